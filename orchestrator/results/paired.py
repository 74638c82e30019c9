"""Differences of accuracy on the same rows: pure functions.

Two plans score the same dev rows, so the difference of their accuracies is the mean of the rows' differences,
and its standard error that of this mean. Tasks are independent; each counts alike in a mean over tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Right = npt.NDArray[np.bool_]
"""[rows]: whether each dev row's class was right."""

_Z = 1.959963984540054


@dataclass(frozen=True)
class Difference:
    """Accuracy of one less another's, in points, with its standard error. ``of``: the mean of so many."""

    points: float
    error: float
    of: int = 1

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return self.points - _Z * self.error

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return self.points + _Z * self.error

    def __str__(self) -> str:
        return f"{self.points:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def difference(one: Right, other: Right) -> Difference:
    """Paired over rows. Shapes: [rows] both. Raises: ValueError when they are not of the same rows."""
    if one.shape != other.shape or not len(one):
        raise ValueError(f"{len(one)} rows against {len(other)} cannot be paired")
    each = 100.0 * (one.astype(np.float64) - other.astype(np.float64))
    error = float(each.std(ddof=1)) / math.sqrt(len(each)) if len(each) > 1 else 0.0
    return Difference(float(each.mean()), error)


def mean_difference(differences: Sequence[Difference]) -> Difference | None:
    """The mean of independent differences; None of none."""
    if not differences:
        return None
    count = len(differences)
    error = math.sqrt(sum(one.error**2 for one in differences)) / count
    return Difference(sum(one.points for one in differences) / count, error, count)


def pooled_difference(pairs: Sequence[tuple[Right, Right]]) -> Difference | None:
    """The mean over pairs of the same rows (other T, |S|, devices): rows are independent, pairs are not."""
    if not pairs:
        return None
    rows = len(pairs[0][0])
    total = np.zeros(rows)
    for one, other in pairs:
        total += one.astype(np.float64) - other.astype(np.float64)
    each = 100.0 * total / len(pairs)
    error = float(each.std(ddof=1)) / math.sqrt(rows) if rows > 1 else 0.0
    return Difference(float(each.mean()), error, len(pairs))
