"""Scores of submodels do not depend on which rows share a batch."""

from __future__ import annotations

import dataclasses

import numpy as np

from sti_runtime.evaluation import evaluate, full_model
from sti_runtime.rows import select_rows
from tests.unit.test_importance import CONFIG, make_tensors, unlabelled_rows


def test_a_score_belongs_to_its_rows_whatever_their_order_and_batches() -> None:
    rows = unlabelled_rows(150)
    rows = dataclasses.replace(rows, labels=np.arange(150, dtype=np.int32) % 3 // 2)
    assert len(set(rows.lengths.tolist())) > 1
    whole = full_model(CONFIG)
    alone = [
        evaluate(make_tensors(), CONFIG, whole, select_rows(rows, np.array([i])), threads=1)
        for i in range(150)
    ]
    for order in (np.arange(150), np.random.default_rng(1).permutation(150)):
        together = evaluate(make_tensors(), CONFIG, whole, select_rows(rows, order), batch=64, threads=1)
        assert together.correct == sum(one.correct for one in alone)
        assert abs(together.loss_nano - sum(one.loss_nano for one in alone) / 150) < 1000
