"""What the store holds of an attempt's journal: its records, and where on the attempt that is counted.

Who holds an attempt's lock (``lock_attempts``) is alone with its records until the transaction ends.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import Select, bindparam, insert, select, tuple_
from sqlalchemy.orm import Session, defer

from db.documents import now_wall_ns, storable, untrusted_document
from db.models import AttemptRow, DeviceRow, JobRow, JournalRecordRow
from sti_runtime.messages import FailureRecord, JournalRecord, ResultRecord
from sti_runtime.records import sha256_hex

_ASKED_TOGETHER = 2000
"""Rows named in one statement: SQLite takes 32,766 parameters, PostgreSQL 65,535."""


@dataclass(frozen=True)
class Opened:
    """An attempt, locked, with its job and its device."""

    attempt: AttemptRow
    job: JobRow
    device: DeviceRow

    @property
    def key(self) -> tuple[str, int]:
        """(job, number) of the attempt."""
        return self.attempt.job_id, self.attempt.number


@dataclass(frozen=True)
class Kept:
    """Of a stored record: what a record that comes after it or in its place is compared with."""

    digest: str
    wall_ns: int
    boot_id: str


@dataclass(frozen=True)
class Incoming:
    """A record with its text and digest."""

    record: JournalRecord
    text: str
    digest: str

    @classmethod
    def of(cls, record: JournalRecord) -> Incoming:
        """Serialise a record."""
        text = untrusted_document(record)
        return cls(record, text, sha256_hex(text.encode()))

    @property
    def kept(self) -> Kept:
        """As the store will have it."""
        return Kept(self.digest, self.record.wall_ns, storable(self.record.boot_id))


def lock_attempts(
    session: Session, wanted: Collection[tuple[str, int]], *, with_jobs: bool = True
) -> dict[tuple[str, int], Opened]:
    """The attempts of (job, number) that there are, locked: two ingestions of one journal take turns.

    All locks are taken in one order, so that two who want several do not wait for each other. Without
    ``with_jobs`` the jobs' documents, which are long, are not read.
    """
    found = session.execute(_locked(with_jobs), {"wanted": sorted(wanted)})
    return {opened.key: opened for opened in (Opened(*row) for row in found)}


@cache
def _locked(with_jobs: bool) -> Select[*tuple[Any, ...]]:
    # Statements are made once: that takes as long as to execute them.
    query = (
        select(AttemptRow, JobRow, DeviceRow)
        .join(JobRow, JobRow.id == AttemptRow.job_id)
        .join(DeviceRow, DeviceRow.id == JobRow.device_id)
        .where(tuple_(AttemptRow.job_id, AttemptRow.number).in_(bindparam("wanted", expanding=True)))
        .order_by(AttemptRow.id)
        .with_for_update(of=AttemptRow)
        .execution_options(populate_existing=True)
    )
    return query if with_jobs else query.options(defer(JobRow.job_json))


def kept_around(session: Session, come: Sequence[tuple[Opened, Sequence[Incoming]]]) -> list[dict[int, Kept]]:
    """Of each attempt the stored records, by number, that lie between the first and the last of what has
    come (sorted), and the one before."""
    asked = [_numbers_around(opened.attempt, incoming) for opened, incoming in come]
    wanted = [
        (opened.job.device_id, *opened.key, seq)
        for (opened, _), numbers in zip(come, asked, strict=True)
        for seq in numbers
    ]
    found: dict[tuple[str, int], dict[int, Kept]] = defaultdict(dict)
    for at in range(0, len(wanted), _ASKED_TOGETHER):
        rows = session.execute(_kept(), {"wanted": wanted[at : at + _ASKED_TOGETHER]})
        for job, attempt, seq, digest, wall_ns, boot in rows:
            found[job, attempt][seq] = Kept(digest, wall_ns, boot)
    return [found[opened.key] for opened, _ in come]


def _numbers_around(attempt: AttemptRow, incoming: Sequence[Incoming]) -> Sequence[int]:
    """The numbers among which stored records may be; where the journal has no gaps, none beyond its end."""
    if not incoming or attempt.records == 0:
        return ()
    first, last = incoming[0].record.seq - 1, incoming[-1].record.seq
    if attempt.next_seq >= attempt.records:
        return range(max(0, first), min(last + 1, attempt.next_seq))
    numbers = {each.record.seq for each in incoming}
    return sorted(numbers | {number - 1 for number in numbers})


@cache
def _kept() -> Select[*tuple[Any, ...]]:
    table = JournalRecordRow
    key = tuple_(table.device_id, table.job_id, table.attempt, table.seq)
    return select(table.job_id, table.attempt, table.seq, table.digest, table.wall_ns, table.boot_id).where(
        key.in_(bindparam("wanted", expanding=True))
    )


def done_units(
    session: Session, asked: Sequence[tuple[Opened, Collection[int]]]
) -> dict[tuple[str, int], set[int]]:
    """By attempt: which of these units have an accepted result in it."""
    wanted = [
        (*opened.key, unit) for opened, units in asked if opened.attempt.results for unit in sorted(units)
    ]
    found: dict[tuple[str, int], set[int]] = defaultdict(set)
    for at in range(0, len(wanted), _ASKED_TOGETHER):
        for job, attempt, unit in session.execute(_done(), {"wanted": wanted[at : at + _ASKED_TOGETHER]}):
            found[job, attempt].add(unit)
    return found


@cache
def _done() -> Select[*tuple[Any, ...]]:
    table = JournalRecordRow
    return select(table.job_id, table.attempt, table.unit).where(
        tuple_(table.job_id, table.attempt, table.unit).in_(bindparam("wanted", expanding=True)),
        table.type == "result",
        table.rejected.is_(None),
    )


def insert_records(
    session: Session, new: Sequence[tuple[Opened, Sequence[Incoming]]]
) -> dict[tuple[str, int, int], int]:
    """Insert records of attempts that the store does not have; their row ids by job, attempt and number."""
    table, now = JournalRecordRow, now_wall_ns()
    rows = [
        {
            "device_id": opened.job.device_id,
            "job_id": opened.attempt.job_id,
            "attempt": opened.attempt.number,
            "seq": each.record.seq,
            "type": each.record.payload.type,
            "unit": _unit(each.record),
            "digest": each.digest,
            "record_json": each.text,
            "boot_id": storable(each.record.boot_id),
            "wall_ns": each.record.wall_ns,
            "ingested_wall_ns": now,
            "rejected": None,
        }
        for opened, records in new
        for each in records
    ]
    if not rows:
        return {}
    columns = (table.job_id, table.attempt, table.seq, table.id)
    statement = insert(table.__table__).returning(*columns)  # type: ignore[arg-type]
    return {(job, attempt, seq): row for job, attempt, seq, row in session.execute(statement, rows)}


def _unit(record: JournalRecord) -> int | None:
    payload = record.payload
    return payload.unit if isinstance(payload, ResultRecord | FailureRecord) else None


def advance(session: Session, opened: Opened, new: Collection[int]) -> None:
    """Count records of these numbers, now stored, and move on to the first number that is not."""
    attempt, fresh = opened.attempt, set(new)
    gaps = attempt.next_seq < attempt.records
    attempt.records += len(fresh)
    following = _run_end(attempt.next_seq, fresh)
    if gaps and following != attempt.next_seq:
        table = JournalRecordRow
        beyond = select(table.seq).where(
            table.device_id == opened.job.device_id,
            table.job_id == attempt.job_id,
            table.attempt == attempt.number,
            table.seq >= following,
        )
        following = _run_end(following, fresh.union(session.scalars(beyond)))
    attempt.next_seq = following


def _run_end(first: int, numbers: Collection[int]) -> int:
    """The first number from ``first`` on that is not among ``numbers``."""
    while first in numbers:
        first += 1
    return first
