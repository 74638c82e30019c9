"""Rows of what the CLI shows, made from store answers. Pure: no printing here."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from db.grounds import ProfileRef
from db.measured import Measured
from db.plan_answers import PlanAnswer
from orchestrator.distinctions import IMPORTANCE, Asked, Distinction, distinctions, ranking_of
from orchestrator.measure import Answer
from sti_runtime.errors import ResourceError, StifarmError
from sti_runtime.profile import DeviceProfile
from sti_runtime.units import NONE, NS_PER_S, format_bytes, format_ns, format_ns_up

PLAN_COLUMNS = (
    ">T", "n×m", ">bits", ">preload", ">read", ">predicted", "median [95 %]", ">p95", ">≤ T",
    ">stall", "accuracy [95 %]", ">memory",
)  # fmt: skip
PLAN_LESS = ("stall", "preload", "memory", "read", "bits", "p95")
"""Columns that a narrow terminal does without, the least wanted first."""

SUBMODEL_COLUMN = "n×m"
PLAN_CAPTION = (
    "T: target latency. n×m: submodel. bits: mean fidelity. preload: bytes kept in memory.\n"
    "read: bytes the kernel read from storage for a request. predicted: at p95 figures.\n"
    "median, p95: measured. stall: share of the latency spent waiting for shards; it and accuracy in %.\n"
    "memory: peak of the engine's buffers."
)


BUFFERS_CAPTION = "|S|: preload buffer. W: working buffer."
"""Of the columns that only some listings have."""


@dataclass(frozen=True)
class PlanTable:
    """The plans of one device, ready to show."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    footnotes: tuple[str, ...] = ()
    """What a row's mark behind its submodel stands for."""


def plan_tables(found: Sequence[PlanAnswer], answers: Sequence[Answer] = ()) -> list[PlanTable]:
    """One table for each device, in order of T and policy; questions without a plan among them.

    What all rows of a device have in common stands in its title, not in every row; what tells them apart
    (``distinctions``) has columns, the importance profile notes.
    """
    devices = list(dict.fromkeys([a.device for a in found] + [a.device for a in answers]))
    tables = []
    for device in devices:
        mine = [answer for answer in found if answer.device == device]
        lines = [_Line(Asked.by(a), plan_cells(a), notes(a)) for a in mine]
        lines += [
            _Line(Asked.without_plan(a), _infeasible_cells(a), _infeasible_notes(a))
            for a in answers
            if a.device == device and a.infeasible is not None
        ]
        if not lines:
            continue
        lines.sort(key=lambda line: line.asked.target_ns)
        planned = [line.notes for line in lines if line.cells[1] != NONE]
        common = [note for note in planned[0] if all(note in each for each in planned)] if planned else []
        if mine and mine[0].emulated:
            common = list(dict.fromkeys([*(n for n in notes(mine[0]) if n.startswith("emulated")), *common]))
        apart = distinctions([line.asked for line in lines])
        ranked = [_ranked(apart, number) for number in range(len(lines))]
        extras = [
            ", ".join([*first, *(note for note in line.notes if note not in common)])
            for first, line in zip(ranked, lines, strict=True)
        ]
        columns = [*PLAN_COLUMNS]
        rows = [list(line.cells) for line in lines]
        for place, distinct in enumerate((each for each in apart if each.name != IMPORTANCE), 1):
            columns.insert(place, distinct.column)
            for row, cell in zip(rows, distinct.cells, strict=True):
                row.insert(place, cell or NONE)
        noted = list(dict.fromkeys(filter(None, extras)))
        for row, extra in zip(rows, extras, strict=True):
            if extra:
                row[columns.index(SUBMODEL_COLUMN)] += _mark(noted.index(extra) + 1)
        tables.append(
            PlanTable(
                " — ".join([device, *common]),
                tuple(columns),
                tuple(tuple(row) for row in rows),
                tuple(f"{_mark(number)} {text}" for number, text in enumerate(noted, 1)),
            )
        )
    return tables


@dataclass(frozen=True)
class _Line:
    """A row of plans before it has the columns that tell it apart."""

    asked: Asked
    cells: Sequence[str]
    notes: Sequence[str]


def _ranked(apart: Sequence[Distinction], number: int) -> list[str]:
    """The note that names a line's importance profile, where there are several: a column would be wide."""
    cells = (each.cells[number] for each in apart if each.name == IMPORTANCE)
    return [f"{IMPORTANCE}: {cell}" for cell in cells if cell is not None]


def plan_caption(tables: Sequence[PlanTable]) -> str:
    """What the columns of these tables are."""
    shown = {column.lstrip(">") for table in tables for column in table.columns}
    return PLAN_CAPTION + (f"\n{BUFFERS_CAPTION}" if shown & {"|S|", "W"} else "")


def _mark(number: int) -> str:
    """A footnote's number, raised."""
    return str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def percent(ppm: int, digits: int = 1) -> str:
    """Parts per million as per cent."""
    return f"{ppm / 10_000:.{digits}f} %"


def plan_cells(answer: PlanAnswer) -> list[str]:
    """One plan under ``PLAN_COLUMNS``."""
    plan, measured, accuracy = answer.plan, answer.measured, answer.accuracy
    cells = [
        format_ns(plan.target_ns),
        str(plan.submodel),
        f"{plan.mean_fidelity_milli / 1000:.1f}",
        format_bytes(plan.preloaded_bytes),
        format_bytes(measured.storage_bytes if measured else plan.streamed_bytes),
        # What is predicted is a warm request.
        format_ns(answer.predicted_latency_ns)
        if measured is None or measured.request_kind == "warm"
        else NONE,
    ]
    if measured is None:
        cells += [NONE] * 4
    else:
        latency, within = measured.latency, measured.within_target
        bounds = latency.interval
        cells += [
            format_ns(latency.median)
            + ("" if bounds is None else f" [{_ms(bounds.low)}–{_ms(bounds.high)}]"),
            format_ns(latency.p95),
            f"{within.count}/{within.total}",
            f"{measured.stall_share_ppm / 10_000:.1f}",
        ]
    if accuracy is None:
        cells += [NONE]
    else:
        correct = accuracy.correct
        low, high = correct.low_ppm / 10_000, correct.high_ppm / 10_000
        cells += [f"{correct.value_ppm / 10_000:.1f} [{low:.1f}–{high:.1f}]"]
    return [*cells, NONE if measured is None else format_bytes(measured.memory.parts_bytes)]


def notes(answer: PlanAnswer) -> list[str]:
    """What a reader must know of a figure: emulation, flags, staleness, invalid samples."""
    found = []
    if answer.emulated:
        found.append(f"emulated ({', '.join(answer.mechanisms)})" if answer.mechanisms else "emulated")
    found.extend(answer.plan.flags)
    if not answer.plan.within_target:
        found.append("predicted over T")
    if answer.measured is not None and answer.measured.invalid:
        found.append(f"{answer.measured.invalid} invalid left out")
    if answer.measured is not None:
        found.extend(short for short, whole in mode_counts(answer.measured) if not whole)
    if answer.measured is not None and answer.measured.gate_verdict != "pass":
        found.append(answer.measured.gate_verdict)
    found.extend(filter(None, [_pooled(answer)]))
    found.extend(f"stale: {reason}" for reason in answer.stale)
    return found


def _pooled(answer: PlanAnswer) -> str:
    """What the store has of a plan in all, where the answer is of one job only and there are others."""
    count = 0 if answer.measured is None else answer.measured.latency.count
    if answer.pooled is None or answer.pooled.latency.count <= count:
        return ""
    latency = answer.pooled.latency
    return f"with earlier runs: median {format_ns(latency.median)} of {latency.count} requests"


def mode_counts(measured: Measured) -> list[tuple[str, bool]]:
    """For each read mode asked for how many requests are proven to have read so, "direct 48/50", and whether
    all are. Asked buffered reads come cold from storage, or for ``cached`` requests not at all."""
    found = []
    for asked in dict.fromkeys(asked for asked, _, _ in measured.modes):
        buffered = "cached" if measured.request_kind == "cached" else "buffered-cold"
        wanted = "direct" if asked == "direct" else buffered
        counts = {proven: count for mode, proven, count in measured.modes if mode == asked}
        right, total = counts.get(wanted, 0), sum(counts.values())
        found.append((f"{wanted} {right}/{total}", right == total))
    return found


def plan_json(answer: PlanAnswer) -> dict[str, Any]:
    """One answer for machines: what it answers, the plan itself with everything it rests on."""
    accuracy, ranking = answer.accuracy, ranking_of(answer)
    document = {
        "device": answer.device,
        "identity": answer.identity,
        "task": answer.task,
        "question": {
            "policy": answer.plan.policy,
            "target_ns": answer.plan.target_ns,
            "preload_bytes": answer.plan.preload_bytes,
            "working_bytes": answer.plan.working_bytes,
        },
        "importance": None if ranking is None else asdict(ranking),
        "plan_digest": answer.plan_digest,
        "plan": answer.plan.model_dump(mode="json"),
        "predicted_latency_ns": answer.predicted_latency_ns,
        "predicted_median_latency_ns": answer.predicted_median_latency_ns,
        "predicted_interval_ns": None
        if answer.predicted_interval is None
        else [answer.predicted_interval.low, answer.predicted_interval.high],
        "measured": _measured_json(answer.measured),
        "accuracy": None
        if accuracy is None
        else {
            "correct": accuracy.correct.count,
            "rows": accuracy.correct.total,
            "interval_ppm": [accuracy.correct.low_ppm, accuracy.correct.high_ppm],
            "split": accuracy.split,
        },
        "profiles": [asdict(ref) for ref in answer.profiles],
        "stale": list(answer.stale),
        "borrowed": answer.borrowed,
        "emulated": answer.emulated,
        "mechanisms": list(answer.mechanisms),
        "planned_wall_ns": answer.planned_wall_ns,
    }
    return document if answer.pooled is None else {**document, "pooled": _measured_json(answer.pooled)}


def _measured_json(measured: Measured | None) -> dict[str, Any] | None:
    if measured is None:
        return None
    bounds = measured.latency.interval
    return {
        "requests": measured.latency.count,
        "median_ns": measured.latency.median,
        "median_interval_ns": None if bounds is None else [bounds.low, bounds.high],
        "p95_ns": measured.latency.p95,
        "within_target": measured.within_target.count,
        "stall_share_ppm": measured.stall_share_ppm,
        "storage_bytes": measured.storage_bytes,
        "planned_bytes": measured.planned_bytes,
        "memory_bytes": {
            "resident": measured.memory.resident_bytes,
            "preload": measured.memory.preload_bytes,
            "working": measured.memory.working_bytes,
            "activations": measured.memory.activations_bytes,
            "process_peak": measured.memory.process_bytes,
        },
        "invalid": measured.invalid,
        "request_kind": measured.request_kind,
        "io_modes": list(measured.io_modes),
        "modes": [
            {"asked": asked, "proven": proven, "requests": count} for asked, proven, count in measured.modes
        ],
        "modes_as_asked": [text for text, _ in mode_counts(measured)],
        "gate_verdict": measured.gate_verdict,
    }


# ------------------------------------------------------------------ what plans rest on

GROUNDS_COLUMNS = (
    "device", ">T", "policy", "predicted [interval]", "device profile, age", ">samples", "importance, age",
    ">rows", "stale",
)  # fmt: skip
GROUNDS_LESS = ("rows", "samples", "importance, age")
"""As ``PLAN_LESS``."""

GROUNDS_CAPTION = (
    "interval: from median to p95 figures, each moved outwards by the fit's residual; twice as far where the "
    "profile is borrowed.\nsamples: of reads, reads beside compute, compute, fixed parts."
)


def grounds_table(answers: Sequence[PlanAnswer]) -> tuple[tuple[str, ...], list[list[str]]]:
    """(columns, rows): ``GROUNDS_COLUMNS``, and among them those that tell the plans apart."""
    columns, rows = [*GROUNDS_COLUMNS], [grounds_row(answer) for answer in answers]
    place = columns.index("policy")
    for distinct in distinctions([Asked.by(answer) for answer in answers]):
        if distinct.name in columns or distinct.name == IMPORTANCE:  # it is there, with its age
            continue
        place += 1
        columns.insert(place, distinct.column)
        for row, cell in zip(rows, distinct.cells, strict=True):
            row.insert(place, cell or NONE)
    return tuple(columns), rows


def grounds_row(answer: PlanAnswer) -> list[str]:
    """One answer under ``GROUNDS_COLUMNS``."""
    refs = {ref.kind: ref for ref in answer.profiles}
    bounds, device, importance = answer.predicted_interval, refs["device"], refs.get("importance")
    counts = device.samples
    borrowed = f" borrowed from {device.device}" if answer.borrowed else ""
    return [
        answer.device,
        format_ns(answer.plan.target_ns),
        answer.plan.policy,
        format_ns(answer.predicted_latency_ns)
        + ("" if bounds is None else f" [{_ms(bounds.low)}–{_ms(bounds.high)}]"),
        f"{device.digest[:12]}{borrowed}, {_age(device.age_ns)}",
        NONE if counts is None else f"{counts.io}+{counts.beside}+{counts.compute}+{counts.fixed}",
        NONE if importance is None else f"{_named(importance)}, {_age(importance.age_ns)}",
        NONE if importance is None or importance.rows is None else str(importance.rows),
        ", ".join(answer.stale) or "no",
    ]


def _named(importance: ProfileRef) -> str:
    return " ".join(filter(None, (importance.method, importance.digest[:12])))


def _age(age_ns: int | None) -> str:
    return NONE if age_ns is None else format_age(age_ns)


def format_age(age_ns: int) -> str:
    """How long ago something was, in one unit."""
    seconds = age_ns // NS_PER_S
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


# ------------------------------------------------------------------ devices


def hardware(seen: Mapping[str, Any]) -> str:
    """Model and system of a device, from the stable facts that the host saw."""
    model = " ".join(str(seen[key]) for key in ("manufacturer", "model") if seen.get(key))
    system = f"Android {seen['os']}" if seen.get("system") == "android" else seen.get("os")
    return ", ".join(str(part) for part in (model, seen.get("soc"), system) if part) or NONE


# ------------------------------------------------------------------ profiles

PROFILE_COLUMNS = (
    "device", ">T_io, one shard at 2/4/32 bits", ">read rate", ">T_comp, narrowest–widest layer",
    ">fixed", ">fit error", "verdict",
)  # fmt: skip

_RESIDUAL = re.compile(r"(\d+) ppm, more than (\d+)")


def profile_row(device: str, profile: DeviceProfile, shard_bytes: Sequence[int]) -> list[str]:
    """One line of the profile table; ``shard_bytes``: sizes of a shard at 2, 4 and 32 bits."""
    io = profile.io
    rate = 1e12 / io.ps_per_byte if io.ps_per_byte else 0.0
    widths = sorted(row.width for row in profile.compute)
    return [
        device,
        " / ".join(format_ns(io.p95_ns(size)) for size in shard_bytes),
        f"{format_bytes(int(rate))}/s",
        f"{format_ns(profile.t_comp_ns(widths[0]))} ({widths[0]}) – "
        f"{format_ns(profile.t_comp_ns(widths[-1]))} ({widths[-1]})",
        format_ns(profile.fixed_p95.total_ns),
        percent(io.error_ppm),
        ("emulated, " if profile.emulated else "")
        + ("fit" if not profile.unfit else "unfit: " + "; ".join(map(unfit_in_words, profile.unfit))),
    ]


def no_profile_row(device: str, error: StifarmError) -> list[str]:
    """The line of a device that has none, with the reason."""
    reason = " ".join(error.what.removeprefix(f"{device}: ").split())
    return [device, *[NONE] * (len(PROFILE_COLUMNS) - 2), f"none: {reason}"]


def unfit_advice(device: str) -> str:
    """What an unfit profile means, and what to do about it."""
    return (
        f"{device}: its profile is unfit, so what plans from it predict may be far off. Let it cool and let"
        f" nothing else run there, then measure again: stifarm profile --devices {device} --again. If it"
        " stays so, go by measured figures: stifarm eval."
    )


def unfit_in_words(reason: str) -> str:
    """Why a fit is unfit, with shares in per cent: the profile itself has them in parts per million."""
    return _RESIDUAL.sub(
        lambda found: f"{percent(int(found[1]))}, more than {int(found[2]) / 1e4:g} %", reason
    )


def _infeasible_cells(answer: Answer) -> list[str]:
    return [format_ns(answer.question.target_ns), NONE, *[NONE] * (len(PLAN_COLUMNS) - 2)]


def _infeasible_notes(answer: Answer) -> list[str]:
    assert answer.infeasible is not None
    if isinstance(answer.infeasible, ResourceError):
        return [f"infeasible at any T. {answer.infeasible}"]
    return [f"infeasible; the smallest T that works is {format_ns_up(answer.infeasible.smallest_target_ns)}"]


def _ms(duration_ns: int) -> str:
    return f"{duration_ns / 1e6:.3g}"
