"""The verb ``accept-task``: task data comes on standard input, from where it broke off, and is verified.

Format: docs/job-and-journal.md, 6.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agent.chunks import LOCK_WAIT_S
from agent.incoming import RESEND
from agent.input_stream import InputStream
from agent.locks import hold
from agent.spool import Spool, fsync_folder, storage_error
from sti_runtime.errors import DigestError, FormatError, InputError

HEADER_CAP_BYTES = 100
_MOST = (1 << 63) - 1


@dataclass(frozen=True)
class Piece:
    """``length`` bytes from ``offset`` on, of a file of ``total``."""

    offset: int
    length: int
    total: int

    @classmethod
    def from_line(cls, line: bytes | None) -> Piece:
        """Raises: FormatError."""
        try:
            numbers = None if line is None else json.loads(line)
        except (ValueError, RecursionError):
            numbers = None
        good = isinstance(numbers, list) and len(numbers) == 3 and all(type(n) is int for n in numbers)
        if numbers is None or not good or min(numbers) < 0 or max(numbers) > _MOST:
            raise FormatError(
                "The input is not a piece of task data: its first line is not a JSON list of three sizes.",
                RESEND,
            )
        piece = cls(*numbers)
        if piece.length > piece.total - piece.offset:
            raise FormatError("The input is not a piece of task data: it ends behind the whole.", RESEND)
        return piece


def accept_task(
    spool: Spool, digest: str, fd: int, *, stopped: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Append a piece from ``fd`` to what is here of this task data; with the last, verify and show all of it.

    Raises: FormatError if the input is malformed or ends early (what came is kept); InputError if the piece
    begins behind what is here; DigestError if the whole is damaged (it is removed then); StorageFullError.
    """
    with hold(spool.deploy_lock, wait_s=LOCK_WAIT_S, what="Deploying to this device"):
        target, partial = spool.task(digest), spool.task_partial(digest)
        if target.is_file():
            partial.unlink(missing_ok=True)
            return {"digest": digest, "state": "already", "bytes": target.stat().st_size}
        source = InputStream(fd, stopped)
        piece = Piece.from_line(source.line(HEADER_CAP_BYTES))
        _append(source, partial, piece)
        held = piece.offset + piece.length
        if held < piece.total:
            return {"digest": digest, "state": "incoming", "bytes": held}
        _show(partial, target, digest)
    return {"digest": digest, "state": "accepted", "bytes": held}


def _append(source: InputStream, partial: Path, piece: Piece) -> None:
    try:
        fd = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise storage_error(error, partial) from error
    with os.fdopen(fd, "r+b", buffering=0) as stream:
        held = os.fstat(fd).st_size
        if piece.offset > held:
            raise InputError(f"{partial}: holds {held} bytes, the piece begins at {piece.offset}.", RESEND)
        done = 0
        try:
            stream.truncate(piece.offset)
            stream.seek(piece.offset)
            while done < piece.length and (block := source.piece(piece.length - done)):
                done += stream.write(block) or 0
        except OSError as error:
            raise storage_error(error, partial) from error
    if done < piece.length:
        raise FormatError(f"The input ended after {done} of {piece.length} bytes, which are kept.", RESEND)


def _show(partial: Path, target: Path, digest: str) -> None:
    with partial.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != digest:
            partial.unlink()
            raise DigestError(f"{partial}: what came has digest {found[:12]}, not {digest[:12]}.", RESEND)
        try:
            os.fsync(stream.fileno())
        except OSError as error:
            raise storage_error(error, partial) from error
    partial.rename(target)
    fsync_folder(target.parent)
