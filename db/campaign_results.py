"""What results of a campaign's run rest on: its samples with memory and stalls, plans, devices, checks."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from db.campaign_samples import Found
from db.documents import parse
from db.measured import PeakMemory
from db.models import (
    DeviceProfileRow,
    DeviceRow,
    EvaluationRow,
    ImportanceProfileRow,
    PlanRow,
    RequestRow,
    RunRow,
    TaskDataRow,
)
from sti_runtime.messages import LayerTrace, computes_alike

_AT_ONCE = 500

T = TypeVar("T")


@dataclass(frozen=True)
class Samples:
    """Valid requests of one question, warm-ups left out, and the runs they are of. Units: ns, bytes."""

    latency_ns: tuple[int, ...]
    stall_ns: tuple[int, ...]
    storage_bytes: tuple[int, ...]
    invalid: int
    memory: PeakMemory
    runs: tuple[int, ...]

    @property
    def stall_share_ppm(self) -> int:
        """Summed stall over summed latency."""
        return 1_000_000 * sum(self.stall_ns) // max(1, sum(self.latency_ns))


@dataclass(frozen=True)
class SpotCheck:
    """Classes that timed requests of a device gave, beside those that the evaluation of the same plan content
    gave for the same rows."""

    device: str
    compared: int
    different: int


@dataclass(frozen=True)
class Trace:
    """One request: its layers, latency and stall, ns."""

    layers: tuple[LayerTrace, ...]
    latency_ns: int
    stall_ns: int


def samples_of(session: Session, found: Sequence[Found]) -> list[Samples | None]:
    """The samples of each question, in order; None where there are no valid ones."""
    pairs = {pair for one in found for pair in one.jobs}
    runs = _newest_runs(session, {job for job, _ in pairs})
    by_pair: dict[tuple[str, str], list[RunRow]] = {}
    for run in runs:
        by_pair.setdefault((run.job_id, run.plan_digest), []).append(run)
    requests = _requests(session, [run.id for run in runs])
    return [_samples([r for pair in one.jobs for r in by_pair.get(pair, ())], requests) for one in found]


def plans_by_digest(session: Session, digests: Collection[str]) -> dict[str, PlanRow]:
    """A row of each plan."""
    found: dict[str, PlanRow] = {}
    for some in _parts(sorted(digests)):
        for row in session.scalars(select(PlanRow).where(PlanRow.digest.in_(some)).order_by(PlanRow.id)):
            found[row.digest] = row
    return found


def profiles_by_digest(session: Session, digests: Collection[str]) -> dict[str, DeviceProfileRow]:
    """A row of each device profile."""
    query = select(DeviceProfileRow).where(DeviceProfileRow.digest.in_(sorted(digests)))
    return {row.digest: row for row in session.scalars(query.order_by(DeviceProfileRow.id))}


def importance_by_digest(session: Session, digests: Collection[str]) -> dict[str, ImportanceProfileRow]:
    """A row of each importance profile."""
    query = select(ImportanceProfileRow).where(ImportanceProfileRow.digest.in_(sorted(digests)))
    return {row.digest: row for row in session.scalars(query)}


def devices_by_name(session: Session, names: Collection[str]) -> dict[str, DeviceRow]:
    """The current device of each name."""
    query = select(DeviceRow).where(DeviceRow.name.in_(sorted(names)), DeviceRow.retired_wall_ns.is_(None))
    return {row.name: row for row in session.scalars(query)}


def runs_by_id(session: Session, ids: Collection[int]) -> list[RunRow]:
    """These runs, oldest first."""
    found: list[RunRow] = []
    for some in _parts(sorted(ids)):
        found += session.scalars(select(RunRow).where(RunRow.id.in_(some)).order_by(RunRow.id))
    return found


def evaluations(
    session: Session, contents: Collection[str], task_data: Collection[str]
) -> dict[str, list[EvaluationRow]]:
    """Evaluations of contents on any of these task data, oldest first."""
    found: dict[str, list[EvaluationRow]] = {}
    for some in _parts(sorted(contents)):
        query = select(EvaluationRow).where(
            EvaluationRow.content_digest.in_(some), EvaluationRow.task_data_digest.in_(sorted(task_data))
        )
        for row in session.scalars(query.order_by(EvaluationRow.id)):
            found.setdefault(row.content_digest, []).append(row)
    return found


def spot_checks(session: Session, runs: Sequence[RunRow], devices: Mapping[int, str]) -> list[SpotCheck]:
    """Compare every timed request of the runs with the evaluation of its plan's content, by device.

    ``devices``: names by row id. A content's accuracy is measured once, on one device: this is the check that
    the others agree. Data with unlabelled rows are left out: their evaluations do not name rows.
    """
    plans = plans_by_digest(session, {run.plan_digest for run in runs})
    known = evaluations(
        session, {plan.content_digest for plan in plans.values()}, {run.task_data_digest for run in runs}
    )
    table = TaskDataRow
    named = table.digest.in_(sorted({run.task_data_digest for run in runs}))
    rows = dict(session.execute(select(table.digest, table.rows).where(named)).all())
    expected: dict[int, tuple[str, list[int]]] = {}
    for run in runs:
        for row in known.get(plans[run.plan_digest].content_digest, ()):
            if row.task_data_digest != run.task_data_digest or not computes_alike(row.engine, run.engine):
                continue
            classes = [int(number) for number in parse(row.predictions_json)]
            if len(classes) == rows.get(run.task_data_digest):
                expected[run.id] = (devices.get(run.device_id, "?"), classes)
            break
    counts: dict[str, list[int]] = {}
    columns = select(RequestRow.run_id, RequestRow.task_row, RequestRow.logits_json)
    for some in _parts(sorted(expected)):
        for run_id, task_row, logits_json in session.execute(columns.where(RequestRow.run_id.in_(some))):
            device, classes = expected[run_id]
            logits = parse(logits_json)
            count = counts.setdefault(device, [0, 0])
            count[0] += 1
            count[1] += max(range(len(logits)), key=logits.__getitem__) != classes[task_row]
    return [SpotCheck(device, count[0], count[1]) for device, count in sorted(counts.items())]


def usual_request(session: Session, runs: Collection[int]) -> Trace | None:
    """The trace of the valid request of these runs whose latency is nearest to their median."""
    table = RequestRow
    valid = (table.run_id.in_(sorted(runs)), table.valid, table.warmup.is_(False))
    found = session.execute(
        select(table.id, table.latency_ns).where(*valid).order_by(table.latency_ns, table.id)
    )
    ordered = found.all()
    if not ordered:
        return None
    row = session.get_one(RequestRow, ordered[(len(ordered) - 1) // 2].id)
    layers = tuple(LayerTrace.model_validate(layer) for layer in parse(row.trace_json))
    return Trace(layers, row.latency_ns, row.stall_ns)


# ------------------------------------------------------------------ parts


def _newest_runs(session: Session, jobs: Collection[str]) -> list[RunRow]:
    """Runs of jobs; of a unit's attempts the newest."""
    newest: dict[tuple[str, int], RunRow] = {}
    for some in _parts(sorted(jobs)):
        for run in session.scalars(select(RunRow).where(RunRow.job_id.in_(some)).order_by(RunRow.attempt)):
            newest[run.job_id, run.unit] = run
    return list(newest.values())


def _requests(session: Session, runs: Sequence[int]) -> dict[int, list[tuple[bool, int, int, int]]]:
    table = RequestRow
    columns = select(table.run_id, table.valid, table.latency_ns, table.stall_ns, table.storage_bytes)
    found: dict[int, list[tuple[bool, int, int, int]]] = {}
    for some in _parts(runs):
        counted = columns.where(table.run_id.in_(some), table.warmup.is_(False)).order_by(table.id)
        for run_id, valid, latency_ns, stall_ns, storage_bytes in session.execute(counted):
            found.setdefault(run_id, []).append((valid, latency_ns, stall_ns, storage_bytes))
    return found


def _samples(
    runs: Sequence[RunRow], requests: Mapping[int, Sequence[tuple[bool, int, int, int]]]
) -> Samples | None:
    everything = [row for run in runs for row in requests.get(run.id, ())]
    valid = [row for row in everything if row[0]]
    if not valid:
        return None
    processes = [run.process_peak_bytes for run in runs if run.process_peak_bytes is not None]
    return Samples(
        latency_ns=tuple(row[1] for row in valid),
        stall_ns=tuple(row[2] for row in valid),
        storage_bytes=tuple(row[3] for row in valid),
        invalid=len(everything) - len(valid),
        memory=PeakMemory(
            resident_bytes=max(run.resident_bytes for run in runs),
            preload_bytes=max(run.preload_bytes for run in runs),
            working_bytes=max(run.working_bytes for run in runs),
            activations_bytes=max(run.activations_bytes for run in runs),
            process_bytes=max(processes, default=None),
        ),
        runs=tuple(run.id for run in runs),
    )


def _parts(items: Sequence[T]) -> Iterable[Sequence[T]]:
    """Few enough for one query."""
    return (items[start : start + _AT_ONCE] for start in range(0, len(items), _AT_ONCE))
