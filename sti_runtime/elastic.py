"""Elastic submodels after DynaBERT: order heads and neurons by importance, then train all submodels.

1. ``unit_importance`` + ``reorder``: the first m slices of a layer become the best m.
2. ``train_widths``: widths {1, ¾, ½, ¼} at full depth, taught by the fine-tuned model.
3. ``train_depths``: every trained width at depths floor(N·{1, ¾, ½}), taught by the result of 2 at the
   same width.

Source: DynaBERT (NeurIPS 2020), section 2 and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from sti_runtime.arithmetic import Arithmetic
from sti_runtime.encoder import attention_mask, embed_tokens, head_forward, layer_forward, layer_weights
from sti_runtime.errors import InputError
from sti_runtime.model import ModelConfig, Submodel, elastic_submodels
from sti_runtime.rows import Batch, RowArrays, check_rows, in_order, labelled
from sti_runtime.shard import F32
from sti_runtime.torch_tensors import as_torch, torch_threads
from sti_runtime.training import (
    HeldOut,
    PhaseStatus,
    Progress,
    Trained,
    TrainSettings,
    full_model,
    run_phase,
)

F64 = npt.NDArray[np.float64]

WIDTH_HIDDEN_WEIGHT = 0.1
DEPTH_HIDDEN_WEIGHT = 1.0


# ---------------------------------------------------------------------------------- importance


@dataclass(frozen=True, slots=True)
class UnitImportance:
    """Importance of heads [N, M] and FFN neurons [N, ffn]; larger is more important."""

    heads: F64
    neurons: F64


def unit_importance(
    tensors: Mapping[str, F32],
    config: ModelConfig,
    rows: RowArrays,
    *,
    batch: int = 32,
    threads: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> UnitImportance:
    """First-order importance of every head and neuron over held-out, labelled rows.

    Head: Σ |dL/d head-mask|. Neuron: Σ |Σ w·dL/dw + b·dL/db| of its FFN1 row + |Σ w·dL/dw| of its FFN2
    column. Outer sums over batches, as in DynaBERT's code.
    Raises: InputError if the model has no head; DatasetError for rows it cannot take.
    """
    if config.head is None:
        raise InputError("This model has no classification head.", "Train one first: stifarm model train.")
    rows = labelled(rows)
    check_rows(rows, config)
    copies = as_torch(tensors, copy=True, device=device)
    parameters = {n: t.requires_grad_() for n, t in copies.items()}
    masks = torch.ones(config.layers, config.heads, requires_grad=True, device=device)
    heads = torch.zeros(config.layers, config.heads, dtype=torch.float64)
    neurons = torch.zeros(config.layers, config.ffn, dtype=torch.float64)
    total = -(-len(rows.labels) // batch)
    with torch_threads(threads):
        for done, host_part in enumerate(in_order(rows, batch), start=1):
            part = host_part.to(masks.device)
            x = embed_tokens(parameters, config, part.input_ids, part.token_types)
            mask = attention_mask(part.lengths, part.input_ids.shape[1])
            for layer in range(config.layers):
                weights = layer_weights(parameters, config, layer, config.heads)
                x = layer_forward(x, mask, weights, config, head_mask=masks[layer])
            loss = F.cross_entropy(head_forward(x, part.lengths, parameters, config.head), part.labels)
            loss.backward()  # type: ignore[no-untyped-call]
            heads += _gradient(masks).abs().double().cpu()
            for layer in range(config.layers):
                neurons[layer] += _neuron_importance(parameters, f"layers.{layer}.ffn.").cpu()
            for tensor in (masks, *parameters.values()):
                tensor.grad = None
            if progress is not None:
                progress(PhaseStatus("head importance", done, total, float(loss.detach())))
    return UnitImportance(heads.numpy(), neurons.numpy())


def _gradient(tensor: Tensor) -> Tensor:
    return torch.zeros_like(tensor) if tensor.grad is None else tensor.grad


def _neuron_importance(parameters: Mapping[str, Tensor], prefix: str) -> Tensor:
    """[ffn] of one layer, from the gradients at hand."""
    rows, bias, columns = (parameters[prefix + n] for n in ("in.weight", "in.bias", "out.weight"))
    with torch.no_grad():
        first = (rows * _gradient(rows)).sum(1) + bias * _gradient(bias)
        return (first.abs() + (columns * _gradient(columns)).sum(0).abs()).double()


def reorder(tensors: Mapping[str, F32], config: ModelConfig, importance: UnitImportance) -> dict[str, F32]:
    """Permute heads and neurons of every layer, most important first; ties keep their order.

    The function computed by the full model is unchanged. Neurons are assigned to slices in their order.
    """
    d, result = config.head_size, dict(tensors)
    for layer in range(config.layers):
        heads = np.argsort(-importance.heads[layer], kind="stable")
        rows = (heads[:, None] * d + np.arange(d)).reshape(-1)
        neurons = np.argsort(-importance.neurons[layer], kind="stable")
        attention, ffn = f"layers.{layer}.attention.", f"layers.{layer}.ffn."
        for name in "qkv":
            for part in ("weight", "bias"):
                result[f"{attention}{name}.{part}"] = tensors[f"{attention}{name}.{part}"][rows]
        result[attention + "o.weight"] = np.ascontiguousarray(tensors[attention + "o.weight"][:, rows])
        result[ffn + "in.weight"] = tensors[ffn + "in.weight"][neurons]
        result[ffn + "in.bias"] = tensors[ffn + "in.bias"][neurons]
        result[ffn + "out.weight"] = np.ascontiguousarray(tensors[ffn + "out.weight"][:, neurons])
    return result


# ------------------------------------------------------------------------------------ training


def train_widths(
    tensors: Mapping[str, F32],
    config: ModelConfig,
    rows: RowArrays,
    settings: TrainSettings,
    *,
    held_out: RowArrays | None = None,
    workspace: Path | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Width phase: loss = soft cross-entropy + 0.1 · MSE of hidden states, against the input model.

    Gradients of all widths are accumulated per batch; early stopping goes by the mean of all widths on
    ``held_out``. Raises: as ``training.run_phase``.
    """
    widths = tuple(s for s in elastic_submodels(config.layers, config.heads) if s.depth == config.layers)
    teacher, whole = as_torch(tensors, copy=True, device=settings.device), full_model(config)

    def step(parameters: dict[str, Tensor], batch: Batch, arithmetic: Arithmetic) -> float:
        with torch.no_grad(), arithmetic.forward():
            lesson = _forward(teacher, config, whole, batch)
        return sum(
            _learn(parameters, config, student, batch, lesson, WIDTH_HIDDEN_WEIGHT, arithmetic)
            for student in widths
        )

    return run_phase(
        "widths", tensors, config, rows, settings, step,
        held_out=None if held_out is None else HeldOut(held_out, widths),
        identity=str([s.width for s in widths]), workspace=workspace, progress=progress,
    )  # fmt: skip


def train_depths(
    tensors: Mapping[str, F32],
    config: ModelConfig,
    rows: RowArrays,
    settings: TrainSettings,
    *,
    held_out: RowArrays | None = None,
    workspace: Path | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Width and depth phase: soft cross-entropy + MSE of hidden states, 1 : 1, all submodels.

    Each submodel's teacher is the input model at the same width and full depth; the hidden state at the
    input of a kept layer is compared with the teacher's at the input of the same layer.
    Gradients of all submodels are accumulated per batch; early stopping goes by the mean of all submodels on
    ``held_out``. Raises: as ``training.run_phase``.
    """
    students = elastic_submodels(config.layers, config.heads)
    teacher = as_torch(tensors, copy=True, device=settings.device)
    layers = tuple(range(config.layers))

    def step(parameters: dict[str, Tensor], batch: Batch, arithmetic: Arithmetic) -> float:
        loss = 0.0
        for width in sorted({s.width for s in students}, reverse=True):
            with torch.no_grad(), arithmetic.forward():
                lesson = _forward(teacher, config, Submodel(kept=layers, width=width), batch)
            loss += sum(
                _learn(parameters, config, student, batch, lesson, DEPTH_HIDDEN_WEIGHT, arithmetic)
                for student in students
                if student.width == width
            )
        return loss

    return run_phase(
        "depths", tensors, config, rows, settings, step,
        held_out=None if held_out is None else HeldOut(held_out, students),
        identity=str([(s.kept, s.width) for s in students]), workspace=workspace, progress=progress,
    )  # fmt: skip


def make_elastic(
    tensors: Mapping[str, F32],
    config: ModelConfig,
    rows: RowArrays,
    held_out: RowArrays,
    widths: TrainSettings,
    depths: TrainSettings,
    *,
    workspace: Path | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Reorder a fine-tuned model by importance over ``held_out``, then both phases on ``rows``.

    Early stopping, where the settings ask for it, goes by ``held_out`` too.
    The result's trained submodels are ``model.elastic_submodels``. Raises: as the steps.
    """
    importance = unit_importance(
        tensors, config, held_out, batch=widths.batch, threads=widths.threads, device=widths.device,
        progress=progress,
    )  # fmt: skip
    ordered = reorder(tensors, config, importance)
    wide = train_widths(
        ordered, config, rows, widths, held_out=held_out, workspace=workspace, progress=progress
    )
    deep = train_depths(
        wide.tensors, config, rows, depths, held_out=held_out, workspace=workspace, progress=progress
    )
    return Trained(deep.tensors, wide.ends + deep.ends)


@dataclass(frozen=True, slots=True)
class _Lesson:
    """What is distilled: logits [B, labels] and the encoder's states, [B, L, H] each.

    ``states[i]`` is the input of layer i of the submodel; the last is the encoder's output.
    """

    logits: Tensor
    states: tuple[Tensor, ...]


def _forward(tensors: Mapping[str, Tensor], config: ModelConfig, submodel: Submodel, batch: Batch) -> _Lesson:
    if config.head is None:
        raise InputError("This model has no classification head.", "Train one first: stifarm model train.")
    x = embed_tokens(tensors, config, batch.input_ids, batch.token_types)
    mask = attention_mask(batch.lengths, batch.input_ids.shape[1])
    states = [x]
    for layer in submodel.kept:
        x = layer_forward(x, mask, layer_weights(tensors, config, layer, submodel.width), config)
        states.append(x)
    return _Lesson(head_forward(x, batch.lengths, tensors, config.head), tuple(states))


def _learn(
    parameters: Mapping[str, Tensor],
    config: ModelConfig,
    student: Submodel,
    batch: Batch,
    teacher: _Lesson,
    hidden_weight: float,
    arithmetic: Arithmetic,
) -> float:
    """Add one submodel's gradients; its graph is freed before the next one's is built."""
    with arithmetic.forward():
        own = _forward(parameters, config, student, batch)
    wanted = F.softmax(teacher.logits.float(), 1)
    soft = -(wanted * F.log_softmax(own.logits.float(), 1)).sum(1).mean()
    real = attention_mask(batch.lengths, batch.input_ids.shape[1])[:, 0, 0]
    targets = [teacher.states[layer] for layer in (*student.kept, config.layers)]
    hidden = torch.stack(
        [
            F.mse_loss(mine[real].float(), theirs[real].float())
            for mine, theirs in zip(own.states, targets, strict=True)
        ]
    ).sum()
    loss = soft + hidden_weight * hidden
    arithmetic.backward(loss)
    return float(loss.detach())
