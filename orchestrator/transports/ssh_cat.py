"""Files of an ssh board that has no sftp server (dropbear, busybox): streams through ``cat`` and its like."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from orchestrator.errors import StableError, TransientError
from orchestrator.transports.base import Progress
from orchestrator.transports.room import check_room
from orchestrator.transports.ssh_files import (
    BLOCK_BYTES,
    Command,
    Keep,
    failure,
    keep_pulled,
    missing,
    open_source,
    partial_of,
    resumable,
)

TRANSFER_TIMEOUT_S = 6 * 3600.0
"""For a whole file: whether the link lives is watched apart from it."""

_TIMEOUT_S = 120.0
_NOT_THERE = 44
_READ = '[ -e "$1" ] || exit 44; tail -c "+$2" -- "$1" | head -c "$3"'
_READ_BEGINNING = '[ -e "$1" ] || exit 44; exec head -c "$2" -- "$1"'
_SIZE = 'if [ -f "$1" ]; then wc -c <"$1"; else echo 0; fi'
_WRITE = '[ -z "$1" ] || mkdir -p -- "$1" || exit 1; [ "$3" != 0 ] || : >"$2" || exit 1; exec cat >>"$2"'
_KEEP = '[ ! -d "$2" ] || { echo "Is a directory" >&2; exit 1; }; mv -f -- "$1" "$2"'
_C = {"LC_ALL": "C"}


class CatFiles:
    """The file operations of a transport, each by commands; ``stream``: as ``run``, with a ``sink``."""

    def __init__(self, run: Command, stream: Command, device: str) -> None:
        self._run, self._stream, self._device = run, stream, device

    def read_from(self, path: str, offset: int, limit: int) -> bytes:
        """See ``Transport.read_from``."""
        script = [_READ, "sh", path, str(offset + 1), str(limit)]
        if offset == 0:
            script = [_READ_BEGINNING, "sh", path, str(limit)]
        done = self._run(
            ["sh", "-c", *script], timeout_s=_TIMEOUT_S, env=_C, output_cap_bytes=max(limit, 4096)
        )
        if done.exit_code == _NOT_THERE:
            raise missing(path, self._device)
        if not done.ok or (done.stderr and not done.stdout):
            raise failure(done.error_text(), f"{path} cannot be read", self._device)
        return done.stdout[:limit]

    def pull(self, source: str, destination: Path, progress: Progress | None) -> None:
        """See ``Transport.pull``."""
        size = self._size(source)
        wanted = size or BLOCK_BYTES  # a file of the kernel states none
        check_room(source, size, destination, self._device)

        def fetch(keep: Keep) -> None:
            done = 0

            def take(data: bytes) -> None:
                nonlocal done
                done += len(data)
                if done > wanted:
                    raise StableError(
                        f"{source} has more than the {wanted} bytes that were asked for.",
                        "Do not trust the board: its head(1) does not end.",
                        device=self._device,
                    )
                keep(data)
                if progress is not None:
                    progress(done, max(size, done))

            script = [_READ_BEGINNING, "sh", source, str(wanted)]
            said = self._stream(["sh", "-c", *script], timeout_s=TRANSFER_TIMEOUT_S, env=_C, sink=take)
            if said.exit_code == _NOT_THERE:
                raise missing(source, self._device)
            if not said.ok:
                raise failure(said.error_text(), f"{source} cannot be read", self._device)

        keep_pulled(destination, fetch, self._device)

    def push(self, source: Path, destination: str, progress: Progress | None) -> None:
        """See ``Transport.push``."""
        partial = partial_of(destination)
        with open_source(source, self._device) as stream:
            total = os.fstat(stream.fileno()).st_size
            there = self._size(partial)
            held = resumable(self._run, partial, there, stream) if 0 < there <= total else 0
            try:
                arguments = [posixpath.dirname(destination), partial, str(held)]
                self._check(_WRITE, arguments, destination, stdin=_blocks(stream, held, total, progress))
                arrived = self._size(partial)
                if arrived != total:
                    raise StableError(
                        f"{destination} has {arrived} bytes there instead of {total}.",
                        "Was it changed while it was sent? Run the command again.",
                        device=self._device,
                    )
                self._check(_KEEP, [partial, destination], destination)
            except TransientError:
                raise  # the next push goes on from here
            except BaseException:
                self._run(["rm", "-f", "--", partial], timeout_s=_TIMEOUT_S)
                raise

    def close(self) -> None:
        """Nothing is kept open."""

    def _check(
        self, script: str, arguments: list[str], destination: str, stdin: Iterator[bytes] | None = None
    ) -> None:
        done = self._run(
            ["sh", "-c", script, "sh", *arguments], timeout_s=TRANSFER_TIMEOUT_S, env=_C, stdin=stdin
        )
        if not done.ok:
            raise failure(done.error_text(), f"{destination} cannot be written", self._device)

    def _size(self, path: str) -> int:
        text = self._run(["sh", "-c", _SIZE, "sh", path], timeout_s=_TIMEOUT_S).stdout.strip()
        return int(text) if text.isdigit() and len(text) < 19 else 0


def _blocks(stream: BinaryIO, held: int, total: int, progress: Progress | None) -> Iterator[bytes]:
    done = held
    while block := stream.read(BLOCK_BYTES):
        yield block
        done += len(block)
        if progress is not None:
            progress(done, total)
