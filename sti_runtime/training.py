"""Training: AdamW with linear warm-up and decay, in phases that survive Ctrl-C and kill -9.

A phase is deterministic (no dropout; batches depend on seed and epoch only) and writes its whole state
now and then, atomically. The same call after an interruption continues at the last state and ends
with the same bits as an uninterrupted run with as many threads.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sti_runtime.encoder import model_forward
from sti_runtime.metrics import count_correct, mean_cross_entropy
from sti_runtime.model import HeadConfig, ModelConfig, Submodel, tensor_shapes
from sti_runtime.records import canonical_json
from sti_runtime.rows import (
    I64,
    Batch,
    RowArrays,
    check_rows,
    epoch_order,
    in_order,
    labelled,
    rows_digest,
    to_batch,
)
from sti_runtime.shard import F32
from sti_runtime.torch_tensors import as_numpy, as_torch, torch_threads
from sti_runtime.train_state import Trainer, TrainSettings

__all__ = [
    "Evaluation",
    "Progress",
    "Step",
    "TrainSettings",
    "classify",
    "evaluate",
    "evaluate_submodels",
    "fine_tune",
    "full_model",
    "initial_tensors",
    "run_phase",
    "with_head",
]

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int, float], None]
"""Called as (phase, steps done, steps in all, loss of the last step)."""

_INITIAL_STD = 0.02  # BERT's initializer_range


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A submodel's score on some rows: mean loss in nano-nats."""

    rows: int
    correct: int
    loss_nano: int

    @property
    def accuracy(self) -> float:
        """Share of correct rows, 0…1."""
        return self.correct / self.rows


# ------------------------------------------------------------------------------------- tensors


def initial_tensors(config: ModelConfig, seed: int) -> dict[str, F32]:
    """Tensors to train from scratch: weights N(0, 0.02), biases 0, norms 1. Source: BERT's code."""
    rng = np.random.default_rng(seed)
    return {name: _initial(name, shape, rng) for name, shape in tensor_shapes(config).items()}


def with_head(
    config: ModelConfig, tensors: Mapping[str, F32], head: HeadConfig, seed: int
) -> tuple[ModelConfig, dict[str, F32]]:
    """Put a new, untrained classification head on an encoder; a head already there is replaced."""
    config = config.model_copy(update={"head": head})
    rng = np.random.default_rng(seed)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    new = {n: _initial(n, s, rng) for n, s in tensor_shapes(config).items() if n.startswith("head.")}
    return config, kept | new


def _initial(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> F32:
    if name.endswith(".bias"):
        return np.zeros(shape, np.float32)
    if name.endswith("norm.weight"):
        return np.ones(shape, np.float32)
    return (rng.standard_normal(shape) * _INITIAL_STD).astype(np.float32)


# -------------------------------------------------------------------------------------- phases

Step = Callable[[dict[str, Tensor], Batch], float]
"""Adds one batch's gradients to the parameters' ``.grad`` and returns the loss."""


def run_phase(
    phase: str,
    tensors: Mapping[str, F32],
    config: ModelConfig,
    rows: RowArrays,
    settings: TrainSettings,
    step: Step,
    *,
    identity: str = "",
    workspace: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, F32]:
    """Train ``tensors`` by ``step`` over ``rows`` and return the result; the input is not changed.

    ``workspace``: a folder for the phase's state file; a finished phase found there is not trained again.
    ``identity``: whatever else the result depends on (a teacher, a list of submodels).
    Raises: DatasetError for rows that the model cannot take; FormatError for a damaged state file;
    ResourceError when the state cannot be written or the loss is no longer finite.
    """
    check_rows(rows, config)
    batches_per_epoch = -(-len(rows.labels) // settings.batch)
    total = batches_per_epoch * settings.epochs
    total = total if settings.max_steps is None else min(total, settings.max_steps)
    # Phases of other inputs, settings or code paths have other names, so they never mix.
    facts = asdict(settings) | {"threads": 0, "checkpoint_every": 0}
    key = canonical_json([phase, identity, config.to_json().decode(), facts, rows_digest(rows)])
    name = hashlib.sha256(key + _digest_of(tensors).encode()).hexdigest()[:16]
    state_file = None if workspace is None else workspace / f"{phase}-{name}.safetensors"

    trainer = Trainer(tensors, settings, total)
    if state_file is not None and state_file.exists():
        trainer.restore(state_file)
        log.info("phase %s: continues at step %d of %d (%s)", phase, trainer.done, total, state_file)
        if progress is not None:
            progress(phase, trainer.done, total, trainer.loss)
    order: tuple[int, list[I64]] = (-1, [])
    with torch_threads(settings.threads):
        while trainer.done < total:
            epoch, position = divmod(trainer.done, batches_per_epoch)
            if order[0] != epoch:
                order = (epoch, epoch_order(rows, settings.batch, settings.seed, epoch))
            trainer.update(step(trainer.parameters, to_batch(rows, order[1][position])), phase)
            last = trainer.done == total
            if state_file is not None and (last or trainer.done % settings.checkpoint_every == 0):
                trainer.save(state_file)
            if progress is not None:
                progress(phase, trainer.done, total, trainer.loss)
    return as_numpy(trainer.parameters)


def _digest_of(tensors: Mapping[str, F32]) -> str:
    state = hashlib.sha256()
    for name in sorted(tensors):
        state.update(name.encode())
        state.update(np.ascontiguousarray(tensors[name], "<f4").data)
    return state.hexdigest()


# -------------------------------------------------------------------------- fine-tuning, scoring


def full_model(config: ModelConfig) -> Submodel:
    """All layers, all slices."""
    return Submodel(kept=tuple(range(config.layers)), width=config.heads)


def fine_tune(
    tensors: Mapping[str, F32],
    config: ModelConfig,
    rows: RowArrays,
    settings: TrainSettings,
    *,
    workspace: Path | None = None,
    progress: Progress | None = None,
    phase: str = "fine-tune",
) -> dict[str, F32]:
    """Train encoder and head on labelled rows by cross-entropy. ``config`` has a head (``with_head``).

    Raises: as ``run_phase``.
    """
    submodel = full_model(config)

    def step(parameters: dict[str, Tensor], batch: Batch) -> float:
        loss = F.cross_entropy(classify(parameters, config, submodel, batch), batch.labels)
        loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    rows = labelled(rows)
    return run_phase(phase, tensors, config, rows, settings, step, workspace=workspace, progress=progress)


def classify(tensors: Mapping[str, Tensor], config: ModelConfig, submodel: Submodel, batch: Batch) -> Tensor:
    """Logits [B, labels] of one batch. Raises: ValueError if the model has no head."""
    logits, _ = model_forward(tensors, config, submodel, batch.input_ids, batch.token_types, batch.lengths)
    if logits is None:
        raise ValueError("the model has no classification head; put one on with with_head")
    return logits


def evaluate(
    tensors: Mapping[str, F32],
    config: ModelConfig,
    submodel: Submodel,
    rows: RowArrays,
    *,
    batch: int = 64,
    threads: int = 0,
) -> Evaluation:
    """Accuracy and mean loss of one submodel at 32 bits over the labelled rows.

    Raises: DatasetError for rows that the model cannot take, or when none is labelled.
    """
    rows = labelled(rows)
    check_rows(rows, config)
    parameters = as_torch(tensors)
    with torch_threads(threads), torch.inference_mode():
        logits = torch.cat([classify(parameters, config, submodel, b) for b in in_order(rows, batch)])
    correct, count = count_correct(logits.argmax(1).numpy(), rows.labels)
    return Evaluation(count, correct, round(mean_cross_entropy(logits.numpy(), rows.labels) * 1e9))


def evaluate_submodels(
    tensors: Mapping[str, F32],
    config: ModelConfig,
    submodels: tuple[Submodel, ...],
    rows: RowArrays,
    *,
    batch: int = 64,
    threads: int = 0,
    progress: Progress | None = None,
    phase: str = "evaluate",
) -> dict[Submodel, Evaluation]:
    """``evaluate`` for every submodel, in order; ``phase`` is what ``progress`` is told."""
    results: dict[Submodel, Evaluation] = {}
    for submodel in submodels:
        results[submodel] = evaluate(tensors, config, submodel, rows, batch=batch, threads=threads)
        if progress is not None:
            progress(phase, len(results), len(submodels), results[submodel].loss_nano / 1e9)
    return results
