"""Codecs: how one weight matrix becomes, at any number of bits, a table of values, codes and exceptions.

A codec sees a matrix once and answers for every fidelity of it: which weights are kept exactly (the
outliers) and which 2^k centroids stand for the others. Everything after that is the same for all: a
weight's code is that of the nearest centroid, ``pack`` lays out tables, codes and outliers, and every
decoder reads them without knowing the codec. A new codec is a function here, its line in ``CODECS``, and
its name in the manifest.

* ``gobo``: Gaussian outliers, centroids of least absolute error. Source: GOBO (MICRO 2020); ``quantize``.
* ``fisher``: weighted k-means by the Fisher information, as many outliers as GOBO has, of them
  ``SENSITIVE_PPM`` the most sensitive weights and the others the farthest from the mean. Source: SqueezeLLM
  (ICML 2024), sections 4.1 and 4.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from sti_runtime.errors import InputError
from sti_runtime.quantize import U32, Dictionary, fit_dictionary, nearest_dictionary, sort_weights
from sti_runtime.quantizer import SENSITIVE_PPM, CodecName, Quantizer
from sti_runtime.shard import F32
from sti_runtime.weighted_centroids import F64, WeightedValues, weighted_centroids

_FLOOR = 1.0
"""Added to every sensitivity, in means of the matrix: what a few hundred rows left alone may matter yet."""


@dataclass(frozen=True, slots=True)
class PreparedMatrix:
    """What a codec makes of one matrix.

    Shapes: outlier_index [r] ascending positions in row-major order; outlier_values [r].
    ``dictionary`` gives the 2^bits centroids of the other weights.
    """

    outlier_index: U32
    outlier_values: F32
    dictionary: Callable[[int], Dictionary]


Codec = Callable[[F32, F32 | None, Quantizer], PreparedMatrix]
"""(weights [out, in], their sensitivities [out, in] or None, options) → the matrix as prepared.

Raises: InputError for weights it cannot take.
"""


def prepare(weights: F32, quantizer: Quantizer, sensitivities: F32 | None = None) -> PreparedMatrix:
    """Prepare a matrix with the quantizer's codec. Raises: InputError."""
    return CODECS[quantizer.codec](weights, sensitivities, quantizer)


def prepare_gobo(weights: F32, sensitivities: F32 | None, quantizer: Quantizer) -> PreparedMatrix:
    """GOBO does not look at sensitivities."""
    prepared = sort_weights(weights, quantizer)
    return PreparedMatrix(
        prepared.outlier_index,
        prepared.outlier_values,
        lambda bits: fit_dictionary(prepared, bits, refinement=quantizer.refinement),
    )


def prepare_fisher(weights: F32, sensitivities: F32 | None, quantizer: Quantizer) -> PreparedMatrix:
    """Dense-and-sparse: the outliers apart, weighted k-means of the rest.

    Raises: InputError without sensitivities, or if they are not of the weights' shape, finite and ≥ 0.
    """
    masses = _masses(weights, sensitivities)
    flat = np.ascontiguousarray(weights, dtype=np.float32).reshape(-1)
    kept = sort_weights(weights, quantizer).outlier_index.size
    index = _sparse(flat, masses, kept)
    dense = np.ones(flat.size, bool)
    dense[index] = False
    data = WeightedValues.of(flat[dense], masses[dense])
    return PreparedMatrix(
        index, flat[index], lambda bits: nearest_dictionary(weighted_centroids(data, 1 << bits))
    )


CODECS: Mapping[CodecName, Codec] = MappingProxyType({"gobo": prepare_gobo, "fisher": prepare_fisher})


# ------------------------------------------------------------------ details


def _masses(weights: F32, sensitivities: F32 | None) -> F64:
    """Sensitivities [n] with a floor of ``_FLOOR`` times their mean; all 1 where nothing is sensitive."""
    if sensitivities is None:
        raise InputError(
            "The codec fisher needs the sensitivity of every weight, and was given none.",
            "Name the task it is measured on: stifarm bundle build MODEL --codec fisher --task TASK.",
        )
    masses = np.ascontiguousarray(sensitivities, dtype=np.float64).reshape(-1)
    if sensitivities.shape != weights.shape or not (np.isfinite(masses).all() and np.all(masses >= 0.0)):
        raise InputError(
            f"Sensitivities of shape {sensitivities.shape} for weights of shape {weights.shape}: they must be"
            " of one shape, finite and not negative.",
            "The model's gradients overflow or belong to another model; measure them with this one.",
        )
    mean = float(np.cumsum(masses)[-1]) / masses.size
    if mean == 0.0:
        return np.ones(masses.size)
    return masses / mean + _FLOOR


def _sparse(flat: F32, masses: F64, count: int) -> U32:
    """Positions [count], ascending, of the weights kept exactly; ties to the earlier one."""
    sensitive = count * SENSITIVE_PPM // 1_000_000
    far = np.abs(flat.astype(np.float64) - float(np.cumsum(flat, dtype=np.float64)[-1]) / flat.size)
    farthest = np.argsort(-far, kind="stable")[: count - sensitive]
    rest = masses.copy()
    rest[farthest] = -1.0
    most = np.argsort(-rest, kind="stable")[:sensitive]
    return np.sort(np.concatenate((farthest, most))).astype(np.uint32)
