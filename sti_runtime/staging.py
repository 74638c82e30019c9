"""Folders that appear complete or not at all: written hidden, flushed to storage, then renamed."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

log = logging.getLogger(__name__)

_STAGING_PREFIX = ".build-"


@contextlib.contextmanager
def locked(folder: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the folder's advisory lock; yields False if another process has it and ``wait`` is off."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def staging_folder(out_root: Path) -> Iterator[Path]:
    """A hidden folder, locked while in use; what killed builds left behind is removed first.

    The kernel drops a lock with its process, so an unlocked folder is nobody's. The lock on
    ``out_root`` keeps another build from sweeping ours between its creation and its locking.
    """
    with contextlib.ExitStack() as stack:
        with locked(out_root):
            for leftover in out_root.glob(f"{_STAGING_PREFIX}*"):
                # Its owner may be removing it at this moment; then there is nothing left to do.
                with contextlib.suppress(FileNotFoundError), locked(leftover, wait=False) as abandoned:
                    if abandoned:
                        log.info("removing what a killed build left behind: %s", leftover)
                        _remove(leftover)
            folder = Path(tempfile.mkdtemp(prefix=_STAGING_PREFIX, dir=out_root))
            stack.callback(_remove, folder)
            stack.enter_context(locked(folder))
        folder.chmod(0o755)
        yield folder


def _remove(folder: Path) -> None:
    """Remove a staging folder if it is still there; two builds may do so at once."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        log.warning("could not remove %s; delete it by hand", folder)


def flush(stream: BinaryIO) -> None:
    """Flush an open file to storage."""
    stream.flush()
    os.fsync(stream.fileno())


def flush_folder(folder: Path) -> None:
    """Flush a folder's entries to storage: what was created or renamed in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
