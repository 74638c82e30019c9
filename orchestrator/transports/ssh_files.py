"""What files over ssh have in common, whether by sftp or by commands: names, causes of failures, resuming.

A push writes to a hidden file beside its destination and renames it. When the link is lost that file stays,
and the next push of the same content goes on behind it, after a digest of it was compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import posixpath
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from orchestrator.errors import DeviceError, DeviceFullError, MissingFileError, StableError, TransientError
from orchestrator.transports.base import Completed

BLOCK_BYTES = 1 << 20
DIGEST_TIMEOUT_S = 300.0

Command = Callable[..., Completed]
"""Runs an argv on the board: ``Transport.run``."""

Keep = Callable[[bytes], None]
"""Takes the next block of a file that is pulled."""

# Texts of the C libraries, without their case: (part of it, error, what to do).
_CAUSES: tuple[tuple[str, type[DeviceError], str], ...] = (
    ("no space left", DeviceFullError, "Free space there and run the command again."),
    ("quota exceeded", DeviceFullError, "Free space there, or raise the user's quota."),
    ("read-only file system", StableError, "Mount it writable, or give another workdir in the inventory."),
    ("permission denied", StableError, "Log in as a user who may, or give another workdir in the inventory."),
    ("not permitted", StableError, "Log in as a user who may, or give another workdir in the inventory."),
    ("input/output error", TransientError, "Try again; if it happens again, the storage there is failing."),
)

# Tries what a push does, where a full, read-only or forbidden file system says so in words.
_WHY = """[ ! -d "$2" ] || { echo "Is a directory" >&2; exit 1; }
mkdir -p -- "$3" && true >>"$1" && dd if=/dev/zero bs=65536 count=16 >>"$1"; code=$?
rm -f -- "$1"; [ $code = 0 ] || exit $code
needed=$4; set -- $(df -Pk -- "$3" | tail -n 1)
case $4 in '' | *[!0-9]*) exit 0 ;; esac
[ "$4" -ge "$needed" ] || { echo "No space left on device" >&2; exit 1; }"""
_DIGEST = 'sha256sum <"$1" || md5sum <"$1"'


def partial_of(destination: str) -> str:
    """Where a push writes before its content is whole: one fixed name per destination."""
    folder, name = posixpath.split(destination)
    return posixpath.join(folder, f".{name}.partial")


def failure(text: str, what: str, device: str) -> DeviceError:
    """The error for what the board said of a file operation."""
    lines = [line.rpartition(": ")[2].rstrip(".")[:200] for line in text.strip().splitlines()]
    for part, kind, remedy in _CAUSES:
        for line in lines:
            if part in line.lower():
                return kind(f"{what}: {line}.", remedy, device=device)
    last = lines[-1] if lines else "no reason given"
    return StableError(
        f"{what}: {last}.", "Check the path, its permissions and the installation.", device=device
    )


def why_not_written(run: Command, destination: str, size: int, device: str) -> DeviceError | None:
    """Ask the board's shell why a file cannot be written; None when it can. Raises: DeviceError."""
    folder = posixpath.dirname(destination) or "."
    arguments = [partial_of(destination) + ".why", destination, folder, str(size >> 10)]
    tried = run(["sh", "-c", _WHY, "sh", *arguments], timeout_s=60, env={"LC_ALL": "C"})
    return None if tried.ok else failure(tried.error_text(), f"{destination} cannot be written", device)


def resumable(run: Command, partial: str, size: int, source: BinaryIO) -> int:
    """Bytes of ``source`` that a partial file of ``size`` bytes already holds: all of it or none.

    The source is left behind them. Raises: DeviceError.
    """
    said = run(["sh", "-c", _DIGEST, "sh", partial], timeout_s=DIGEST_TIMEOUT_S).stdout.split()
    given = said[0].decode(errors="replace") if said else ""
    kinds = {64: "sha256", 32: "md5"}
    if len(given) not in kinds:
        return 0  # a board without either
    digest = hashlib.new(kinds[len(given)], usedforsecurity=False)
    left = size
    source.seek(0)
    while left and (block := source.read(min(left, BLOCK_BYTES))):
        digest.update(block)
        left -= len(block)
    if left or digest.hexdigest() != given:
        source.seek(0)
        return 0
    return size


def missing(path: str, device: str) -> MissingFileError:
    """For a file that is not on the board."""
    return MissingFileError(f"{path} does not exist.", device=device)


def open_source(source: Path, device: str) -> BinaryIO:
    """A file of the host. Raises: StableError."""
    try:
        return source.open("rb")
    except FileNotFoundError as error:
        raise StableError(f"{source} on the host does not exist.", "Make it again.", device=device) from error
    except OSError as error:
        raise StableError(
            f"{source} on the host cannot be read: {error.strerror}.",
            "Correct its permissions.",
            device=device,
        ) from error


def keep_pulled(destination: Path, fetch: Callable[[Keep], None], device: str) -> None:
    """Write the blocks that ``fetch`` hands on to a file of the host, as a whole or not at all.

    Raises: what ``fetch`` raises, and StableError for the host's own refusals.
    """
    partial = destination.with_name(f".{destination.name}.partial")
    with _on_host(destination, device):
        destination.parent.mkdir(parents=True, exist_ok=True)
        output = partial.open("wb")

    def keep(block: bytes) -> None:
        with _on_host(destination, device):
            output.write(block)

    try:
        fetch(keep)
        with _on_host(destination, device):
            output.close()
            partial.replace(destination)
    finally:
        output.close()
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _on_host(destination: Path, device: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StableError(
            f"{destination} on the host cannot be written: {error.strerror}.",
            "Free space there, or correct its permissions.",
            device=device,
        ) from error
