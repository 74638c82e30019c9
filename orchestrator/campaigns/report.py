"""What a run found, as tables for people and one document for machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sqlalchemy.orm import Session

from db.artifacts import bundle_names
from db.campaign_samples import Found, accuracy_in, found_in, importance_taken
from db.runs import Accuracy
from db.statistics import Proportion, Summary, summarise, wilson
from orchestrator.campaigns.status import RunStatus, format_span
from sti_runtime.units import NONE, format_bytes, format_ns, in_words

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
    names = bundle_names(session)
    timed, scored = found_in(session, run_id), found_in(session, run_id, kind="evaluate")
    return [
        _row(session, one, names.get(one.question.bundle, "?"), [*timed, *scored]) for one in timed or scored
    ]


def importance_of_run(session: Session, run_id: int) -> list[str]:
    """Which importance a run took from the store, by bundle and task."""
    names = bundle_names(session)
    return [
        f"importance of {names.get(bundle, '?')} on {task}: {what}"
        for bundle, task, what in importance_taken(session, run_id)
    ]


def _row(session: Session, found: Found, bundle: str, others: Sequence[Found]) -> Row:
    samples = found.latency_ns
    met = sum(one <= (found.target_ns or 0) for one in samples)
    return Row(
        found,
        bundle,
        summarise(samples),
        wilson(met, len(samples)) if samples else None,
        accuracy_in(session, found, others),
    )


@dataclass(frozen=True)
class ReportTable:
    """The questions of one device with what was measured, ready to show."""

    device: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def in_common(rows: Sequence[Row]) -> str:
    """What all questions of a run have in common, for its title."""
    texts = [_asked(row) for row in rows]
    same = [name for name in _ASKED if len({text[name] for text in texts} - {NONE}) == 1]
    first = {name: next(text[name] for text in texts if text[name] != NONE) for name in same}
    words = {"bundle": "bundle ", "task": "task ", "|S|": "|S| = "}
    return ", ".join(f"{words.get(name, '')}{text}" for name, text in first.items())


def report_tables(rows: Sequence[Row]) -> list[ReportTable]:
    """A table for each device, with columns of what is not ``in_common``; what has no samples has a state."""
    texts = [_asked(row) for row in rows]
    varying = [name for name in _ASKED if len({text[name] for text in texts} - {NONE}) > 1]
    mixed = any(row.latency is not None and set(row.found.states) != {"done"} for row in rows)
    columns = [
        *(">|S|" if name == "|S|" else name for name in varying), "T", "median [95 %]", ">p95", ">≤ T",
        "accuracy [95 %]", *(["state"] if mixed else []),
    ]  # fmt: skip
    return [
        ReportTable(
            device,
            tuple(columns),
            tuple(
                (*(text[name] for name in varying), *_measured(row), *([_states(row.found)] if mixed else []))
                for row, text in zip(rows, texts, strict=True)
                if row.found.question.device == device
            ),
        )
        for device in dict.fromkeys(row.found.question.device for row in rows)
    ]


_ASKED = ("bundle", "task", "engine", "policy", "|S|")


def _asked(row: Row) -> dict[str, str]:
    asked = row.found.question
    used = asked.preload or asked.preload_bytes
    size = format_bytes(asked.preload_bytes) if used else NONE
    return dict(zip(_ASKED, (row.bundle, asked.task, asked.engine, asked.policy, size), strict=True))


def _measured(row: Row) -> tuple[str, ...]:
    """T and what was measured."""
    latency, right = row.latency, row.accuracy
    return (
        row.found.question.target,
        _median(latency) if latency else _states(row.found),
        format_ns(latency.p95) if latency else NONE,
        f"{row.within.count}/{row.within.total}" if row.within else NONE,
        _share(right.correct) if right else NONE,
    )


def _share(share: Proportion) -> str:
    return f"{share.value_ppm / 1e4:.1f} % [{share.low_ppm / 1e4:.1f}–{share.high_ppm / 1e4:.1f}]"


def _median(latency: Summary) -> str:
    """A median with its interval, whose unit stands once where all have one."""
    median, interval = format_ns(latency.median), latency.interval
    if interval is None:
        return median
    ends = [format_ns(interval.low), format_ns(interval.high)]
    if len({text.split()[1] for text in (median, *ends)}) == 1:
        ends = [text.split()[0] for text in ends]
    return f"{median} [{'–'.join(ends)}]"


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
            causes.setdefault(in_words(cause), f"{asked.device}, {asked.policy} at T = {asked.target}")
    return [f"{where}: {cause}" for cause, where in causes.items()]


def status_cells(status: RunStatus) -> tuple[str, ...]:
    """A line of the status table."""
    now = [f"{device or 'host'}: {what}" for device, what in sorted(status.doing.items())]
    if status.worked_on is False:
        now = ["nobody works on it"]
    return (
        status.campaign,
        str(status.number),
        status.state,
        str(status.total),
        str(status.counts.get("done", 0)),
        ", ".join(_not_done(status)),
        format_span(status.elapsed_ns),
        format_span(status.left_ns),
        "; ".join([*now, *status.waits, *([status.cause] if status.cause else [])]),
    )


def counted(status: RunStatus) -> str:
    """A run's cells: how many are done, what became of the others, and how many there are: "24 + 4 infeasible
    of 28"."""
    return f"{' + '.join([str(status.counts.get('done', 0)), *_not_done(status)])} of {status.total}"


def _not_done(status: RunStatus) -> list[str]:
    return [f"{count} {state}" for state, count in sorted(status.counts.items()) if state != "done"]


def _states(found: Found) -> str:
    if len(found.states) == 1:
        return next(iter(found.states))
    return ", ".join(f"{count} {state}" for state, count in sorted(found.states.items()))
