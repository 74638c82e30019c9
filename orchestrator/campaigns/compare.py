"""Two runs of a campaign side by side: each device's metrics with ratio, interval and verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sqlalchemy.orm import Session

from db.artifacts import bundle_names
from db.campaign_plans import PlanChange, plan_changes
from db.campaign_samples import (
    Found,
    Profiled,
    accuracy_in,
    content_in,
    devices_with_data,
    found_in,
    profile_metrics,
)
from db.ratios import PPM, Ratio, Verdict, median_ratio, share_ratio, verdict
from db.statistics import median

Metric = Literal["latency", "accuracy", "read", "compute"]

UNITS: Mapping[Metric, str] = {
    "latency": "ns", "accuracy": "ppm", "read": "ps/byte", "compute": "ns/layer",
}  # fmt: skip
"""All metrics, in the order in which a device's are listed: of a question its latency and the share of right
answers, of a profile the time to read and to compute a widest layer."""


@dataclass(frozen=True)
class Asked:
    """What a metric is of, whichever the night; empty, None: it does not depend on that.

    ``bundle``: its name, where a run has several. ``preload_bytes``: None where the policy has no use for it.
    """

    bundle: str = ""
    task: str = ""
    engine: str = ""
    target: str = ""
    preload_bytes: int | None = None
    policy: str = ""


@dataclass(frozen=True)
class Compared:
    """One metric of one device in two runs. Medians, or shares, are None where a run has no samples of it.

    ``samples``: how many before and after; of an accuracy, rows. ``lacking``: why there are none, else empty.
    """

    device: str
    metric: Metric
    unit: str
    asked: Asked
    before: int | None
    after: int | None
    samples: tuple[int, int]
    lacking: tuple[str, str]
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
    timed, scored = (
        [found_in(session, run_id, kind=kind) for run_id in (before, after)]
        for kind in ("execute", "evaluate")
    )
    profiles = [profile_metrics(session, run_id) for run_id in (before, after)]
    named = _bundle_names(
        session,
        [
            {one.question.bundle for one in (*timed[run], *scored[run])}
            | {one.bundle for one in profiles[run]}
            for run in (0, 1)
        ],
    )
    runs = [[*each, *others] for each, others in zip(timed, scored, strict=True)]
    metrics = [
        *(_latency(*pair) for pair in _paired(timed, named)),
        *(_accuracy(session, *pair, runs) for pair in _paired(scored, named)),
        *_of_profiles(profiles, named),
    ]
    had = [set(devices_with_data(session, run_id)[1]) for run_id in (before, after)]
    order = list(UNITS)
    return Comparison(
        tuple(sorted(metrics, key=lambda one: (one.device, order.index(one.metric)))),
        tuple(plan_changes(session, before, after)),
        tuple(sorted(had[0] - had[1])),
    )


Named = Callable[[str], str]
"""A bundle's name by its digest; empty where no run has more than one: a retrained model has another. Where
a run has several of one name, all of that name have their short digest behind it."""


def _bundle_names(session: Session, digests: Sequence[set[str]]) -> Named:
    if all(len(of_run) <= 1 for of_run in digests):
        return lambda _digest: ""
    names = bundle_names(session)
    shared = {
        name
        for of_run in digests
        for name, count in Counter(names.get(digest) for digest in of_run).items()
        if count > 1
    }

    def named(digest: str) -> str:
        name = names.get(digest)
        if name is None:
            return digest[:12]
        return f"{name} {digest[:12]}" if name in shared else name

    return named


# ------------------------------------------------------------------ questions


def _paired(
    runs: Sequence[Sequence[Found]], named: Named
) -> Iterator[tuple[str, Asked, Found | None, Found | None]]:
    """(device, question, before, after) of every question of two runs, those of one device by T."""
    old, new = ({(one.question.device, _asked(one, named)): one for one in found} for found in runs)

    def place(key: tuple[str, Asked]) -> tuple[str, str, str, str, int, int, str]:
        device, asked = key
        targets = [found.target_ns or 0 for found in (old.get(key), new.get(key)) if found is not None]
        size = -1 if asked.preload_bytes is None else asked.preload_bytes
        return device, asked.bundle, asked.task, asked.engine, max(targets), size, asked.policy

    for key in sorted(old.keys() | new.keys(), key=place):
        yield *key, old.get(key), new.get(key)


def _asked(found: Found, named: Named) -> Asked:
    asked = found.question
    used = asked.preload or asked.preload_bytes
    return Asked(
        named(asked.bundle),
        asked.task,
        asked.engine,
        asked.target,
        asked.preload_bytes if used else None,
        asked.policy,
    )


def _latency(device: str, asked: Asked, before: Found | None, after: Found | None) -> Compared:
    samples = [() if one is None else one.latency_ns for one in (before, after)]
    return _of_samples(device, "latency", asked, samples, (_lacking(before), _lacking(after)))


def _accuracy(
    session: Session,
    device: str,
    asked: Asked,
    before: Found | None,
    after: Found | None,
    runs: Sequence[Sequence[Found]],
) -> Compared:
    """``runs``: all that each of the two found."""
    sides = [
        None if one is None else accuracy_in(session, one, others)
        for one, others in zip((before, after), runs, strict=True)
    ]
    shares = [None if one is None else one.correct for one in sides]
    ratio = None
    if before is not None and after is not None and sides[0] is not None and sides[1] is not None:
        rows = sides[0].task_data_digest == sides[1].task_data_digest
        if rows and content_in(session, before) == content_in(session, after):
            ratio = Ratio(PPM, PPM, PPM)  # one content has one accuracy on the same rows
        else:
            ratio = share_ratio(sides[0].correct, sides[1].correct)
    lacking = [
        "" if share is not None else _lacking(found)
        for share, found in zip(shares, (before, after), strict=True)
    ]
    return Compared(
        device=device,
        metric="accuracy",
        unit=UNITS["accuracy"],
        asked=asked,
        before=None if shares[0] is None else PPM * shares[0].count // shares[0].total,
        after=None if shares[1] is None else PPM * shares[1].count // shares[1].total,
        samples=(shares[0].total if shares[0] else 0, shares[1].total if shares[1] else 0),
        lacking=(lacking[0], lacking[1]),
        ratio=ratio,
        verdict=verdict(ratio, more_is_better=True),
    )


def _lacking(found: Found | None) -> str:
    """Why a run has nothing of a question, should it have nothing."""
    if found is None:
        return "it was not asked"
    states = ", ".join(state for state in found.states if state != "done")
    return next(iter(found.causes), states or "no valid request")


# ------------------------------------------------------------------ profiles


def _of_profiles(profiles: Sequence[Mapping[Profiled, Sequence[int]]], named: Named) -> Iterator[Compared]:
    old, new = (
        {
            (one.device, one.metric, Asked(bundle=named(one.bundle), engine=one.engine)): samples
            for one, samples in found.items()
        }
        for found in profiles
    )
    for key in sorted(old.keys() | new.keys(), key=lambda key: (*key[:2], key[2].bundle, key[2].engine)):
        device, metric, asked = key
        samples = [found.get(key, ()) for found in (old, new)]
        yield _of_samples(device, metric, asked, samples, ("no profile was measured",) * 2)


def _of_samples(
    device: str, metric: Metric, asked: Asked, samples: Sequence[Sequence[int]], why: tuple[str, str]
) -> Compared:
    """``why``: of either run why it has no samples, should it have none."""
    before, after = samples
    ratio = median_ratio(before, after)
    return Compared(
        device=device,
        metric=metric,
        unit=UNITS[metric],
        asked=asked,
        before=median(before) if before else None,
        after=median(after) if after else None,
        samples=(len(before), len(after)),
        lacking=("" if before else why[0], "" if after else why[1]),
        ratio=ratio,
        verdict=verdict(ratio),
    )
