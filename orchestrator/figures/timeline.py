"""The pipeline timeline of single requests: an IO lane and a compute lane, from a run's trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.figures.style import BLACK, BLUE, ORANGE, VERMILION, new_figure, save
from sti_runtime.messages import LayerTrace

_IO, _COMPUTE = 1.0, 0.0
_HEIGHT = 0.62

_ALIKE = 3.0
"""Requests within such a factor of each other share a time axis; others would have no room in it."""

_LEAST_SHARE = 0.012
"""Of the axis: a narrower bar has no number."""


@dataclass(frozen=True)
class Request:
    """One request and what it was run as."""

    title: str
    layers: Sequence[LayerTrace]
    latency_ns: int
    target_ns: int


def draw_timelines(requests: Sequence[Request], title: str, path: Path) -> None:
    """Draw requests below one another, on one time axis unless they are too unlike in length.

    Several layers may be read at once: where they are, the IO lane has a row for each.
    Raises: InputError without Matplotlib; ResourceError when the file cannot be written.
    """
    figure = new_figure(9, 1.1 + 1.7 * len(requests))
    ends = [1.04 * max(request.latency_ns, request.target_ns) / 1e6 for request in requests]
    alike = max(ends) <= _ALIKE * min(ends)
    rows = figure.subplots(len(requests), 1, squeeze=False)
    for axes, request, end in zip((row[0] for row in rows), requests, ends, strict=True):
        axes.set_xlim(0, max(ends) if alike else end)
        _lanes(axes, request)
        if not alike or axes is rows[-1][0]:
            axes.set_xlabel("ms from the request", fontsize=8)
    figure.suptitle(title, fontsize=10)
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure.legend(
        handles=[
            Patch(facecolor=BLUE, edgecolor="white", label="shards of a layer read"),
            Patch(facecolor=ORANGE, edgecolor="white", label="layer computed"),
            Patch(facecolor="white", edgecolor="#888888", hatch="////", label="stall"),
            Patch(facecolor="#DDDDDD", edgecolor="white", label="embedding, head"),
            Line2D([], [], color=VERMILION, linestyle="--", label="T"),
        ],
        loc="outside lower center",
        ncols=5,
        fontsize=8,
        frameon=False,
    )
    save(figure, path)


def io_rows(layers: Sequence[LayerTrace]) -> dict[int, int]:
    """By layer that is read: the first row of the IO lane that is free when its reading begins."""
    free: list[int] = []
    rows: dict[int, int] = {}
    for number in sorted(
        (n for n, layer in enumerate(layers) if layer.bytes), key=lambda n: layers[n].io_start_ns
    ):
        row = next((r for r, end in enumerate(free) if end <= layers[number].io_start_ns), len(free))
        free[row : row + 1] = [layers[number].io_end_ns]
        rows[number] = row
    return rows


def _lanes(axes: Any, request: Request) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(request.title, fontsize=8.5, loc="left")
    axes.set_yticks([_COMPUTE, _IO], ["compute", "IO"], fontsize=8)
    axes.set_ylim(-0.5, 1.5)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    before = 0
    rows = io_rows(request.layers)
    thick = _HEIGHT / (1 + max(rows.values(), default=0))
    for number, layer in enumerate(request.layers):
        if number in rows:
            place = _IO + _HEIGHT / 2 - (rows[number] + 0.5) * thick
            _bar(axes, place, layer.io_start_ns, layer.io_end_ns, BLUE, str(number), "white", thick)
        if number == 0:
            _bar(axes, _COMPUTE, 0, layer.compute_start_ns - layer.stall_ns, "#DDDDDD", "", BLACK)
        if layer.stall_ns:
            _stall(axes, layer.compute_start_ns - layer.stall_ns, layer.compute_start_ns)
        _bar(axes, _COMPUTE, layer.compute_start_ns, layer.compute_end_ns, ORANGE, str(number), BLACK)
        before = layer.compute_end_ns
    _bar(axes, _COMPUTE, before, request.latency_ns, "#DDDDDD", "", BLACK)
    axes.axvline(request.target_ns / 1e6, color=VERMILION, linestyle="--", linewidth=1.3)
    axes.axvline(request.latency_ns / 1e6, color=BLACK, linewidth=0.8, ymax=0.5)


def _bar(
    axes: Any,
    lane: float,
    start_ns: int,
    end_ns: int,
    colour: str,
    text: str,
    ink: str,
    height: float = _HEIGHT,
) -> None:
    if end_ns <= start_ns:
        return
    width = (end_ns - start_ns) / 1e6
    axes.barh(lane, width, left=start_ns / 1e6, height=height, color=colour, edgecolor="white", linewidth=0.6)
    if text and width >= _LEAST_SHARE * axes.get_xlim()[1]:
        axes.annotate(
            text, (start_ns / 1e6 + width / 2, lane), ha="center", va="center", fontsize=6, color=ink,
            clip_on=True,
        )  # fmt: skip


def _stall(axes: Any, start_ns: int, end_ns: int) -> None:
    axes.barh(
        _COMPUTE, (end_ns - start_ns) / 1e6, left=start_ns / 1e6, height=_HEIGHT, color="white",
        edgecolor="#888888", hatch="////", linewidth=0.0,
    )  # fmt: skip
