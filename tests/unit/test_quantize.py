"""GOBO: thresholds and signal-to-noise of the paper's setting, corners, determinism to the byte."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sti_runtime.errors import InputError
from sti_runtime.quantize import GoboMatrix, fit_gobo, outlier_sigmas, sort_weights
from sti_runtime.quantizer import Quantizer, Refinement
from sti_runtime.shard import F32

STD = 0.04
UNREFINED = Quantizer("none")
CONVERGED = Quantizer("converged")


@pytest.fixture(scope="module")
def gaussian() -> F32:
    weights = np.random.default_rng(7).standard_normal((1024, 1024)) * STD
    return weights.astype(np.float32)


def sqnr_db(weights: F32, quantized: npt.NDArray[np.floating]) -> float:
    exact = weights.astype(np.float64)
    return float(10 * np.log10(np.sum(exact**2) / np.sum((exact - quantized) ** 2)))


def l1(weights: F32, matrix: GoboMatrix) -> float:
    return math.fsum(np.abs(weights.astype(np.float64) - matrix.dequantized()).reshape(-1))


def uniform(weights: F32, bits: int) -> npt.NDArray[np.float64]:
    """Equal cells over the G group's range, reconstructed at their middles; outliers exact."""
    reach = outlier_sigmas(STD) * STD
    step = 2 * reach / 2**bits
    cell = np.clip(np.floor((weights + reach) / step), 0, 2**bits - 1)
    return np.where(np.abs(weights) > reach, weights, (cell + 0.5) * step - reach)


def test_outlier_threshold_depends_on_scale() -> None:
    assert outlier_sigmas(0.04) == pytest.approx(3.55, abs=0.005)
    assert math.erfc(outlier_sigmas(0.04) / math.sqrt(2)) == pytest.approx(0.00039, abs=0.00001)
    assert math.erfc(outlier_sigmas(0.1) / math.sqrt(2)) == pytest.approx(0.0010, abs=0.00005)


@pytest.mark.parametrize(("std", "share"), [(0.04, 0.00039), (0.1, 0.0010)])
def test_share_of_outliers(gaussian: F32, std: float, share: float) -> None:
    scaled = gaussian * np.float32(std / STD)
    found = sort_weights(scaled).outlier_index.size / scaled.size
    assert found == pytest.approx(share, rel=0.15)


@pytest.mark.parametrize(
    ("bits", "unrefined_db", "refined_db", "uniform_db"),
    [(3, 12.7, 14.3, 11.8), (4, 16.7, 20.1, 17.8), (5, 20.7, 25.9, 23.9), (6, 24.8, 31.1, 29.9)],
)
def test_signal_to_noise(
    gaussian: F32, bits: int, unrefined_db: float, refined_db: float, uniform_db: float
) -> None:
    refined, unrefined = fit_gobo(gaussian, bits), fit_gobo(gaussian, bits, UNREFINED)
    assert sqnr_db(gaussian, refined.dequantized()) == pytest.approx(refined_db, abs=0.2)
    assert sqnr_db(gaussian, unrefined.dequantized()) == pytest.approx(unrefined_db, abs=0.2)
    assert sqnr_db(gaussian, uniform(gaussian, bits)) == pytest.approx(uniform_db, abs=0.2)


@pytest.mark.parametrize(
    ("density_milli", "share", "gain_db"), [(-4000, 0.00039, 1.1), (-1000, 0.0102, 2.5), (0, 0.0321, 3.7)]
)
def test_converged_centroids_and_more_outliers_come_closer(
    gaussian: F32, density_milli: int, share: float, gain_db: float
) -> None:
    """At 6 bits, beside GOBO's: 31.1 dB."""
    plain, close = fit_gobo(gaussian, 6), fit_gobo(gaussian, 6, Quantizer("converged", density_milli))
    found = sqnr_db(gaussian, close.dequantized()) - sqnr_db(gaussian, plain.dequantized())
    assert found == pytest.approx(gain_db, abs=0.2)
    assert close.outlier_index.size / gaussian.size == pytest.approx(share, rel=0.15)


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
def test_converged_centroids_are_the_means_of_what_they_stand_for(gaussian: F32, bits: int) -> None:
    part = gaussian[:256]
    matrix = fit_gobo(part, bits, CONVERGED)
    inside = np.ones(part.size, bool)
    inside[matrix.outlier_index] = False
    codes, values = matrix.codes.reshape(-1)[inside], part.reshape(-1)[inside].astype(np.float64)
    means = np.bincount(codes, values) / np.bincount(codes)
    assert means == pytest.approx(matrix.centroids, rel=1e-5, abs=1e-7)


def test_outliers_are_exact_and_beyond_the_threshold(gaussian: F32) -> None:
    matrix = fit_gobo(gaussian, 3)
    flat, index = gaussian.reshape(-1), matrix.outlier_index
    reach = outlier_sigmas(float(gaussian.std())) * float(gaussian.std())
    assert np.array_equal(matrix.dequantized().reshape(-1)[index], flat[index])
    assert np.array_equal(index, np.flatnonzero(np.abs(flat - gaussian.mean()) > reach))
    assert set(matrix.codes.reshape(-1)[index]) == {0, 7}


@settings(max_examples=60, deadline=None)
@given(
    weights=hnp.arrays(
        np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=24), elements=st.floats(-8, 8, width=32)
    ),
    bits=st.sampled_from((2, 3, 4, 5, 6)),
)
def test_properties_of_any_matrix(weights: F32, bits: int) -> None:
    refined, unrefined = fit_gobo(weights, bits), fit_gobo(weights, bits, UNREFINED)
    assert refined.centroids.shape == (2**bits,)
    assert np.all(np.diff(refined.centroids) >= 0)
    assert np.all(np.diff(unrefined.centroids) >= 0)
    assert refined.codes.shape == weights.shape
    assert int(refined.codes.max()) < 2**bits
    converged = fit_gobo(weights, bits, CONVERGED)
    assert converged.centroids.shape == (2**bits,)
    assert np.all(np.diff(converged.centroids) >= 0)
    slack = 1e-5 * max(1.0, float(np.abs(weights).max())) * weights.size
    assert l1(weights, refined) <= l1(weights, unrefined) + slack
    nearest = np.abs(weights[..., None].astype(np.float64) - refined.centroids).min(-1)
    chosen = np.abs(weights.astype(np.float64) - refined.centroids[refined.codes])
    outliers = np.zeros(weights.size, bool)
    outliers[refined.outlier_index] = True
    assert np.array_equal(chosen[~outliers.reshape(weights.shape)], nearest[~outliers.reshape(weights.shape)])


def test_refinement_lowers_the_l1_error(gaussian: F32) -> None:
    for bits in (3, 4, 5, 6):
        assert l1(gaussian, fit_gobo(gaussian, bits)) < 0.99 * l1(
            gaussian, fit_gobo(gaussian, bits, UNREFINED)
        )


@pytest.mark.parametrize("value", [0.0, -0.25, 1e30, 1e-40])
@pytest.mark.parametrize("refinement", ["none", "l1", "converged"])
def test_constant_matrix_is_exact(value: float, refinement: Refinement) -> None:
    weights = np.full((5, 7), value, np.float32)
    matrix = fit_gobo(weights, 3, Quantizer(refinement))
    assert matrix.outlier_index.size == 0
    assert np.array_equal(matrix.dequantized(), weights)


def test_fewer_weights_than_centroids_is_exact() -> None:
    weights = np.array([[0.5, -0.125], [0.25, 3.0]], np.float32)
    assert np.array_equal(fit_gobo(weights, 6).dequantized(), weights)
    assert np.array_equal(fit_gobo(weights, 6, UNREFINED).dequantized(), weights)


def test_every_weight_an_outlier() -> None:
    # A standard deviation above e^4 / sqrt(2 pi) = 21.8 puts even the mean's density below -4 nats.
    weights = (np.random.default_rng(1).standard_normal((16, 16)) * 1000).astype(np.float32)
    matrix = fit_gobo(weights, 4)
    assert matrix.outlier_index.size == weights.size
    assert np.array_equal(matrix.dequantized(), weights)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_weights_are_refused(gaussian: F32, bad: float) -> None:
    weights = gaussian[:8, :8].copy()
    weights[3, 4] = bad
    with pytest.raises(InputError, match="not finite"):
        fit_gobo(weights, 4)


def test_an_empty_matrix_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be quantized"):
        fit_gobo(np.empty((0, 4), np.float32), 4)


_FINGERPRINT = """
import hashlib, numpy as np
from sti_runtime.quantize import fit_gobo
from sti_runtime.quantizer import Quantizer
weights = (np.random.default_rng(3).standard_normal((96, 160)) * 0.05).astype(np.float32)
digest = hashlib.sha256()
for bits in (2, 3, 4, 5, 6):
    for quantizer in (Quantizer(), Quantizer("none"), Quantizer("converged", -500)):
        m = fit_gobo(weights, bits, quantizer)
        for part in (m.centroids, m.codes, m.outlier_index, m.outlier_values):
            digest.update(part.tobytes())
fingerprint = digest.hexdigest()
"""


def test_same_bytes_in_another_process_and_for_another_memory_order() -> None:
    names: dict[str, str] = {}
    exec(compile(_FINGERPRINT, "fingerprint", "exec"), names)
    other = subprocess.run(
        [sys.executable, "-c", _FINGERPRINT + "print(fingerprint)"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert other.stdout.strip() == names["fingerprint"]
    weights = np.random.default_rng(3).standard_normal((40, 24)).astype(np.float32) * np.float32(0.05)
    strided = np.asfortranarray(weights)
    digests = {
        hashlib.sha256(fit_gobo(w, 4).codes.tobytes() + fit_gobo(w, 4).outlier_index.tobytes()).hexdigest()
        for w in (weights, strided)
    }
    assert len(digests) == 1
