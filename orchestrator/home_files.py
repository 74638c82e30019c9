"""Small files that the farm keeps for itself below its home: read, locked, written whole or not at all.

What the system refuses is told in words: which file, why, and what to do.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TypeVar

import structlog

from sti_runtime.errors import FormatError, ResourceError, StifarmError
from sti_runtime.records import Record
from sti_runtime.staging import flush

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM})
_FILES = frozenset({errno.EMFILE, errno.ENFILE})
_STORAGE = _FULL | _FORBIDDEN | _FILES | {errno.EROFS, errno.EIO}

_ELSEWHERE = "or set STIFARM_HOME to a folder elsewhere, if it lies below that."

_log = structlog.get_logger(__name__)
_R = TypeVar("_R", bound=Record)


def refused(error: OSError, what: str) -> ResourceError:
    """Our error for what the system did not let us do; ``what`` names the file and has no full stop."""
    if error.errno in _FULL:
        remedy = "Free some space there; then run the same command again."
    elif error.errno == errno.EROFS:
        remedy = f"Its file system is mounted read-only: mount it writable, {_ELSEWHERE}"
    elif error.errno in _FORBIDDEN:
        remedy = f"Give this user the right to it, {_ELSEWHERE}"
    elif error.errno in _FILES:
        remedy = "Raise the limit of open files (ulimit -n); then run the same command again."
    else:
        remedy = "Look at it, and at its disk (dmesg); then run the same command again."
    return ResourceError(f"{what}: {error.strerror or error}.", remedy)


def of_storage(error: OSError) -> ResourceError | None:
    """Our error for one that nobody has told better, if it is about files at all; None for another: what is
    forbidden and names no file is a socket, a signal."""
    named = [str(name) for name in (error.filename, error.filename2) if name is not None]
    if error.errno not in _STORAGE or (error.errno in _FORBIDDEN and not named):
        return None
    return refused(error, f"{' and '.join(named) or 'A file'} cannot be used")


def make_folder(path: Path) -> None:
    """Create a folder of the home. Raises: ResourceError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"{path} cannot be created: {error.strerror}.",
            "Set STIFARM_HOME to a folder that this user may write to.",
        ) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, in place of one of before, which stays when that fails. Raises: ResourceError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            stream.write(content)
            flush(stream)
        partial.replace(path)
    except OSError as error:
        remove(partial)
        raise refused(error, f"{path} cannot be written") from error


def remove(path: Path) -> None:
    """Remove a file, if it is there. One that cannot be removed is told of; who reads it next judges it."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        if not os.path.lexists(path):
            return  # a read-only file system refuses that, too
        _log.warning("a file stays", path=str(path), cause=error.strerror)


def lock_file(path: Path) -> int:
    """A descriptor of a file that processes lock, made if need be. Raises: ResourceError."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise refused(error, f"{path}, which is to be locked, cannot be opened") from error


def read_if_there(path: Path, kind: type[_R], failed: type[StifarmError], remedy: str) -> _R | None:
    """A record that this home may hold; None when there is none. Raises: ``failed``, with that remedy, for
    one that cannot be read, is damaged or of another version."""
    try:
        return kind.read(path)
    except FormatError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        if isinstance(error.__cause__, PermissionError):
            remedy = f"Use stifarm as the user who made it. {remedy}"
        raise failed(error.what, remedy) from error
