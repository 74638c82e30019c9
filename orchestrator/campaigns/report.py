"""What a run found, as tables for people and one document for machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy.orm import Session

from db.artifacts import list_bundles
from db.campaign_samples import Found, accuracy_in, found_in, importance_taken
from db.runs import Accuracy
from db.statistics import Proportion, Summary, summarise, wilson
from orchestrator.campaigns.compare import Compared
from orchestrator.campaigns.status import RunStatus, format_span
from sti_runtime.units import format_bytes, format_ns

REPORT_COLUMNS = (
    "device", "bundle", "task", "engine", "T", ">|S|", "policy", "state", ">median", ">[95 %]", ">p95",
    ">≤ T", ">accuracy", ">[95 %]",
)  # fmt: skip
COMPARE_COLUMNS = ("device", "metric", ">before", ">after", ">ratio", ">[95 %]", "verdict")
STATUS_COLUMNS = (
    "campaign",
    ">run",
    "state",
    ">cells",
    ">done",
    "of the others",
    ">took",
    ">left, about",
    "now",
)


@dataclass(frozen=True)
class Row:
    """One question of a run with what was measured."""

    found: Found
    bundle: str
    latency: Summary | None
    within: Proportion | None
    accuracy: Accuracy | None


def rows_of(session: Session, run_id: int) -> list[Row]:
    """Every question of a run, finished or not."""
    names = {row.digest: row.name for row in list_bundles(session)}
    found = found_in(session, run_id) or found_in(session, run_id, kind="evaluate")
    return [_row(session, one, names.get(one.question.bundle, "?")) for one in found]


def importance_of_run(session: Session, run_id: int) -> list[str]:
    """Which importance a run took from the store, by bundle and task."""
    names = {row.digest: row.name for row in list_bundles(session)}
    return [
        f"importance of {names.get(bundle, '?')} on {task}: {what}"
        for bundle, task, what in importance_taken(session, run_id)
    ]


def _row(session: Session, found: Found, bundle: str) -> Row:
    samples = found.latency_ns
    met = sum(one <= (found.target_ns or 0) for one in samples)
    return Row(
        found,
        bundle,
        summarise(samples),
        wilson(met, len(samples)) if samples else None,
        accuracy_in(session, found),
    )


def report_cells(row: Row) -> tuple[str, ...]:
    """A line of the table."""
    asked, latency, right = row.found.question, row.latency, row.accuracy
    interval = latency.interval if latency else None
    return (
        asked.device,
        row.bundle,
        asked.task,
        asked.engine,
        asked.target,
        format_bytes(asked.preload_bytes),
        asked.policy,
        _states(row.found),
        format_ns(latency.median) if latency else "–",
        f"[{format_ns(interval.low)}–{format_ns(interval.high)}]" if interval else "–",
        format_ns(latency.p95) if latency else "–",
        f"{row.within.count}/{row.within.total}" if row.within else "–",
        f"{right.correct.value_ppm / 1e4:.1f} %" if right else "–",
        f"[{right.correct.low_ppm / 1e4:.1f}–{right.correct.high_ppm / 1e4:.1f}]" if right else "–",
    )


def report_json(row: Row) -> dict[str, Any]:
    """The same for machines: ns, bytes, millionths."""
    found = row.found
    return {
        **asdict(found.question),
        "bundle_name": row.bundle,
        "target_ns": found.target_ns,
        "plans": list(found.plans),
        "states": dict(found.states),
        "causes": list(found.causes),
        "invalid": found.invalid,
        "latency": None if row.latency is None else asdict(row.latency),
        "within_target": None if row.within is None else asdict(row.within),
        "accuracy": None if row.accuracy is None else asdict(row.accuracy),
    }


def causes_of(rows: Sequence[Row]) -> list[str]:
    """Why cells have no samples, each cause once with where it applies first."""
    causes: dict[str, str] = {}
    for row in rows:
        for cause in row.found.causes:
            asked = row.found.question
            causes.setdefault(cause, f"{asked.device}, {asked.policy} at T={asked.target}")
    return [f"{where}: {cause}" for cause, where in causes.items()]


def compare_cells(one: Compared) -> tuple[str, ...]:
    """A line of the comparison."""
    ratio = one.ratio
    return (
        one.device,
        one.metric,
        "–" if one.before is None else f"{one.before:,}",
        "–" if one.after is None else f"{one.after:,}",
        f"{ratio.value_ppm / 1e6:.3f}" if ratio else "–",
        f"[{ratio.low_ppm / 1e6:.3f}–{ratio.high_ppm / 1e6:.3f}]" if ratio else "–",
        one.verdict,
    )


def status_cells(status: RunStatus) -> tuple[str, ...]:
    """A line of the status table."""
    others = [f"{count} {state}" for state, count in sorted(status.counts.items()) if state != "done"]
    now = [f"{device or 'host'}: {what}" for device, what in sorted(status.doing.items())]
    if status.worked_on is False:
        now = ["nobody works on it"]
    return (
        status.campaign,
        str(status.number),
        status.state,
        str(status.total),
        str(status.counts.get("done", 0)),
        ", ".join(others),
        format_span(status.elapsed_ns),
        format_span(status.left_ns),
        "; ".join([*now, *status.waits, *([status.cause] if status.cause else [])]),
    )


def _states(found: Found) -> str:
    if len(found.states) == 1:
        return next(iter(found.states))
    return ", ".join(f"{count} {state}" for state, count in sorted(found.states.items()))
