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


@dataclass(frozen=True)
class Request:
    """One request and what it was run as."""

    title: str
    layers: Sequence[LayerTrace]
    latency_ns: int
    target_ns: int


def draw_timelines(requests: Sequence[Request], title: str, path: Path) -> None:
    """Draw requests below one another on one time axis. Raises: InputError, ResourceError."""
    figure = new_figure(9, 1.1 + 1.55 * len(requests))
    rows = figure.subplots(len(requests), 1, squeeze=False, sharex=True)
    for axes, request in zip((row[0] for row in rows), requests, strict=True):
        _lanes(axes, request)
    rows[-1][0].set_xlabel("ms from the request", fontsize=8)
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


def _lanes(axes: Any, request: Request) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_title(request.title, fontsize=8.5, loc="left")
    axes.set_yticks([_COMPUTE, _IO], ["compute", "IO"], fontsize=8)
    axes.set_ylim(-0.5, 1.5)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    before = 0
    for number, layer in enumerate(request.layers):
        if layer.bytes:
            _bar(axes, _IO, layer.io_start_ns, layer.io_end_ns, BLUE, str(number), "white")
        if number == 0:
            _bar(axes, _COMPUTE, 0, layer.compute_start_ns - layer.stall_ns, "#DDDDDD", "", BLACK)
        if layer.stall_ns:
            _stall(axes, layer.compute_start_ns - layer.stall_ns, layer.compute_start_ns)
        _bar(axes, _COMPUTE, layer.compute_start_ns, layer.compute_end_ns, ORANGE, str(number), BLACK)
        before = layer.compute_end_ns
    _bar(axes, _COMPUTE, before, request.latency_ns, "#DDDDDD", "", BLACK)
    axes.axvline(request.target_ns / 1e6, color=VERMILION, linestyle="--", linewidth=1.3)
    axes.axvline(request.latency_ns / 1e6, color=BLACK, linewidth=0.8, ymax=0.5)


def _bar(axes: Any, lane: float, start_ns: int, end_ns: int, colour: str, text: str, ink: str) -> None:
    if end_ns <= start_ns:
        return
    width = (end_ns - start_ns) / 1e6
    axes.barh(
        lane, width, left=start_ns / 1e6, height=_HEIGHT, color=colour, edgecolor="white", linewidth=0.6
    )
    if text:
        axes.annotate(
            text, (start_ns / 1e6 + width / 2, lane), ha="center", va="center", fontsize=6, color=ink,
            clip_on=True,
        )  # fmt: skip


def _stall(axes: Any, start_ns: int, end_ns: int) -> None:
    axes.barh(
        _COMPUTE, (end_ns - start_ns) / 1e6, left=start_ns / 1e6, height=_HEIGHT, color="white",
        edgecolor="#888888", hatch="////", linewidth=0.0,
    )  # fmt: skip
