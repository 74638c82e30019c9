"""Ingestion: journal records of a device into the store, each exactly once.

All of a batch is one transaction of the caller's. A record's unique key (device, job, attempt, seq)
decides whether it is new; only new records make samples, so the same batch may come twice, overlap with
another or be sent by two hosts at once. A record that cannot be true is kept with the reason and makes
no samples (``db.validate``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Select, select, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from db.artifacts import bundle_manifest
from db.devices import set_agent
from db.documents import now_wall_ns, storable, untrusted_document
from db.errors import StoreError
from db.events import record_event
from db.fan_out import fan_out
from db.jobs import get_job, job_record, latest_attempt, progress, set_job_state
from db.models import AttemptRow, BundleRow, JobRow, JournalRecordRow, TaskDataRow
from db.source import Source
from db.upsert import insert_new
from db.validate import Context, why_rejected
from sti_runtime.messages import (
    EndRecord,
    FailureRecord,
    Job,
    JournalRecord,
    ResultRecord,
    SettingReport,
    StartRecord,
)
from sti_runtime.records import sha256_hex


@dataclass(frozen=True)
class Rejection:
    """A record that was kept but not believed."""

    seq: int
    reason: str


@dataclass(frozen=True)
class IngestReport:
    """What a batch did.

    ``next_seq``: the first number not stored; ``gaps``: numbers beyond it are stored, so records are
    missing. ``complete``: the end record and everything before it is stored.

    ``conflicts``: numbers that are stored already with other content (what is stored stays). The device
    lost the end of this attempt's journal after it was sent, as in a power cut, and wrote it anew; since
    then store and device disagree on what its numbers mean, and the attempt can no longer be completed.
    What the caller does: stop the attempt, close it (``db.jobs.end_attempt``, state "lost") and begin a
    new one (``db.jobs.begin_attempt``); what was accepted of the old one is kept.
    """

    inserted: int
    duplicates: int
    rejected: tuple[Rejection, ...]
    conflicts: tuple[int, ...]
    next_seq: int
    gaps: bool
    complete: bool


def ingest(
    session: Session, *, device_id: int, job_id: str, attempt: int, records: Sequence[JournalRecord]
) -> IngestReport:
    """Store a batch of one attempt's records, in any order, new or not.

    Raises: StoreError when the store knows no such job, attempt or device of it.
    """
    row = get_job(session, job_id)
    if row.device_id != device_id:
        raise StoreError(
            f"Job {job_id} belongs to device {row.device_id}, its journal came from device {device_id}.",
            "Two devices share a work folder, or the inventory changed; run `stifarm devices probe`.",
        )
    opened = _lock_attempt(session, job_id, attempt)
    batch = _Batch(session, row, opened)
    inserted = 0
    rejected: list[Rejection] = []
    conflicts: list[int] = []
    for record in sorted(records, key=lambda record: record.seq):
        journal_id, digest = batch.insert(record)
        if journal_id is None:
            if batch.stored_digest(record.seq) != digest:
                conflicts.append(record.seq)
            continue
        inserted += 1
        reason = batch.accept(record, journal_id)
        if reason is not None:
            rejected.append(Rejection(record.seq, reason))
    _report_oddities(session, row, rejected, conflicts)
    seen = progress(session, job_id, attempt)
    complete = seen.ended and not seen.gaps
    if complete and opened.state in ("running", "lost"):
        _finish(session, row, opened, batch.done)
    session.flush()
    return IngestReport(
        inserted=inserted,
        duplicates=len(records) - inserted,
        rejected=tuple(rejected),
        conflicts=tuple(conflicts),
        next_seq=seen.next_seq,
        gaps=seen.gaps,
        complete=complete,
    )


class _Batch:
    """One call of ``ingest``: the job it is for, and which units already have an accepted result."""

    def __init__(self, session: Session, row: JobRow, opened: AttemptRow) -> None:
        self.session, self.row, self.opened = session, row, opened
        self.job = job_record(row)
        self.context = _context(session, self.job, opened.number)
        table = JournalRecordRow
        stored = select(table.unit).where(
            table.device_id == row.device_id,
            table.job_id == row.id,
            table.attempt == opened.number,
            table.type == "result",
            table.rejected.is_(None),
        )
        self.done: set[int] = {unit for unit in session.scalars(stored) if unit is not None}

    def insert(self, record: JournalRecord) -> tuple[int | None, str]:
        """Insert one record if it is new: its row id (None if not new) and its digest."""
        text = untrusted_document(record)
        digest = sha256_hex(text.encode())
        payload = record.payload
        values = {
            "device_id": self.row.device_id,
            "job_id": self.row.id,
            "attempt": self.opened.number,
            "seq": record.seq,
            "type": payload.type,
            "unit": payload.unit if isinstance(payload, (ResultRecord, FailureRecord)) else None,
            "digest": digest,
            "record_json": text,
            "boot_id": storable(record.boot_id),
            "wall_ns": record.wall_ns,
            "ingested_wall_ns": now_wall_ns(),
            "rejected": None,
        }
        return insert_new(self.session, JournalRecordRow, values, JournalRecordRow.id), digest

    def stored_digest(self, seq: int) -> str | None:
        """Digest of the stored record of a sequence number."""
        return self.session.scalars(self._at(JournalRecordRow.digest, seq)).one_or_none()

    def accept(self, record: JournalRecord, journal_id: int) -> str | None:
        """Check a new record and act on it; why it was not believed, else None."""
        before = self.session.scalars(
            self._at(JournalRecordRow.wall_ns, record.seq - 1).where(
                JournalRecordRow.boot_id == storable(record.boot_id)
            )
        ).one_or_none()
        payload = record.payload
        reason = why_rejected(record, replace(self.context, previous_wall_ns=before))
        if reason is None and isinstance(payload, ResultRecord) and payload.unit in self.done:
            reason = f"a second result of unit {payload.unit}"
        if reason is None and isinstance(payload, ResultRecord):
            source = Source.of(self.session, self.row, self.job, self.opened, record, journal_id)
            reason = fan_out(self.session, source, payload)
        if reason is not None:
            values = {"rejected": storable(reason)}
            row = JournalRecordRow
            self.session.execute(update(row).where(row.id == journal_id).values(**values))
            return reason
        if isinstance(payload, ResultRecord):
            self.done.add(payload.unit)
        elif isinstance(payload, StartRecord):
            _started(self.session, self.opened, payload)
        elif isinstance(payload, EndRecord) and payload.refused is not None:
            self.opened.refused = storable(payload.refused)
        if isinstance(payload, StartRecord | EndRecord):
            _note_settings(self.session, self.row, payload.settings)
        return None

    def _at(self, column: InstrumentedAttribute[Any], seq: int) -> Select[Any]:
        table = JournalRecordRow
        return select(column).where(
            table.device_id == self.row.device_id,
            table.job_id == self.row.id,
            table.attempt == self.opened.number,
            table.seq == seq,
        )


def _lock_attempt(session: Session, job_id: str, number: int) -> AttemptRow:
    """The attempt, locked: two ingestions of one journal take turns."""
    query = select(AttemptRow).where(AttemptRow.job_id == job_id, AttemptRow.number == number)
    locked = query.with_for_update().execution_options(populate_existing=True)
    opened = session.scalars(locked).one_or_none()
    if opened is None:
        raise StoreError(
            f"The store knows no attempt {number} of job {job_id}.",
            "The journal is of another store, or was left by one that is gone; see `stifarm devices clean`.",
        )
    return opened


def _context(session: Session, job: Job, attempt: int) -> Context:
    bundle = session.get(BundleRow, job.bundle) if job.bundle else None
    data = session.get(TaskDataRow, job.task_data) if job.task_data else None
    model = None if bundle is None else bundle_manifest(bundle).model
    return Context(
        job=job,
        attempt=attempt,
        bundle_bytes=None if bundle is None else bundle.bytes,
        heads=None if model is None else model.heads,
        labels=len(model.head.labels) if model is not None and model.head is not None else None,
        data_rows=None if data is None else data.rows,
        sequence_length=None if data is None else data.sequence_length,
    )


def _started(session: Session, opened: AttemptRow, start: StartRecord) -> None:
    opened.agent, opened.agent_digest = storable(start.agent), start.agent_digest
    opened.protocol, opened.agent_emulated = start.protocol, start.emulated
    set_agent(session, opened.device_id, start.agent_digest)
    session.flush()


def _note_settings(session: Session, row: JobRow, reports: Sequence[SettingReport]) -> None:
    """An event for each state that settings of the device should not be in; the record holds them all."""
    for state in ("not-applied", "kept", "not-restored"):
        found = [report for report in reports if report.state == state]
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            what = f"Job {row.id}: setting {found[0].target}{more} {state}: {found[0].why}."
            record_event(session, "warning", f"setting-{state}", what, device_id=row.device_id, job_id=row.id)


def _finish(session: Session, row: JobRow, opened: AttemptRow, done: set[int]) -> None:
    """Close an attempt whose whole journal is stored; by what was accepted, not by what it claims."""
    state = "done" if len(done) == row.units else "failed"
    opened.state = "refused" if opened.refused is not None else state
    opened.ended_wall_ns = now_wall_ns()
    session.flush()
    newest = latest_attempt(session, row.id)
    if row.state != "cancelled" and newest is not None and newest.number == opened.number:
        set_job_state(session, row.id, state)


def _report_oddities(
    session: Session, row: JobRow, rejected: Sequence[Rejection], conflicts: Sequence[int]
) -> None:
    for rejection in rejected:
        what = f"Record {rejection.seq} of job {row.id} was not believed: {rejection.reason}."
        record_event(session, "warning", "record-rejected", what, device_id=row.device_id, job_id=row.id)
    for seq in conflicts:
        what = f"Record {seq} of job {row.id} came again with other content; the first one was kept."
        record_event(session, "warning", "record-conflict", what, device_id=row.device_id, job_id=row.id)
