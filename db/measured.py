"""What was measured of a plan, for plan queries: from what its runs hold of their requests in brief.

A run keeps, in ``measured_json``, the figures of its requests that answers are made of, so that a query
reads one row of each run and none of its requests, whose documents are long. Statistics are made on read.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, chain
from operator import attrgetter
from typing import Any

from sqlalchemy import Select, bindparam, select
from sqlalchemy.orm import Session

from db.documents import numbers, parse
from db.models import PlanRow, RunRow
from db.statistics import Proportion, Summary, summarise, wilson


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


# ------------------------------------------------------------------------------- a run in brief

NOT_KEPT = "{}"
"""``measured_json`` of a run whose requests were compacted before the store kept it."""


@dataclass(frozen=True, slots=True)
class RequestFigures:
    """Of one request what answers are made of, and ``reasons`` for which it is not valid."""

    warmup: bool
    valid: bool
    latency_ns: int
    stall_ns: int
    storage_bytes: int
    planned_bytes: int
    mode_asked: str
    mode_proven: str
    reasons: tuple[str, ...]


def in_brief(requests: Iterable[RequestFigures]) -> str:
    """A run's ``measured_json``: warm-ups left out, all but counts and modes of the valid requests only.

    ``latency_ns``: in their order; ``stall_ns``: the sum; ``storage_bytes``, ``planned_bytes``: [value, how
    many] in ascending order; ``invalid``: how many; ``modes``: [asked, proven, how many] in order.
    """
    counted = [each for each in requests if not each.warmup]
    valid = [each for each in counted if each.valid]
    modes = Counter((each.mode_asked, each.mode_proven) for each in counted)
    return numbers(
        {
            "latency_ns": [each.latency_ns for each in valid],
            "stall_ns": sum(each.stall_ns for each in valid),
            "storage_bytes": sorted(Counter(each.storage_bytes for each in valid).items()),
            "planned_bytes": sorted(Counter(each.planned_bytes for each in valid).items()),
            "invalid": len(counted) - len(valid),
            "modes": [(*mode, count) for mode, count in sorted(modes.items())],
        }
    )


# -------------------------------------------------------------------------------------- a plan


def measured_of(
    session: Session,
    plans: Mapping[int, bool],
    *,
    request_kind: str = "warm",
    jobs: Collection[str] | None = None,
) -> dict[int, Measured]:
    """What was measured of plans, by their row; those without a valid request of that kind have no entry.
    ``jobs``: by these jobs only.

    ``plans``: whether each is one of an emulated device; what was measured on others than such is left out.
    A unit that several attempts of a job ran counts once: as the newest of them ran it.
    """
    by_plan: dict[int, list[Any]] = {}
    asked = {"plans": list(plans), "kind": request_kind}
    for run in session.execute(_runs_measured(), asked).all():
        if jobs is None or run.job_id in jobs:
            by_plan.setdefault(run.plan_id, []).append(run)
    found = {}
    for plan_id, of_plan in by_plan.items():
        newest = [run for run in _newest_attempts(of_plan) if run.emulated == plans[plan_id]]
        measured = _measured(newest, request_kind) if newest else None
        if measured is not None:
            found[plan_id] = measured
    return found


def _measured(runs: Sequence[Any], request_kind: str) -> Measured | None:
    """Of a plan's runs, the newest first."""
    provenance = _provenance(runs[0])
    same = [run for run in runs if _provenance(run) == provenance]
    kept = [run.measured_json for run in same if run.measured_json != NOT_KEPT]
    briefs = parse(f"[{','.join(kept)}]")  # at once: quicker than one by one
    latencies = sorted(chain.from_iterable(brief["latency_ns"] for brief in briefs))
    summary, target_ns = summarise(latencies), runs[0].target_ns
    if summary is None:
        return None
    modes: Counter[tuple[str, str]] = Counter()
    for brief in briefs:
        for asked_mode, proven, count in brief["modes"]:
            modes[asked_mode, proven] += count
    return Measured(
        latency=summary,
        within_target=wilson(bisect_right(latencies, target_ns), len(latencies)),
        stall_share_ppm=1_000_000 * sum(brief["stall_ns"] for brief in briefs) // max(1, sum(latencies)),
        storage_bytes=_median_counted(briefs, "storage_bytes"),
        planned_bytes=_median_counted(briefs, "planned_bytes"),
        memory=_peaks(same),
        invalid=sum(brief["invalid"] for brief in briefs),
        runs=len(same),
        older_runs=len(runs) - len(same),
        request_kind=request_kind,
        io_modes=tuple(sorted({run.io_mode_proven for run in same})),
        modes=tuple((*mode, count) for mode, count in sorted(modes.items())),
        gate_verdict=_worst(run.gate_verdict for run in same),
        mechanisms=_mechanisms(same[0]),
    )


_PROVENANCE = (
    "agent_digest",
    "engine",
    "threads",
    "os_build",
    "kernel",
    "io_mechanism",
    "cpu_mechanism",
    "emulation_json",
)
"""What the runs that are summed up have in common."""

_provenance = attrgetter(*_PROVENANCE)

_RUN_COLUMNS = (
    "plan_id",
    "job_id",
    "unit",
    "attempt",
    "emulated",
    *_PROVENANCE,
    "io_mode_proven",
    "gate_verdict",
    "resident_bytes",
    "preload_bytes",
    "working_bytes",
    "activations_bytes",
    "process_peak_bytes",
    "measured_json",
)
"""What ``measured_of`` needs of a run; the rest is large."""


@cache
def _runs_measured() -> Select[*tuple[Any, ...]]:
    # Of tables and not of their classes: the ORM would look at each row.
    run, plan = RunRow.__table__.c, PlanRow.__table__.c
    query = select(*(run[name] for name in _RUN_COLUMNS), plan.target_ns)
    query = query.join_from(RunRow.__table__, PlanRow.__table__, plan.id == run.plan_id)
    of_plans = run.plan_id.in_(bindparam("plans", expanding=True))
    return query.where(of_plans, run.request_kind == bindparam("kind")).order_by(run.id.desc())


def _median_counted(briefs: Sequence[Mapping[str, Any]], name: str) -> int:
    """``statistics.median`` of values that are given as [value, how many]."""
    counts: Counter[int] = Counter()
    for brief in briefs:
        for value, count in brief[name]:
            counts[value] += count
    values = sorted(counts)
    ends = list(accumulate(counts[value] for value in values))
    low, high = (
        next(value for value, end in zip(values, ends, strict=True) if end > place)
        for place in ((ends[-1] - 1) // 2, ends[-1] // 2)
    )
    return (low + high) // 2


def _newest_attempts(runs: Sequence[Any]) -> list[Any]:
    """Of each unit of a job only the run of its newest attempt. Runs exist of accepted results only."""
    newest: dict[tuple[str, int], int] = {}
    for run in runs:
        unit = (run.job_id, run.unit)
        newest[unit] = max(run.attempt, newest.get(unit, run.attempt))
    return [run for run in runs if run.attempt == newest[run.job_id, run.unit]]


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
