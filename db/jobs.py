"""Queries about jobs, attempts and what their journals hold."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from sqlalchemy import and_, func, or_, select, update
from sqlalchemy.orm import Session

from db.documents import document, now_wall_ns, unpack
from db.errors import StoreError
from db.models import AttemptRow, JobRow, JournalRecordRow, TaskDataRow
from db.plans import ensure_plan
from db.upsert import save_new
from sti_runtime.messages import ExecuteUnit, FailureRecord, Job, JournalRecord, ResultRecord, UnitResult


@dataclass(frozen=True)
class Progress:
    """How far one attempt's journal has come into the store.

    ``next_seq``: the first sequence number not stored. ``gaps``: stored numbers lie beyond it.
    """

    next_seq: int
    gaps: bool
    results: int
    failures: int
    rejected: int
    ended: bool


def create_job(session: Session, job: Job, *, key: str, kind: str, device_id: int) -> JobRow:
    """Register a job and the plans it executes; the same key again returns the job that is there.

    Raises: StoreError when its task data or a plan's bundle are not registered.
    """
    found = job_by_key(session, key)
    if found is not None:
        return found
    now = now_wall_ns()
    plans = {unit.plan.digest: unit.plan for unit in job.units if isinstance(unit, ExecuteUnit)}
    if plans:
        data = session.get(TaskDataRow, job.task_data) if job.task_data else None
        if data is None:
            raise StoreError(
                f"Job {job.id} executes plans on task data that the store does not know.",
                "Register the task data before making the job.",
            )
        for plan in plans.values():
            ensure_plan(session, plan, device_id=device_id, task=data.task)
    save_new(
        session,
        JobRow,
        {
            "id": job.id,
            "key": key,
            "kind": kind,
            "device_id": device_id,
            "state": "queued",
            "units": len(job.units),
            "job_json": document(job),
            "created_wall_ns": now,
            "updated_wall_ns": now,
        },
    )
    made = job_by_key(session, key)
    if made is None:
        raise StoreError(
            f"A job {job.id} is there already, for other work.", "Give the new job an id of its own."
        )
    return made


def job_by_key(session: Session, key: str) -> JobRow | None:
    """The job of an idempotent key."""
    return session.scalars(select(JobRow).where(JobRow.key == key)).one_or_none()


def get_job(session: Session, job_id: str) -> JobRow:
    """A job by id. Raises: StoreError when there is none."""
    row = session.get(JobRow, job_id)
    if row is None:
        raise StoreError(f"The store knows no job {job_id!r}.", "See `stifarm campaign status`.")
    return row


def job_record(row: JobRow) -> Job:
    """The job itself, as first asked."""
    return _job(row.job_json, row.id)


@lru_cache(maxsize=256)
def _job(text: str, job_id: str) -> Job:
    # A job's batches come one after the other, of many devices in turn.
    return Job.from_json(text.encode(), source=f"job {job_id}")


def task_data_asked(session: Session, job_ids: Collection[str]) -> str | None:
    """The task data that the newest of the jobs asks for; None when none of them does."""
    query = select(JobRow).where(JobRow.id.in_(job_ids)).order_by(JobRow.created_wall_ns.desc())
    return next((job.task_data for job in map(job_record, session.scalars(query)) if job.task_data), None)


def open_jobs(session: Session, *, device_id: int | None = None) -> Sequence[JobRow]:
    """Queued and running jobs, oldest first."""
    query = select(JobRow).where(JobRow.state.in_(("queued", "running")))
    if device_id is not None:
        query = query.where(JobRow.device_id == device_id)
    return session.scalars(query.order_by(JobRow.created_wall_ns, JobRow.id)).all()


def begin_attempt(session: Session, job_id: str, *, lease_counter: int) -> int:
    """Open a new attempt under a new lease, giving up one that is still open; its number is returned."""
    session.execute(select(JobRow.id).where(JobRow.id == job_id).with_for_update())
    now = now_wall_ns()
    session.execute(
        update(AttemptRow)
        .where(AttemptRow.job_id == job_id, AttemptRow.state == "running")
        .values(state="lost", ended_wall_ns=now)
    )
    highest = select(func.max(AttemptRow.number)).where(AttemptRow.job_id == job_id)
    number = (session.execute(highest).scalar() or 0) + 1
    row = get_job(session, job_id)
    attempt = AttemptRow(job_id=job_id, number=number, device_id=row.device_id, state="running")
    attempt.lease_counter, attempt.started_wall_ns = lease_counter, now
    session.add(attempt)
    row.state, row.updated_wall_ns = "running", now
    session.flush()
    return number


def end_attempt(session: Session, job_id: str, number: int, state: str, *, job_state: str) -> None:
    """Close an attempt by the host's decision (lost, cancelled); ``ingest`` closes those that end."""
    now = now_wall_ns()
    session.execute(
        update(AttemptRow)
        .where(AttemptRow.job_id == job_id, AttemptRow.number == number)
        .values(state=state, ended_wall_ns=now)
    )
    session.execute(update(JobRow).where(JobRow.id == job_id).values(state=job_state, updated_wall_ns=now))


def set_job_state(session: Session, job_id: str, state: str) -> None:
    """Set a job's state (see ``db.models.work.JOB_STATES``)."""
    session.execute(
        update(JobRow).where(JobRow.id == job_id).values(state=state, updated_wall_ns=now_wall_ns())
    )


def newest_attempts(session: Session, job_ids: Collection[str]) -> dict[str, int]:
    """The number of each job's newest attempt; none of a job without one."""
    table = AttemptRow
    query = (
        select(table.job_id, func.max(table.number)).where(table.job_id.in_(job_ids)).group_by(table.job_id)
    )
    return {job_id: number for job_id, number in session.execute(query)}  # noqa: C416 - rows are no pairs


def latest_attempt(session: Session, job_id: str) -> AttemptRow | None:
    """The newest attempt of a job."""
    query = select(AttemptRow).where(AttemptRow.job_id == job_id)
    return session.scalars(query.order_by(AttemptRow.number.desc()).limit(1)).one_or_none()


def unheard_attempts(session: Session, job_id: str, *, before: int) -> Sequence[tuple[str, int]]:
    """(job, attempt) of a job's device whose journals may hold more than the store does, when an attempt of
    the job begins: those of it that were given up, and those of other jobs that nobody went on with."""
    table = AttemptRow
    device = select(JobRow.device_id).where(JobRow.id == job_id).scalar_subquery()
    given_up = and_(table.job_id == job_id, table.state == "lost", table.number < before)
    left = and_(table.job_id != job_id, table.state == "running", table.device_id == device)
    query = select(table.job_id, table.number).where(or_(given_up, left)).order_by(table.id)
    return [(job, number) for job, number in session.execute(query)]


def was_done_before(session: Session, job_id: str, number: int) -> bool:
    """Whether an attempt before ``number`` has done the job."""
    table = AttemptRow
    done = select(table.id).where(table.job_id == job_id, table.number < number, table.state == "done")
    return session.execute(done.limit(1)).first() is not None


def open_attempt(session: Session, device_id: int) -> AttemptRow | None:
    """The newest attempt of a device that has not ended, of whatever job."""
    query = select(AttemptRow).where(AttemptRow.device_id == device_id, AttemptRow.state == "running")
    return session.scalars(query.order_by(AttemptRow.lease_counter.desc()).limit(1)).one_or_none()


def lose_attempts(session: Session, device_id: int) -> int:
    """Close a device's open attempts whose journals are gone; their jobs wait for a new attempt."""
    opened = session.scalars(
        select(AttemptRow).where(AttemptRow.device_id == device_id, AttemptRow.state == "running")
    ).all()
    for row in opened:
        end_attempt(session, row.job_id, row.number, "lost", job_state="queued")
    return len(opened)


def progress(session: Session, job_id: str, attempt: int) -> Progress:
    """What the store holds of one attempt's journal, as ``db.ingest`` counted it. Raises: StoreError when
    there is no such attempt."""
    table = AttemptRow
    columns = (table.next_seq, table.records, table.results, table.failures, table.rejected, table.ended)
    query = select(*columns).where(table.job_id == job_id, table.number == attempt)
    row = session.execute(query).one_or_none()
    if row is None:
        raise StoreError(
            f"The store knows no attempt {attempt} of job {job_id}.", "See `stifarm campaign status`."
        )
    return Progress(
        next_seq=row.next_seq,
        gaps=row.next_seq < row.records,
        results=row.results,
        failures=row.failures,
        rejected=row.rejected,
        ended=row.ended,
    )


def results_of(session: Session, job_id: str) -> Mapping[int, UnitResult]:
    """Accepted results of a job by unit; of several attempts the newest one's."""
    return {
        record.payload.unit: record.payload.result
        for record in _accepted(session, job_id, "result")
        if isinstance(record.payload, ResultRecord)
    }


def failures_of(session: Session, job_id: str) -> Mapping[int, FailureRecord]:
    """Failures of a job by unit; of several attempts the newest one's."""
    return {
        record.payload.unit: record.payload
        for record in _accepted(session, job_id, "failure")
        if isinstance(record.payload, FailureRecord)
    }


def rejections_of(session: Session, job_id: str) -> Sequence[JournalRecordRow]:
    """Records of a job that were not believed, with the reason in ``rejected``."""
    table = JournalRecordRow
    query = select(table).where(table.job_id == job_id, table.rejected.is_not(None))
    return session.scalars(query.order_by(table.attempt, table.seq)).all()


def _accepted(session: Session, job_id: str, kind: str) -> list[JournalRecord]:
    table = JournalRecordRow
    query = select(table.record_json).where(
        table.job_id == job_id, table.type == kind, table.rejected.is_(None)
    )
    return [
        JournalRecord.from_json(unpack(text).encode(), source=f"journal of job {job_id}")
        for text in session.scalars(query.order_by(table.attempt, table.seq))
    ]
