"""Appending to a journal so that a record is there whole, or not at all.

One record is one ``write`` followed by ``fsync``. What a crash leaves half-written at the end is cut off
when the job resumes; damage anywhere else is an error.
"""

from __future__ import annotations

import logging
import mmap
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from agent.spool import fsync_folder, storage_error
from sti_runtime.errors import FormatError
from sti_runtime.journal_format import LINE_CAP_BYTES, checked_body, decode_line, encode_line
from sti_runtime.messages import (
    EndRecord,
    FailureRecord,
    JournalRecord,
    Lease,
    Payload,
    ResultRecord,
    StartRecord,
)

log = logging.getLogger(__name__)


@dataclass
class JournalState:
    """What a journal says about its job so far."""

    next_seq: int = 0
    good_bytes: int = 0
    done: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    leases: list[Lease] = field(default_factory=list)
    end: EndRecord | None = None

    def take(self, payload: Payload) -> None:
        """Account for one record."""
        match payload:
            case StartRecord():
                if payload.lease not in self.leases:
                    self.leases.append(payload.lease)
            case ResultRecord():
                self.done.add(payload.unit)
            case FailureRecord():
                self.failed.add(payload.unit)
            case EndRecord():
                self.end = payload

    @property
    def finished(self) -> set[int]:
        """Units that are in the journal and not run again."""
        return self.done | self.failed


def scan(path: Path) -> JournalState:
    """Read a journal from its start to its last good record.

    ``good_bytes`` is less than the file's size when the end is torn. Memory: one line at a time.
    Raises: FormatError when a bad line has a good one behind it, or is longer than a line can be.
    """
    state = JournalState()
    if not path.exists() or path.stat().st_size == 0:
        return state
    with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        while state.good_bytes < len(data):
            end = data.find(b"\n", state.good_bytes)
            where = f"{path} at byte {state.good_bytes}"
            if end < 0 or end - state.good_bytes > LINE_CAP_BYTES:
                _check_torn(data, state.good_bytes, where)
                break
            line = data[state.good_bytes : end]
            try:
                checked_body(line, source=where)
            except FormatError:
                _check_torn(data, state.good_bytes, where)
                break
            record = decode_line(line, source=where)
            if record.seq != state.next_seq:
                raise FormatError(
                    f"{where}: record {record.seq} where {state.next_seq} was due.",
                    "The journal is damaged; start a new attempt of the job.",
                )
            state.take(record.payload)
            state.next_seq += 1
            state.good_bytes = end + 1
    return state


def _check_torn(data: mmap.mmap, start: int, where: str) -> None:
    """Raise FormatError unless what begins at ``start`` can be one append that was cut short."""
    torn = data[start:]
    if len(torn) > LINE_CAP_BYTES:
        raise FormatError(
            f"{where}: {len(torn)} bytes that are no record, more than one append can leave.",
            "The journal is damaged; start a new attempt of the job.",
        )
    for line in filter(None, torn.split(b"\n")[1:]):  # there may be four million empty ones
        try:
            checked_body(line, source=where)
        except FormatError:
            continue
        raise FormatError(
            f"{where}: a bad record with good ones behind it.",
            "The journal is damaged; start a new attempt of the job.",
        )


class Journal:
    """A journal open for appending. One process at a time (the caller holds the spool's run lock)."""

    def __init__(self, path: Path, boot_id: str) -> None:
        """Open ``path`` (made if absent) and cut off a torn end. Raises: FormatError, StifarmError."""
        self.path = path
        self._boot_id = boot_id
        self.state = scan(path)
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
            torn_bytes = os.fstat(self._fd).st_size - self.state.good_bytes
            if torn_bytes:
                log.warning("%s: cut off %d bytes of an append that was cut short", path, torn_bytes)
                os.ftruncate(self._fd, self.state.good_bytes)
            os.fsync(self._fd)
            fsync_folder(path.parent)
        except OSError as error:
            raise storage_error(error, path) from error

    def append(self, payload: Payload) -> None:
        """Append one record and flush it to storage.

        Raises: FormatError if the record cannot be written as a line (nothing was written);
        StorageFullError or InputError if storage failed (the file was cut back to its last good record).
        """
        record = JournalRecord(
            seq=self.state.next_seq, boot_id=self._boot_id, wall_ns=time.time_ns(), payload=payload
        )
        line = encode_line(record)
        try:
            written = 0
            while written < len(line):
                written += os.pwrite(self._fd, line[written:], self.state.good_bytes + written)
            os.fsync(self._fd)
        except OSError as error:
            os.ftruncate(self._fd, self.state.good_bytes)
            raise storage_error(error, self.path) from error
        self.state.good_bytes += len(line)
        self.state.next_seq += 1
        self.state.take(payload)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)
