"""The Fisher information against gradients taken row by row, and against the loss it stands for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sti_runtime.encoder import model_forward
from sti_runtime.errors import InputError
from sti_runtime.fisher import fisher_information
from sti_runtime.rows import LabelledRows, in_order
from sti_runtime.shard import F32, SHARDED_WEIGHTS
from sti_runtime.training import full_model
from tests.bundles import random_tensors, small_config

CONFIG = small_config(layers=2, heads=2, hidden=16, ffn=24)
NAMES = [f"layers.{i}.{name}.weight" for i in range(CONFIG.layers) for name in SHARDED_WEIGHTS.values()]


def some_rows(count: int = 11, tokens: int = 9) -> LabelledRows:
    rng = np.random.default_rng(4)
    lengths = rng.integers(2, tokens + 1, count).astype(np.int32)
    ids = rng.integers(1, CONFIG.vocab, (count, tokens)).astype(np.int32)
    ids[np.arange(tokens)[None, :] >= lengths[:, None]] = CONFIG.pad_id
    labels = rng.integers(0, 2, count).astype(np.int32)
    return LabelledRows(ids, np.zeros_like(ids), lengths, labels)


def row_by_row(tensors: dict[str, F32], rows: LabelledRows) -> dict[str, F32]:
    """Autograd's gradient of one row's loss at a time."""
    whole = full_model(CONFIG)
    squares = {name: np.zeros(tensors[name].shape, np.float64) for name in NAMES}
    for batch in in_order(rows, 1):
        parameters = {name: torch.from_numpy(t.copy()).requires_grad_() for name, t in tensors.items()}
        found, _ = model_forward(parameters, CONFIG, whole, batch.input_ids, batch.token_types, batch.lengths)
        assert found is not None
        F.cross_entropy(found, batch.labels).backward()  # type: ignore[no-untyped-call]
        for name in NAMES:
            gradient = parameters[name].grad
            assert gradient is not None
            squares[name] += gradient.numpy().astype(np.float64) ** 2
    return {name: (total / len(rows.labels)).astype(np.float32) for name, total in squares.items()}


def test_is_the_mean_of_the_squares_of_every_rows_gradient() -> None:
    tensors, rows, seen = random_tensors(CONFIG), some_rows(), []
    found = fisher_information(
        CONFIG, tensors, rows, threads=1, progress=lambda done, total: seen.append((done, total))
    )
    assert seen[-1] == (11, 11)
    for name, wanted in row_by_row(tensors, rows).items():
        np.testing.assert_allclose(found[name], wanted, rtol=2e-3, atol=1e-6 * float(wanted.max()))


def test_the_same_rows_give_the_same_bytes() -> None:
    tensors, rows = random_tensors(CONFIG), some_rows()
    one, two = (fisher_information(CONFIG, tensors, rows, threads=1) for _ in range(2))
    assert all(np.array_equal(one[name], two[name]) for name in NAMES)
    assert set(one) == set(NAMES)


def test_a_model_without_a_head_has_none() -> None:
    config = small_config(layers=1, heads=2, hidden=16, ffn=24, head=None)
    with pytest.raises(InputError, match="no classification head"):
        fisher_information(config, random_tensors(config), some_rows(), threads=1)
