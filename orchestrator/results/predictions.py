"""How well plans foretold what was measured: by device and policy, over the cells of a run. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from db.statistics import median
from orchestrator.results.gather import Results
from orchestrator.results.markdown import table


@dataclass(frozen=True)
class Foretold:
    """A policy's cells on one device. ``ratios``: of each cell the measured median over the predicted one,
    ascending. ``over``: requests over the predicted p95, of ``requests``.
    """

    device: str
    policy: str
    ratios: tuple[float, ...]
    over: int
    requests: int


def foretold(results: Results) -> Iterator[Foretold]:
    """What was timed, by the page's order of devices and the campaign's of policies."""
    for device in results.by_starvation:
        for policy in results.spec.planning_policies:
            ratios: list[float] = []
            over = requests = 0
            for cell in results.pick(device=device, policy=policy):
                if cell.samples is None or cell.plan is None or not cell.samples.latency_ns:
                    continue
                latency_ns, plan = cell.samples.latency_ns, cell.plan
                ratios.append(median(latency_ns) / plan.predicted_median_latency_ns)
                over += sum(one > plan.predicted_latency_ns for one in latency_ns)
                requests += len(latency_ns)
            if ratios:
                yield Foretold(device, policy, tuple(sorted(ratios)), over, requests)


def predictions(results: Results) -> Iterator[str]:
    """The section of the page; nothing where nothing was timed."""
    rows = [
        (
            each.device,
            f"`{each.policy}`",
            str(len(each.ratios)),
            f"{statistics.median(each.ratios):.2f} [{each.ratios[0]:.2f}–{each.ratios[-1]:.2f}]",
            f"{100 * each.over / each.requests:.1f} %",
        )
        for each in foretold(results)
    ]
    if not rows:
        return
    yield "## Predicted and measured"
    yield (
        "Each cell's measured median over the one its plan predicts: the middle cell, the least and the most."
        " Requests over the latency that the plan predicts at the profile's p95 figures, which is what T is"
        " compared with when plans are made: some are expected to be, more where reads are waited for."
    )
    yield table(
        ("device", "policy", "cells", "measured ÷ predicted [least–most]", "over the predicted p95"), rows
    )
