"""A comparison of two runs as tables for people: what was compared, and why the rest was not."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from db.ratios import LEAST_SAMPLES, PPM, Ratio
from orchestrator.campaigns.compare import Asked, Compared, Metric
from orchestrator.report import percent
from sti_runtime.units import format_bytes, format_ns, in_words

COMPARED_COLUMNS = ("metric", ">before", ">after", ">change", ">ratio [95 %]", "verdict")
LACKING_COLUMNS = ("not enough data", "why")
TELLS_NOTHING = "not enough data: the interval of the ratio reaches across 1, and beyond 5 %."

_NAMES: dict[Metric, str] = {
    "latency": "latency",
    "accuracy": "accuracy",
    "read": "reading 1 MB",
    "compute": "computing a widest layer",
}


def asked_by_all(metrics: Sequence[Compared]) -> str:
    """What all questions have in common, for the title; empty where that is nothing."""
    asked = [one.asked for one in metrics if one.asked.task]
    same = {name for name, known in _values(asked).items() if len(known) == 1}
    return ", ".join(dict.fromkeys(part for one in asked for part in _parts(one, same)))


def compared_rows(metrics: Sequence[Compared]) -> dict[str, list[tuple[str, ...]]]:
    """By device: what has a ratio, under ``COMPARED_COLUMNS``; a metric is named by what is not
    ``asked_by_all``."""
    found: dict[str, list[tuple[str, ...]]] = {}
    for one, name in zip(metrics, _names(metrics), strict=True):
        if (ratio := one.ratio) is not None:
            cells = (
                name,
                _figure(one, one.before),
                _figure(one, one.after),
                _change(one, ratio),
                f"{ratio.value_ppm / PPM:.3f} [{ratio.low_ppm / PPM:.3f}–{ratio.high_ppm / PPM:.3f}]",
                one.verdict,
            )
            found.setdefault(one.device, []).append(cells)
    return found


def lacking_rows(metrics: Sequence[Compared], runs: tuple[int, int]) -> dict[str, list[tuple[str, ...]]]:
    """By device: what has no ratio, under ``LACKING_COLUMNS``, metrics of one question together. ``runs``:
    their numbers."""
    of_questions, of_profiles = _varying_in(metrics)
    grouped: dict[tuple[str, Asked, str], list[str]] = {}
    for one in metrics:
        if one.ratio is None:
            grouped.setdefault((one.device, one.asked, _why(one, runs)), []).append(_NAMES[one.metric])
    found: dict[str, list[tuple[str, ...]]] = {}
    for (device, asked, why), names in grouped.items():
        parts = _parts(asked, of_questions if asked.task else of_profiles)
        found.setdefault(device, []).append((", ".join([*names, *parts]), why))
    return found


# ------------------------------------------------------------------ figures


def _figure(one: Compared, value: int | None) -> str:
    if value is None:
        return ""
    if one.metric == "accuracy":
        return percent(value)
    # ps a byte are µs a MB
    return format_ns(1000 * value if one.metric == "read" else value)


def _change(one: Compared, ratio: Ratio) -> str:
    """By how much: points of accuracy, or per cent of a time."""
    if one.metric == "accuracy":
        return _signed(((one.after or 0) - (one.before or 0)) / 1e4, "points")
    return _signed((ratio.value_ppm - PPM) / 1e4, "%")


def _signed(value: float, unit: str) -> str:
    text = f"{abs(value):.1f}"
    sign = "" if float(text) == 0 else "−" if value < 0 else "+"
    return f"{sign}{text} {unit}"


def _why(one: Compared, runs: tuple[int, int]) -> str:
    if not any(one.samples) and one.lacking[0] == one.lacking[1]:
        return f"runs {runs[0]} and {runs[1]}: {in_words(one.lacking[0])}"
    of = "rows" if one.metric == "accuracy" else "samples"
    sides = [
        f"run {run}: {f'{_figure(one, value)} of {count} {of}' if count else in_words(lacking)}"
        for run, value, count, lacking in zip(
            runs, (one.before, one.after), one.samples, one.lacking, strict=True
        )
    ]
    told = "; ".join(sides)
    if not all(one.samples):
        return told
    if one.metric != "accuracy" and min(one.samples) < LEAST_SAMPLES:
        return f"{told}; it takes {LEAST_SAMPLES} of each"
    return f"{told}; what was before may be 0"


# ------------------------------------------------------------------ names

_FIELDS = ("task", "bundle", "engine", "policy", "target", "preload_bytes")


def _names(metrics: Sequence[Compared]) -> list[str]:
    """What each row is of: the metric, and what of its question not all have in common."""
    of_questions, of_profiles = _varying_in(metrics)
    return [
        ", ".join([_NAMES[one.metric], *_parts(one.asked, of_questions if one.asked.task else of_profiles)])
        for one in metrics
    ]


def _varying_in(metrics: Sequence[Compared]) -> tuple[set[str], set[str]]:
    """What differs among questions, and among profiles."""
    return (
        _varying([one.asked for one in metrics if one.asked.task]),
        _varying([one.asked for one in metrics if not one.asked.task]),
    )


def _varying(asked: Sequence[Asked]) -> set[str]:
    """The fields in which these differ; a bundle is no difference where each task has one."""
    found = {name for name, known in _values(asked).items() if len(known) > 1}
    if len({(one.task, one.bundle) for one in asked}) == len({one.task for one in asked}):
        found.discard("bundle")
    return found


def _values(asked: Sequence[Asked]) -> dict[str, set[str | int]]:
    """What these have in each field; to have nothing is no value."""
    return {
        name: {value for one in asked if (value := getattr(one, name)) not in ("", None)} for name in _FIELDS
    }


def _parts(asked: Asked, names: Collection[str]) -> list[str]:
    """Of these fields those that a question has, in words."""
    words = {
        "task": asked.task,
        "bundle": asked.bundle,
        "engine": asked.engine,
        "policy": asked.policy,
        "target": asked.target and f"T = {asked.target}",
        "preload_bytes": "" if asked.preload_bytes is None else f"|S| = {format_bytes(asked.preload_bytes)}",
    }
    return [words[name] for name in _FIELDS if name in names and words[name]]
