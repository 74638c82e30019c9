"""Compaction: old raw sample rows become summaries, and the records they came in are packed.

What must stay as rows is decided in the transaction that takes rows away, record by record in small batches:
a compaction may be killed, run beside ingestion, or twice at once. Nothing is lost: the samples stay in
their (packed) record, and an audit counts rows and summaries alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Subquery, and_, delete, exists, func, insert, or_, select, update
from sqlalchemy.orm import Session

from db.documents import now_wall_ns, pack
from db.events import record_event
from db.models import (
    ComputeSampleRow,
    DeviceProfileRow,
    FixedSampleRow,
    IoSampleRow,
    JobRow,
    JournalRecordRow,
    PlanRow,
    RequestRow,
    RunRow,
    SampleSummaryRow,
)
from db.plans import place_among_answers
from db.session import Store
from db.statistics import median, median_interval, p95
from sti_runtime.errors import InputError

DAY_NS = 86_400 * 10**9
_RECORDS_AT_ONCE = 100


@dataclass(frozen=True)
class Retention:
    """What stays as rows: samples younger than ``days``; those of the newest ``profiles`` fits of each device
    and setting; requests of the newest ``runs`` runs of each plan; and all that a latest plan rests on."""

    days: int = 90
    profiles: int = 3
    runs: int = 3


@dataclass(frozen=True)
class Compaction:
    """What was, or with a dry run would be, compacted. ``bytes_saved``: of the records' text; rows and their
    indexes come on top."""

    records: int
    samples: int
    summaries: int
    bytes_saved: int

    def __add__(self, other: Compaction) -> Compaction:
        return Compaction(
            self.records + other.records,
            self.samples + other.samples,
            self.summaries + other.summaries,
            self.bytes_saved + other.bytes_saved,
        )


NOTHING = Compaction(0, 0, 0, 0)


def compact(
    store: Store,
    retention: Retention,
    *,
    dry_run: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> Compaction:
    """Compact what the policy lets go of; with ``dry_run`` only say how much that is.

    ``advance`` is told the records done so far. Raises: InputError for a policy that is none.
    """
    if min(retention.days, retention.profiles, retention.runs) < 0:
        raise InputError("What is kept cannot be less than nothing.", "Give numbers from 0 on.")
    before_ns = now_wall_ns() - retention.days * DAY_NS
    done, after = NOTHING, 0
    while True:
        with store.reader() if dry_run else store.session() as session:
            ids = _candidates(session, retention, before_ns, after)
            for journal_id in ids:
                done += _compact_record(session, journal_id, dry_run=dry_run)
        if not ids:
            break
        after = ids[-1]
        advance(done.records)
    if done.records and not dry_run:
        what = (
            f"{done.samples} samples of {done.records} records are now {done.summaries} summaries; kept were"
            f" {retention.days} days, {retention.profiles} fits a setting, {retention.runs} runs a plan."
        )
        with store.session() as session:
            record_event(session, "info", "samples-compacted", what)
    return done


def vacuum(store: Store) -> None:
    """Give unused space back to the disk; others wait meanwhile (SQLite) or not (PostgreSQL)."""
    driver = store.engine.raw_connection()
    try:
        if store.engine.dialect.name == "postgresql":
            driver.driver_connection.autocommit = True  # type: ignore[union-attr]
        driver.cursor().execute("VACUUM")
    finally:
        driver.close()


# ------------------------------------------------------------------ what may go


def _candidates(session: Session, retention: Retention, before_ns: int, after: int) -> Sequence[int]:
    """The next records, by id, whose sample rows may go."""
    record = JournalRecordRow
    tables: tuple[type[Any], ...] = (IoSampleRow, ComputeSampleRow, FixedSampleRow)
    profiled = or_(*(exists().where(table.journal_id == record.id) for table in tables))
    # A fit of which nobody knows the job keeps all that it may rest on.
    kept = _kept_profiles(retention.profiles)
    of_kept_fit = exists().where(
        kept.c.device_id == record.device_id, or_(kept.c.job_id == record.job_id, kept.c.job_id.is_(None))
    )
    ran = exists().where(RunRow.journal_id == record.id, ~_is_kept_run(retention.runs))
    query = (
        select(record.id)
        .join(JobRow, JobRow.id == record.job_id)
        .where(
            record.id > after,
            record.type == "result",
            record.compacted_wall_ns.is_(None),
            record.rejected.is_(None),
            record.ingested_wall_ns < before_ns,
            JobRow.state.not_in(("queued", "running")),
            or_(and_(profiled, ~of_kept_fit), ran),
        )
        .order_by(record.id)
        .limit(_RECORDS_AT_ONCE)
    )
    return session.scalars(query).all()


def _latest_plans() -> Subquery:
    """The newest plan of every question: id and profile."""
    placed = select(PlanRow.id, PlanRow.device_profile_id, place_among_answers()).subquery()
    return select(placed.c.id, placed.c.device_profile_id).where(placed.c.place == 1).subquery()


def _kept_profiles(newest: int) -> Subquery:
    """Device and job of every fit whose samples stay."""
    fit = DeviceProfileRow
    setting = (
        fit.device_id,
        fit.bundle_digest,
        fit.engine,
        fit.sequence_length,
        fit.threads,
        fit.queue_depth,
        fit.emulation_json,
    )
    place = func.row_number().over(partition_by=setting, order_by=(fit.created_wall_ns.desc(), fit.id.desc()))
    placed = select(fit.id, fit.device_id, fit.job_id, place.label("place")).subquery()
    planned = select(_latest_plans().c.device_profile_id)
    return (
        select(placed.c.device_id, placed.c.job_id)
        .where(or_(placed.c.place <= newest, placed.c.id.in_(planned)))
        .subquery()
    )


def _is_kept_run(newest: int) -> ColumnElement[bool]:
    """Of a run: whether its requests stay."""
    place = func.row_number().over(
        partition_by=(RunRow.plan_id, RunRow.request_kind), order_by=RunRow.id.desc()
    )
    placed = select(RunRow.id, place.label("place")).subquery()
    return or_(
        RunRow.plan_id.in_(select(_latest_plans().c.id)),
        RunRow.id.in_(select(placed.c.id).where(placed.c.place <= newest)),
    )


# ------------------------------------------------------------------ one record

_QUANTITIES = {
    "io": ("duration",),
    "compute": ("decompress", "compute"),
    "fixed": ("embed_io", "embed_compute", "head"),
    "request": ("latency", "stall"),
}
COUNTED = {"io": "duration", "compute": "compute", "fixed": "head", "request": "latency"}
"""By kind the quantity whose summaries count each sample once."""

_APART = ("beside_compute", "versions", "width", "fidelity")
"""Columns that tell samples of a kind apart; those a kind lacks are NULL."""


def _compact_record(session: Session, journal_id: int, *, dry_run: bool) -> Compaction:
    """Summaries for the sample rows of a record, which goes packed; nothing when another did it already."""
    table = JournalRecordRow
    record = session.scalars(select(table).where(table.id == journal_id).with_for_update()).one()
    if record.compacted_wall_ns is not None:
        return NOTHING
    now, packed = now_wall_ns(), pack(record.record_json)
    run = session.scalars(select(RunRow).where(RunRow.journal_id == journal_id)).one_or_none()
    sources: list[tuple[str, type[Any], ColumnElement[bool]]] = [
        ("io", IoSampleRow, IoSampleRow.journal_id == journal_id),
        ("compute", ComputeSampleRow, ComputeSampleRow.journal_id == journal_id),
        ("fixed", FixedSampleRow, FixedSampleRow.journal_id == journal_id),
    ]
    if run is not None:
        sources.append(("request", RequestRow, RequestRow.run_id == run.id))
    samples, summaries = 0, list[dict[str, Any]]()
    for kind, source, condition in sources:
        rows = session.scalars(select(source).where(condition)).all()
        samples += len(rows)
        shared = {
            "journal_id": journal_id,
            "kind": kind,
            "device_id": record.device_id,
            "compacted_wall_ns": now,
        }
        summaries += [shared | summary for summary in _summaries(kind, rows, run)]
        if rows and not dry_run:
            session.execute(delete(source).where(condition).execution_options(synchronize_session=False))
            session.expunge_all()
    saved = len(record.record_json) - len(packed)
    if not dry_run:
        session.execute(insert(SampleSummaryRow), summaries)
        session.execute(
            update(table).where(table.id == journal_id).values(record_json=packed, compacted_wall_ns=now)
        )
    return Compaction(1, samples, len(summaries), saved)


def _summaries(kind: str, rows: Iterable[Any], run: RunRow | None) -> list[dict[str, Any]]:
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for row in rows:
        origin = row if run is None else run
        key = (
            origin.bundle_digest, origin.engine, row.emulated, row.warmup, row.valid, row.reasons_json,
            *(getattr(row, name, None) for name in _APART),
        )  # fmt: skip
        groups.setdefault(key, []).append(row)
    names = ("bundle_digest", "engine", "emulated", "warmup", "valid", "reasons_json", *_APART)
    return [
        dict(zip(names, key, strict=True))
        | {"quantity": quantity}
        | _figures([getattr(row, f"{quantity}_ns") for row in alike])
        for key, alike in groups.items()
        for quantity in _QUANTITIES[kind]
    ]


def _figures(samples: Sequence[int]) -> dict[str, int | None]:
    interval = median_interval(samples)
    return {
        "count": len(samples),
        "min_ns": min(samples),
        "mean_ns": sum(samples) // len(samples),
        "median_ns": median(samples),
        "median_low_ns": None if interval is None else interval.low,
        "median_high_ns": None if interval is None else interval.high,
        "p95_ns": p95(samples),
        "max_ns": max(samples),
    }
