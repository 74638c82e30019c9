"""One-dimensional k-means in which every value has a mass: Σ mass · (value − its centroid)² made small.

The values are sorted once and the running sums of masses and of masses times values are kept, so that a step
of Lloyd's iteration costs O(k · log n), as in ``quantize``. Sums are sequential: the same input, the same
centroids.

Source: Lloyd, "Least squares quantization in PCM" (1957); the start: Panter and Dite (1951), by which the
best centroids of many are as dense as the cube root of the density, here of the mass.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sti_runtime.shard import F32

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

_MAX_ITERATIONS = 2000
_CELLS = (1, 16)
"""Cells of the starts' histograms per centroid: few where there are few values to each, else many."""


@dataclass(frozen=True, slots=True)
class WeightedValues:
    """Sorted values and what their bins sum up to.

    Shapes: values, masses [n]; mass, moment [n + 1] running sums of masses and of masses · values.
    """

    values: F64
    masses: F64
    mass: F64
    moment: F64

    @classmethod
    def of(cls, values: F32, masses: npt.NDArray[np.floating]) -> WeightedValues:
        """Sort them. Shapes: both [n]; masses positive and finite."""
        order = np.argsort(values, kind="stable")
        ordered, of_each = values[order].astype(np.float64), masses[order].astype(np.float64)
        return cls(ordered, of_each, _running(of_each), _running(of_each * ordered))


def weighted_centroids(data: WeightedValues, count: int) -> F32:
    """``count`` ascending centroids, none of which Lloyd's iteration would move; all zero without values.

    Never of a greater weighted error than any of its starts. With fewer distinct values than centroids every
    value is met and some centroids repeat.
    """
    if data.values.size == 0:
        return np.zeros(count, np.float32)
    distinct = np.unique(data.values)
    if distinct.size <= count:
        return np.concatenate((distinct, np.full(count - distinct.size, distinct[-1]))).astype(np.float32)
    starts = [companded_start(data, count, cells * count) for cells in _CELLS]
    tried = [*(_until_still(data, first) for first in starts), *starts]
    return min(tried, key=lambda centroids: weighted_error(data, centroids))


def weighted_error(data: WeightedValues, centroids: F32) -> float:
    """Σ mass · (value − nearest centroid)²."""
    edges = _nearest_edges(data.values, centroids)
    near = np.repeat(centroids.astype(np.float64), np.diff(edges))
    return float(np.cumsum(data.masses * (data.values - near) ** 2)[-1])


def companded_start(data: WeightedValues, count: int, cells: int) -> F32:
    """Centroids as dense as the cube root of the mass of ``cells`` equal cells of the range.

    Weighted quantiles, as dense as the mass itself, end in minima of twice the error at 64 centroids.
    """
    low, high = data.values[0], data.values[-1]
    bounds = np.linspace(low, high, cells + 1)
    at = np.searchsorted(data.values, bounds, "left")
    at[-1] = data.values.size
    density = _running(np.cbrt(np.maximum(data.mass[at[1:]] - data.mass[at[:-1]], 0.0)))
    wanted = density[-1] * (np.arange(count) + 0.5) / count
    centroids: F32 = np.clip(np.interp(wanted, density, bounds), low, high).astype(np.float32)
    return centroids


# ------------------------------------------------------------------ details


def _until_still(data: WeightedValues, centroids: F32) -> F32:
    for _ in range(_MAX_ITERATIONS):
        moved = _means(data, _nearest_edges(data.values, centroids), centroids)
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    return centroids


def _means(data: WeightedValues, edges: I64, empty: F32) -> F32:
    """Centre of mass of every bin, rounded to what will be stored; an empty bin keeps its value."""
    masses = data.mass[edges[1:]] - data.mass[edges[:-1]]
    moments = data.moment[edges[1:]] - data.moment[edges[:-1]]
    filled = (np.diff(edges) > 0) & (masses > 0.0)
    means = np.where(filled, moments / np.where(filled, masses, 1.0), empty)
    # Rounding in the running sums may swap neighbours that are equal but for the last bit.
    return np.maximum.accumulate(means.astype(np.float32))


def _nearest_edges(values: F64, centroids: F32) -> I64:
    """Bin i is values[edges[i] : edges[i + 1]]; ties to the lower centroid."""
    exact = centroids.astype(np.float64)
    inner = np.searchsorted(values, (exact[:-1] + exact[1:]) * 0.5, "right")
    return np.concatenate(([0], inner, [values.size])).astype(np.int64)


def _running(terms: F64) -> F64:
    sums = np.zeros(terms.size + 1)
    np.cumsum(terms, out=sums[1:])
    return sums
