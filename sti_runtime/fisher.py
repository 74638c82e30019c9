"""How much the task's loss minds a change of each weight: the diagonal of the Fisher information.

F(w) = mean over rows of (∂ loss of that row / ∂w)², the loss being the cross-entropy of the row's label.
Where the loss has its minimum, moving w by δ costs about ½ F(w) δ². One backward pass per batch gives the
gradient of every row apart: of y = x · Wᵀ it is the product of the row's output gradients and inputs.

Source: SqueezeLLM (ICML 2024, arXiv 2306.07629), section 4.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from sti_runtime.encoder import Watch, layer_forward, layer_weights
from sti_runtime.importance import logits_of, start
from sti_runtime.model import ModelConfig
from sti_runtime.rows import Batch, LabelledRows, by_length
from sti_runtime.shard import F32, SHARDED_WEIGHTS
from sti_runtime.torch_tensors import as_torch, torch_threads

_BATCH = 8
"""Rows whose gradients of one matrix are in memory at once."""


def fisher_information(
    config: ModelConfig,
    tensors: Mapping[str, F32],
    rows: LabelledRows,
    *,
    threads: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, F32]:
    """F of every sharded weight, by canonical name and of its shape; at the weights ``tensors``.

    ``progress`` gets (rows done, rows in all). The same input and threads give the same values.
    Memory: the sharded matrices once more, and ``_BATCH`` gradients of the largest of them.
    Raises: InputError if the model has no head.
    """
    parameters = as_torch(tensors)
    names = [
        f"layers.{layer}.{name}.weight" for layer in range(config.layers) for name in SHARDED_WEIGHTS.values()
    ]
    squares = {name: torch.zeros_like(parameters[name]) for name in names}
    done = 0
    with torch_threads(threads):
        for _, batch in by_length(rows, _BATCH):
            _add_squares(squares, parameters, config, batch)
            done += len(batch.labels)
            if progress is not None:
                progress(done, len(rows.labels))
    return {name: (total / len(rows.labels)).numpy() for name, total in squares.items()}


def _add_squares(
    squares: Mapping[str, Tensor], parameters: Mapping[str, Tensor], config: ModelConfig, batch: Batch
) -> None:
    """Adds the squared gradients of every row of a batch."""
    x, mask = start(parameters, config, batch)
    x.requires_grad_()
    for layer in range(config.layers):
        weights = layer_weights(parameters, config, layer, config.heads)
        x = layer_forward(x, mask, weights, config, watch=_watch(squares, f"layers.{layer}."))
    logits = logits_of(x, parameters, config, batch)
    # Rows do not see one another, so the gradient of the sum is, row by row, that of the row's loss.
    F.cross_entropy(logits, batch.labels, reduction="sum").backward()  # type: ignore[no-untyped-call]


def _watch(squares: Mapping[str, Tensor], prefix: str) -> Watch:
    def watch(name: str, x: Tensor, y: Tensor) -> None:
        total, entered = squares[f"{prefix}{SHARDED_WEIGHTS[name]}.weight"], x.detach()

        def on_gradient(gradient: Tensor) -> None:
            """gradient: [B, L, out] of y = x · Wᵀ; padding has none."""
            total.add_(torch.bmm(gradient.transpose(1, 2), entered).square_().sum(0))

        y.register_hook(on_gradient)  # type: ignore[no-untyped-call]

    return watch
