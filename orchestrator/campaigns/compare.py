"""Two runs of a campaign side by side: each device's metrics with ratio, interval and verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from db.campaign_plans import PlanChange, plan_changes
from db.campaign_samples import (
    Found,
    accuracy_in,
    content_in,
    devices_with_data,
    found_in,
    profile_metrics,
)
from db.ratios import PPM, Ratio, Verdict, median_ratio, share_ratio, verdict
from db.statistics import median
from sti_runtime.units import format_bytes


@dataclass(frozen=True)
class Compared:
    """One metric of one device in two runs. Medians are None where a run has no samples of it."""

    device: str
    metric: str
    before: int | None
    after: int | None
    ratio: Ratio | None
    verdict: Verdict


@dataclass(frozen=True)
class Comparison:
    """``plans``: those with other content; ``missing``: devices with data before and none after."""

    metrics: tuple[Compared, ...]
    plans: tuple[PlanChange, ...]
    missing: tuple[str, ...]


def compare_runs(session: Session, before: int, after: int) -> Comparison:
    """Compare two runs by their row ids."""
    metrics = [*_latencies(found_in(session, before), found_in(session, after))]
    metrics += _accuracies(session, before, after)
    profiles = profile_metrics(session, before), profile_metrics(session, after)
    for device, metric in sorted(profiles[0].keys() | profiles[1].keys()):
        key = (device, metric)
        metrics.append(_compared(device, metric, profiles[0].get(key, ()), profiles[1].get(key, ())))
    had = [set(devices_with_data(session, run_id)[1]) for run_id in (before, after)]
    return Comparison(
        tuple(sorted(metrics, key=lambda one: (one.device, one.metric))),
        tuple(plan_changes(session, before, after)),
        tuple(sorted(had[0] - had[1])),
    )


def _latencies(before: Sequence[Found], after: Sequence[Found]) -> list[Compared]:
    """By question but for the bundle's digest, which a retrained model changes."""

    def by_name(found: Sequence[Found]) -> Mapping[tuple[str, str], Found]:
        return {(one.question.device, _metric(one)): one for one in found}

    old, new = by_name(before), by_name(after)
    compared = []
    for device, metric in sorted(old.keys() | new.keys()):
        left, right = old.get((device, metric)), new.get((device, metric))
        compared.append(
            _compared(
                device,
                metric,
                left.latency_ns if left else (),
                right.latency_ns if right else (),
            )
        )
    return compared


def _accuracies(session: Session, before: int, after: int) -> list[Compared]:
    """Of each question that either run evaluated, the share of right answers in millionths."""

    def by_name(run_id: int) -> Mapping[tuple[str, str], Found]:
        found = found_in(session, run_id, kind="evaluate")
        return {(one.question.device, _asked(one)): one for one in found}

    old, new = by_name(before), by_name(after)
    return [
        _compared_accuracy(session, key, old.get(key), new.get(key))
        for key in sorted(old.keys() | new.keys())
    ]


def _compared_accuracy(
    session: Session, key: tuple[str, str], before: Found | None, after: Found | None
) -> Compared:
    sides = [None if one is None else accuracy_in(session, one) for one in (before, after)]
    shares = [None if one is None else one.correct for one in sides]
    ratio = None
    if before is not None and after is not None and sides[0] is not None and sides[1] is not None:
        rows = sides[0].task_data_digest == sides[1].task_data_digest
        if rows and content_in(session, before) == content_in(session, after):
            ratio = Ratio(PPM, PPM, PPM)  # one content has one accuracy on the same rows
        else:
            ratio = share_ratio(sides[0].correct, sides[1].correct)
    return Compared(
        device=key[0],
        metric=f"accuracy, ppm: {key[1]}",
        before=None if shares[0] is None else PPM * shares[0].count // shares[0].total,
        after=None if shares[1] is None else PPM * shares[1].count // shares[1].total,
        ratio=ratio,
        verdict=verdict(ratio, more_is_better=True),
    )


def _metric(found: Found) -> str:
    return f"latency, ns: {_asked(found)}"


def _asked(found: Found) -> str:
    asked = found.question
    size = format_bytes(asked.preload_bytes)
    return f"{asked.task} {asked.engine} {asked.policy} T={asked.target} |S|={size}"


def _compared(device: str, metric: str, before: Sequence[int], after: Sequence[int]) -> Compared:
    ratio = median_ratio(before, after)
    return Compared(
        device=device,
        metric=metric,
        before=median(before) if before else None,
        after=median(after) if after else None,
        ratio=ratio,
        verdict=verdict(ratio),
    )
