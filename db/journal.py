"""What the store holds of an attempt's journal: its records, and where on the attempt that is counted.

Who holds an attempt's lock (``lock_attempts``) is alone with its records until the transaction ends.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import Select, and_, bindparam, insert, select, tuple_
from sqlalchemy.orm import Session, defer

from db.documents import now_wall_ns, storable, untrusted_document
from db.models import AttemptRow, DeviceRow, JobRow, JournalRecordRow
from sti_runtime.messages import FailureRecord, JournalRecord, ResultRecord
from sti_runtime.records import sha256_hex


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
    """Of each attempt the stored records, by number, that what has come (sorted) may repeat, and those just
    before it. The attempts are as they were locked."""
    plain = [opened.attempt.id for opened, incoming in come if _goes_on(opened.attempt, incoming)]
    found: dict[tuple[str, int], dict[int, Kept]] = defaultdict(dict)
    if plain:
        for job, number, *kept in session.execute(_last_kept(), {"attempts": plain}):
            found[job, number][kept[0]] = Kept(*kept[1:])
    for opened, incoming in come:
        if opened.attempt.records and incoming and not _goes_on(opened.attempt, incoming):
            first, last = incoming[0].record.seq - 1, incoming[-1].record.seq
            asked = {"device": opened.job.device_id, "first": first, "last": last}
            for job, number, *kept in session.execute(_kept(), {**asked, **_named(opened)}):
                found[job, number][kept[0]] = Kept(*kept[1:])
    return [found[opened.key] for opened, _ in come]


def _goes_on(attempt: AttemptRow, incoming: Sequence[Incoming]) -> bool:
    """Whether records begin where the stored journal, which has no gaps, ends."""
    begun = 0 < attempt.records == attempt.next_seq
    return begun and bool(incoming) and incoming[0].record.seq == attempt.next_seq


def _named(opened: Opened) -> dict[str, Any]:
    return {"job": opened.attempt.job_id, "attempt": opened.attempt.number}


@cache
def _last_kept() -> Select[*tuple[Any, ...]]:
    """The last record of each attempt whose journal has no gaps."""
    table, attempt = JournalRecordRow.__table__.c, AttemptRow.__table__.c
    return (
        select(table.job_id, table.attempt, table.seq, table.digest, table.wall_ns, table.boot_id)
        .join_from(
            AttemptRow.__table__,
            JournalRecordRow.__table__,
            and_(
                table.device_id == attempt.device_id,
                table.job_id == attempt.job_id,
                table.attempt == attempt.number,
                table.seq == attempt.next_seq - 1,
            ),
        )
        .where(attempt.id.in_(bindparam("attempts", expanding=True)))
    )


@cache
def _kept() -> Select[*tuple[Any, ...]]:
    table = JournalRecordRow.__table__.c
    return select(table.job_id, table.attempt, table.seq, table.digest, table.wall_ns, table.boot_id).where(
        table.device_id == bindparam("device"),
        table.job_id == bindparam("job"),
        table.attempt == bindparam("attempt"),
        table.seq.between(bindparam("first"), bindparam("last")),
    )


def done_units(
    session: Session, asked: Sequence[tuple[Opened, Collection[int]]]
) -> dict[tuple[str, int], set[int]]:
    """By attempt: units that have an accepted result in it; those that are asked for are among them."""
    jobs = sorted({opened.attempt.job_id for opened, units in asked if units and opened.attempt.results})
    found: dict[tuple[str, int], set[int]] = defaultdict(set)
    if jobs:
        for job, attempt, unit in session.execute(_done(), {"jobs": jobs}):
            found[job, attempt].add(unit)
    return found


@cache
def _done() -> Select[*tuple[Any, ...]]:
    table = JournalRecordRow.__table__.c
    return select(table.job_id, table.attempt, table.unit).where(
        table.job_id.in_(bindparam("jobs", expanding=True)),
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
