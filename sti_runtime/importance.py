"""Exhaustive importance: every shard raised to the high fidelity in turn, all others at the base.

Raising a shard of layer l changes nothing below l, so the hidden states at the input of every layer
under the base configuration are computed once per unit of work and shared; a shard of layer l costs
only the layers from l on. Rows of like length are scored together. Scores do not depend on how shards are
grouped into units or on what was scored before, so units may run anywhere and rows already in a store
need not be redone.

Source: STI (ASPLOS 2023), section 4.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor

from sti_runtime.bundle import Bundle
from sti_runtime.encoder import (
    LayerWeights,
    attention_mask,
    embed_tokens,
    head_forward,
    layer_forward,
    layer_weights,
)
from sti_runtime.errors import InputError
from sti_runtime.importance_profile import ImportanceProfile, Level, Method, Score, ShardScore
from sti_runtime.manifest import EMBEDDINGS_FILE
from sti_runtime.metrics import F64, row_losses, wilson_interval
from sti_runtime.model import ModelConfig, Submodel
from sti_runtime.pack import unpack_version
from sti_runtime.rank_statistics import reliability_ppm
from sti_runtime.rows import I32, I64, Batch, LabelledRows, RowArrays, by_length, check_rows, labelled
from sti_runtime.shard import F32, SHARDED_WEIGHTS, ShardId, matrix_shapes
from sti_runtime.torch_tensors import as_torch, torch_threads

BASE_CANDIDATES: tuple[int, ...] = (2, 3, 4, 5, 6)
_BATCH = 64


@dataclass(frozen=True, slots=True)
class SplitScore:
    """A configuration's score, the mean loss (nano-nats) of the even and of the odd rows, and how many of
    the even rows are correct."""

    score: Score
    even_loss_nano: int
    odd_loss_nano: int
    even_correct: int

    @property
    def odd_correct(self) -> int:
        """How many of the odd rows are correct."""
        return self.score.correct - self.even_correct


@dataclass(frozen=True, slots=True)
class ImportanceTask:
    """What shards are scored on: dequantised tensors at the base and at the high fidelity, and rows.

    Both are canonical tensors of the whole model; they differ in the sharded matrices only.
    """

    config: ModelConfig
    base: Mapping[str, F32]
    high: Mapping[str, F32]
    rows: LabelledRows


@dataclass(frozen=True, slots=True)
class BaseChoice:
    """The base fidelity, the score of all shards at it, and why: "above chance" or "none above chance"."""

    fidelity: int
    score: SplitScore
    above_chance: bool


# --------------------------------------------------------------------------------------- inputs


def tensors_at(bundle: Bundle, fidelity: int) -> dict[str, F32]:
    """Canonical tensors with every shard as the bundle stores it at ``fidelity`` bits.

    Memory: one whole float32 model. Raises: FormatError for a damaged or truncated region.
    """
    manifest = bundle.manifest
    config, shapes = manifest.model, matrix_shapes(manifest.model)
    if fidelity not in manifest.fidelities:
        raise InputError(
            f"{bundle.path}: holds no {fidelity}-bit versions, only {manifest.fidelities}.",
            "Build the bundle with that fidelity.",
        )
    tensors = _unsharded(bundle)
    region = np.memmap(bundle.region_path(fidelity), dtype=np.uint8, mode="r")
    for layer in range(config.layers):
        parts: dict[str, list[F32]] = {name: [] for name in shapes}
        for index in range(config.heads):
            version = manifest.shard_version(layer, index, fidelity)
            payload = np.array(region[version.offset : version.offset + version.payload_bytes])
            for name, matrix in unpack_version(payload, shapes, fidelity, version.outliers).items():
                parts[name].append(matrix)
        for name, pieces in parts.items():
            axis = 1 if name in ("o", "ffn_out") else 0
            tensors[f"layers.{layer}.{SHARDED_WEIGHTS[name]}.weight"] = np.concatenate(pieces, axis)
    return tensors


def prepare_rows(rows: RowArrays, config: ModelConfig, limit: int | None = None) -> LabelledRows:
    """The labelled rows (the first ``limit``) that importance is scored on. Raises: DatasetError."""
    chosen = labelled(rows, limit)
    check_rows(chosen, config)
    return chosen


# -------------------------------------------------------------------------------------- scoring


def score_configuration(
    config: ModelConfig,
    tensors: Mapping[str, F32],
    rows: LabelledRows,
    *,
    submodel: Submodel | None = None,
    threads: int = 0,
) -> SplitScore:
    """The score of one configuration of the whole model or of ``submodel``.

    Raises: InputError if the model has no head.
    """
    kept = range(config.layers) if submodel is None else submodel.kept
    width = config.heads if submodel is None else submodel.width
    parameters, batches = as_torch(tensors), by_length(rows, _BATCH)
    logits = []
    with torch_threads(threads), torch.inference_mode():
        for _, batch in batches:
            x, mask = start(parameters, config, batch)
            for layer in kept:
                x = layer_forward(x, mask, layer_weights(parameters, config, layer, width), config)
            logits.append(logits_of(x, parameters, config, batch))
    return score_logits(_in_order(logits, batches), rows)


def choose_base_fidelity(
    bundle: Bundle,
    rows: LabelledRows,
    *,
    candidates: Sequence[int] = BASE_CANDIDATES,
    threads: int = 0,
) -> BaseChoice:
    """The lowest fidelity at which the whole model is not at chance, with its score.

    Not at chance: see ``is_above_chance``. If no candidate passes, the lowest is taken, for then more bits
    are not known to help, and ``above_chance`` is False.
    """
    tried: list[BaseChoice] = []
    for fidelity in candidates_of(bundle, candidates):
        tensors = tensors_at(bundle, fidelity)
        score = score_configuration(bundle.manifest.model, tensors, rows, threads=threads)
        tried.append(BaseChoice(fidelity, score, is_above_chance(score.score.correct, rows.labels)))
        if tried[-1].above_chance:
            return tried[-1]
    return tried[0]


def candidates_of(bundle: Bundle, candidates: Sequence[int] = BASE_CANDIDATES) -> list[int]:
    """The fidelities that the base may have, ascending. Raises: InputError when the bundle has none."""
    found = sorted(set(candidates) & set(bundle.manifest.fidelities))
    if not found:
        raise InputError(
            f"{bundle.path}: holds none of the fidelities {tuple(candidates)}.",
            "Build the bundle with at least one fidelity below 32 bits.",
        )
    return found


def is_above_chance(correct: int, labels: I32) -> bool:
    """Whether the accuracy's Wilson 95 % lower bound exceeds the share of the rows' commonest label."""
    low, _ = wilson_interval(correct, len(labels))
    return low > int(np.bincount(labels).max()) / len(labels)


def plan_units(config: ModelConfig, done: Iterable[ShardId], workers: int) -> list[list[ShardId]]:
    """Group the shards that are not ``done`` into units of work of like cost, about four per worker.

    A unit is a run of whole layers or a part of one layer, costly (low) layers first.
    """
    finished = set(done)
    left = [
        [(layer, s) for s in range(config.heads) if (layer, s) not in finished]
        for layer in range(config.layers)
    ]
    cost = sum(len(shards) * (config.layers - layer) for layer, shards in enumerate(left))
    target = max(1, -(-cost // (4 * max(1, workers))))
    units: list[list[ShardId]] = []
    room = 0
    for layer, shards in enumerate(left):
        for shard in shards:
            price = config.layers - layer
            if not units or room < price:
                units.append([])
                room = max(target, price)
            units[-1].append(shard)
            room -= price
    return units


def score_shards(
    task: ImportanceTask, shards: Sequence[ShardId], *, threads: int = 0
) -> Iterator[tuple[ShardId, SplitScore]]:
    """Score each of ``shards`` raised alone, in ascending order; yields as soon as one is done.

    Memory: the states of one layer's input over all rows (rows · tokens · hidden · 4 bytes).
    Raises: InputError if the model has no head or a shard lies outside it.
    """
    config = task.config
    wanted = sorted(set(shards))
    if wanted and not (
        wanted[0] >= (0, 0) and all(0 <= s < config.heads and 0 <= n < config.layers for n, s in wanted)
    ):
        raise InputError(
            f"Shards {wanted} are not all within {config.layers} layers of {config.heads} slices.",
            "Score them against the bundle they were listed from.",
        )
    base, high = as_torch(task.base), as_torch(task.high)
    batches = by_length(task.rows, _BATCH)
    with torch_threads(threads), torch.inference_mode():
        states = [start(base, config, batch) for _, batch in batches]
    below = 0
    for layer, index in wanted:
        with torch_threads(threads), torch.inference_mode():
            while below < layer:
                weights = layer_weights(base, config, below, config.heads)
                states = [(layer_forward(x, mask, weights, config), mask) for x, mask in states]
                below += 1
            raised = _raise_shard(base, high, config, layer, index)
            logits = []
            for (below_it, mask), (_, batch) in zip(states, batches, strict=True):
                x = layer_forward(below_it, mask, raised, config)
                for above in range(layer + 1, config.layers):
                    x = layer_forward(x, mask, layer_weights(base, config, above, config.heads), config)
                logits.append(logits_of(x, base, config, batch))
            score = score_logits(_in_order(logits, batches), task.rows)
        yield (layer, index), score


def raise_shards(task: ImportanceTask, shards: Iterable[ShardId]) -> dict[str, F32]:
    """Canonical tensors with ``shards`` at the high fidelity and all others at the base."""
    config, tensors = task.config, dict(task.base)
    by_layer: dict[int, list[int]] = {}
    for layer, index in shards:
        by_layer.setdefault(layer, []).append(index)
    for layer, indices in by_layer.items():
        for name in SHARDED_WEIGHTS.values():
            key = f"layers.{layer}.{name}.weight"
            tensors[key] = task.base[key].copy()
            for index in indices:
                part = _slices(config, name, index)
                tensors[key][part] = task.high[key][part]
    return tensors


# --------------------------------------------------------------------------------------- profile


def build_profile(
    config: ModelConfig,
    scores: Mapping[ShardId, SplitScore],
    base: SplitScore,
    *,
    base_fidelity: int,
    model_digest: str,
    task: str,
    split_digest: str,
    rows: int,
    method: Method = "exhaustive",
    levels: tuple[Level, ...] = (),
) -> ImportanceProfile:
    """Put the scores of all shards together, to be ranked as ``method`` says.

    Raises: InputError naming the shards that are missing.
    """
    every = [(layer, s) for layer in range(config.layers) for s in range(config.heads)]
    missing = [shard for shard in every if shard not in scores]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(every)} shards have no score yet, the first is {missing[0]}.",
            "Run the importance command again; it scores only what is missing.",
        )
    profile = ImportanceProfile(
        format="stifarm-importance",
        version=1,
        model_digest=model_digest,
        task=task,
        split_digest=split_digest,
        method=method,
        base_fidelity=cast(Literal[2, 3, 4, 5, 6], base_fidelity),
        rows=rows,
        base=base.score,
        reliability_ppm=_reliability_ppm([scores[shard] for shard in every], base, method),
        layers=config.layers,
        slices=config.heads,
        scores=tuple(ShardScore(layer=n, slice=s, score=scores[(n, s)].score) for n, s in every),
    )
    return profile.model_copy(update={"levels": levels}) if levels else profile


def _reliability_ppm(scores: Sequence[SplitScore], base: SplitScore, method: Method) -> int:
    if method == "exhaustive-accuracy":
        return reliability_ppm([s.even_correct for s in scores], [s.odd_correct for s in scores])
    return reliability_ppm(
        [base.even_loss_nano - s.even_loss_nano for s in scores],
        [base.odd_loss_nano - s.odd_loss_nano for s in scores],
    )


# --------------------------------------------------------------------------------------- one pass


def start(tensors: Mapping[str, Tensor], config: ModelConfig, batch: Batch) -> tuple[Tensor, Tensor]:
    """(the first layer's input, attention mask) of a batch."""
    x = embed_tokens(tensors, config, batch.input_ids, batch.token_types)
    return x, attention_mask(batch.lengths, batch.input_ids.shape[1])


def logits_of(x: Tensor, tensors: Mapping[str, Tensor], config: ModelConfig, batch: Batch) -> Tensor:
    """Logits [B, labels] of the encoder's output. Raises: InputError if the model has no head."""
    if config.head is None:
        raise InputError("This model has no classification head.", "Train one first: stifarm model train.")
    return head_forward(x, batch.lengths, tensors, config.head)


def score_logits(logits: F32, rows: LabelledRows) -> SplitScore:
    """The score of logits [R, labels], in the order of ``rows``."""
    losses = row_losses(logits, rows.labels)
    correct = logits.argmax(1) == rows.labels
    return SplitScore(
        Score(loss_nano=_mean_nano(losses), correct=int(correct.sum())),
        _mean_nano(losses[0::2]),
        _mean_nano(losses[1::2]),
        int(correct[0::2].sum()),
    )


def _in_order(parts: Sequence[Tensor], batches: Sequence[tuple[I64, Batch]]) -> F32:
    """Batches' logits in the order of their rows."""
    sorted_logits = torch.cat(list(parts)).numpy()
    logits = np.empty_like(sorted_logits)
    logits[np.concatenate([index for index, _ in batches])] = sorted_logits
    return logits


def _mean_nano(losses: F64) -> int:
    return round(math.fsum(losses.tolist()) / max(1, len(losses)) * 1e9)


# --------------------------------------------------------------------------------------- details


def _unsharded(bundle: Bundle) -> dict[str, F32]:
    """Resident parameters and embedding tables."""
    tensors = dict(bundle.resident())
    for table in bundle.manifest.embeddings:
        data = np.memmap(
            bundle.path / EMBEDDINGS_FILE,
            dtype="<f4",
            mode="r",
            offset=table.offset,
            shape=(table.rows, table.row_bytes // 4),
        )
        tensors[f"embeddings.{table.name}.weight"] = np.array(data, np.float32)
    return tensors


def _slices(config: ModelConfig, name: str, index: int) -> tuple[slice, slice]:
    """Rows and columns of slice ``index`` in matrix ``name`` of a layer."""
    size = config.ffn_slice if name.startswith("ffn") else config.head_size
    part = slice(index * size, (index + 1) * size)
    return (
        (slice(None), part)
        if name in (SHARDED_WEIGHTS["o"], SHARDED_WEIGHTS["ffn_out"])
        else (part, slice(None))
    )


def _raise_shard(
    base: Mapping[str, Tensor], high: Mapping[str, Tensor], config: ModelConfig, layer: int, index: int
) -> LayerWeights:
    mixed = {key: value for key, value in base.items() if key.startswith(f"layers.{layer}.")}
    for name in SHARDED_WEIGHTS.values():
        key, part = f"layers.{layer}.{name}.weight", _slices(config, name, index)
        mixed[key] = base[key].clone()
        mixed[key][part] = high[key][part]
    return layer_weights(mixed, config, layer, config.heads)
