"""Importance estimated from slopes: one forward and one backward pass, instead of one pass per shard.

Move shard s from its base weights W towards its high ones along W + a_s · (high − W). One backward pass
gives, for every row i and shard s, the slope of row i's logits in a_s at the base: the inner product of
(high − W) with the gradient of the logits by W, restricted to the shard's rows and columns. What a raised
shard does is then estimated from logits moved by that slope, through the true loss. So the estimate has
the first-order term of the loss and a second-order one, the Gauss-Newton (Fisher) term of the softmax;
it lacks the curvature of the network itself.

The inner products are taken per row of data, from the layers' inputs and the gradients of their outputs:
no gradient of a weight is ever formed. A head of C labels needs C − 1 backward passes, since only
differences of logits matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sti_runtime.bundle import Bundle
from sti_runtime.encoder import Watch, layer_forward, layer_weights
from sti_runtime.importance import (
    BASE_CANDIDATES,
    ImportanceTask,
    SplitScore,
    candidates_of,
    is_above_chance,
    logits_of,
    score_logits,
    start,
    tensors_at,
)
from sti_runtime.model import ModelConfig
from sti_runtime.rows import Batch, LabelledRows, by_length
from sti_runtime.shard import F32, SHARDED_WEIGHTS, ShardId
from sti_runtime.torch_tensors import as_torch, torch_threads

_BATCH = 64


@dataclass(frozen=True, slots=True)
class Slopes:
    """Logits [R, C] of some rows, and how they move with each shard: slopes [R, N, M, C].

    Slopes are per whole step from the one weights to the others, relative to label 0, whose own are 0.
    """

    logits: F32
    slopes: F32


def shard_slopes(
    config: ModelConfig,
    at: Mapping[str, F32],
    towards: Mapping[str, F32],
    rows: LabelledRows,
    *,
    step: Mapping[str, F32] | None = None,
    threads: int = 0,
) -> Slopes:
    """The slopes of all shards at weights ``at``, of a step to ``towards`` or, if given, of ``step``.

    Memory: one batch's activations, and another model's sharded matrices.
    Raises: InputError if the model has no head.
    """
    parameters = as_torch(at)
    moved = {
        key: torch.from_numpy(towards[key] - at[key] if step is None else step[key])
        for layer in range(config.layers)
        for name in SHARDED_WEIGHTS.values()
        for key in (f"layers.{layer}.{name}.weight",)
    }
    count = len(rows.labels)
    classes = 0 if config.head is None else len(config.head.labels)
    logits = np.empty((count, classes), np.float32)
    slopes = np.zeros((count, config.layers, config.heads, classes), np.float32)
    with torch_threads(threads):
        for index, batch in by_length(rows, _BATCH):
            logits[index], slopes[index] = _batch_slopes(parameters, moved, config, batch)
    return Slopes(logits, slopes)


@dataclass(frozen=True, slots=True)
class Estimate:
    """All shards' scores when raised alone, as estimated, and the base's, as measured."""

    base_fidelity: int
    base: SplitScore
    scores: dict[ShardId, SplitScore]
    above_chance: bool


def estimate_bundle(
    bundle: Bundle,
    rows: LabelledRows,
    *,
    candidates: Sequence[int] = BASE_CANDIDATES,
    threads: int = 0,
) -> Estimate:
    """The estimate at the lowest fidelity that is not at chance, as ``choose_base_fidelity`` chooses it.

    Raises: InputError if the model has no head or the bundle none of the candidates.
    """
    config = bundle.manifest.model
    high, tried = tensors_at(bundle, bundle.manifest.fidelities[-1]), []
    for fidelity in candidates_of(bundle, candidates):
        task = ImportanceTask(config, tensors_at(bundle, fidelity), high, rows)
        base, scores = estimate_shards(task, threads=threads)
        tried.append(Estimate(fidelity, base, scores, is_above_chance(base.score.correct, rows.labels)))
        if tried[-1].above_chance:
            return tried[-1]
    return tried[0]


def estimate_shards(
    task: ImportanceTask, *, threads: int = 0
) -> tuple[SplitScore, dict[ShardId, SplitScore]]:
    """The base's score, as measured, and every shard's score when raised alone, as estimated.

    Raises: InputError if the model has no head.
    """
    found = shard_slopes(task.config, task.base, task.high, task.rows, threads=threads)
    scores = {
        (layer, index): score_logits(found.logits + found.slopes[:, layer, index], task.rows)
        for layer in range(task.config.layers)
        for index in range(task.config.heads)
    }
    return score_logits(found.logits, task.rows), scores


# --------------------------------------------------------------------------------------- details


def _batch_slopes(
    parameters: Mapping[str, Tensor], moved: Mapping[str, Tensor], config: ModelConfig, batch: Batch
) -> tuple[F32, F32]:
    """(logits [B, C], slopes [B, N, M, C]) of one batch."""
    x, mask = start(parameters, config, batch)
    x.requires_grad_()
    gathered = torch.zeros(len(batch.labels), config.layers, config.heads)
    for layer in range(config.layers):
        weights = layer_weights(parameters, config, layer, config.heads)
        watch = _watch(moved, gathered[:, layer], f"layers.{layer}.")
        x = layer_forward(x, mask, weights, config, watch=watch)
    logits = logits_of(x, parameters, config, batch)
    classes = logits.shape[1]
    slopes = torch.zeros(*gathered.shape, classes)
    for label in range(1, classes):
        gathered.zero_()
        (logits[:, label] - logits[:, 0]).sum().backward(retain_graph=label < classes - 1)  # type: ignore[no-untyped-call]
        slopes[..., label] = gathered
    return logits.detach().numpy(), slopes.numpy()


def _watch(moved: Mapping[str, Tensor], gathered: Tensor, prefix: str) -> Watch:
    """Adds to ``gathered`` [B, M], in every backward pass, what each shard of the layer moves."""

    def watch(name: str, x: Tensor, y: Tensor) -> None:
        step, entered = moved[f"{prefix}{SHARDED_WEIGHTS[name]}.weight"], x.detach()

        def on_gradient(gradient: Tensor) -> None:
            """gradient: [B, L, out] of y = x · Wᵀ; a shard's part lies in its rows or columns of W."""
            by_columns = name in ("o", "ffn_out")
            products = entered * (gradient @ step) if by_columns else gradient * F.linear(entered, step)
            rows, tokens, size = products.shape
            slices = gathered.shape[1]
            gathered.add_(products.view(rows, tokens, slices, size // slices).sum((1, 3)))

        y.register_hook(on_gradient)  # type: ignore[no-untyped-call]

    return watch
