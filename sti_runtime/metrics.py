"""Scores of predictions: accuracy with its interval, cross-entropy. float64, in a fixed order."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sti_runtime.errors import DatasetError

F64 = npt.NDArray[np.float64]
UNKNOWN_LABEL = -1
_Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True, slots=True)
class Accuracy:
    """``correct`` of ``rows`` with the Wilson 95 % interval [low, high]; shares in 0…1."""

    correct: int
    rows: int
    value: float
    low: float
    high: float


def wilson_interval(correct: int, rows: int, z: float = _Z_95) -> tuple[float, float]:
    """Score interval of a share, at z standard deviations.

    Raises: DatasetError when there are no rows. Source: Wilson, JASA 22 (1927).
    """
    if not 0 <= correct <= rows or rows == 0:
        raise DatasetError(
            f"{correct} correct of {rows} rows is no accuracy.", "Score on data that has labelled rows."
        )
    share, square = correct / rows, z * z
    centre = (share + square / (2 * rows)) / (1 + square / rows)
    half = z / (1 + square / rows) * math.sqrt(share * (1 - share) / rows + square / (4 * rows * rows))
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == rows else min(1.0, centre + half)
    return low, high


def accuracy(correct: int, rows: int) -> Accuracy:
    """Accuracy with its 95 % interval. Raises: DatasetError when there are no rows."""
    low, high = wilson_interval(correct, rows)
    return Accuracy(correct, rows, correct / rows, low, high)


def count_correct(predictions: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[int, int]:
    """(correct, rows) over the rows whose label is known. Shapes: both [R]."""
    predicted, wanted = np.asarray(predictions), np.asarray(labels)
    known = wanted != UNKNOWN_LABEL
    return int(((predicted == wanted) & known).sum()), int(known.sum())


def row_losses(logits: npt.NDArray[Any], labels: npt.ArrayLike) -> F64:
    """Cross-entropy of every row, nats; NaN where the label is unknown. Shapes: [R, C], [R] → [R]."""
    scores = np.asarray(logits, dtype=np.float64)
    wanted = np.asarray(labels)
    shifted = scores - scores.max(axis=1, keepdims=True)
    log_sum = np.log(np.exp(shifted).sum(axis=1))
    picked = shifted[np.arange(len(wanted)), np.maximum(wanted, 0)]
    return np.where(wanted == UNKNOWN_LABEL, np.nan, log_sum - picked)


def mean_cross_entropy(logits: npt.NDArray[Any], labels: npt.ArrayLike) -> float:
    """Mean cross-entropy over the rows whose label is known, nats; exactly rounded sum.

    Shapes: logits [R, C], labels [R]. Raises: DatasetError when no label is known.
    """
    losses = row_losses(logits, labels)
    known = losses[np.asarray(labels) != UNKNOWN_LABEL]
    if not len(known):
        raise DatasetError("None of the rows has a label.", "Score on data that has labelled rows.")
    return math.fsum(known.tolist()) / len(known)
