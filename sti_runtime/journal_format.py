"""The bytes of a journal: one line per record, checked by a checksum. Format: docs/job-and-journal.md.

A line is ``<seq> <crc32 of the JSON, 8 hex digits> <canonical JSON of a JournalRecord>\\n``. Sequence
numbers count 0, 1, 2, … per (job, attempt). Only the end of a file can be torn (an append that was cut
short); damage with good lines behind it is an error, never skipped.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from pathlib import Path

from sti_runtime.errors import FormatError
from sti_runtime.messages import RECORD_CAP_BYTES, JournalRecord

PROTOCOL_VERSION = 4
"""Version of job file, journal, verbs and packs together; host and agent refuse another's."""

LINE_CAP_BYTES = RECORD_CAP_BYTES + 40
"""Longest line: sequence number (at most 19 digits), two blanks, checksum, JSON, newline."""

READ_BYTES = 2 * LINE_CAP_BYTES
"""What a tailing reader should ask for at once: then a bad line is told from an incomplete one."""

_HEAD = re.compile(rb"(0|[1-9][0-9]{0,18}) ([0-9a-f]{8}) ")


@dataclass(frozen=True)
class JournalSlice:
    """What a stretch of journal holds. ``next_offset``: where to read on (start of the first line not
    taken). ``problem``: damage found at ``next_offset``; the records before it are good."""

    records: tuple[JournalRecord, ...]
    next_offset: int
    problem: FormatError | None


def encode_line(record: JournalRecord) -> bytes:
    """The line of one record.

    Raises: FormatError if it would be longer than RECORD_CAP_BYTES or does not survive a round trip
    (a value that is not finite, a field out of range).
    """
    source = f"journal record {record.seq}"
    try:
        body = record.to_json()
    except ValueError as error:
        raise FormatError(f"{source} cannot be written as JSON: {error}.") from error
    if len(body) > RECORD_CAP_BYTES:
        raise FormatError(
            f"{source} has {len(body)} bytes, more than the {RECORD_CAP_BYTES} a record may have.",
            "Split the unit into smaller ones.",
        )
    JournalRecord.from_json(body, source=source, cap_bytes=RECORD_CAP_BYTES)
    return b"%d %08x %s\n" % (record.seq, zlib.crc32(body), body)


def checked_body(line: bytes, *, source: str) -> bytes:
    """The JSON of one line (without its newline), after length, shape and checksum were checked.

    Raises: FormatError.
    """
    head = _HEAD.match(line)
    if len(line) >= LINE_CAP_BYTES or head is None:
        raise FormatError(
            f"{source}: not a journal line (wants '<seq> <crc32> <json>', at most {LINE_CAP_BYTES} bytes).",
            "The journal is damaged; start a new attempt of the job.",
        )
    body = line[head.end() :]
    if zlib.crc32(body) != int(head[2], 16):
        raise FormatError(
            f"{source}: the checksum of record {int(head[1])} is wrong.",
            "The journal is damaged; start a new attempt of the job.",
        )
    return body


def decode_line(line: bytes, *, source: str) -> JournalRecord:
    """Parse and validate one line without its newline. Raises: FormatError naming ``source``."""
    body = checked_body(line, source=source)
    record = JournalRecord.from_json(body, source=source, cap_bytes=RECORD_CAP_BYTES)
    if record.seq != int(line.split(b" ", 1)[0]):
        raise FormatError(
            f"{source}: the line says record {int(line.split(b' ', 1)[0])}, its JSON {record.seq}.",
            "The journal is damaged; start a new attempt of the job.",
        )
    return record


def parse_lines(data: bytes, *, offset: int, source: str, expect_seq: int | None = None) -> JournalSlice:
    """Parse journal bytes that start at file offset ``offset``, a line start.

    An incomplete last line, or one with a wrong checksum and nothing behind it, is left for the next
    read: it may still be on its way to storage. ``expect_seq``: number the first record must have; at
    offset 0 it is 0.
    """
    records: list[JournalRecord] = []
    position = 0
    wanted = 0 if offset == 0 else expect_seq
    while position < len(data):
        end = data.find(b"\n", position)
        where = f"{source} at byte {offset + position}"
        if end < 0:
            if len(data) - position <= LINE_CAP_BYTES:
                break
            problem = FormatError(
                f"{where}: a line of more than {LINE_CAP_BYTES} bytes.",
                "The journal is damaged; start a new attempt of the job.",
            )
            return JournalSlice(tuple(records), offset + position, problem)
        try:
            checked_body(data[position:end], source=where)
        except FormatError as error:
            last = end + 1 == len(data) and end - position <= LINE_CAP_BYTES
            return JournalSlice(tuple(records), offset + position, None if last else error)
        try:
            record = decode_line(data[position:end], source=where)
            if wanted is not None and record.seq != wanted:
                raise FormatError(
                    f"{where}: record {record.seq} where {wanted} was due.",
                    "The journal is damaged or another job's; start a new attempt of the job.",
                )
        except FormatError as error:
            return JournalSlice(tuple(records), offset + position, error)
        records.append(record)
        wanted = record.seq + 1
        position = end + 1
    return JournalSlice(tuple(records), offset + position, None)


def read_records(path: Path, offset: int, *, expect_seq: int | None = None) -> JournalSlice:
    """Tail a journal file: the complete records from ``offset`` on, at most READ_BYTES at once.

    Raises: FormatError if the file cannot be read or is shorter than ``offset`` (it was cut back after a
    crash: read it again from 0; records already ingested are recognised by their sequence number).
    """
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            if size < offset:
                raise FormatError(
                    f"{path}: has {size} bytes, fewer than the {offset} already read.",
                    "Read it again from the start.",
                )
            stream.seek(offset)
            data = stream.read(READ_BYTES)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}.") from error
    return parse_lines(data, offset=offset, source=str(path), expect_seq=expect_seq)
