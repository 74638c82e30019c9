"""A bundle on its way: its layout, the list of verified chunks, checking and committing it.

``incoming/<digest>.done`` lists verified chunks, one index of ``Manifest.all_chunks()`` per line, appended
after their bytes were flushed. ``incoming/<digest>.arrived`` lists those that are not flushed yet and counts
only in the boot that its first line names: what a killed process has written is lost with the boot, no
sooner. The caller holds the spool's deploy lock.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Set
from dataclasses import dataclass
from pathlib import Path

from agent.identity import boot_id
from agent.spool import Spool, fsync_folder, storage_error, write_atomic
from sti_runtime.errors import DigestError, FormatError, InputError
from sti_runtime.manifest import MANIFEST_CAP_BYTES, MANIFEST_NAME, Chunk, Manifest
from sti_runtime.records import sha256_hex

RESEND = "Run deploy again: it sends what is missing."
READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Layout:
    """A manifest with what the deploy needs of it. ``same[sha256]``: all chunks with these bytes."""

    digest: str
    manifest: Manifest
    chunks: tuple[tuple[str, Chunk], ...]
    same: dict[str, tuple[int, ...]]
    sizes: dict[str, int]


def read_layout(path: Path) -> Layout:
    """Raises: FormatError if the manifest is unreadable, over-long, malformed or not canonical."""
    manifest = Manifest.read(path, cap_bytes=MANIFEST_CAP_BYTES)
    digest = manifest.digest
    if sha256_hex(path.read_bytes()) != digest:
        raise FormatError(
            f"{path}: the manifest is not canonical JSON, so its digest is not the bundle's.",
            "Build the bundle again.",
        )
    chunks = manifest.all_chunks()
    same: dict[str, list[int]] = {}
    sizes: dict[str, int] = {}
    for index, (file, chunk) in enumerate(chunks):
        same.setdefault(chunk.sha256, []).append(index)
        sizes[file] = max(sizes.get(file, 0), chunk.offset + chunk.length)
    for group in same.values():
        if len({chunks[index][1].length for index in group}) > 1:
            raise FormatError(f"{path}: chunks of one digest have different lengths.", "Build it again.")
    return Layout(digest, manifest, chunks, {sha: tuple(group) for sha, group in same.items()}, sizes)


def incoming_layout(spool: Spool, digest: str) -> Layout:
    """The layout of an announced bundle. Raises: InputError if it was not announced, FormatError."""
    path = spool.incoming_bundle(digest) / MANIFEST_NAME
    if not path.exists():
        raise InputError(f"Bundle {digest[:12]} was not announced to this device.", "Call `missing` first.")
    layout = read_layout(path)
    if layout.digest != digest:
        raise DigestError(f"{path}: this is the manifest of {layout.digest[:12]}.", RESEND)
    return layout


def read_done(spool: Spool, layout: Layout) -> set[int]:
    """Verified chunks; lines that are torn or make no sense count as not done."""
    lines = _whole_lines(spool.done_list(layout.digest))
    arrived = _whole_lines(spool.arrived_list(layout.digest))
    if arrived[:1] == [boot_id().encode()]:
        lines += arrived[1:]
    indices = {int(line) for line in lines if line.isdigit() and len(line) < 10}
    return {index for index in indices if index < len(layout.chunks)}


def _whole_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def open_arrived(spool: Spool, digest: str) -> int:
    """The list of chunks written in this boot, to append whole lines to. Raises: StifarmError."""
    path = spool.arrived_list(digest)
    head = f"{boot_id()}\n".encode()
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        if os.pread(fd, len(head), 0) == head:
            os.write(fd, b"-\n")  # as in the other list
        else:
            os.ftruncate(fd, 0)
            os.write(fd, head)
    except OSError as error:
        raise storage_error(error, path) from error
    return fd


def append_done(spool: Spool, digest: str, indices: Iterable[int]) -> None:
    """Add to the list of verified chunks; their bytes are on storage already. Raises: StifarmError."""
    path = spool.done_list(digest)
    try:
        with path.open("ab") as stream:
            # A torn last line must neither run into the first new one nor count as a whole one.
            stream.write(b"-\n" + b"".join(b"%d\n" % index for index in sorted(indices)))
            stream.flush()
            os.fsync(stream.fileno())
        fsync_folder(path.parent)
    except OSError as error:
        raise storage_error(error, path) from error


def write_done(spool: Spool, digest: str, indices: Iterable[int]) -> None:
    """Replace the lists of verified chunks. Raises: StifarmError."""
    spool.arrived_list(digest).unlink(missing_ok=True)
    write_atomic(spool.done_list(digest), b"".join(b"%d\n" % index for index in sorted(indices)))


def is_stored(fd: int, chunk: Chunk) -> bool:
    """Whether a chunk's bytes, read from storage and not from the page cache, are right; none stay cached."""
    found = hashlib.sha256()
    os.posix_fadvise(fd, chunk.offset, chunk.length, os.POSIX_FADV_DONTNEED)
    for done in range(0, chunk.length, READ_BYTES):
        found.update(os.pread(fd, min(READ_BYTES, chunk.length - done), chunk.offset + done))
    os.posix_fadvise(fd, chunk.offset, chunk.length, os.POSIX_FADV_DONTNEED)
    return found.hexdigest() == chunk.sha256


def damaged_chunks(folder: Path, layout: Layout, stored: Set[int] = frozenset()) -> list[int]:
    """Indices of chunks whose bytes, read from storage, are wrong; those in ``stored`` were read before.

    Leaves nothing in the page cache.
    """
    damaged: list[int] = []
    by_file: dict[str, list[tuple[int, Chunk]]] = {}
    for index, (file, chunk) in enumerate(layout.chunks):
        if index not in stored:
            by_file.setdefault(file, []).append((index, chunk))
    for file, chunks in by_file.items():
        path = folder / file
        if not path.is_file() or path.is_symlink():
            damaged.extend(index for index, _ in chunks)
            continue
        with path.open("rb", buffering=0) as stream:
            os.fsync(stream.fileno())  # only what is on storage already can be dropped from the page cache
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            damaged.extend(index for index, chunk in chunks if not is_stored(stream.fileno(), chunk))
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return sorted(damaged)


def check_files(folder: Path, layout: Layout) -> None:
    """Raises: FormatError unless the folder holds exactly the manifest's files at their exact sizes."""
    found = {path.name: path.lstat().st_size for path in folder.iterdir()}
    found.pop(MANIFEST_NAME, None)
    if found != layout.sizes:
        odd = sorted(found.items() ^ layout.sizes.items())[0][0]
        raise FormatError(
            f"{folder}: {odd} is missing, of a wrong size, or does not belong there.",
            "Run `collect` without keeping this bundle, then deploy it again.",
        )


def commit_incoming(spool: Spool, layout: Layout, stored: Set[int] = frozenset()) -> None:
    """Make an announced bundle visible once every chunk was read from storage, but those in ``stored``, which
    this process has read back already. Raises: DigestError if chunks are missing or wrong (they are asked for
    again by ``missing``); FormatError if the folder holds other files.
    """
    folder = spool.incoming_bundle(layout.digest)
    check_files(folder, layout)
    damaged = damaged_chunks(folder, layout, stored)
    if damaged:
        write_done(spool, layout.digest, read_done(spool, layout) - set(damaged))
        file, chunk = layout.chunks[damaged[0]]
        raise DigestError(
            f"Bundle {layout.digest[:12]}: {len(damaged)} of {len(layout.chunks)} chunks are missing or "
            f"damaged, the first at byte {chunk.offset} of {file}.",
            RESEND,
        )
    folder.rename(spool.bundle(layout.digest))
    fsync_folder(spool.bundles)
    fsync_folder(spool.incoming)
    forget_incoming(spool, layout.digest)


def forget_incoming(spool: Spool, digest: str) -> None:
    """Remove what lies beside a bundle on its way: the pushed manifest, then the lists of verified chunks."""
    spool.pushed_manifest(digest).unlink(missing_ok=True)
    spool.arrived_list(digest).unlink(missing_ok=True)
    spool.done_list(digest).unlink(missing_ok=True)
