"""GOBO quantization of one weight matrix: Gaussian outliers kept exactly, the rest as 2^k centroids.

A weight whose log-density under the matrix's fitted Gaussian is below a threshold is an
outlier. The others (the "G group") get 2^k centroids: means of equal-population bins of the sorted
weights, then assign-to-nearest and recompute-means until the L1 error stops falling. A ``Quantizer``
may move that threshold, leave the refinement out, or carry it to its end.

The G group is sorted once and its prefix sums are kept, so that one refinement step costs
O(2^k · log n) whatever the size of the matrix, and all fidelities share the sort. Every sum is
either a sequential ``cumsum`` or exact (``fsum``): the same input gives the same bytes.

Source: GOBO (MICRO 2020), section 4; STI (ASPLOS 2023), section 4.2. Least squared error: Lloyd,
"Least squares quantization in PCM" (1957); its start: Panter and Dite (1951).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from sti_runtime.errors import InputError
from sti_runtime.quantizer import GOBO, Quantizer, Refinement
from sti_runtime.shard import F32

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
F64 = npt.NDArray[np.float64]

_MAX_ITERATIONS = {"l1": 200, "converged": 2000}


@dataclass(frozen=True, slots=True)
class GoboMatrix:
    """One quantized matrix.

    Shapes: centroids [2^bits] ascending; codes [out, in] (an outlier's is the first or the last);
    outlier_index [r] ascending positions in row-major order; outlier_values [r].
    """

    centroids: F32
    codes: U8
    outlier_index: U32
    outlier_values: F32

    def dequantized(self) -> F32:
        """The matrix that the codes and outliers stand for, [out, in]."""
        values = self.centroids[self.codes]
        values.reshape(-1)[self.outlier_index] = self.outlier_values
        return values


@dataclass(frozen=True, slots=True)
class Dictionary:
    """centroids [2^bits] ascending; a weight's code is the number of thresholds [2^bits − 1] below it."""

    centroids: F32
    thresholds: F32


@dataclass(frozen=True, slots=True)
class SortedWeights:
    """What every fidelity of one matrix shares.

    Shapes: group [g] the sorted G group; prefix [g + 1] its running sums; outliers as in GoboMatrix.
    """

    group: F64
    prefix: F64
    outlier_index: U32
    outlier_values: F32


def outlier_sigmas(std: float, quantizer: Quantizer = GOBO) -> float:
    """|z| beyond which a weight is an outlier; 0 if even the mean's density is below the threshold."""
    threshold = quantizer.outlier_log_density_milli / 1000
    squared = -2.0 * (threshold + math.log(std) + 0.5 * math.log(2.0 * math.pi))
    return math.sqrt(squared) if squared > 0.0 else 0.0


def sort_weights(weights: F32, quantizer: Quantizer = GOBO) -> SortedWeights:
    """Fit the Gaussian, split off the outliers and sort the rest.

    Shapes: weights [out, in], any strides. Raises: InputError if empty or not finite.
    """
    flat = np.ascontiguousarray(weights, dtype=np.float32).reshape(-1)
    if flat.size == 0 or flat.size >= 2**32:
        raise InputError(f"A weight matrix of shape {weights.shape} cannot be quantized.")
    ordered = np.sort(flat).astype(np.float64)
    # Sorting puts -inf first and inf, NaN last: the ends tell about all of them.
    if not (math.isfinite(ordered[0]) and math.isfinite(ordered[-1])):
        raise InputError(
            f"A weight matrix of shape {weights.shape} holds values that are not finite.",
            "The checkpoint is damaged or its training diverged; import a sound one.",
        )
    mean = float(np.cumsum(ordered)[-1]) / flat.size
    std = math.sqrt(float(np.cumsum((ordered - mean) ** 2)[-1]) / flat.size)
    if ordered[0] == ordered[-1] or std == 0.0:
        group, index = ordered, np.empty(0, np.uint32)
    else:
        reach = outlier_sigmas(std, quantizer) * std
        low, high = mean - reach, mean + reach
        group = ordered[np.searchsorted(ordered, low, "left") : np.searchsorted(ordered, high, "right")]
        index = np.flatnonzero((flat < _ceil32(low)) | (flat > _floor32(high))).astype(np.uint32)
    prefix = np.empty(group.size + 1)
    prefix[0] = 0.0
    np.cumsum(group, out=prefix[1:])
    return SortedWeights(group, prefix, index, flat[index])


def fit_dictionary(sorted_weights: SortedWeights, bits: int, *, refinement: Refinement = "l1") -> Dictionary:
    """2^bits ascending centroids of the G group; all zero if every weight is an outlier.

    ``none`` stops at equal-population bins: their means, and their edges as thresholds.
    With fewer weights than centroids some centroids repeat or stay unused.
    """
    group = sorted_weights.group
    count = 1 << bits
    if group.size == 0:
        return Dictionary(np.zeros(count, np.float32), np.zeros(count - 1, np.float32))
    edges = np.arange(count + 1, dtype=np.int64) * group.size // count
    at_edges = group[np.minimum(edges[:-1], group.size - 1)].astype(np.float32)
    centroids = _means(sorted_weights.prefix, edges, at_edges)
    if refinement == "none":
        return Dictionary(centroids, group[np.maximum(edges[1:-1] - 1, 0)].astype(np.float32))
    if refinement == "l1":
        centroids = _until_l1_rises(sorted_weights, centroids)
    elif count < group.size:
        centroids = _until_still(sorted_weights, _companded(sorted_weights, count))
    return nearest_dictionary(centroids)


def nearest_dictionary(centroids: F32) -> Dictionary:
    """The dictionary that takes every weight to its nearest centroid. Shapes: centroids ascending."""
    # The greatest float32 not above each exact middle: comparing in float32 is then exact.
    return Dictionary(centroids, _floor32_array(_middles(centroids)))


def assign_codes(values: F32, dictionary: Dictionary) -> U8:
    """Index of the centroid of every value, ties to the lower; same shape as ``values``."""
    return np.searchsorted(dictionary.thresholds, values, "left").astype(np.uint8)


def fit_gobo(weights: F32, bits: int, quantizer: Quantizer = GOBO) -> GoboMatrix:
    """Quantize one matrix. Shapes: weights [out, in]. Raises: InputError as ``sort_weights``."""
    prepared = sort_weights(weights, quantizer)
    dictionary = fit_dictionary(prepared, bits, refinement=quantizer.refinement)
    codes = assign_codes(np.asarray(weights, np.float32), dictionary)
    return GoboMatrix(dictionary.centroids, codes, prepared.outlier_index, prepared.outlier_values)


def _until_l1_rises(weights: SortedWeights, centroids: F32) -> F32:
    """GOBO's refinement: the centroids of the least L1 error before it first rises."""
    best, best_error = centroids, math.inf
    for _ in range(_MAX_ITERATIONS["l1"]):
        edges = _nearest_edges(weights.group, centroids)
        error = _l1_error(weights.group, weights.prefix, edges, centroids)
        if error >= best_error:
            break
        best, best_error = centroids, error
        centroids = _means(weights.prefix, edges, centroids)
    return best


def _until_still(weights: SortedWeights, centroids: F32) -> F32:
    """Lloyd's iterations to their end: a minimum of the squared error."""
    for _ in range(_MAX_ITERATIONS["converged"]):
        moved = _means(weights.prefix, _nearest_edges(weights.group, centroids), centroids)
        if np.array_equal(moved, centroids):
            break
        centroids = moved
    return centroids


def _companded(weights: SortedWeights, count: int) -> F32:
    """Centroids as dense as the cube root of a Gaussian's density is high: the best for many of them.

    That cube root is a Gaussian too, √3 times as wide; it is cut where the G group ends.
    """
    group, low, high = weights.group, float(weights.group[0]), float(weights.group[-1])
    mean = float(weights.prefix[-1]) / group.size
    std = math.sqrt(float(np.cumsum((group - mean) ** 2)[-1]) / group.size)
    if std == 0.0:
        return np.full(count, low, np.float32)
    wide = NormalDist(mean, math.sqrt(3.0) * std)
    first, last = wide.cdf(low), wide.cdf(high)
    steps = [first + (last - first) * (i + 0.5) / count for i in range(count)]
    return np.clip([wide.inv_cdf(step) for step in steps], low, high).astype(np.float32)


def _middles(centroids: F32) -> F64:
    exact = centroids.astype(np.float64)
    return (exact[:-1] + exact[1:]) * 0.5


def _nearest_edges(group: F64, centroids: F32) -> npt.NDArray[np.int64]:
    inner = np.searchsorted(group, _middles(centroids), "right")
    return np.concatenate(([0], inner, [group.size])).astype(np.int64)


def _means(prefix: F64, edges: npt.NDArray[np.int64], empty: F32) -> F32:
    """Mean of every bin, rounded to what will be stored; an empty bin keeps its value in ``empty``."""
    sizes = np.diff(edges)
    sums = prefix[edges[1:]] - prefix[edges[:-1]]
    means = np.where(sizes > 0, sums / np.maximum(sizes, 1), empty)
    # Rounding in the prefix sums may swap neighbours that are equal but for the last bit.
    return np.maximum.accumulate(means.astype(np.float32))


def _l1_error(group: F64, prefix: F64, edges: npt.NDArray[np.int64], centroids: F32) -> float:
    """Σ |weight − its centroid|, from the prefix sums."""
    exact = centroids.astype(np.float64)
    start, end = edges[:-1], edges[1:]
    split = np.clip(np.searchsorted(group, exact, "left"), start, end)
    below = exact * (split - start) - (prefix[split] - prefix[start])
    above = (prefix[end] - prefix[split]) - exact * (end - split)
    return math.fsum(below) + math.fsum(above)


def _floor32_array(values: F64) -> F32:
    rounded = values.astype(np.float32)
    return np.where(rounded > values, np.nextafter(rounded, np.float32(-np.inf)), rounded)


def _floor32(value: float) -> np.float32:
    return np.float32(_floor32_array(np.array([value]))[0])


def _ceil32(value: float) -> np.float32:
    return np.float32(-_floor32_array(np.array([-value]))[0])
