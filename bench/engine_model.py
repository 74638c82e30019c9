"""The model that every engine of ``bench.engines`` runs: BERT-base's shape, random weights from a fixed seed.

Weights are Gaussian with the deviation BERT is initialised with, two in a thousand four times as wide: that
gives the quantizer about the outliers it meets in trained models (0.1 %). 64 labels make the logits a vector
whose cosine says something.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench.quantize import bert_base
from sti_runtime.bundle import Bundle
from sti_runtime.bundle_build import build_bundle
from sti_runtime.encoder import model_forward
from sti_runtime.importance_profile import ImportanceProfile
from sti_runtime.model import HeadConfig, ModelConfig, Submodel, elastic_submodels, tensor_shapes
from sti_runtime.model_store import Model, load_model, make_model, save_model
from sti_runtime.plan_build import Fidelity
from sti_runtime.quantizer import GOBO, Quantizer
from sti_runtime.shard import F32, FIDELITIES
from sti_runtime.task_data import I32, TaskData, TaskDataInfo, load_task_data, store_task_data

LAYERS = HEADS = 12
TOKENS = 128
ROWS = 64
LABELS = tuple(str(label) for label in range(64))
STD = 0.02
WIDE_SHARE, WIDE = 0.002, 4.0
SEED = 1
CLOSE_QUANTIZER = Quantizer("converged", 0)
"""Of the bundle that stays closest to the model: 1.4 % of its weights are outliers."""
CLOSE_FIDELITY: Fidelity = 6
CHECKED_ROWS = 8
"""Rows whose logits are compared with the reference."""


def cache_folder() -> Path:
    """Where models, peers and their builds are kept: below XDG_CACHE_HOME, else ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "stifarm" / "bench"


@dataclass(frozen=True)
class BenchModel:
    """The model in its forms. ``reference`` [8, labels]: logits of torch in float32 for the first rows;
    ``close``: the bundle of CLOSE_QUANTIZER, at CLOSE_FIDELITY only."""

    model: Model
    folder: Path
    spool: Path
    bundle: Bundle
    close: Bundle
    task_file: Path
    rows_file: Path
    reference: F32

    @property
    def whole(self) -> Submodel:
        """All 12 × 12 shards."""
        return Submodel(kept=tuple(range(LAYERS)), width=HEADS)


def config() -> ModelConfig:
    """BERT-base with a pooler and a classifier of 64 labels."""
    head = HeadConfig(pooling="cls", activation="tanh", labels=LABELS)
    return bert_base(LAYERS).model_copy(update={"head": head})


def random_tensors(model: ModelConfig) -> dict[str, F32]:
    """All canonical tensors from the seed: weights as above, LayerNorms near 1, small biases."""
    rng = np.random.default_rng(SEED)
    tensors: dict[str, F32] = {}
    for name, shape in tensor_shapes(model).items():
        values = rng.standard_normal(shape, np.float32)
        if name.endswith("norm.weight"):
            values = 1 + np.float32(0.1) * values
        elif name.endswith(".bias"):
            values *= np.float32(0.02)
        else:
            wide = rng.random(shape, np.float32) < WIDE_SHARE
            values *= np.where(wide, np.float32(STD * WIDE), np.float32(STD))
        tensors[name] = np.ascontiguousarray(values, np.float32)
    return tensors


def random_rows(model: ModelConfig) -> I32:
    """Token ids [ROWS, TOKENS]; every row is full."""
    return np.random.default_rng(SEED).integers(0, model.vocab, (ROWS, TOKENS), np.int32)


def prepare(folder: Path) -> BenchModel:
    """Make the model, its bundle, task data and reference logits below ``folder``, or find them there."""
    spool = folder / "spool"
    made = make_or_load(folder)
    bundle = _bundle(made, spool, GOBO, FIDELITIES)
    close = _bundle(made, spool, CLOSE_QUANTIZER, (CLOSE_FIDELITY,))
    ids = random_rows(made.config)
    task = store_task_data(
        TaskData(
            info=TaskDataInfo(
                format="stifarm-task-data",
                version=1,
                task="random",
                split="all",
                labels=LABELS,
                tokenizer=None,
            ),
            input_ids=ids,
            token_types=np.zeros_like(ids),
            lengths=np.full(ROWS, TOKENS, np.int32),
            labels=np.full(ROWS, -1, np.int32),
        ),
        spool / "tasks",
    )
    rows_file, reference_file = folder / "rows.i32", folder / "reference.npy"
    ids.astype("<i4").tofile(rows_file)
    if not reference_file.exists():
        np.save(reference_file, reference_logits(made, task))
    return BenchModel(
        model=made,
        folder=folder,
        spool=spool,
        bundle=bundle,
        close=close,
        task_file=task,
        rows_file=rows_file,
        reference=np.load(reference_file),
    )


def _bundle(model: Model, spool: Path, quantizer: Quantizer, fidelities: tuple[int, ...]) -> Bundle:
    path = build_bundle(
        model.config,
        model.tensors,
        model_digest=model.digest,
        submodels=model.info.submodels,
        untrained=True,
        out_root=spool / "bundles",
        fidelities=fidelities,
        quantizer=quantizer,
    )
    return Bundle.open(path)


def make_or_load(folder: Path) -> Model:
    """The model folder below ``folder``, written when it is not there."""
    found = sorted((folder / "models").glob("*/model.json"))
    if found:
        return load_model(found[0].parent, verify=False)
    shape = config()
    made = make_model(
        shape,
        random_tensors(shape),
        None,
        submodels=elastic_submodels(LAYERS, HEADS),
        untrained=True,
        source="random",
        provenance={"seed": SEED},
    )
    save_model(made, folder)
    return made


def reference_logits(model: Model, task_file: Path) -> F32:
    """Logits [8, labels] of the whole model in float32."""
    data = load_task_data(task_file)
    tensors = {name: torch.from_numpy(array) for name, array in model.tensors.items()}
    rows = slice(0, CHECKED_ROWS)
    with torch.inference_mode():
        logits, _ = model_forward(
            tensors,
            model.config,
            Submodel(kept=tuple(range(LAYERS)), width=HEADS),
            torch.from_numpy(data.input_ids[rows]),
            torch.from_numpy(data.token_types[rows]),
            torch.from_numpy(data.lengths[rows]),
        )
    assert logits is not None
    return np.ascontiguousarray(logits.numpy(), np.float32)


def made_up_importance(model: Model) -> ImportanceProfile:
    """Scores from the seed: random weights have no important shards, planning only needs an order."""
    losses = np.random.default_rng(SEED).permutation(LAYERS * HEADS).tolist()
    return ImportanceProfile.model_validate(
        {
            "format": "stifarm-importance",
            "version": 1,
            "model_digest": model.digest,
            "task": "random",
            "split_digest": "0" * 64,
            "method": "exhaustive",
            "base_fidelity": 2,
            "rows": ROWS,
            "base": {"loss_nano": 10**9, "correct": 0},
            "reliability_ppm": 0,
            "layers": LAYERS,
            "slices": HEADS,
            "scores": tuple(
                {"layer": i // HEADS, "slice": i % HEADS, "score": {"loss_nano": loss, "correct": 0}}
                for i, loss in enumerate(losses)
            ),
        }
    )
