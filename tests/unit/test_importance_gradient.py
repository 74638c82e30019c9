from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sti_runtime.bundle import Bundle
from sti_runtime.errors import InputError
from sti_runtime.importance import (
    ImportanceTask,
    SplitScore,
    build_profile,
    choose_base_fidelity,
    raise_shards,
    score_configuration,
    score_shards,
    tensors_at,
)
from sti_runtime.importance_gradient import estimate_bundle, estimate_shards, shard_slopes
from sti_runtime.model import HeadConfig
from sti_runtime.rank_statistics import rank_correlation
from sti_runtime.rows import LabelledRows, select_rows
from sti_runtime.shard import F32, ShardId
from sti_runtime.torch_tensors import torch_threads
from tests.unit import test_importance as made

EVERY = made.EVERY
bundle = made.bundle
task = made.task


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    with torch_threads(1):
        yield


def near(task: ImportanceTask, share: float) -> ImportanceTask:
    """The task with its high weights moved to ``share`` of the way from the base."""
    high = {n: task.base[n] + np.float32(share) * (task.high[n] - task.base[n]) for n in task.high}
    return dataclasses.replace(task, high=high)


def gains(base: SplitScore, scores: dict[ShardId, SplitScore]) -> list[int]:
    return [base.score.loss_nano - scores[shard].score.loss_nano for shard in EVERY]


def test_slopes_are_those_of_small_steps(task: ImportanceTask) -> None:
    rows = select_rows(task.rows, np.arange(20))
    found = shard_slopes(task.config, task.base, task.high, rows)
    share = 1 / 64
    small = near(task, share)
    np.testing.assert_allclose(found.logits, made.answers(dict(task.base), rows), atol=1e-5)
    for layer, index in EVERY:
        moved = made.answers(raise_shards(small, [(layer, index)]), rows) - found.logits
        difference = (moved - moved[:, :1]) / share
        np.testing.assert_allclose(found.slopes[:, layer, index], difference, atol=0.02, rtol=0.05)


def test_a_small_step_is_scored_as_measured(task: ImportanceTask) -> None:
    small = near(task, 1 / 32)
    base, estimated = estimate_shards(small)
    measured = dict(score_shards(small, EVERY))
    truth, guess = np.array(gains(base, measured)), np.array(gains(base, estimated))
    assert np.abs(guess - truth).max() < 0.1 * np.abs(truth).max()
    assert rank_correlation(truth, guess) > 0.95


def test_the_estimate_ranks_whole_steps_much_as_the_exhaustive_profile(task: ImportanceTask) -> None:
    base, estimated = estimate_shards(task)
    assert base == score_configuration(task.config, task.base, task.rows)
    assert rank_correlation(gains(base, dict(score_shards(task, EVERY))), gains(base, estimated)) > 0.7


def test_an_estimate_does_not_depend_on_how_rows_are_batched(task: ImportanceTask) -> None:
    whole = shard_slopes(task.config, task.base, task.high, task.rows)
    part = shard_slopes(task.config, task.base, task.high, select_rows(task.rows, np.arange(70, 90)))
    np.testing.assert_allclose(whole.slopes[70:90], part.slopes, atol=1e-5)


def test_more_labels_take_a_pass_each(task: ImportanceTask) -> None:
    config = task.config.model_copy(
        update={"head": HeadConfig(pooling="cls", activation="tanh", labels=("a", "b", "c"))}
    )
    rng = np.random.default_rng(3)

    def widened(tensors: dict[str, F32]) -> dict[str, F32]:
        extra = rng.standard_normal((1, config.hidden)).astype(np.float32)
        weight = np.concatenate([tensors["head.classifier.weight"], extra])
        return tensors | {
            "head.classifier.weight": weight,
            "head.classifier.bias": np.zeros(3, np.float32),
        }

    rng_state = rng.bit_generator.state
    base = widened(dict(task.base))
    rng.bit_generator.state = rng_state
    high = widened(dict(task.high))
    rows = select_rows(task.rows, np.arange(16))
    three = shard_slopes(config, base, high, rows).slopes
    two = shard_slopes(task.config, task.base, task.high, rows).slopes
    assert three.shape == (16, 3, 4, 3)
    np.testing.assert_allclose(three[..., :2], two, atol=1e-5)
    assert np.abs(three[..., 2]).max() > 0


def test_the_base_is_chosen_as_the_exhaustive_profile_chooses_it(
    bundle: Bundle, task: ImportanceTask
) -> None:
    right, wrong = made.rows_by_two_bit_answer(bundle, task)
    half = min(len(right), len(wrong))
    for index in (np.concatenate([right, wrong[:5]]), np.concatenate([right[:half], wrong[:half]])):
        rows: LabelledRows = select_rows(task.rows, index)
        estimate, choice = estimate_bundle(bundle, rows), choose_base_fidelity(bundle, rows)
        assert (estimate.base_fidelity, estimate.above_chance) == (choice.fidelity, choice.above_chance)
        assert estimate.base == choice.score
        again = ImportanceTask(task.config, tensors_at(bundle, choice.fidelity), task.high, rows)
        assert estimate.scores == estimate_shards(again)[1]
    with pytest.raises(InputError, match="none of the fidelities"):
        estimate_bundle(bundle, task.rows, candidates=(3, 5))


def test_a_profile_says_that_it_is_estimated(task: ImportanceTask) -> None:
    base, scores = estimate_shards(task)
    profile = build_profile(
        task.config, scores, base, base_fidelity=2, model_digest="a" * 64, task="t", split_digest="b" * 64,
        rows=150, method="gradient",
    )  # fmt: skip
    assert profile.method == "gradient"
    assert [profile.worth()[layer * 4 + index] for layer, index in profile.ranking()] == sorted(
        gains(base, scores), reverse=True
    )
    assert profile.reliability_ppm > 0


def test_a_headless_model_has_no_slopes(task: ImportanceTask) -> None:
    headless = dataclasses.replace(task, config=task.config.model_copy(update={"head": None}))
    with pytest.raises(InputError, match="no classification head"):
        estimate_shards(headless)


def test_no_gradient_is_left_on_weights(task: ImportanceTask) -> None:
    before = {name: tensor.copy() for name, tensor in task.base.items()}
    estimate_shards(task)
    assert torch.is_grad_enabled()
    for name, tensor in before.items():
        np.testing.assert_array_equal(task.base[name], tensor)


def test_every_shard_has_an_estimate(task: ImportanceTask) -> None:
    _, scores = estimate_shards(task)
    assert sorted(scores) == list(itertools.product(range(3), range(4)))
