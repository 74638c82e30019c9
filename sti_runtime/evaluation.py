"""Scoring submodels at 32 bits on labelled rows, with weights in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sti_runtime.early_stop import NANO, EarlyStop
from sti_runtime.encoder import model_forward
from sti_runtime.metrics import count_correct, mean_cross_entropy
from sti_runtime.model import ModelConfig, Submodel
from sti_runtime.rows import Batch, LabelledRows, RowArrays, by_length, check_rows, labelled
from sti_runtime.shard import F32
from sti_runtime.torch_tensors import as_torch, torch_threads
from sti_runtime.train_state import PhaseStatus

Progress = Callable[[PhaseStatus], None]
"""Told how far a phase is, after every step."""

_BATCH = 64


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


def full_model(config: ModelConfig) -> Submodel:
    """All layers, all slices."""
    return Submodel(kept=tuple(range(config.layers)), width=config.heads)


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
    batch: int = _BATCH,
    threads: int = 0,
    device: str = "cpu",
) -> Evaluation:
    """Accuracy and mean loss of one submodel at 32 bits over the labelled rows.

    Raises: DatasetError for rows that the model cannot take, or when none is labelled.
    """
    rows = labelled(rows)
    check_rows(rows, config)
    parameters = as_torch(tensors, device=device)
    with torch_threads(threads):
        correct, loss = _score(parameters, config, submodel, rows, batch)
    return Evaluation(len(rows.labels), correct, round(loss * NANO))


def evaluate_submodels(
    tensors: Mapping[str, F32],
    config: ModelConfig,
    submodels: tuple[Submodel, ...],
    rows: RowArrays,
    *,
    batch: int = _BATCH,
    threads: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
    phase: str = "evaluate",
) -> dict[Submodel, Evaluation]:
    """``evaluate`` for every submodel, in order; ``phase`` is what ``progress`` is told."""
    results: dict[Submodel, Evaluation] = {}
    for submodel in submodels:
        found = evaluate(tensors, config, submodel, rows, batch=batch, threads=threads, device=device)
        results[submodel] = found
        if progress is not None:
            progress(PhaseStatus(phase, len(results), len(submodels), found.loss_nano / NANO))
    return results


def check_on(
    parameters: Mapping[str, Tensor],
    config: ModelConfig,
    submodels: tuple[Submodel, ...],
    rows: LabelledRows,
    rule: EarlyStop,
) -> float:
    """What early stopping goes by, mean over ``submodels``: loss in nano-nats, or accuracy in 10⁻⁹."""
    scores = [_score(parameters, config, submodel, rows, _BATCH) for submodel in submodels]
    if rule.measure == "accuracy":
        return sum(correct for correct, _ in scores) * NANO / (len(scores) * len(rows.labels))
    return sum(loss for _, loss in scores) * NANO / len(scores)


def _score(
    parameters: Mapping[str, Tensor],
    config: ModelConfig,
    submodel: Submodel,
    rows: LabelledRows,
    batch: int,
) -> tuple[int, float]:
    """(correct rows, mean loss in nats) at float32, on the device where the parameters are."""
    device = next(iter(parameters.values())).device
    classes = 0 if config.head is None else len(config.head.labels)
    logits = np.empty((len(rows.labels), classes), np.float32)
    with torch.inference_mode():
        for index, part in by_length(rows, batch):
            logits[index] = classify(parameters, config, submodel, part.to(device)).cpu().numpy()
    correct, _ = count_correct(logits.argmax(1), rows.labels)
    return correct, mean_cross_entropy(logits, rows.labels)
