"""The store against a device's own journal: no record lost, none twice, none changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from sqlalchemy import func, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from db.compact import COUNTED
from db.documents import untrusted_document
from db.fan_out_runs import request_figures
from db.measured import NOT_KEPT, in_brief
from db.models import (
    AttemptRow,
    ComputeSampleRow,
    FixedSampleRow,
    IoSampleRow,
    JournalRecordRow,
    ProbeRow,
    RequestRow,
    RunRow,
    SampleSummaryRow,
)
from sti_runtime.messages import (
    ComputeProfileResult,
    ExecuteResult,
    FixedProfileResult,
    IoProfileResult,
    JournalRecord,
    ProbeResult,
    ResultRecord,
    UnitResult,
)
from sti_runtime.records import sha256_hex


@dataclass(frozen=True)
class Discrepancy:
    """One point at which store and journal disagree."""

    job_id: str
    attempt: int
    seq: int
    what: str


@dataclass(frozen=True)
class Audit:
    """What a comparison found. ``records``: compared; ``samples``: rows made of them that were counted."""

    records: int
    samples: int
    discrepancies: tuple[Discrepancy, ...]

    def __add__(self, other: Audit) -> Audit:
        return Audit(
            self.records + other.records,
            self.samples + other.samples,
            self.discrepancies + other.discrepancies,
        )


def audit_attempt(
    session: Session, *, device_id: int, job_id: str, attempt: int, records: Sequence[JournalRecord]
) -> Audit:
    """Compare one attempt's whole journal, as it is on the device, with what the store made of it.

    Every record must be stored with the same content; every accepted result must have made exactly as many
    sample rows as it holds samples; the store must hold no record that the journal has not; and the attempt's
    counts must be those of its records. An evaluation makes a row only if it is the first of its content, so
    it is compared as a record.
    """
    table = JournalRecordRow
    rows = session.scalars(
        select(table).where(table.device_id == device_id, table.job_id == job_id, table.attempt == attempt)
    )
    stored = {row.seq: row for row in rows}
    found = _miscounted(session, job_id, attempt, list(stored.values()))
    samples = 0
    for record in records:
        row = stored.pop(record.seq, None)
        if row is None:
            found.append((record.seq, f"the {record.payload.type} record is not in the store"))
        elif row.digest != sha256_hex(untrusted_document(record).encode()):
            found.append((record.seq, "the store holds another content"))
        elif row.rejected is None and isinstance(record.payload, ResultRecord):
            counted, wrong = _count_samples(session, row.id, record.payload.result)
            samples += counted
            found += [(record.seq, text) for text in wrong]
    found += [(seq, "the store holds a record that is not in the journal") for seq in sorted(stored)]
    return Audit(len(records), samples, tuple(Discrepancy(job_id, attempt, seq, what) for seq, what in found))


def _miscounted(
    session: Session, job_id: str, attempt: int, rows: Sequence[JournalRecordRow]
) -> list[tuple[int, str]]:
    """Where an attempt's counts are not those of its stored records."""
    of_attempt = select(AttemptRow).where(AttemptRow.job_id == job_id, AttemptRow.number == attempt)
    kept = session.scalars(of_attempt).one_or_none()
    if kept is None:
        return []
    believed = [row.type for row in rows if row.rejected is None]
    wanted = {
        "records": len(rows),
        "results": believed.count("result"),
        "failures": believed.count("failure"),
        "rejected": len(rows) - len(believed),
    }
    return [
        (kept.next_seq, f"the attempt counts {getattr(kept, name)} {name} where the store has {count}")
        for name, count in wanted.items()
        if getattr(kept, name) != count
    ]


def attempts_of(session: Session, device_id: int) -> set[tuple[str, int]]:
    """(job, attempt) of every record that the store has of a device."""
    table = JournalRecordRow
    query = select(table.job_id, table.attempt).where(table.device_id == device_id).distinct()
    return {(job_id, attempt) for job_id, attempt in session.execute(query)}


# ------------------------------------------------------------------ rows that a result makes


def _expected(result: UnitResult) -> Mapping[InstrumentedAttribute[int], int]:
    """How many rows of each kind a result makes, by the column that names its journal record."""
    if isinstance(result, ProbeResult):
        return {ProbeRow.journal_id: 1}
    if isinstance(result, IoProfileResult):
        return {IoSampleRow.journal_id: len(result.samples)}
    if isinstance(result, ComputeProfileResult):
        return {ComputeSampleRow.journal_id: len(result.samples), IoSampleRow.journal_id: len(result.reads)}
    if isinstance(result, FixedProfileResult):
        return {FixedSampleRow.journal_id: len(result.samples)}
    if isinstance(result, ExecuteResult):
        return {RunRow.journal_id: 1}
    return {}


_KINDS: Mapping[type[Any], str] = {
    IoSampleRow: "io", ComputeSampleRow: "compute", FixedSampleRow: "fixed", RequestRow: "request",
}  # fmt: skip
"""Kinds of summaries by the table that their samples stood in."""


def _table(column: InstrumentedAttribute[int]) -> type[Any]:
    return cast("type[Any]", column.class_)


def _compacted(session: Session, journal_id: int, table: type[Any]) -> int:
    """How many samples of a record are summaries now."""
    kind, summary = _KINDS.get(table), SampleSummaryRow
    if kind is None:
        return 0
    query = select(func.coalesce(func.sum(summary.count), 0)).where(
        summary.journal_id == journal_id, summary.kind == kind, summary.quantity == COUNTED[kind]
    )
    return int(session.execute(query).scalar_one())


def _count_samples(session: Session, journal_id: int, result: UnitResult) -> tuple[int, list[str]]:
    counted, wrong = 0, []

    def check(name: str, found: int, wanted: int) -> None:
        if found != wanted:
            wrong.append(f"the store has {found} rows of {name} where the result has {wanted}")

    for column, wanted in _expected(result).items():
        rows = select(func.count()).select_from(column.class_).where(column == journal_id)
        found = session.execute(rows).scalar_one() + _compacted(session, journal_id, _table(column))
        counted += found
        check(str(column.class_.__tablename__), found, wanted)
    if isinstance(result, ExecuteResult):
        of_run = select(RunRow.id).where(RunRow.journal_id == journal_id)
        found = session.execute(
            select(func.count()).select_from(RequestRow).where(RequestRow.run_id.in_(of_run))
        ).scalar_one() + _compacted(session, journal_id, RequestRow)
        counted += found
        check(RequestRow.__tablename__, found, len(result.requests))
        brief = session.execute(select(RunRow.measured_json).where(RunRow.journal_id == journal_id)).scalar()
        compacted = brief == NOT_KEPT and _compacted(session, journal_id, RequestRow) > 0
        if brief is not None and not compacted and brief != in_brief(request_figures(result)):
            wrong.append("what its run holds of its requests in brief is not what the result says")
    return counted, wrong
