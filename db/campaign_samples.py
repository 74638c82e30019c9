"""What a campaign's run measured, from raw samples: by cell for reports, by metric for comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from db.jobs import task_data_asked
from db.models import (
    CampaignBatchRow,
    CampaignCellRow,
    ComputeSampleRow,
    IoSampleRow,
    JournalRecordRow,
    PlanRow,
    RequestRow,
    RunRow,
)
from db.runs import Accuracy, accuracy_of

_Batch, _Cell = CampaignBatchRow, CampaignCellRow


@dataclass(frozen=True, order=True)
class Question:
    """What a cell asks of a device, whichever the repeat and the night. ``bundle``: its digest.

    ``preload``: |S| as the campaign says it; empty where the policy has no use for it.
    """

    device: str
    bundle: str
    task: str
    engine: str
    target: str
    preload_bytes: int
    policy: str
    preload: str = ""


@dataclass(frozen=True)
class Found:
    """What a run found for one question, its repeats pooled. ``plans``: digests, one unless it was replanned.

    ``jobs``: (job, plan) of its cells, which lead to its samples. ``states``: how many of its cells are in
    each state; ``causes``: of those that are not done.
    """

    question: Question
    kind: str
    target_ns: int | None
    plans: tuple[str, ...]
    jobs: tuple[tuple[str, str], ...]
    latency_ns: tuple[int, ...]
    invalid: int
    states: Mapping[str, int]
    causes: tuple[str, ...]


@dataclass
class _Pool:
    target_ns: int | None = None
    plans: dict[str, None] = field(default_factory=dict)
    jobs: dict[tuple[str, str], None] = field(default_factory=dict)
    latency_ns: list[int] = field(default_factory=list)
    invalid: int = 0
    states: dict[str, int] = field(default_factory=dict)
    causes: dict[str, None] = field(default_factory=dict)


def devices_with_data(session: Session, run_id: int) -> tuple[list[str], list[str]]:
    """(devices that the run asks something of, those that it has something of: measured, or an accuracy that
    was known, which is looked up when the device has been reached)."""
    asked = select(_Batch.device).where(_Batch.run_id == run_id, _Batch.device.is_not(None)).distinct()
    measured = asked.join(_Cell, _Cell.batch_id == _Batch.id).where(
        _Cell.state == "done", or_(_Cell.job_id.is_not(None), _Batch.kind == "evaluate")
    )
    return (
        sorted(name for name in session.scalars(asked) if name),
        sorted(name for name in session.scalars(measured) if name),
    )


def first_cause(session: Session, run_id: int, device: str) -> str | None:
    """Why the first of a device's cells that has no data has none; None when no cell says so."""
    query = select(_Cell.cause).join(_Batch, _Batch.id == _Cell.batch_id)
    query = query.where(_Batch.run_id == run_id, _Batch.device == device, _Cell.state != "done")
    return session.scalars(
        query.where(_Cell.cause.is_not(None)).order_by(_Batch.number, _Cell.number).limit(1)
    ).one_or_none()


def importance_taken(session: Session, run_id: int) -> list[tuple[str, str, str]]:
    """(bundle's digest, task, what) of the importance that a run took from the store."""
    query = (
        select(_Batch.bundle_digest, _Batch.task, _Cell.cause)
        .join(_Cell, _Cell.batch_id == _Batch.id)
        .where(_Batch.run_id == run_id, _Batch.kind == "importance", _Cell.state == "done")
        .where(_Cell.cause.is_not(None))
        .order_by(_Batch.number)
    )
    return [(bundle or "", task or "", cause or "") for bundle, task, cause in session.execute(query)]


def found_in(session: Session, run_id: int, *, kind: str = "execute") -> list[Found]:
    """What the run's cells of a kind found, finished or not, by question."""
    pools: dict[Question, _Pool] = {}
    query = select(_Cell, _Batch).join(_Batch, _Batch.id == _Cell.batch_id)
    query = query.where(_Cell.run_id == run_id, _Batch.kind == kind).order_by(_Batch.number, _Cell.number)
    for cell, batch in session.execute(query):
        question = Question(
            device=batch.device or "",
            bundle=batch.bundle_digest or "",
            task=batch.task or "",
            engine=batch.engine or "",
            target=cell.target or "",
            preload_bytes=cell.preload_bytes or 0,
            policy=cell.policy or "",
            preload=cell.preload or "",
        )
        pool = pools.setdefault(question, _Pool())
        pool.target_ns = cell.target_ns or pool.target_ns
        pool.states[cell.state] = pool.states.get(cell.state, 0) + 1
        if cell.cause and cell.state != "done":
            pool.causes[cell.cause] = None
        if cell.plan_digest:
            pool.plans[cell.plan_digest] = None
        if cell.job_id and cell.plan_digest:
            pool.jobs[cell.job_id, cell.plan_digest] = None
    # Questions with one plan share its samples.
    requests = _requests(session, {job for pool in pools.values() for job, _ in pool.jobs})
    for pool in pools.values():
        for pair in pool.jobs:
            valid, invalid = requests.get(pair, ((), 0))
            pool.latency_ns += valid
            pool.invalid += invalid
    return [
        Found(
            question,
            kind,
            pool.target_ns,
            tuple(pool.plans),
            tuple(pool.jobs),
            tuple(pool.latency_ns),
            pool.invalid,
            pool.states,
            tuple(pool.causes),
        )
        for question, pool in sorted(pools.items())
    ]


def content_in(session: Session, found: Found) -> str | None:
    """Digest of the content of the newest plan that ran: plans of one content have one accuracy."""
    if not found.plans:
        return None
    query = select(PlanRow.content_digest).where(PlanRow.digest == found.plans[-1]).limit(1)
    return session.scalars(query).one_or_none()


def accuracy_in(session: Session, found: Found, others: Sequence[Found] = ()) -> Accuracy | None:
    """The accuracy of what ran, of its newest plan, on the rows that its newest job asked for.

    ``others``: of its run; what was known has no job, and is on the rows that theirs for its task asked for.
    """
    content = content_in(session, found)
    if content is None:
        return None
    alike = [one for one in others if one.question.task == found.question.task]
    jobs = found.jobs or [pair for one in alike for pair in one.jobs]
    return accuracy_of(
        session,
        content,
        found.question.task,
        engine=found.question.engine,
        task_data_digest=task_data_asked(session, {job for job, _ in jobs}),
    )


@dataclass(frozen=True, order=True)
class Profiled:
    """What a device was profiled for, and the ``metric`` of it: "read", ps for each byte, or "compute", ns of
    a widest layer. ``bundle``: its digest."""

    device: str
    bundle: str
    engine: str
    metric: Literal["read", "compute"]


def profile_metrics(session: Session, run_id: int) -> dict[Profiled, list[int]]:
    """Raw samples of a run's profiles."""
    query = (
        select(_Batch.device, _Batch.bundle_digest, _Batch.engine, _Cell.job_id)
        .join(_Cell, _Cell.batch_id == _Batch.id)
        .where(_Batch.run_id == run_id, _Batch.kind == "profile", _Cell.job_id.is_not(None))
    )
    found: dict[Profiled, list[int]] = {}
    for device, bundle, engine, job_id in session.execute(query):
        of = device or "", bundle or "", engine or ""
        journal = select(JournalRecordRow.id).where(JournalRecordRow.job_id == job_id)
        io, compute = IoSampleRow, ComputeSampleRow
        reads = select(io.duration_ns, io.read_bytes).where(
            io.journal_id.in_(journal), io.valid, io.warmup.is_(False), io.beside_compute.is_(False)
        )
        per_byte = [1000 * duration // size for duration, size in session.execute(reads) if size]
        found.setdefault(Profiled(*of, "read"), []).extend(per_byte)
        of_job = (compute.journal_id.in_(journal), compute.valid, compute.warmup.is_(False))
        widest = session.scalar(select(func.max(compute.width)).where(*of_job))
        layers = select(compute.compute_ns).where(*of_job, compute.width == widest, compute.read_bytes == 0)
        found.setdefault(Profiled(*of, "compute"), []).extend(session.scalars(layers))
    return found


def _requests(session: Session, jobs: set[str]) -> Mapping[tuple[str, str], tuple[Sequence[int], int]]:
    """(valid latencies, how many were not) by (job, plan); of a unit's attempts the newest counts."""
    runs: dict[tuple[str, int], RunRow] = {}
    query = select(RunRow).where(RunRow.job_id.in_(jobs)).order_by(RunRow.attempt)
    for run in session.scalars(query):
        runs[run.job_id, run.unit] = run
    owner = {run.id: (run.job_id, run.plan_digest) for run in runs.values()}
    columns = select(RequestRow.run_id, RequestRow.latency_ns, RequestRow.valid)
    rows = session.execute(
        columns.where(RequestRow.run_id.in_(list(owner)), RequestRow.warmup.is_(False))
    ).all()
    found: dict[tuple[str, str], tuple[list[int], int]] = {}
    for run_id, latency_ns, valid in rows:
        latencies, invalid = found.setdefault(owner[run_id], ([], 0))
        if valid:
            latencies.append(latency_ns)
        else:
            found[owner[run_id]] = (latencies, invalid + 1)
    return found
