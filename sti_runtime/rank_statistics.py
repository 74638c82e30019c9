"""Rank correlation, and how reliable a ranking is when each half of the data ranks for itself."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from sti_runtime.metrics import F64


def reliability_ppm(even: npt.ArrayLike, odd: npt.ArrayLike) -> int:
    """Split-half reliability of a ranking, parts per million, from the gains on even and odd rows.

    Spearman's r between the halves, corrected to full length by Spearman-Brown, 2r / (1 + r), and
    bounded below by -1 000 000. 0 when a half ranks nothing.
    """
    r = rank_correlation(even, odd)
    corrected = 2 * r / (1 + r) if r > -1 / 3 else -1.0
    return round(corrected * 1e6)


def rank_correlation(a: npt.ArrayLike, b: npt.ArrayLike) -> float:
    """Spearman's rank correlation, ties by mean rank; 0 if either side is constant."""
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    norm = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / norm if norm else 0.0


def _ranks(values: npt.ArrayLike) -> F64:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    mean_ranks: F64 = ends - (counts - 1) / 2.0
    return mean_ranks[inverse]
