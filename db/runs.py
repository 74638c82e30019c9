"""Queries about executed plans: latency, stalls, memory, accuracy. Statistics are made here, on read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, Select, String, bindparam, cast, func, select
from sqlalchemy.orm import Session

from db.documents import parse
from db.models import DeviceRow, EvaluationRow, PlanRow, RequestRow, RunRow, TaskDataRow
from db.statistics import Proportion, Summary, median, summarise, wilson
from sti_runtime.messages import computes_alike

SEEN_SPLITS = ("train", "profile", "profile-even", "profile-odd")
"""Splits that training or planning has seen: no accuracy is reported from them unless asked."""


@dataclass(frozen=True)
class PeakMemory:
    """Largest of each part over the runs, in bytes. ``process``: VmHWM, None for the torch engine."""

    resident_bytes: int
    preload_bytes: int
    working_bytes: int
    activations_bytes: int
    process_bytes: int | None

    @property
    def parts_bytes(self) -> int:
        """Sum of the parts."""
        return self.resident_bytes + self.preload_bytes + self.working_bytes + self.activations_bytes


@dataclass(frozen=True)
class Measured:
    """Valid requests of one plan and kind, warm-ups left out, all under the provenance of the newest run.

    ``stall_share_ppm``: summed stall over summed latency. ``storage_bytes``: median per request.
    ``modes``: (mode asked, mode proven, requests) of all of them, the invalid ones too.
    ``invalid``: requests left out as invalid. ``older_runs``: runs left out because agent, engine, OS or
    mechanism of emulation differ from the newest run's. ``gate_verdict``: the worst among the runs.
    """

    latency: Summary
    within_target: Proportion
    stall_share_ppm: int
    storage_bytes: int
    planned_bytes: int
    memory: PeakMemory
    invalid: int
    runs: int
    older_runs: int
    request_kind: str
    io_modes: tuple[str, ...]
    modes: tuple[tuple[str, str, int], ...]
    gate_verdict: str
    mechanisms: tuple[str, ...]


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of one content on one task data. ``loss_nano``: mean cross-entropy, nano-nats."""

    correct: Proportion
    loss_nano: int
    task_data_digest: str
    split: str
    wall_ns: int


@dataclass(frozen=True)
class Evaluated:
    """One evaluation: mean cross-entropy in nano-nats over ``rows`` labelled rows; ``device`` by name."""

    rows: int
    correct: int
    loss_nano: int
    device: str


def evaluations_on(
    session: Session, content_digests: Collection[str], task_data_digest: str, *, engine: str
) -> dict[str, Evaluated]:
    """By content, the first evaluation on a task data with an engine that computes like ``engine``."""
    row = EvaluationRow
    query = (
        select(row.content_digest, row.engine, row.rows, row.correct, row.loss_nano, DeviceRow.name)
        .join(DeviceRow, DeviceRow.id == row.device_id)
        .where(row.task_data_digest == task_data_digest, row.content_digest.in_(sorted(content_digests)))
        .order_by(row.id)
    )
    found: dict[str, Evaluated] = {}
    for content, by, rows, correct, loss_nano, device in session.execute(query):
        if computes_alike(by, engine):
            found.setdefault(content, Evaluated(rows, correct, loss_nano, device))
    return found


def runs_of(session: Session, plan_id: int, *, request_kind: str | None = None) -> Sequence[RunRow]:
    """All runs of a plan, newest first."""
    query = select(RunRow).where(RunRow.plan_id == plan_id)
    if request_kind is not None:
        query = query.where(RunRow.request_kind == request_kind)
    return session.scalars(query.order_by(RunRow.id.desc())).all()


def measured_of(
    session: Session, plan_id: int, *, request_kind: str = "warm", emulated: bool = False
) -> Measured | None:
    """What was measured of a plan; None when it has no valid request of that kind.

    A unit that several attempts of a job ran counts once: as the newest of them ran it.
    """
    asked = {"plan": plan_id, "kind": request_kind}
    newest = _newest_attempts(session.execute(_runs_measured(), asked).all())
    runs = [run for run in newest if run.emulated == emulated]
    if not runs:
        return None
    same = [run for run in runs if _provenance(run) == _provenance(runs[0])]
    groups = session.execute(_requests_measured(), {"runs": [run.id for run in same]}).all()
    valid = [group for group in groups if group.valid]
    if not valid:
        return None
    latencies = [value for group in valid for value in _numbers(group.latencies)]
    summary, target_ns = summarise(latencies), runs[0].target_ns
    assert summary is not None
    modes: Counter[tuple[str, str]] = Counter()
    for group in groups:
        modes[group.mode_asked, group.mode_proven] += group.requests
    return Measured(
        latency=summary,
        within_target=wilson(sum(latency <= target_ns for latency in latencies), len(latencies)),
        stall_share_ppm=1_000_000 * sum(int(group.stalled) for group in valid) // max(1, sum(latencies)),
        storage_bytes=median([value for group in valid for value in _numbers(group.stored)]),
        planned_bytes=median([value for group in valid for value in _numbers(group.planned)]),
        memory=_peaks(same),
        invalid=sum(group.requests for group in groups if not group.valid),
        runs=len(same),
        older_runs=len(runs) - len(same),
        request_kind=request_kind,
        io_modes=tuple(sorted({run.io_mode_proven for run in same})),
        modes=tuple((asked, proven, count) for (asked, proven), count in sorted(modes.items())),
        gate_verdict=_worst(run.gate_verdict for run in same),
        mechanisms=_mechanisms(same[0]),
    )


_RUN_COLUMNS = (
    "id",
    "job_id",
    "unit",
    "attempt",
    "emulated",
    "agent_digest",
    "engine",
    "threads",
    "os_build",
    "kernel",
    "io_mechanism",
    "cpu_mechanism",
    "emulation_json",
    "io_mode_proven",
    "gate_verdict",
    "resident_bytes",
    "preload_bytes",
    "working_bytes",
    "activations_bytes",
    "process_peak_bytes",
)
"""What ``measured_of`` needs of a run; the rest is large."""


@cache
def _runs_measured() -> Select[*tuple[Any, ...]]:
    # Of tables and not of their classes, here and below: the ORM would look at each row.
    run, plan = RunRow.__table__.c, PlanRow.__table__.c
    query = select(*(run[name] for name in _RUN_COLUMNS), plan.target_ns)
    query = query.join_from(RunRow.__table__, PlanRow.__table__, plan.id == run.plan_id)
    of_plan = query.where(run.plan_id == bindparam("plan"), run.request_kind == bindparam("kind"))
    return of_plan.order_by(run.id.desc())


@cache
def _requests_measured() -> Select[*tuple[Any, ...]]:
    """Requests by verdict and mode: how many, their stalls' sum, and lists of their other figures, which are
    read faster than as many rows."""
    # Of columns of the index ix_requests_measured only: the rows themselves are long, and not looked at.
    row = RequestRow.__table__.c
    kind = (row.valid, row.mode_asked, row.mode_proven)
    return (
        select(
            *kind,
            func.count().label("requests"),
            func.sum(row.stall_ns).label("stalled"),
            _listed(row.latency_ns).label("latencies"),
            _listed(row.storage_bytes).label("stored"),
            _listed(row.planned_bytes).label("planned"),
        )
        .where(row.run_id.in_(bindparam("runs", expanding=True)), row.warmup.is_(False))
        .group_by(*kind)
    )


def _listed(column: ColumnElement[int]) -> ColumnElement[str]:
    return func.aggregate_strings(cast(column, String), ",")


def _numbers(listed: str) -> Iterable[int]:
    return map(int, listed.split(","))


def accuracy_of(
    session: Session,
    content_digest: str,
    task: str,
    *,
    engine: str | None = None,
    split: str | None = None,
    task_data_digest: str | None = None,
) -> Accuracy | None:
    """The newest evaluation of a content on a task's data; None when it was never evaluated.

    ``engine``: that engine's evaluation if there is one, else that of one that computes alike (another
    arithmetic has another accuracy); None: any engine's. ``split``: by default any that
    was neither trained nor planned on. ``task_data_digest``: on exactly these data, of whatever split;
    without it, data that were replaced since may answer.
    """
    conditions = [TaskDataRow.task == task]
    if task_data_digest is not None:
        conditions.append(TaskDataRow.digest == task_data_digest)
    if split is not None:
        conditions.append(TaskDataRow.split == split)
    elif task_data_digest is None:
        conditions.append(TaskDataRow.split.not_in(SEEN_SPLITS))
    found = session.execute(_evaluations().where(*conditions), {"content": content_digest})
    return _newest_accuracy(found.all(), engine)


def accuracy_on(
    session: Session, content_digest: str, task_data_digests: Collection[str], *, engine: str | None = None
) -> Accuracy | None:
    """As ``accuracy_of``, on any of the named task data."""
    given = {"content": content_digest, "data": list(task_data_digests)}
    return _newest_accuracy(session.execute(_evaluations_on(), given).all(), engine)


def predictions_of(
    session: Session, content_digest: str, task_data_digest: str, *, engine: str | None = None
) -> tuple[int, ...] | None:
    """Predicted classes by the first evaluation of a content on a task data, with an engine that computes
    like ``engine`` (None: any); None when there is none.

    One for each labelled row, in the order of the data: rows without a label are not evaluated, so an
    index into the data is one into this tuple only where all rows have labels.
    """
    query = (
        select(EvaluationRow.engine, EvaluationRow.predictions_json)
        .where(
            EvaluationRow.content_digest == content_digest,
            EvaluationRow.task_data_digest == task_data_digest,
        )
        .order_by(EvaluationRow.id)
    )
    for row in session.execute(query):
        if engine is None or computes_alike(row.engine, engine):
            return tuple(int(value) for value in parse(row.predictions_json))
    return None


@cache
def _evaluations() -> Select[*tuple[Any, ...]]:
    """Evaluations of a content, the newest first."""
    row = EvaluationRow
    return (
        select(
            row.engine,
            row.correct,
            row.rows,
            row.loss_nano,
            row.task_data_digest,
            row.wall_ns,
            TaskDataRow.split,
        )
        .join(TaskDataRow, TaskDataRow.digest == row.task_data_digest)
        .where(row.content_digest == bindparam("content"))
        .order_by(row.id.desc())
    )


@cache
def _evaluations_on() -> Select[*tuple[Any, ...]]:
    return _evaluations().where(TaskDataRow.digest.in_(bindparam("data", expanding=True)))


def _newest_accuracy(evaluations: Sequence[Any], engine: str | None) -> Accuracy | None:
    found = [each for each in evaluations if engine is None or computes_alike(each.engine, engine)]
    if not found:
        return None
    best = next((each for each in found if each.engine == engine), found[0])
    correct = wilson(best.correct, best.rows)
    return Accuracy(correct, best.loss_nano, best.task_data_digest, best.split, best.wall_ns)


def _newest_attempts(runs: Sequence[Any]) -> list[Any]:
    """Of each unit of a job only the run of its newest attempt. Runs exist of accepted results only."""
    newest: dict[tuple[str, int], int] = {}
    for run in runs:
        unit = (run.job_id, run.unit)
        newest[unit] = max(run.attempt, newest.get(unit, run.attempt))
    return [run for run in runs if run.attempt == newest[run.job_id, run.unit]]


def _provenance(run: Any) -> tuple[object, ...]:
    return (
        run.agent_digest,
        run.engine,
        run.threads,
        run.os_build,
        run.kernel,
        run.io_mechanism,
        run.cpu_mechanism,
        run.emulation_json,
    )


def _peaks(runs: Sequence[Any]) -> PeakMemory:
    processes = [run.process_peak_bytes for run in runs if run.process_peak_bytes is not None]
    return PeakMemory(
        resident_bytes=max(run.resident_bytes for run in runs),
        preload_bytes=max(run.preload_bytes for run in runs),
        working_bytes=max(run.working_bytes for run in runs),
        activations_bytes=max(run.activations_bytes for run in runs),
        process_bytes=max(processes) if processes else None,
    )


def _worst(verdicts: Iterable[str]) -> str:
    order = ("fail", "ungated", "pass")
    return min(verdicts, key=order.index)


def _mechanisms(run: Any) -> tuple[str, ...]:
    named = (("io", run.io_mechanism), ("cpu", run.cpu_mechanism))
    return tuple(f"{what}: {mechanism}" for what, mechanism in named if mechanism is not None)
