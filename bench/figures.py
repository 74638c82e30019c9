"""Medians with intervals, ratios paired by round, and the table that ``bench.engines`` prints.

Intervals are those of order statistics (``db.statistics``), at least 95 %: nothing is assumed of how the
samples are distributed. Paired: both sides of a ratio are of the same round, so that minutes of drift cancel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from db.statistics import median, median_interval, percentile

PPM = 1_000_000


@dataclass(frozen=True)
class Figure:
    """The median of some samples, its interval (None for fewer than six), and how many there are."""

    value: float
    low: float | None
    high: float | None
    count: int

    def text(self, scale: float = 1.0, digits: int = 1) -> str:
        """ "12.3 [12.0, 12.9]", divided by ``scale``."""
        value = f"{self.value / scale:.{digits}f}"
        if self.low is None or self.high is None:
            return value
        return f"{value} [{self.low / scale:.{digits}f}, {self.high / scale:.{digits}f}]"


def figure(samples: Sequence[int]) -> Figure:
    """Median and interval of integer samples. Raises: ValueError when there are none."""
    interval = median_interval(samples)
    low, high = (None, None) if interval is None else (float(interval.low), float(interval.high))
    return Figure(float(median(samples)), low, high, len(samples))


def paired_ratio(ours: Sequence[int], theirs: Sequence[int]) -> Figure:
    """Median of ours ÷ theirs, round by round. Raises: ValueError when the rounds do not match."""
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} and {len(theirs)} rounds cannot be paired")
    found = figure([round(PPM * a / b) for a, b in zip(ours, theirs, strict=True)])
    low, high = (None if bound is None else bound / PPM for bound in (found.low, found.high))
    return Figure(found.value / PPM, low, high, found.count)


def median_and_p95(samples: Sequence[int]) -> tuple[int, int]:
    """Both, the latter by nearest rank. Raises: ValueError when there are none."""
    return median(samples), percentile(samples, 95)


def cosine(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Of two arrays taken as one vector each; not a number when one is all zeros."""
    x, y = (np.asarray(v, np.float64).ravel() for v in (a, b))
    norms = math.sqrt(float(x @ x)) * math.sqrt(float(y @ y))
    return float(x @ y) / norms if norms else math.nan


# ------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Claim:
    """One line of the table. ``reached`` None: not judged, ``unjudged`` and ``note`` say why.

    ``shown`` is the figure as text.
    """

    row: str
    what: str
    reach: str
    shown: str
    reached: bool | None
    regime: str
    note: str = ""
    figure: Figure | None = None
    unjudged: str = "not measured"

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def claim(
    row: str,
    what: str,
    reach: str,
    found: Figure,
    limit: float,
    regime: str,
    *,
    scale: float = 1.0,
    digits: int = 2,
    unit: str = "",
    note: str = "",
) -> Claim:
    """A claim that ``found`` is at most ``limit`` (both before division by ``scale``)."""
    shown = found.text(scale, digits) + unit
    return Claim(row, what, reach, shown, found.value <= limit, regime, note, found)


BEGIN, END = "<!-- bench.engines: begin -->", "<!-- bench.engines: end -->"


def between_marks(page: str, text: str) -> str:
    """``page`` with ``text`` between its two marks. Raises: ValueError when it has none."""
    before, mark, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise ValueError(f"the page has no lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def markdown(claims: Sequence[Claim]) -> str:
    """The table, one line per claim."""
    words = {True: "yes", False: "no"}
    lines = [
        "| | what | reach | measured | reached | regime, and what limits it |",
        "|---|---|---|---|---|---|",
    ]
    for entry in claims:
        regime = ": ".join(part for part in (entry.regime, entry.note) if part)
        reached = entry.unjudged if entry.reached is None else words[entry.reached]
        cells = (entry.row, entry.what, entry.reach, entry.shown, reached, regime)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)
