"""The codec fisher: what it keeps exactly, what it weighs, what it says of itself; gobo stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sti_runtime.bundle import Bundle
from sti_runtime.bundle_build import Sensitivity, build_bundle
from sti_runtime.codecs import CODECS, prepare
from sti_runtime.errors import InputError
from sti_runtime.importance import tensors_at
from sti_runtime.manifest import FisherInfo
from sti_runtime.model import all_submodels
from sti_runtime.pack import pack_matrices, pack_version, unpack_matrices
from sti_runtime.plan_check import check_bundle
from sti_runtime.planner import plan_paper
from sti_runtime.quantize import assign_codes, fit_gobo, sort_weights
from sti_runtime.quantizer import FISHER, GOBO, SENSITIVE_PPM, Quantizer
from sti_runtime.shard import F32, FIDELITIES, SHARDED_WEIGHTS
from tests.bundles import make_bundle, random_sensitivity, random_tensors, small_config
from tests.unit.planning_data import make_importance, make_profile

LOW = tuple(bits for bits in FIDELITIES if bits != 32)
SHAPE = (96, 256)
RNG = np.random.default_rng(7)
WEIGHTS: F32 = (RNG.standard_t(5, SHAPE) * 0.05).astype(np.float32)
SENSITIVE: F32 = RNG.standard_normal(SHAPE, np.float32) ** 8


def quantized(weights: F32, sensitivities: F32, bits: int) -> F32:
    prepared = prepare(weights, FISHER, sensitivities)
    dictionary = prepared.dictionary(bits)
    values: F32 = dictionary.centroids[assign_codes(weights, dictionary)]
    values.reshape(-1)[prepared.outlier_index] = prepared.outlier_values
    return values


def weighted(weights: F32, found: F32, sensitivities: F32) -> float:
    return float(np.sum(sensitivities * (weights.astype(np.float64) - found) ** 2))


def test_gobo_is_a_codec_like_the_others() -> None:
    assert set(CODECS) == {"gobo", "fisher"}
    for bits in LOW:
        prepared, wanted = prepare(WEIGHTS, GOBO), fit_gobo(WEIGHTS, bits)
        assert np.array_equal(prepared.dictionary(bits).centroids, wanted.centroids)
        assert np.array_equal(prepared.outlier_index, wanted.outlier_index)


@pytest.mark.parametrize("bits", LOW)
def test_the_weighted_error_is_below_gobos_of_either_refinement(bits: int) -> None:
    ours = weighted(WEIGHTS, quantized(WEIGHTS, SENSITIVE, bits), SENSITIVE)
    for quantizer in (GOBO, Quantizer("converged")):
        assert ours < weighted(WEIGHTS, fit_gobo(WEIGHTS, bits, quantizer).dequantized(), SENSITIVE)


def test_as_many_outliers_as_gobo_the_farthest_and_the_most_sensitive() -> None:
    prepared = prepare(WEIGHTS, FISHER, SENSITIVE)
    count = sort_weights(WEIGHTS).outlier_index.size
    sensitive = count * SENSITIVE_PPM // 1_000_000
    assert prepared.outlier_index.size == count > sensitive > 0
    assert np.all(np.diff(prepared.outlier_index.astype(np.int64)) > 0)
    assert np.array_equal(prepared.outlier_values, WEIGHTS.reshape(-1)[prepared.outlier_index])
    far = np.abs(WEIGHTS.reshape(-1) - WEIGHTS.mean(dtype=np.float64))
    assert set(np.argsort(-far)[: count - sensitive]) <= set(prepared.outlier_index)
    assert set(np.argsort(-SENSITIVE.reshape(-1))[:sensitive]) <= set(prepared.outlier_index)


def test_a_version_takes_the_bytes_of_gobos_and_is_read_alike() -> None:
    for bits in LOW:
        packed = pack_matrices([WEIGHTS], (bits,), FISHER, [SENSITIVE])[bits]
        plain = pack_version({"q": WEIGHTS}, bits)
        assert (len(packed.payload), packed.outliers) == (len(plain.payload), plain.outliers)
        found = unpack_matrices(packed.payload, (SHAPE,), bits, packed.outliers)[0]
        assert np.array_equal(found, quantized(WEIGHTS, SENSITIVE, bits))


@pytest.mark.parametrize(
    ("weights", "sensitivities"),
    [
        (WEIGHTS, np.zeros(SHAPE, np.float32)),
        (np.full(SHAPE, 0.25, np.float32), SENSITIVE),
        (np.zeros(SHAPE, np.float32), np.zeros(SHAPE, np.float32)),
        (np.sign(WEIGHTS), SENSITIVE),
        (WEIGHTS[:1, :3], SENSITIVE[:1, :3]),
        (WEIGHTS, np.where(SENSITIVE.max() == SENSITIVE, np.float32(1e30), np.float32(0))),
        (WEIGHTS, np.full(SHAPE, 1e-45, np.float32)),
        (WEIGHTS * np.float32(1e-20), SENSITIVE),
    ],
)
def test_inputs_with_little_in_them(weights: F32, sensitivities: F32) -> None:
    few = len(np.unique(weights))
    for bits in LOW:
        found = quantized(weights, sensitivities, bits)
        assert np.isfinite(found).all()
        assert found.min() >= weights.min()
        assert found.max() <= weights.max()
        if few <= 1 << bits:
            assert np.array_equal(found, weights)


def test_equal_sensitivities_are_as_none_at_all() -> None:
    one, other = np.full(SHAPE, 3.0, np.float32), np.zeros(SHAPE, np.float32)
    for bits in (2, 4):
        np.testing.assert_allclose(
            quantized(WEIGHTS, one, bits), quantized(WEIGHTS, other, bits), rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize(
    "sensitivities",
    [SENSITIVE[:1], -SENSITIVE, np.full(SHAPE, np.nan, np.float32), np.full(SHAPE, np.inf, np.float32)],
)
def test_sensitivities_that_are_none_are_refused(sensitivities: F32) -> None:
    with pytest.raises(InputError, match="of one shape, finite and not negative"):
        prepare(WEIGHTS, FISHER, sensitivities)


# ------------------------------------------------------------------ bundles

CONFIG = small_config(layers=2, heads=2, hidden=32, ffn=64)


def build(root: Path, **options: Any) -> Path:
    given: dict[str, Any] = {
        "model_digest": "ab" * 32,
        "submodels": all_submodels(CONFIG.layers, CONFIG.heads),
        "untrained": True,
        "out_root": root,
        "quantizer": FISHER,
        "sensitivity": random_sensitivity(CONFIG),
    }
    return build_bundle(CONFIG, random_tensors(CONFIG), **(given | options))


def test_the_same_sensitivities_give_the_same_bundle(tmp_path: Path) -> None:
    one, two = build(tmp_path / "one"), build(tmp_path / "two")
    assert one.name == two.name
    for file in one.iterdir():
        assert (two / file.name).read_bytes() == file.read_bytes()
    other = build(tmp_path / "one", sensitivity=random_sensitivity(CONFIG, seed=3))
    assert other.name != one.name


def test_sensitivities_are_measured_only_for_a_bundle_that_is_not_there(tmp_path: Path) -> None:
    path, known = build(tmp_path), random_sensitivity(CONFIG)

    def measure() -> dict[str, F32]:
        raise AssertionError("measured again")

    assert build(tmp_path, sensitivity=Sensitivity(known.info, measure)) == path


def test_the_manifest_says_which_codec_and_what_it_was_measured_on(tmp_path: Path) -> None:
    bundle = Bundle.open(build(tmp_path), verify=True)
    made = bundle.manifest.quantizer
    assert isinstance(made, FisherInfo)
    assert made.sensitivity == random_sensitivity(CONFIG).info
    assert made.made_by == "fisher, sensitivities of 2 rows of sst-2"
    other = FisherInfo.of(FISHER, random_sensitivity(CONFIG, seed=3).info)
    assert len({made.label, other.label, "fisher"}) == 3
    assert len(made.label) <= 64


def test_shards_are_weighed_by_their_own_part_of_the_sensitivities(tmp_path: Path) -> None:
    """Of every shard, also those cut out of columns: the weighted error of the whole is below GOBO's."""
    exact, fisher = random_tensors(CONFIG), random_sensitivity(CONFIG).measure()
    ours = tensors_at(Bundle.open(build(tmp_path)), 3)
    gobo = tensors_at(Bundle.open(build(tmp_path, quantizer=Quantizer("converged"), sensitivity=None)), 3)
    for layer in range(CONFIG.layers):
        for kind in SHARDED_WEIGHTS.values():
            name = f"layers.{layer}.{kind}.weight"
            mine, theirs = (weighted(exact[name], t[name], fisher[name]) for t in (ours, gobo))
            assert mine < theirs


def test_the_head_is_gobos_under_every_codec(tmp_path: Path) -> None:
    bundle = Bundle.open(build(tmp_path, head_encoding="gobo6"))
    exact = random_tensors(CONFIG)["head.pooler.weight"]
    assert np.array_equal(bundle.resident()["head.pooler.weight"], fit_gobo(exact, 6).dequantized())


def test_a_bundle_without_its_sensitivities_or_with_useless_ones_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no task is given") as caught:
        build(tmp_path, sensitivity=None)
    assert "--task" in caught.value.remedy
    with pytest.raises(InputError, match="gobo does not look at sensitivities"):
        build(tmp_path, quantizer=GOBO)
    assert not list(tmp_path.iterdir())


def test_the_planner_plans_alike_for_bundles_of_either_codec(tmp_path: Path) -> None:
    """Versions take the same bytes, so with one importance and one device they are the same choices."""
    importance = make_importance(CONFIG.layers, CONFIG.heads).model_copy(update={"model_digest": "0" * 64})
    chosen = []
    for quantizer in (GOBO, FISHER):
        bundle, _ = make_bundle(CONFIG, tmp_path, quantizer=quantizer)
        profile = make_profile(
            bundle=bundle.digest,
            layer_ns={1: 10**6, 2: 10**6},
            decompress_ns=dict.fromkeys(FIDELITIES, 10),
            ps_per_byte=40_000,
        )
        plan = plan_paper(
            bundle.manifest,
            importance,
            profile,
            target_ns=4 * 10**6,
            preload_bytes=1 << 14,
            working_bytes=1 << 20,
        )
        assert not check_bundle(plan, bundle.manifest)
        chosen.append((plan.submodel, plan.shards))
    assert chosen[0] == chosen[1]
    assert len({shard.fidelity for shard in chosen[0][1]}) > 1


def test_gobos_bundles_are_as_before(tmp_path: Path) -> None:
    """Their manifests have no new field, so no digest of a bundle that is out there has changed."""
    bundle, _ = make_bundle(CONFIG, tmp_path, fidelities=(2,))
    assert bundle.manifest.quantizer.model_dump() == {
        "name": "gobo", "refined": True, "outlier_log_density_milli": -4000,
    }  # fmt: skip
