"""Where Ray keeps its sockets, logs and objects: a folder per process that runs a node, swept if it died."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from orchestrator.errors import PoolError

OBJECT_STORE_BYTES = 200_000_000
"""Enough for what passes through Ray here (records, never tensors of a whole model at once)."""

_OBJECT_STORE_MIN_BYTES = 80 << 20
_SOCKET_PATH_LIMIT = 107
_SESSION_PATH_BYTES = 70
"""Longest path Ray adds to its folder: ``/session_<date>_<pid>/sockets/<name>``."""

_FOLDER_PREFIX = "stifarm-ray-"


def session_folder() -> Path:
    """A new folder for Ray, with a name short enough for its sockets; removes those of dead processes.
    Raises: PoolError."""
    try:
        return _session_folder(Path(tempfile.gettempdir()))
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise PoolError(
            f"Ray's temporary folder cannot be made: {error.strerror or error}{where}.",
            "Free space there (df), or set TMPDIR to a folder that this user may write to.",
        ) from error


def _session_folder(base: Path) -> Path:
    if len(str(base)) + len(_FOLDER_PREFIX) + 20 + _SESSION_PATH_BYTES > _SOCKET_PATH_LIMIT:
        base = Path("/tmp")
    for left in base.glob(f"{_FOLDER_PREFIX}*-*"):
        owner = left.name.removeprefix(_FOLDER_PREFIX).split("-")[0]
        with contextlib.suppress(FileNotFoundError):  # another start sweeps at this moment
            if owner.isdigit() and not Path(f"/proc/{owner}").exists() and left.stat().st_uid == os.getuid():
                shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_FOLDER_PREFIX}{os.getpid()}-", dir=base))


def objects_folder() -> Path | None:
    """Where the object store goes when /dev/shm is too small for it (containers); None: there."""
    shm = Path("/dev/shm")
    if shm.is_dir() and shutil.disk_usage(shm).free > OBJECT_STORE_BYTES + _OBJECT_STORE_MIN_BYTES:
        return None
    return Path(tempfile.gettempdir())
