"""The verb ``accept-job``: a job file comes on standard input and is there flushed and whole, or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent.errors import RefusedError
from agent.incoming import RESEND
from agent.input_stream import InputStream
from agent.spool import Spool, checked_digest, fsync_folder, storage_error, write_atomic
from sti_runtime.errors import DigestError, FormatError
from sti_runtime.messages import JOB_CAP_BYTES, JOB_FILE, Job
from sti_runtime.records import sha256_hex


def accept_job(
    spool: Spool,
    job_id: str,
    attempt: str,
    digest: str,
    fd: int,
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Take the job file with this digest in from ``fd``. What lies there already stays if it is a job; a torn
    file, as a power cut can leave, is replaced.

    Raises: InputError; DigestError if other bytes come (nothing is changed then); StorageFullError.
    """
    folder = spool.job(job_id, attempt)
    path = folder / JOB_FILE
    held = _read(path)
    if held is not None and sha256_hex(held) == checked_digest(digest):
        return {"digest": digest, "state": "already"}
    if held is not None and _is_job(held, path):
        return {"digest": digest, "state": "other"}
    data = _rest(InputStream(fd, stopped))
    if sha256_hex(data) != checked_digest(digest):
        raise DigestError(
            f"{path}: what came is not the job file, nor all of it ({len(data)} bytes).", RESEND
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fsync_folder(spool.jobs)
        fsync_folder(folder.parent)
    except OSError as error:
        raise storage_error(error, path) from error
    write_atomic(path, data)
    return {"digest": digest, "state": "accepted"}


def _read(path: Path) -> bytes | None:
    try:
        with path.open("rb") as stream:
            return stream.read(JOB_CAP_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}.") from error


def _is_job(data: bytes, path: Path) -> bool:
    try:
        Job.from_json(data, source=str(path), cap_bytes=JOB_CAP_BYTES, newer=RefusedError)
    except RefusedError:
        return True  # a newer agent's
    except FormatError:
        return False
    return True


def _rest(source: InputStream) -> bytes:
    data = bytearray()
    while len(data) <= JOB_CAP_BYTES and (piece := source.piece(JOB_CAP_BYTES + 1 - len(data))):
        data += piece
    return bytes(data)
