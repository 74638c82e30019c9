"""Rows of token ids and labels as training and scoring take them, and deterministic batches of them.

``task_data.TaskData`` has these four arrays too, so it can be passed wherever ``RowArrays`` is asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sti_runtime.errors import DatasetError
from sti_runtime.metrics import UNKNOWN_LABEL
from sti_runtime.model import ModelConfig

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]

_LENGTH_WINDOW = 16  # batches sorted by length together, so that short rows are not padded to long ones


class RowArrays(Protocol):
    """R rows of at most L tokens. Shapes: ids and types [R, L]; lengths, labels [R] (label -1: unknown)."""

    @property
    def input_ids(self) -> I32:
        """Token ids [R, L], padded on the right."""

    @property
    def token_types(self) -> I32:
        """Token types [R, L]."""

    @property
    def lengths(self) -> I32:
        """Real tokens of each row [R]."""

    @property
    def labels(self) -> I32:
        """Label indices [R]."""


@dataclass(frozen=True, slots=True)
class LabelledRows:
    """The plain implementation of ``RowArrays``."""

    input_ids: I32
    token_types: I32
    lengths: I32
    labels: I32


@dataclass(frozen=True, slots=True)
class Batch:
    """B rows as tensors, cut to the longest of them: ids, types [B, l]; lengths, labels [B]."""

    input_ids: Tensor
    token_types: Tensor
    lengths: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        """The same on ``device``; on the CPU itself."""
        return Batch(
            self.input_ids.to(device),
            self.token_types.to(device),
            self.lengths.to(device),
            self.labels.to(device),
        )


def labelled(rows: RowArrays, limit: int | None = None) -> LabelledRows:
    """The rows whose label is known, the first ``limit`` of them. Raises: DatasetError if there is none."""
    picked = np.flatnonzero(rows.labels != UNKNOWN_LABEL)[:limit]
    if not len(picked):
        raise DatasetError("None of the rows has a label.", "Use data whose label column is filled in.")
    return select_rows(rows, picked)


def select_rows(rows: RowArrays, index: I64) -> LabelledRows:
    """The rows at ``index``, in that order."""
    return LabelledRows(
        rows.input_ids[index], rows.token_types[index], rows.lengths[index], rows.labels[index]
    )


def check_rows(rows: RowArrays, config: ModelConfig) -> None:
    """Refuse rows that ``config`` cannot take. Raises: DatasetError."""
    if rows.input_ids.shape[1] > config.max_tokens:
        raise DatasetError(
            f"Rows of {rows.input_ids.shape[1]} tokens, and the model has {config.max_tokens} positions.",
            "Tokenize the data again with a smaller max_tokens.",
        )
    classes = len(config.head.labels) if config.head is not None else 0
    if rows.labels.size and (int(rows.labels.max()) >= classes or int(rows.labels.min()) < UNKNOWN_LABEL):
        raise DatasetError(
            f"A row has a label outside the {classes} that the model's head knows.",
            "Check that the data belongs to the task the model was made for.",
        )
    if rows.input_ids.size and int(rows.input_ids.max()) >= config.vocab:
        raise DatasetError(
            f"A token id is outside the model's vocabulary of {config.vocab}.",
            "Tokenize the data with the model's own tokenizer.",
        )


def rows_digest(rows: RowArrays) -> str:
    """SHA-256 over the four arrays."""
    state = hashlib.sha256(repr(rows.input_ids.shape).encode())
    for array in (rows.input_ids, rows.token_types, rows.lengths, rows.labels):
        state.update(np.ascontiguousarray(array, "<i4").data)
    return state.hexdigest()


def to_batch(rows: RowArrays, index: I64) -> Batch:
    """The rows at ``index`` as tensors, cut to the longest."""
    longest = int(rows.lengths[index].max())
    return Batch(
        input_ids=torch.from_numpy(rows.input_ids[index, :longest].astype(np.int64)),
        token_types=torch.from_numpy(rows.token_types[index, :longest].astype(np.int64)),
        lengths=torch.from_numpy(rows.lengths[index].astype(np.int64)),
        labels=torch.from_numpy(rows.labels[index].astype(np.int64)),
    )


def in_order(rows: RowArrays, batch: int) -> Iterator[Batch]:
    """All rows in their order."""
    for start in range(0, len(rows.labels), batch):
        yield to_batch(rows, np.arange(start, min(start + batch, len(rows.labels))))


def by_length(rows: RowArrays, batch: int) -> list[tuple[I64, Batch]]:
    """All rows, those of like length together: (indices of the batch's rows, batch).

    Ties keep their order. Of short and long rows mixed most of a batch in their own order is padding.
    """
    order = np.argsort(rows.lengths, kind="stable")
    parts = [order[i : i + batch] for i in range(0, len(order), batch)]
    return [(part, to_batch(rows, part)) for part in parts]


def epoch_order(rows: RowArrays, batch: int, seed: int, epoch: int) -> list[I64]:
    """Row indices of the batches of one epoch: shuffled, then of like length within a window.

    Depends on its arguments only, so training resumes in the middle of an epoch.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(rows.labels))
    batches: list[I64] = []
    for start in range(0, len(order), batch * _LENGTH_WINDOW):
        window = order[start : start + batch * _LENGTH_WINDOW]
        window = window[np.argsort(rows.lengths[window], kind="stable")]
        batches += [window[i : i + batch] for i in range(0, len(window), batch)]
    return [batches[i] for i in rng.permutation(len(batches))]
