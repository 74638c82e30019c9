"""Device side of the content-addressed deploy: which chunks a bundle lacks, committing and verifying it.

A bundle grows in ``incoming/<digest>/`` and appears in ``bundles/<digest>/`` by one rename, after every
chunk was verified from storage; it is never half-visible. All entry points hold the spool's deploy
lock. Formats: docs/job-and-journal.md.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from agent.chunk_writer import ChunkWriter
from agent.incoming import (
    Layout,
    commit_incoming,
    damaged_chunks,
    forget_incoming,
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


def missing(spool: Spool, manifest: Path) -> dict[str, Any]:
    """Announce a bundle: which chunks must be sent, after all the device has were copied from elsewhere.

    Of chunks with equal bytes only the first is asked for. Space for the whole bundle is checked and
    reserved before its first byte. Raises: FormatError, ResourceError, StifarmError.
    """
    layout = read_layout(manifest)
    total = len(layout.chunks)
    with hold(spool.deploy_lock, wait_s=LOCK_WAIT_S, what="Deploying to this device"):
        report = {"digest": layout.digest, "total": total, "copied": 0, "missing": [], "missing_bytes": 0}
        spool.pack.unlink(missing_ok=True)
        if spool.bundle(layout.digest).is_dir():
            return {**report, "complete": True}
        done = read_done(spool, layout)
        lacking = {sha for sha, group in layout.same.items() if not done.issuperset(group)}
        local = _local_sources(spool, lacking)
        _reserve(spool, layout, manifest)
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


def _reserve(spool: Spool, layout: Layout, manifest: Path) -> None:
    """Check the space for the whole bundle, then allocate its files (contiguous, so cold reads are fair)."""
    folder = spool.incoming_bundle(layout.digest)
    allocated = {file: _allocated_bytes(folder / file) for file in layout.sizes}
    needed = sum(max(0, size - allocated[file]) for file, size in layout.sizes.items())
    needed += manifest.stat().st_size
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
    copied = set()
    with ChunkWriter(spool, layout) as writer:
        for sha, (path, chunk) in sorted(local.items(), key=lambda item: (item[1][0], item[1][1].offset)):
            with path.open("rb") as stream:
                stream.seek(chunk.offset)
                data = stream.read(chunk.length)
            places = layout.same[sha]
            if sha256_hex(data) == sha and len(data) == layout.chunks[places[0]][1].length:
                for place in places:
                    writer.write(place, data)
                writer.add(places)
                copied.add(sha)
    return copied


def commit(spool: Spool, digest: str) -> dict[str, Any]:
    """Verify every chunk from storage and make the bundle visible. Doing it again changes nothing.

    Raises: DigestError if chunks are missing or wrong (they are asked for again by ``missing``).
    """
    with hold(spool.deploy_lock, wait_s=LOCK_WAIT_S, what="Deploying to this device"):
        target = spool.bundle(digest)
        if target.is_dir():
            forget_incoming(spool, digest)
            return {"digest": digest, "state": "already", "bytes": 0}
        layout = incoming_layout(spool, digest)
        commit_incoming(spool, layout)
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
        damaged = damaged_chunks(folder, layout)
        if damaged:
            good = sorted(set(range(len(layout.chunks))) - set(damaged))
            write_done(spool, digest, good)
            folder.rename(spool.incoming_bundle(digest))
            fsync_folder(spool.bundles)
            fsync_folder(spool.incoming)
    return {"digest": digest, "state": "damaged" if damaged else "intact", "damaged": damaged}
