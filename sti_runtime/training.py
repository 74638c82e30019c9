"""Training: AdamW with linear warm-up and decay, in phases that survive Ctrl-C and kill -9.

A phase is deterministic (no dropout; batches depend on seed and epoch only) and writes its whole state
now and then, atomically. The same call after an interruption continues at the last state and ends
with the same bits as an uninterrupted run with as many threads (on CUDA: the same but for rounding).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from sti_runtime.arithmetic import Arithmetic
from sti_runtime.early_stop import EarlyStop, PhaseEnd
from sti_runtime.evaluation import (
    Evaluation,
    Progress,
    check_on,
    classify,
    evaluate,
    evaluate_submodels,
    full_model,
)
from sti_runtime.model import HeadConfig, ModelConfig, Submodel, tensor_shapes
from sti_runtime.records import canonical_json
from sti_runtime.rows import (
    I64,
    Batch,
    LabelledRows,
    RowArrays,
    check_rows,
    epoch_order,
    labelled,
    rows_digest,
    to_batch,
)
from sti_runtime.shard import F32
from sti_runtime.torch_tensors import as_numpy, torch_threads
from sti_runtime.train_state import PhaseStatus, Trainer, TrainSettings

__all__ = [
    "EarlyStop",
    "Evaluation",
    "HeldOut",
    "PhaseEnd",
    "PhaseStatus",
    "Progress",
    "Step",
    "TrainSettings",
    "Trained",
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

_INITIAL_STD = 0.02  # BERT's initializer_range


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

Step = Callable[[dict[str, Tensor], Batch, Arithmetic], float]
"""Adds one batch's gradients to the parameters' ``.grad`` and returns the loss."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What early stopping scores: submodels on rows that are not trained on."""

    rows: RowArrays
    submodels: tuple[Submodel, ...]


@dataclass(frozen=True, slots=True)
class Trained:
    """The result of phases: tensors, and how each phase ended."""

    tensors: dict[str, F32]
    ends: tuple[PhaseEnd, ...]


def run_phase(
    phase: str,
    tensors: Mapping[str, F32],
    config: ModelConfig,
    rows: RowArrays,
    settings: TrainSettings,
    step: Step,
    *,
    held_out: HeldOut | None = None,
    identity: str = "",
    workspace: Path | None = None,
    progress: Progress | None = None,
) -> Trained:
    """Train ``tensors`` by ``step`` over ``rows`` and return the result; the input is not changed.

    ``held_out``: what ``settings.early_stop`` goes by. ``workspace``: a folder for the phase's state file; a
    finished phase found there is not trained again. ``identity``: whatever else the result depends on (a
    teacher, a list of submodels).
    Raises: DatasetError for rows that the model cannot take; FormatError for a damaged state file;
    ResourceError when the state cannot be written or the loss is no longer finite.
    """
    check_rows(rows, config)
    watched = _watched(settings.early_stop, held_out, config)
    batches_per_epoch = -(-len(rows.labels) // settings.batch)
    total = batches_per_epoch * settings.epochs
    total = total if settings.max_steps is None else min(total, settings.max_steps)
    # Phases of other inputs, settings or code paths have other names, so they never mix.
    facts = asdict(settings) | {"threads": 0, "checkpoint_every": 0}
    key = canonical_json(
        [
            phase,
            identity,
            config.to_json().decode(),
            facts,
            rows_digest(rows),
            None if watched is None else rows_digest(watched[1]),
        ]
    )
    name = hashlib.sha256(key + _digest_of(tensors).encode()).hexdigest()[:16]
    state_file = None if workspace is None else workspace / f"{phase}-{name}.safetensors"

    trainer = Trainer(tensors, settings, total)
    if state_file is not None and state_file.exists():
        trainer.restore(state_file)
        log.info("phase %s: continues at step %d of %d (%s)", phase, trainer.done, total, state_file)
        if progress is not None:
            progress(trainer.status(phase))
    order: tuple[int, list[I64]] = (-1, [])
    with torch_threads(settings.threads):
        while trainer.why is None:
            epoch, position = divmod(trainer.done, batches_per_epoch)
            if order[0] != epoch:
                order = (epoch, epoch_order(rows, settings.batch, settings.seed, epoch))
            batch = to_batch(rows, order[1][position]).to(trainer.arithmetic.device)
            trainer.update(step(trainer.parameters, batch, trainer.arithmetic), phase)
            if watched is not None and watched[0].is_due(trainer.done, total):
                _check(trainer, watched, config, phase)
            trainer.end_if_due()
            saves = trainer.why is not None or trainer.done % settings.checkpoint_every == 0
            if state_file is not None and saves:
                trainer.save(state_file)
            if progress is not None:
                progress(trainer.status(phase))
    return Trained(as_numpy(trainer.parameters), (trainer.end(phase, batches_per_epoch),))


_Watched = tuple[EarlyStop, LabelledRows, tuple[Submodel, ...]]


def _watched(rule: EarlyStop | None, held_out: HeldOut | None, config: ModelConfig) -> _Watched | None:
    """What is scored now and then, if anything is. Raises: DatasetError, ValueError."""
    if rule is None:
        return None
    if held_out is None:
        raise ValueError("early stopping needs held-out rows")
    rows = labelled(held_out.rows)
    check_rows(rows, config)
    return rule, rows, held_out.submodels


def _check(trainer: Trainer, watched: _Watched, config: ModelConfig, phase: str) -> None:
    rule, rows, submodels = watched
    assert trainer.best is not None
    found = check_on(trainer.parameters, config, submodels, rows, rule)
    trainer.require_finite(found, f"the held-out loss after step {trainer.done}", phase)
    trainer.best.check(round(found), trainer.done, trainer.parameters)


def _digest_of(tensors: Mapping[str, F32]) -> str:
    state = hashlib.sha256()
    for name in sorted(tensors):
        state.update(name.encode())
        state.update(np.ascontiguousarray(tensors[name], "<f4").data)
    return state.hexdigest()


# --------------------------------------------------------------------------------- fine-tuning


def fine_tune(
    tensors: Mapping[str, F32],
    config: ModelConfig,
    rows: RowArrays,
    settings: TrainSettings,
    *,
    held_out: RowArrays | None = None,
    workspace: Path | None = None,
    progress: Progress | None = None,
    phase: str = "fine-tune",
) -> Trained:
    """Train encoder and head on labelled rows by cross-entropy. ``config`` has a head (``with_head``).

    ``held_out``: rows for early stopping. Raises: as ``run_phase``.
    """
    submodel = full_model(config)

    def step(parameters: dict[str, Tensor], batch: Batch, arithmetic: Arithmetic) -> float:
        with arithmetic.forward():
            logits = classify(parameters, config, submodel, batch)
        loss = F.cross_entropy(logits.float(), batch.labels)
        arithmetic.backward(loss)
        return float(loss.detach())

    return run_phase(
        phase, tensors, config, labelled(rows), settings, step,
        held_out=None if held_out is None else HeldOut(held_out, (submodel,)),
        workspace=workspace, progress=progress,
    )  # fmt: skip
