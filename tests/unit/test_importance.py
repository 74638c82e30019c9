from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sti_runtime.bundle import Bundle
from sti_runtime.bundle_build import build_bundle
from sti_runtime.errors import DatasetError, InputError
from sti_runtime.importance import (
    ImportanceTask,
    SplitScore,
    build_profile,
    choose_base_fidelity,
    plan_units,
    prepare_rows,
    raise_shards,
    score_configuration,
    score_shards,
    tensors_at,
)
from sti_runtime.importance_profile import ImportanceProfile, Method, Score
from sti_runtime.model import HeadConfig, ModelConfig, all_submodels, tensor_shapes
from sti_runtime.pack import pack_version, unpack_version
from sti_runtime.rank_statistics import rank_correlation, reliability_ppm
from sti_runtime.rows import I64, LabelledRows, by_length, in_order, select_rows
from sti_runtime.shard import F32, MATRICES, ShardId, matrix_shapes, shard_matrices
from sti_runtime.torch_tensors import as_torch, torch_threads
from sti_runtime.training import classify, full_model, initial_tensors

CONFIG = ModelConfig(
    family="bert", layers=3, heads=4, hidden=32, ffn=64, vocab=40, positions=16, position_offset=0,
    token_types=2, layer_norm_eps=1e-12, activation="gelu", pad_id=0,
    head=HeadConfig(pooling="cls", activation="tanh", labels=("no", "yes")),
)  # fmt: skip
EVERY: tuple[ShardId, ...] = tuple(itertools.product(range(CONFIG.layers), range(CONFIG.heads)))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny tensors: more threads only wait for each other."""
    with torch_threads(1):
        yield


@functools.cache
def make_tensors() -> dict[str, F32]:
    """Random weights, large enough that fidelity matters; both labels are answered equally often."""
    rng = np.random.default_rng(5)
    tensors = {
        name: (tensor + rng.standard_normal(tensor.shape) * 0.15).astype(np.float32)
        for name, tensor in initial_tensors(CONFIG, 5).items()
    }
    logits = answers(tensors, unlabelled_rows(1000))
    tensors["head.classifier.bias"][1] -= np.median(logits[:, 1] - logits[:, 0])
    return tensors


def answers(tensors: dict[str, F32], rows: LabelledRows) -> F32:
    """Logits [R, 2] of the full model."""
    parameters = as_torch(tensors)
    with torch.inference_mode():
        parts = [classify(parameters, CONFIG, full_model(CONFIG), b).numpy() for b in in_order(rows, 64)]
    return np.concatenate(parts)


def unlabelled_rows(count: int) -> LabelledRows:
    rng = np.random.default_rng(6)
    lengths = rng.integers(3, 13, count).astype(np.int32)
    ids = rng.integers(1, CONFIG.vocab, (count, 12)).astype(np.int32)
    ids[np.arange(12) >= lengths[:, None]] = 0
    return LabelledRows(ids, np.zeros_like(ids), lengths, np.zeros(count, np.int32))


def make_rows(count: int = 150) -> LabelledRows:
    """Rows whose labels are the full model's own answers: quantization then costs accuracy."""
    rows = unlabelled_rows(count)
    labels = answers(make_tensors(), rows).argmax(1).astype(np.int32)
    return dataclasses.replace(rows, labels=labels)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    root = tmp_path_factory.mktemp("bundles")
    path = build_bundle(
        CONFIG, make_tensors(), model_digest="a" * 64, submodels=all_submodels(3, 4), untrained=True,
        out_root=root, fidelities=(2, 4, 32),
    )  # fmt: skip
    return Bundle.open(path)


@pytest.fixture(scope="module")
def task(bundle: Bundle) -> ImportanceTask:
    return ImportanceTask(CONFIG, tensors_at(bundle, 2), tensors_at(bundle, 32), make_rows())


@pytest.fixture(scope="module")
def scores(task: ImportanceTask) -> dict[ShardId, SplitScore]:
    return dict(score_shards(task, EVERY))


# --------------------------------------------------------------------------------------- tensors


def test_tensors_at_32_bits_are_the_model_s(bundle: Bundle) -> None:
    tensors, original = tensors_at(bundle, 32), make_tensors()
    assert {n: t.shape for n, t in tensors.items()} == tensor_shapes(CONFIG)
    for name, tensor in original.items():
        np.testing.assert_array_equal(tensors[name], tensor)


def test_tensors_at_two_bits_are_each_shard_quantised_by_itself(bundle: Bundle) -> None:
    tensors, original = tensors_at(bundle, 2), make_tensors()
    for layer, index in EVERY:
        matrices = shard_matrices(original, CONFIG, layer, index)
        packed = pack_version({name: matrices[name] for name in MATRICES}, 2)
        expected = unpack_version(packed.payload, matrix_shapes(CONFIG), 2, packed.outliers)
        for name, matrix in shard_matrices(tensors, CONFIG, layer, index).items():
            np.testing.assert_array_equal(matrix, expected[name])
    np.testing.assert_array_equal(tensors["head.pooler.weight"], original["head.pooler.weight"])
    np.testing.assert_array_equal(tensors["embeddings.word.weight"], original["embeddings.word.weight"])


def test_a_fidelity_the_bundle_lacks_is_named(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="6-bit"):
        tensors_at(bundle, 6)


def test_raising_all_shards_is_the_high_model(task: ImportanceTask) -> None:
    raised = raise_shards(task, EVERY)
    for name, tensor in task.high.items():
        np.testing.assert_array_equal(raised[name], tensor)
    for name, tensor in raise_shards(task, ()).items():
        np.testing.assert_array_equal(tensor, task.base[name])
    assert score_configuration(CONFIG, raised, task.rows).score.correct == len(task.rows.labels)


# --------------------------------------------------------------------------------------- scoring


def test_shared_states_give_the_naive_scores(task: ImportanceTask, scores: dict[ShardId, SplitScore]) -> None:
    for shard in EVERY:
        naive = score_configuration(CONFIG, raise_shards(task, [shard]), task.rows)
        found = scores[shard]
        assert found.score.correct == naive.score.correct
        assert abs(found.score.loss_nano - naive.score.loss_nano) <= 1000
        assert abs(found.even_loss_nano - naive.even_loss_nano) <= 1000
        assert abs(found.odd_loss_nano - naive.odd_loss_nano) <= 1000


def test_scores_do_not_depend_on_the_grouping_into_units(
    task: ImportanceTask, scores: dict[ShardId, SplitScore]
) -> None:
    for workers in (1, 3):
        again: dict[ShardId, SplitScore] = {}
        for unit in plan_units(CONFIG, (), workers):
            again |= dict(score_shards(task, unit))
        assert again == scores


def test_scoring_resumes_after_any_shard(task: ImportanceTask, scores: dict[ShardId, SplitScore]) -> None:
    """The consumer stores each score as it comes; stopping loses at most the shard in work."""
    stored: dict[ShardId, SplitScore] = {}
    (unit,) = plan_units(CONFIG, (), 1)[:1]
    for shard, score in itertools.islice(score_shards(task, unit), 2):
        stored[shard] = score
    left = plan_units(CONFIG, stored, 1)
    assert not {shard for part in left for shard in part} & set(stored)
    for part in left:
        stored |= dict(score_shards(task, part))
    assert stored == scores


def test_halves_average_to_the_whole(scores: dict[ShardId, SplitScore]) -> None:
    for found in scores.values():
        assert abs((found.even_loss_nano + found.odd_loss_nano) / 2 - found.score.loss_nano) <= 1


def test_shards_outside_the_model_and_headless_models_are_refused(task: ImportanceTask) -> None:
    for shard in ((3, 0), (0, 4), (-1, 0), (0, -1)):
        with pytest.raises(InputError, match="not all within 3 layers of 4 slices"):
            next(score_shards(task, [shard]))
    headless = dataclasses.replace(task, config=CONFIG.model_copy(update={"head": None}))
    with pytest.raises(InputError, match="no classification head"):
        next(score_shards(headless, [(0, 0)]))


def test_rows_without_label_are_left_out() -> None:
    rows = make_rows(20)
    labels = rows.labels.copy()
    labels[::2] = -1
    chosen = prepare_rows(dataclasses.replace(rows, labels=labels), CONFIG)
    np.testing.assert_array_equal(chosen.input_ids, rows.input_ids[1::2])
    assert len(prepare_rows(rows, CONFIG, 7).labels) == 7
    with pytest.raises(DatasetError, match="None of the rows"):
        prepare_rows(dataclasses.replace(rows, labels=np.full(20, -1, np.int32)), CONFIG)


# ---------------------------------------------------------------------------------- base fidelity


def rows_by_two_bit_answer(bundle: Bundle, task: ImportanceTask) -> tuple[I64, I64]:
    """Indices of the rows that the model at two bits gets right, and of those it gets wrong."""
    agrees = answers(tensors_at(bundle, 2), task.rows).argmax(1) == task.rows.labels
    return np.flatnonzero(agrees), np.flatnonzero(~agrees)


def test_the_base_is_two_bits_when_that_is_above_chance(bundle: Bundle, task: ImportanceTask) -> None:
    right, wrong = rows_by_two_bit_answer(bundle, task)
    rows = select_rows(task.rows, np.concatenate([right, wrong[: len(right) // 5]]))
    choice = choose_base_fidelity(bundle, rows)
    assert (choice.fidelity, choice.above_chance) == (2, True)
    assert choice.score == score_configuration(CONFIG, task.base, rows)


def test_a_base_at_chance_is_passed_over(bundle: Bundle, task: ImportanceTask) -> None:
    """Rows on which two bits are wrong half the time and four bits are mostly right."""
    right, wrong = rows_by_two_bit_answer(bundle, task)
    half = min(len(right), len(wrong))
    assert half >= 30
    choice = choose_base_fidelity(
        bundle, select_rows(task.rows, np.concatenate([right[:half], wrong[:half]]))
    )
    assert (choice.fidelity, choice.above_chance) == (4, True)


def test_when_nothing_is_above_chance_the_choice_says_so(bundle: Bundle, task: ImportanceTask) -> None:
    shuffled = np.random.default_rng(0).permutation(task.rows.labels)
    choice = choose_base_fidelity(bundle, dataclasses.replace(task.rows, labels=shuffled))
    assert (choice.fidelity, choice.above_chance) == (2, False)
    with pytest.raises(InputError, match="none of the fidelities"):
        choose_base_fidelity(bundle, task.rows, candidates=(3, 5))


# ------------------------------------------------------------------------------------------ units


@given(layers=st.integers(1, 12), heads=st.integers(1, 12), workers=st.integers(1, 8), data=st.data())
def test_units_cover_exactly_what_is_left(layers: int, heads: int, workers: int, data: st.DataObject) -> None:
    config = CONFIG.model_copy(update={"layers": layers, "heads": heads})
    every = list(itertools.product(range(layers), range(heads)))
    done = data.draw(st.sets(st.sampled_from(every)))
    units = plan_units(config, done, workers)
    flat = [shard for unit in units for shard in unit]
    assert sorted(flat) == sorted(set(every) - done)
    assert len(flat) == len(set(flat))
    assert all(units)
    costs = [sum(layers - layer for layer, _ in unit) for unit in units]
    assert not costs or max(costs) <= max(layers, -(-sum(costs) // (4 * workers)))


def test_nothing_left_is_no_unit() -> None:
    assert plan_units(CONFIG, EVERY, 2) == []
    assert len(plan_units(CONFIG, (), 2)) >= 2


# ---------------------------------------------------------------------------------------- profile


def profile_of(
    scores: dict[ShardId, SplitScore], base: SplitScore, method: Method = "exhaustive"
) -> ImportanceProfile:
    return build_profile(
        CONFIG, scores, base, base_fidelity=2, model_digest="a" * 64, task="t", split_digest="b" * 64,
        rows=150, method=method,
    )  # fmt: skip


def test_the_profile_ranks_by_loss_gain(task: ImportanceTask, scores: dict[ShardId, SplitScore]) -> None:
    base = score_configuration(CONFIG, task.base, task.rows)
    profile = build_profile(
        CONFIG, scores, base, base_fidelity=2, model_digest="a" * 64, task="t", split_digest="b" * 64,
        rows=len(task.rows.labels),
    )  # fmt: skip
    ranking = profile.ranking()
    gains = [base.score.loss_nano - scores[shard].score.loss_nano for shard in ranking]
    assert gains == sorted(gains, reverse=True)
    assert gains[0] > 0
    assert [profile.gain_nano(shard) for shard in ranking] == gains
    best, worst = set(ranking[:4]), set(ranking[-4:])
    top, bottom = (score_configuration(CONFIG, raise_shards(task, s), task.rows) for s in (best, worst))
    assert top.score.loss_nano < bottom.score.loss_nano
    assert profile.rows == 150


def test_the_paper_s_ranking_is_by_correct_rows_alone(
    task: ImportanceTask, scores: dict[ShardId, SplitScore]
) -> None:
    base = score_configuration(CONFIG, task.base, task.rows)
    by_loss, by_rows = profile_of(scores, base), profile_of(scores, base, "exhaustive-accuracy")
    assert by_rows.scores == by_loss.scores
    assert by_rows.digest != by_loss.digest
    correct = {shard: score.score.correct for shard, score in scores.items()}
    assert list(by_rows.ranking()) == sorted(EVERY, key=lambda shard: (-correct[shard], shard))
    assert by_rows.worth() == tuple(correct[shard] - base.score.correct for shard in EVERY)
    assert by_loss.worth() == tuple(by_loss.gain_nano(shard) for shard in EVERY)
    halves = [(s.even_correct, s.odd_correct) for _, s in sorted(scores.items())]
    assert by_rows.reliability_ppm == reliability_ppm(*zip(*halves, strict=True))
    assert all(even + odd == correct[shard] for shard, (even, odd) in zip(EVERY, halves, strict=True))


def test_rows_of_like_length_are_scored_together_and_told_in_their_order(task: ImportanceTask) -> None:
    batches = by_length(task.rows, 64)
    order = np.concatenate([index for index, _ in batches])
    assert sorted(order.tolist()) == list(range(len(task.rows.labels)))
    assert (np.diff(task.rows.lengths[order]) >= 0).all()
    for index, batch in batches:
        assert batch.input_ids.shape[1] == task.rows.lengths[index].max()
    logits = answers(dict(task.base), task.rows)
    score = score_configuration(CONFIG, task.base, task.rows)
    right = logits.argmax(1) == task.rows.labels
    assert (score.even_correct, score.odd_correct) == (int(right[::2].sum()), int(right[1::2].sum()))


def test_missing_scores_are_counted(scores: dict[ShardId, SplitScore]) -> None:
    partial = {shard: score for shard, score in scores.items() if shard[0] != 1}
    with pytest.raises(InputError, match=r"4 of 12 shards have no score yet, the first is \(1, 0\)"):
        profile_of(partial, scores[(0, 0)])


def test_reliability_is_spearman_brown_of_the_half_rankings() -> None:
    assert reliability_ppm([5, 1, 9, 3], [10, 2, 18, 6]) == 1_000_000
    # Ranks 1 2 3 4 against 1 2 4 3: r = 0.8, corrected 1.6 / 1.8.
    assert reliability_ppm([1, 2, 3, 4], [1, 2, 4, 3]) == 888_889
    assert reliability_ppm([1, 2, 3], [-1, -2, -3]) == -1_000_000
    assert reliability_ppm([7, 7, 7], [1, 2, 3]) == 0


def test_the_profile_s_reliability_is_of_the_loss_gains() -> None:
    base = SplitScore(Score(loss_nano=100, correct=0), 100, 100, 0)
    halves = [(1 + i, 1 + i) for i in range(10)] + [(11, 12), (12, 11)]
    scores = {
        shard: SplitScore(Score(loss_nano=100, correct=0), 100 - even, 100 - odd, 0)
        for shard, (even, odd) in zip(EVERY, halves, strict=True)
    }
    r = 1 - 6 * 2 / (12 * (12**2 - 1))
    assert profile_of(scores, base).reliability_ppm == round(2 * r / (1 + r) * 1e6)


def test_rank_correlation_with_ties_is_pearson_of_mean_ranks() -> None:
    # Mean ranks 1.5 1.5 3 4 against 1 2 3 4: covariance 4.5, variances 4.5 and 5.
    assert rank_correlation([1, 1, 5, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / np.sqrt(4.5 * 5))
