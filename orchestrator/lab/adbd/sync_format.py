"""Messages of the file service, both versions. Little endian throughout.

Source: packages/modules/adb, SYNC.TXT and file_sync_protocol.h.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Mapping

DATA_CAP_BYTES = 64 << 10
PATH_CAP_BYTES = 1024
HEAD = struct.Struct("<4sI")
STAT_1 = struct.Struct("<4s3I")
STAT_2 = struct.Struct("<4sI2Q4IQ3q")
ENTRY_1 = struct.Struct("<4s4I")
ENTRY_2 = struct.Struct("<4sI2Q4IQ3qI")
SEND_2 = struct.Struct("<4s2I")
RECEIVE_2 = struct.Struct("<4sI")

FLAGS: Mapping[int, str] = {1: "brotli", 2: "lz4", 4: "zstd"}
"""Flags of the second transfer messages, at most one of them."""
DRY_RUN = 0x80000000
"""Flag of sending: take the data, write nothing."""

_WORD = 0xFFFFFFFF
# The protocol has its own numbers, those of Linux.
_ERRNO_UNKNOWN = errno.EIO


def message(name: bytes, number: int, data: bytes = b"") -> bytes:
    """A message of a name, a number (mostly the length of what follows), and data."""
    return HEAD.pack(name, number) + data


def failure(text: str) -> bytes:
    """A FAIL message."""
    data = text.encode(errors="replace")[:DATA_CAP_BYTES]
    return message(b"FAIL", len(data), data)


def stat_1(status: os.stat_result | None) -> bytes:
    """The first answer to STAT: all zero for a missing file; sizes are cut to 32 bits."""
    if status is None:
        return STAT_1.pack(b"STAT", 0, 0, 0)
    return STAT_1.pack(b"STAT", status.st_mode, status.st_size & _WORD, int(status.st_mtime) & _WORD)


def _second(status: os.stat_result | None, error: int) -> tuple[int, ...]:
    if status is None:
        return (error or _ERRNO_UNKNOWN, *([0] * 10))
    return (
        0,
        status.st_dev,
        status.st_ino,
        status.st_mode,
        status.st_nlink & _WORD,
        status.st_uid,
        status.st_gid,
        status.st_size,
        int(status.st_atime),
        int(status.st_mtime),
        int(status.st_ctime),
    )


def stat_2(name: bytes, status: os.stat_result | None, error: int) -> bytes:
    """The answer to STA2 or LST2; ``error``: the errno where there is no status."""
    return STAT_2.pack(name, *_second(status, error))


def entry(name: bytes, status: os.stat_result | None, error: int, *, second: bool) -> bytes:
    """A line of a folder's listing; empty where the first version has no way to say that it failed."""
    if second:
        return ENTRY_2.pack(b"DNT2", *_second(status, error), len(name)) + name
    if status is None:
        return b""
    words = (status.st_mode, status.st_size & _WORD, int(status.st_mtime) & _WORD, len(name))
    return ENTRY_1.pack(b"DENT", *words) + name


def listing_end(*, second: bool) -> bytes:
    """The end of a folder's listing."""
    return (ENTRY_2 if second else ENTRY_1).pack(b"DONE", *([0] * (12 if second else 4)))


def parse_send_name(text: bytes) -> tuple[bytes, int] | None:
    """(path, mode) of ``PATH,MODE``, the argument of the first sending; None when malformed."""
    path, found, mode = text.rpartition(b",")
    if not found or not path or not mode.isdigit() or len(mode) > 10:
        return None
    return path, int(mode)


def compression_of(flags: int) -> str | None:
    """The compression that flags ask for, "" for none; None when they are no valid choice."""
    wanted = flags & ~DRY_RUN
    return "" if wanted == 0 else FLAGS.get(wanted)
