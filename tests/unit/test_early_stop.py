from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from orchestrator.cli.model import detail
from orchestrator.train import subset
from orchestrator.training_report import training_lines
from sti_runtime.early_stop import Best, EarlyStop, PhaseEnd, provenance_of
from sti_runtime.elastic import train_depths, train_widths
from sti_runtime.errors import FormatError, ResourceError
from sti_runtime.evaluation import evaluate, evaluate_submodels, full_model
from sti_runtime.model import elastic_submodels
from sti_runtime.rows import LabelledRows
from sti_runtime.tasks import Example
from sti_runtime.training import PhaseStatus, Trained, TrainSettings, fine_tune, initial_tensors
from tests.unit.test_elastic import CONFIG, make_rows

TRAIN = make_rows(256, 1)
HELD_OUT = make_rows(64, 2)
CONTRARY = LabelledRows(HELD_OUT.input_ids, HELD_OUT.token_types, HELD_OUT.lengths, 1 - HELD_OUT.labels)
"""Rows that a model scores the worse the more it has learned."""


def settings(rule: EarlyStop | None, *, steps: int = 40) -> TrainSettings:
    return TrainSettings(
        epochs=9,
        batch=16,
        learning_rate=3e-3,
        max_steps=steps,
        threads=1,
        checkpoint_every=3,
        early_stop=rule,
    )


def train(rule: EarlyStop | None, held_out: LabelledRows, workspace: Path | None = None) -> Trained:
    return fine_tune(
        initial_tensors(CONFIG, 0), CONFIG, TRAIN, settings(rule), held_out=held_out, workspace=workspace
    )


def same(one: Trained, other: Trained) -> None:
    assert one.ends == other.ends
    for name, tensor in one.tensors.items():
        np.testing.assert_array_equal(tensor, other.tensors[name])


def test_a_phase_ends_when_held_out_rows_gain_no_more_and_keeps_its_best_weights() -> None:
    whole = settings(None, steps=100)
    longer = fine_tune(initial_tensors(CONFIG, 0), CONFIG, TRAIN, whole)
    result = fine_tune(longer.tensors, CONFIG, TRAIN, settings(EarlyStop(patience=2)), held_out=CONTRARY)
    (end,) = result.ends
    assert (end.why, end.planned, end.epoch_steps) == ("no-gain", 40, 16)
    assert end.best_step is not None
    assert end.steps == end.best_step + 2 * 4
    found = evaluate(result.tensors, CONFIG, full_model(CONFIG), CONTRARY, threads=1)
    assert found.loss_nano == end.best_nano
    assert longer.ends[0] == PhaseEnd("fine-tune", 100, 100, 16, "all-steps", "loss", None, None, 0)


def test_the_best_weights_are_kept_of_a_phase_that_takes_every_step() -> None:
    (end,) = train(EarlyStop(patience=99, measure="accuracy"), CONTRARY).ends
    assert (end.why, end.steps) == ("all-steps", 40)
    assert end.best_step is not None
    assert end.best_step < 40
    # A gain that is asked for and cannot be: the first check is the best.
    (end,) = train(EarlyStop(patience=3, least_gain_nano=10**12), HELD_OUT).ends
    assert (end.best_step, end.steps, end.why) == (4, 16, "no-gain")


def test_elastic_phases_go_by_the_mean_of_their_submodels() -> None:
    tensors, rule = initial_tensors(CONFIG, 0), EarlyStop(patience=9)
    every = elastic_submodels(CONFIG.layers, CONFIG.heads)
    widths = tuple(s for s in every if s.depth == CONFIG.layers)
    for phase, submodels in ((train_widths, widths), (train_depths, every)):
        result = phase(tensors, CONFIG, TRAIN, settings(rule, steps=4), held_out=HELD_OUT)
        scores = evaluate_submodels(result.tensors, CONFIG, submodels, HELD_OUT, threads=1)
        mean = sum(score.loss_nano for score in scores.values()) / len(submodels)
        assert result.ends[0].best_nano == pytest.approx(mean, abs=2)


@pytest.mark.parametrize("rule", [EarlyStop(patience=2), EarlyStop(patience=2, least_gain_nano=10**12)])
def test_an_interrupted_phase_ends_as_an_uninterrupted_one(tmp_path: Path, rule: EarlyStop) -> None:
    told: list[PhaseStatus] = []

    def stop_once(status: PhaseStatus) -> None:
        told.append(status)
        if status.done == 8 and len(told) == 8:
            raise KeyboardInterrupt

    def run(workspace: Path | None) -> Trained:
        return fine_tune(
            initial_tensors(CONFIG, 0), CONFIG, TRAIN, settings(rule), held_out=HELD_OUT,
            workspace=workspace, progress=stop_once,
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    resumed = run(tmp_path)
    assert told[8].done == 6  # where it went on
    assert told[-1].ended
    told.clear()
    same(run(tmp_path), resumed)
    assert [status.ended for status in told] == [True]  # not trained again
    same(train(rule, HELD_OUT), resumed)


def test_other_held_out_rows_do_not_pick_up_a_state(tmp_path: Path) -> None:
    rule = EarlyStop(patience=1, least_gain_nano=10**12)
    for rows in (HELD_OUT, CONTRARY):
        train(rule, rows, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ValueError, match="needs held-out rows"):
        fine_tune(initial_tensors(CONFIG, 0), CONFIG, TRAIN, settings(rule))


def test_a_state_of_early_stopping_that_is_damaged_is_named() -> None:
    with pytest.raises(FormatError, match="early stopping is damaged"):
        Best(EarlyStop()).restore("{}", {})


def test_weights_that_are_not_finite_end_the_phase() -> None:
    tensors = initial_tensors(CONFIG, 0)
    tensors["embeddings.word.weight"][7] = np.nan  # a token of no row that is trained on
    rows = make_rows(16, 3)
    rows.input_ids[0, 1] = 7
    with pytest.raises(ResourceError, match=r"diverged: the held-out loss after step 4 is nan"):
        fine_tune(tensors, CONFIG, TRAIN, settings(EarlyStop()), held_out=rows)


# ---------------------------------------------------------------------------------- what is told


def test_what_is_shown_while_a_phase_runs() -> None:
    rule = EarlyStop(patience=3)
    status = PhaseStatus("widths", 120, 600, 0.5123, 312_000_000, 2)
    assert detail(status, rule, 75.2) == (
        "step 120 of 600, loss 0.512, best loss 0.312 on held-out rows, patience 2 of 3, about 0:01:15 left"
    )
    by_rows = EarlyStop(patience=3, measure="accuracy")
    assert "best accuracy 31.2 % on held-out rows" in detail(status, by_rows, None)
    assert detail(PhaseStatus("widths", 1, 600, 0.5), None, None) == "step 1 of 600, loss 0.500"


def test_what_a_model_says_of_its_training() -> None:
    early = PhaseEnd("fine-tune", 120, 600, 100, "no-gain", "loss", 60, 312_000_000, 0)
    whole = PhaseEnd("widths", 100, 100, 100, "all-steps", "accuracy", None, None, 3)
    provenance = {
        "train_rows": 3200, "train_rows_of": 9000, "profile_rows": 500, "seed": 4, "torch": "2.13.0",
        "device": "cpu", "precision": "fp32", **provenance_of(early), **provenance_of(whole),
    }  # fmt: skip
    assert training_lines(provenance) == [
        "Trained on a subset: 3200 of 9000 train rows, seed 4, fp32 on cpu (PyTorch 2.13.0).",
        "fine-tuning: 120 of 600 steps (1.2 epochs), ended early for want of a gain; kept are the weights of"
        " step 60 (loss 0.312 on 500 profile rows)",
        "elastic widths: 100 of 100 steps (1 epoch); 3 steps overflowed float16 and were left out",
    ]
    assert training_lines({}) == []


def test_a_subset_of_the_train_rows_depends_on_its_seed_and_keeps_their_order() -> None:
    examples = [Example(text=str(i), pair=None, label=0) for i in range(50)]
    chosen = subset(examples, 10, 1)
    assert chosen == subset(examples, 10, 1) != subset(examples, 10, 2)
    assert [int(example.text) for example in chosen] == sorted(int(example.text) for example in chosen)
    assert len(chosen) == 10
    assert subset(examples, 50, 1) == subset(examples, None, 1) == examples
