"""Ingestion: journal records of a device into the store, each exactly once.

All that one call is given is one transaction of the caller's. A record's unique key (device, job, attempt,
seq) decides whether it is new; only new records make samples, so the same batch may come twice, overlap with
another or be sent by two hosts at once. A record that cannot be true is kept with the reason and makes
no samples (``db.validate``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sqlalchemy import update
from sqlalchemy.orm import Session

from db.artifacts import bundle_shape
from db.devices import set_agent
from db.documents import now_wall_ns, storable
from db.errors import StoreError
from db.events import record_event
from db.fan_out import fan_out
from db.jobs import get_job, job_record, newest_attempts
from db.journal import (
    Incoming,
    Kept,
    Opened,
    advance,
    done_units,
    insert_records,
    kept_around,
    lock_attempts,
)
from db.models import JobRow, JournalRecordRow, TaskDataRow
from db.source import Pending, Source
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


@dataclass(frozen=True)
class Batch:
    """Records of one attempt, in any order, new or not, as its device sent them.

    ``job``: the job of that id where the caller has it at hand; else it is read and parsed.
    """

    device_id: int
    job_id: str
    attempt: int
    records: Sequence[JournalRecord]
    job: Job | None = None


@dataclass(frozen=True)
class Rejection:
    """A record that was kept but not believed."""

    seq: int
    reason: str


@dataclass(frozen=True)
class IngestReport:
    """What a batch did.

    ``finished``: units of the attempt that have ended by now.
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
    finished: int


def ingest(
    session: Session, *, device_id: int, job_id: str, attempt: int, records: Sequence[JournalRecord]
) -> IngestReport:
    """Store a batch of one attempt's records, in any order, new or not.

    Raises: StoreError when the store knows no such job, attempt or device of it.
    """
    (report,) = ingest_all(session, [Batch(device_id, job_id, attempt, records)])
    if isinstance(report, StoreError):
        raise report
    return report


def ingest_all(session: Session, batches: Sequence[Batch]) -> list[IngestReport | StoreError]:
    """Store batches of several attempts, each attempt's once; what came of each, in their order.

    A batch that belongs to nothing the store knows is answered by the error that ``ingest`` raises; the
    others are stored all the same.
    """
    keys = [(batch.job_id, batch.attempt) for batch in batches]
    if len(set(keys)) != len(keys):
        raise ValueError("an attempt has two batches in one call")
    locked = lock_attempts(session, keys, with_jobs=any(batch.job is None for batch in batches))
    pending = Pending()
    takings: list[_Taking | StoreError] = []
    for batch, key in zip(batches, keys, strict=True):
        opened = locked.get(key)
        if opened is None or opened.job.device_id != batch.device_id:
            takings.append(_stranger(session, batch))
        else:
            takings.append(_Taking(session, opened, batch, pending))
    known = [each for each in takings if isinstance(each, _Taking)]
    kept = kept_around(session, [(each.opened, each.incoming) for each in known])
    for each, before in zip(known, kept, strict=True):
        each.tell_apart(before)
    done = done_units(session, [(each.opened, each.new_units()) for each in known])
    ids = insert_records(session, [(each.opened, each.new) for each in known])
    with session.no_autoflush:  # else every look at the store would write the attempts' counts before
        reports = [
            each if isinstance(each, StoreError) else each.take_in(ids, done[each.opened.key])
            for each in takings
        ]
    pending.write(session)
    _finish(session, [each.opened for each in known if each.ended])
    session.flush()
    return reports


def _stranger(session: Session, batch: Batch) -> StoreError:
    """Why a batch is of nothing that the store knows."""
    try:
        row = get_job(session, batch.job_id)
    except StoreError as error:
        return error
    if row.device_id != batch.device_id:
        return StoreError(
            f"Job {row.id} belongs to device {row.device_id},"
            f" its journal came from device {batch.device_id}.",
            "Two devices share a work folder, or the inventory changed; run `stifarm devices probe`.",
        )
    return StoreError(
        f"The store knows no attempt {batch.attempt} of job {batch.job_id}.",
        "The journal is of another store, or was left by one that is gone; see `stifarm devices clean`.",
    )


class _Taking:
    """One batch being taken in: the attempt it is of, and what its records are checked against."""

    def __init__(self, session: Session, opened: Opened, batch: Batch, pending: Pending) -> None:
        self.session, self.opened, self.pending = session, opened, pending
        self.job = job = job_record(opened.job) if batch.job is None else batch.job
        self.data = session.get(TaskDataRow, job.task_data) if job.task_data else None
        shape = None if job.bundle is None else bundle_shape(session, job.bundle)
        self.bundle_known = shape is not None
        self.context = Context(
            job=job,
            attempt=opened.attempt.number,
            bundle_bytes=None if shape is None else shape.bytes,
            heads=None if shape is None else shape.heads,
            labels=None if shape is None else shape.labels,
            data_rows=None if self.data is None else self.data.rows,
            sequence_length=None if self.data is None else self.data.sequence_length,
        )
        self.incoming = [Incoming.of(each) for each in sorted(batch.records, key=lambda each: each.seq)]
        self.new: list[Incoming] = []
        self.conflicts: list[int] = []
        self.kept: dict[int, Kept] = {}
        self.done: set[int] = set()
        self.ended = False

    def tell_apart(self, kept: dict[int, Kept]) -> None:
        """Find what is new, and the numbers that came before with other content; ``kept``: what is stored of
        these numbers and those before them."""
        self.kept = kept
        for each in self.incoming:
            before = kept.get(each.record.seq)
            if before is None:
                kept[each.record.seq] = each.kept
                self.new.append(each)
            elif before.digest != each.digest:
                self.conflicts.append(each.record.seq)

    def new_units(self) -> set[int]:
        """The units of which results are new."""
        payloads = (each.record.payload for each in self.new)
        return {payload.unit for payload in payloads if isinstance(payload, ResultRecord)}

    def take_in(self, stored: Mapping[tuple[str, int, int], int], done: set[int]) -> IngestReport:
        """Act on what is new of the records. ``stored``: their rows, by job, attempt and number; ``done``:
        units that have an accepted result."""
        session, opened, new, conflicts, kept = self.session, self.opened, self.new, self.conflicts, self.kept
        self.done = done
        ids = {each.record.seq: stored[*opened.key, each.record.seq] for each in new}
        rejected: list[Rejection] = []
        for each in new:
            record = each.record
            reason = self._accept(record, ids[record.seq], kept.get(record.seq - 1))
            if reason is not None:
                rejected.append(Rejection(record.seq, reason))
                row, values = JournalRecordRow, {"rejected": storable(reason)}
                session.execute(update(row).where(row.id == ids[record.seq]).values(**values))
        opened.attempt.rejected += len(rejected)
        advance(session, opened, ids)
        _report_oddities(session, opened.job, rejected, conflicts)
        gaps = opened.attempt.next_seq < opened.attempt.records
        complete = opened.attempt.ended and not gaps
        if complete and opened.attempt.state in ("running", "lost"):
            self.ended = True
        return IngestReport(
            inserted=len(new),
            duplicates=len(self.incoming) - len(new),
            rejected=tuple(rejected),
            conflicts=tuple(conflicts),
            next_seq=opened.attempt.next_seq,
            gaps=gaps,
            complete=complete,
            finished=opened.attempt.results + opened.attempt.failures,
        )

    def _accept(self, record: JournalRecord, journal_id: int, before: Kept | None) -> str | None:
        """Check a new record and act on it; why it was not believed, else None."""
        payload, attempt = record.payload, self.opened.attempt
        same_boot = before is not None and before.boot_id == storable(record.boot_id)
        context = self.context
        if before is not None and same_boot and isinstance(payload, ResultRecord):
            context = replace(context, previous_wall_ns=before.wall_ns)
        reason = why_rejected(record, context)
        if reason is None and isinstance(payload, ResultRecord):
            reason = self._accept_result(record, payload, journal_id)
        if reason is not None:
            return reason
        if isinstance(payload, ResultRecord):
            self.done.add(payload.unit)
            attempt.results += 1
        elif isinstance(payload, FailureRecord):
            attempt.failures += 1
        elif isinstance(payload, StartRecord):
            _started(self.session, self.opened, payload)
        elif isinstance(payload, EndRecord):
            attempt.ended = True
            if payload.refused is not None:
                attempt.refused = storable(payload.refused)
        if isinstance(payload, StartRecord | EndRecord):
            _note_settings(self.session, self.opened.job, payload.settings)
        return None

    def _accept_result(self, record: JournalRecord, payload: ResultRecord, journal_id: int) -> str | None:
        if payload.unit in self.done:
            return f"a second result of unit {payload.unit}"
        source = Source(
            journal_id=journal_id,
            device=self.opened.device,
            job=self.job,
            attempt=self.opened.attempt,
            record=record,
            data=self.data,
            bundle_known=self.bundle_known,
        )
        return fan_out(self.session, source, payload, self.pending)


def _started(session: Session, opened: Opened, start: StartRecord) -> None:
    attempt = opened.attempt
    attempt.agent, attempt.agent_digest = storable(start.agent), start.agent_digest
    attempt.protocol, attempt.agent_emulated = start.protocol, start.emulated
    if opened.device.agent_digest != start.agent_digest:
        set_agent(session, opened.device.id, start.agent_digest)


def _note_settings(session: Session, row: JobRow, reports: Sequence[SettingReport]) -> None:
    """An event for each state that settings of the device should not be in; the record holds them all."""
    for state in ("not-applied", "kept", "not-restored"):
        found = [report for report in reports if report.state == state]
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            what = f"Job {row.id}: setting {found[0].target}{more} {state}: {found[0].why}."
            record_event(session, "warning", f"setting-{state}", what, device_id=row.device_id, job_id=row.id)


def _finish(session: Session, ended: Sequence[Opened]) -> None:
    """Close attempts whose whole journals are stored; by what was accepted, not by what they claim."""
    if not ended:
        return
    now = now_wall_ns()
    with session.no_autoflush:  # everything is written together
        newest = newest_attempts(session, [opened.job.id for opened in ended])
    for opened in ended:
        attempt, job = opened.attempt, opened.job
        state = "done" if attempt.results == job.units else "failed"
        attempt.state = "refused" if attempt.refused is not None else state
        attempt.ended_wall_ns = now
        if job.state != "cancelled" and newest[job.id] == attempt.number:
            job.state, job.updated_wall_ns = state, now


def _report_oddities(
    session: Session, row: JobRow, rejected: Sequence[Rejection], conflicts: Sequence[int]
) -> None:
    for rejection in rejected:
        what = f"Record {rejection.seq} of job {row.id} was not believed: {rejection.reason}."
        record_event(session, "warning", "record-rejected", what, device_id=row.device_id, job_id=row.id)
    for seq in conflicts:
        what = f"Record {seq} of job {row.id} came again with other content; the first one was kept."
        record_event(session, "warning", "record-conflict", what, device_id=row.device_id, job_id=row.id)
