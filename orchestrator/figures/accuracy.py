"""Accuracy against T, or against memory: a panel for each task and device, a line or mark for each policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from orchestrator.figures.style import looks, new_figure, plain_axes, save


@dataclass(frozen=True)
class Point:
    """One measured cell. Units: ``x`` ms or MB; accuracy and its interval in %."""

    task: str
    device: str
    policy: str
    x: float
    accuracy: float
    low: float
    high: float


def draw_accuracy(
    points: Sequence[Point],
    *,
    policies: Sequence[str],
    tasks: Sequence[str],
    devices: Sequence[str],
    title: str,
    x_label: str,
    joined: bool,
    logarithmic: bool,
    path: Path,
) -> None:
    """Draw ``points`` to ``path``; ``joined``: a line through those of a policy.

    Raises: InputError without Matplotlib; ResourceError when the file cannot be written.
    """
    figure = new_figure(1.6 + 3.3 * len(devices), 1.5 + 2.5 * len(tasks))
    grid = figure.subplots(len(tasks), len(devices), squeeze=False, sharey="row")
    look = looks(policies)
    handles: dict[str, Any] = {}
    for row, task in enumerate(tasks):
        for column, device in enumerate(devices):
            axes = grid[row][column]
            plain_axes(axes)
            mine = [point for point in points if (point.task, point.device) == (task, device)]
            for policy in policies:
                series = sorted((p for p in mine if p.policy == policy), key=lambda point: point.x)
                if not series:
                    continue
                if joined:
                    series = _beside(series, mine, policies.index(policy), len(policies))
                handles[policy] = axes.errorbar(
                    [point.x for point in series],
                    [point.accuracy for point in series],
                    yerr=[
                        [point.accuracy - point.low for point in series],
                        [point.high - point.accuracy for point in series],
                    ],
                    color=look[policy].colour,
                    marker=look[policy].marker,
                    # Hollow: where points lie on each other, all are seen.
                    markerfacecolor=None if policy == policies[0] else "none",
                    markeredgewidth=1.4,
                    linestyle=look[policy].line if joined else "none",
                    markersize=6 if policy == policies[0] else 7,
                    linewidth=1.8 if policy == policies[0] else 1.2,
                    elinewidth=0.7,
                    capsize=2,
                    alpha=0.9,
                    zorder=2.5 if policy != policies[0] else 3 if joined else 2,
                )
            if not mine:
                axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color="#666666")
            if logarithmic and mine:
                _sizes_axis(axes, mine)
            elif mine:
                ticks = sorted({point.x for point in mine})
                axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
            if row == 0:
                axes.set_title(device, fontsize=9)
            if row == len(tasks) - 1:
                axes.set_xlabel(x_label, fontsize=8)
            if column == 0:
                axes.set_ylabel(f"{task}\naccuracy, %", fontsize=8)
    figure.suptitle(title, fontsize=10)
    if handles:
        ordered = [policy for policy in policies if policy in handles]
        figure.legend(
            [handles[policy] for policy in ordered],
            ordered,
            loc="outside lower center",
            ncols=-(-len(ordered) // -(-len(ordered) // (1 + 2 * len(devices)))),
            fontsize=8,
            frameon=False,
        )
    save(figure, path)


def _beside(series: Sequence[Point], panel: Sequence[Point], place: int, places: int) -> list[Point]:
    """A policy's points moved a little sideways, so that bars at one x do not hide each other."""
    values = [point.x for point in panel]
    step = 0.008 * (max(values) - min(values))
    return [replace(point, x=point.x + step * (place - (places - 1) / 2)) for point in series]


def _sizes_axis(axes: Any, panel: Sequence[Point]) -> None:
    """Logarithmic, with numbers that people read."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_xlim(min(point.x for point in panel) / 1.6, max(point.x for point in panel) * 1.6)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
