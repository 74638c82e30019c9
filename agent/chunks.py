"""Device side of the content-addressed deploy: which chunks a bundle lacks, taking them in, committing.

A bundle grows in ``incoming/<digest>/`` and appears in ``bundles/<digest>/`` by one rename, after every
chunk was verified from storage; it is never half-visible. All entry points hold the spool's deploy
lock. Formats: docs/job-and-journal.md.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

from agent.incoming import (
    RESEND,
    ChunkWriter,
    Layout,
    check_files,
    damaged_chunks,
    incoming_layout,
    read_done,
    read_layout,
    write_done,
)
from agent.locks import hold
from agent.spool import Spool, fsync_folder, storage_error, write_atomic
from sti_runtime.errors import DigestError, FormatError, InputError, ResourceError
from sti_runtime.manifest import MANIFEST_CAP_BYTES, MANIFEST_NAME, Chunk, Manifest
from sti_runtime.records import sha256_hex

LOCK_WAIT_S = 600.0
PACK_HEADER_CAP_BYTES = 1 << 20
PACK_RESERVE_BYTES = 32 << 20
"""Space kept for the pack that is being pushed, while chunks are missing."""


def missing(spool: Spool, manifest: Path) -> dict[str, Any]:
    """Announce a bundle: which chunks must be sent, after all the device has were copied from elsewhere.

    Of chunks with equal bytes only the first is asked for. Space for the whole bundle is checked and
    reserved before its first byte. Raises: FormatError, ResourceError, StifarmError.
    """
    layout = read_layout(manifest)
    total = len(layout.chunks)
    with hold(spool.deploy_lock, wait_s=LOCK_WAIT_S, what="Deploying to this device"):
        report = {"digest": layout.digest, "total": total, "copied": 0, "missing": [], "missing_bytes": 0}
        if spool.bundle(layout.digest).is_dir():
            return {**report, "complete": True}
        done = read_done(spool, layout)
        lacking = {sha for sha, group in layout.same.items() if not done.issuperset(group)}
        local = _local_sources(spool, lacking)
        to_send = sum(layout.chunks[layout.same[sha][0]][1].length for sha in lacking - local.keys())
        _reserve(spool, layout, manifest, pack_bytes=min(to_send, PACK_RESERVE_BYTES))
        copied = _copy_local(spool, layout, local)
        wanted = sorted(layout.same[sha][0] for sha in lacking - copied)
    return {
        **report,
        "complete": False,
        "copied": sum(len(layout.same[sha]) for sha in copied),
        "missing": wanted,
        "missing_bytes": sum(layout.chunks[index][1].length for index in wanted),
    }


def _local_sources(spool: Spool, wanted: set[str]) -> dict[str, tuple[Path, Chunk]]:
    """Where finished bundles of this device hold wanted chunks. A bundle with a bad manifest has none."""
    found: dict[str, tuple[Path, Chunk]] = {}
    for folder in sorted(spool.bundles.iterdir()):
        try:
            chunks = Manifest.read(folder / MANIFEST_NAME, cap_bytes=MANIFEST_CAP_BYTES).all_chunks()
        except FormatError:
            continue
        for file, chunk in chunks:
            if chunk.sha256 in wanted:
                found.setdefault(chunk.sha256, (folder / file, chunk))
    return found


def _reserve(spool: Spool, layout: Layout, manifest: Path, *, pack_bytes: int) -> None:
    """Check the space for the whole bundle, then allocate its files (contiguous, so cold reads are fair)."""
    folder = spool.incoming_bundle(layout.digest)
    allocated = {file: _allocated_bytes(folder / file) for file in layout.sizes}
    needed = sum(max(0, size - allocated[file]) for file, size in layout.sizes.items())
    needed += pack_bytes + manifest.stat().st_size
    stat = os.statvfs(spool.root)
    free = stat.f_bavail * stat.f_frsize
    if needed > free:
        raise ResourceError(
            f"{spool.root}: bundle {layout.digest[:12]} needs {needed} more bytes, {free} are free.",
            "Free space on the device, or remove what it no longer needs (devices clean).",
        )
    try:
        folder.mkdir(exist_ok=True)
        for file, size in layout.sizes.items():
            fd = os.open(folder / file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            try:
                os.posix_fallocate(fd, 0, size)
                os.ftruncate(fd, size)
            finally:
                os.close(fd)
        for leftover in folder.glob(f".{MANIFEST_NAME}.*"):
            leftover.unlink()  # a killed agent's temporary file, which does not belong into a bundle
    except OSError as error:
        raise storage_error(error, folder) from error
    if not (folder / MANIFEST_NAME).exists():
        write_atomic(folder / MANIFEST_NAME, manifest.read_bytes())


def _allocated_bytes(path: Path) -> int:
    return path.stat().st_blocks * 512 if path.exists() else 0


def _copy_local(spool: Spool, layout: Layout, local: dict[str, tuple[Path, Chunk]]) -> set[str]:
    """Copy chunks from finished bundles; returns the digests that were there undamaged."""
    writer = ChunkWriter(spool, layout)
    copied = set()
    try:
        for sha, (path, chunk) in sorted(local.items(), key=lambda item: (item[1][0], item[1][1].offset)):
            with path.open("rb") as stream:
                stream.seek(chunk.offset)
                data = stream.read(chunk.length)
            if sha256_hex(data) == sha and len(data) == layout.chunks[layout.same[sha][0]][1].length:
                writer.put(sha, data)
                copied.add(sha)
    finally:
        writer.close()
    return copied


def accept(spool: Spool, digest: str, pack: Path) -> dict[str, Any]:
    """Take in one pack: verify each chunk, write it to its place, list it; the pack is removed.

    A chunk whose bytes are wrong or cut off is in ``rejected``, the others are kept.
    Raises: InputError if the pack lies outside ``incoming/``; FormatError if it is malformed.
    """
    if pack.is_symlink() or pack.resolve().parent != spool.incoming.resolve() or not pack.is_file():
        raise InputError(f"{pack}: not a file in {spool.incoming}.", "Push packs into that folder.")
    with hold(spool.deploy_lock, wait_s=LOCK_WAIT_S, what="Deploying to this device"):
        try:
            layout = incoming_layout(spool, digest)
            with pack.open("rb") as stream:
                indices = _read_header(stream, pack, layout)
                rejected = _take_in(spool, layout, stream, indices)
        finally:
            pack.unlink()
        done = read_done(spool, layout)
    remaining = len(layout.chunks) - len(done)
    return {
        "digest": digest,
        "accepted": len(indices) - len(rejected),
        "rejected": rejected,
        "remaining": remaining,
    }


def _read_header(stream: BinaryIO, pack: Path, layout: Layout) -> list[int]:
    header = stream.readline(PACK_HEADER_CAP_BYTES + 1)
    cause = ""
    try:
        indices = json.loads(header)
    except (ValueError, RecursionError):
        indices = None
    if len(header) > PACK_HEADER_CAP_BYTES or not header.endswith(b"\n"):
        cause = f"its first line has no end within {PACK_HEADER_CAP_BYTES} bytes"
    elif not isinstance(indices, list) or not all(type(index) is int for index in indices):
        cause = "its first line is not a JSON list of integers"
    elif len(set(indices)) != len(indices) or not all(0 <= i < len(layout.chunks) for i in indices):
        cause = f"its chunk numbers are not distinct numbers below {len(layout.chunks)}"
    else:
        length = len(header) + sum(layout.chunks[index][1].length for index in indices)
        if pack.stat().st_size > length:
            cause = f"it has {pack.stat().st_size} bytes, its first line accounts for {length}"
    if cause:
        raise FormatError(f"{pack.name}: not a pack: {cause}.", RESEND)
    assert isinstance(indices, list)
    return indices


def _take_in(spool: Spool, layout: Layout, stream: BinaryIO, indices: list[int]) -> list[int]:
    """Returns the chunks that were rejected."""
    writer = ChunkWriter(spool, layout)
    rejected = []
    try:
        for index in indices:
            chunk = layout.chunks[index][1]
            data = stream.read(chunk.length)
            if sha256_hex(data) == chunk.sha256 and len(data) == chunk.length:
                writer.put(chunk.sha256, data)
            else:
                rejected.append(index)
    finally:
        writer.close()
    return rejected


def commit(spool: Spool, digest: str) -> dict[str, Any]:
    """Verify every chunk from storage and make the bundle visible. Doing it again changes nothing.

    Raises: DigestError if chunks are missing or wrong (they are asked for again by ``missing``).
    """
    with hold(spool.deploy_lock, wait_s=LOCK_WAIT_S, what="Deploying to this device"):
        target = spool.bundle(digest)
        if target.is_dir():
            spool.done_list(digest).unlink(missing_ok=True)
            return {"digest": digest, "state": "already", "bytes": 0}
        layout = incoming_layout(spool, digest)
        folder = spool.incoming_bundle(digest)
        check_files(folder, layout)
        damaged = damaged_chunks(folder, layout.chunks)
        if damaged:
            good = read_done(spool, layout) - set(damaged)
            write_done(spool, digest, good)
            file, chunk = layout.chunks[damaged[0]]
            raise DigestError(
                f"Bundle {digest[:12]}: {len(damaged)} of {len(layout.chunks)} chunks are missing or "
                f"damaged, the first at byte {chunk.offset} of {file}.",
                RESEND,
            )
        folder.rename(target)
        fsync_folder(spool.bundles)
        fsync_folder(spool.incoming)
        spool.done_list(digest).unlink(missing_ok=True)
    return {"digest": digest, "state": "committed", "bytes": sum(layout.sizes.values())}


def verify(spool: Spool, digest: str) -> dict[str, Any]:
    """Verify a finished bundle from storage. A damaged one goes back to ``incoming/`` to be mended.

    Raises: InputError if it is not here; BusyError while a job runs that may be reading it.
    """
    with (
        hold(spool.run_lock, wait_s=0, what="The device"),
        hold(spool.deploy_lock, wait_s=LOCK_WAIT_S, what="Deploying to this device"),
    ):
        folder = spool.bundle(digest)
        if not folder.is_dir():
            raise InputError(f"Bundle {digest[:12]} is not on this device.", "Deploy it.")
        layout = read_layout(folder / MANIFEST_NAME)
        if layout.digest != digest:
            raise DigestError(f"{folder}: holds the manifest of {layout.digest[:12]}.", "Deploy it again.")
        damaged = damaged_chunks(folder, layout.chunks)
        if damaged:
            good = sorted(set(range(len(layout.chunks))) - set(damaged))
            write_done(spool, digest, good)
            folder.rename(spool.incoming_bundle(digest))
            fsync_folder(spool.bundles)
            fsync_folder(spool.incoming)
    return {"digest": digest, "state": "damaged" if damaged else "intact", "damaged": damaged}
