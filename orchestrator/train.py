"""Training a model of the home for a task: a head, fine-tuning, elastic training, scores, registration."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from orchestrator.drawn import Draw
from orchestrator.farm import Farm
from orchestrator.library import (
    DEV_SPLIT,
    TaskFiles,
    find_model,
    read_task,
    register_model,
    register_task,
    tokenize_splits,
    tokenizer_of,
)
from sti_runtime.early_stop import provenance_of
from sti_runtime.elastic import make_elastic
from sti_runtime.model import HeadConfig, Submodel, elastic_submodels
from sti_runtime.model_store import TRUNCATED, Model, SubmodelScore, make_model
from sti_runtime.records import canonical_json, sha256_hex
from sti_runtime.tasks import Example, split_digest
from sti_runtime.training import (
    Evaluation,
    Progress,
    TrainSettings,
    evaluate_submodels,
    fine_tune,
    full_model,
    with_head,
)


@dataclass(frozen=True)
class ElasticSettings:
    """The three phases of ``train_model``; ``widths`` and ``depths`` None: not made elastic."""

    fine_tune: TrainSettings
    widths: TrainSettings | None
    depths: TrainSettings | None

    def without_elastic(self) -> ElasticSettings:
        """The fine-tuning alone."""
        return replace(self, widths=None, depths=None)


def train_model(
    farm: Farm,
    base_name: str,
    files: TaskFiles,
    settings: ElasticSettings,
    *,
    name: str,
    pooling: str,
    train_rows: int | None = None,
    dev_rows: int | None = None,
    progress: Progress | None,
) -> Model:
    """Put a head on a model, fine-tune it, make it elastic, score every submodel, register it all.

    Each submodel is scored before elastic training too, cut from the fine-tuned model (``TRUNCATED``).
    ``train_rows``: train on so many rows only, drawn by the seed. Early stopping goes by the profile split,
    never by dev, which reports results. ``dev_rows``: score submodels on so many of them only, drawn by the
    seed; the task keeps them all. The model's provenance says how each phase ended.

    Interrupted training goes on where it was when called again with the same arguments.
    Raises: InputError, DatasetError, ResourceError.
    """
    _, base = find_model(farm, base_name)
    tokenizer_of(base, base_name)
    train, profile, dev = read_task(files)
    examples = (subset(train, train_rows, files.seed), profile, dev)
    splits = tokenize_splits(files.spec, examples, base)
    scored = splits.dev if dev_rows is None else Draw(dev_rows, files.seed).of(splits.dev)
    head = HeadConfig.model_validate(
        {
            "pooling": pooling,
            "activation": "tanh" if pooling == "cls" else "none",
            "labels": files.spec.labels,
        }
    )
    config, tensors = with_head(base.config, base.tensors, head, files.seed)
    workspace = (
        farm.settings.home / "training" / _training_key(base.digest, files, settings, pooling, examples)
    )
    done = fine_tune(
        tensors,
        config,
        splits.train,
        settings.fine_tune,
        held_out=splits.profile,
        workspace=workspace,
        progress=progress,
    )
    tuned, ends = done.tensors, done.ends
    threads, device = settings.fine_tune.threads, settings.fine_tune.device
    truncated: dict[Submodel, Evaluation] = {}
    if settings.widths is not None and settings.depths is not None:
        submodels = elastic_submodels(config.layers, config.heads)
        truncated = evaluate_submodels(
            tuned,
            config,
            submodels,
            scored,
            threads=threads,
            device=device,
            progress=progress,
            phase="truncated",
        )
        elastic = make_elastic(
            tuned,
            config,
            splits.train,
            splits.profile,
            settings.widths,
            settings.depths,
            workspace=workspace,
            progress=progress,
        )
        tuned, ends = elastic.tensors, ends + elastic.ends
    else:
        submodels = (full_model(config),)
    scores = evaluate_submodels(
        tuned, config, submodels, scored, threads=threads, device=device, progress=progress
    )
    model = make_model(
        config,
        tuned,
        base.tokenizer_json,
        submodels=submodels,
        untrained=False,
        source=base.info.source,
        provenance={
            "base_model": base.digest,
            "task": files.spec.name,
            "train_split": split_digest(examples[0]),
            "train_rows": len(examples[0]),
            "train_rows_of": len(train),
            "profile_rows": len(profile),
            "dev_rows": scored.rows,
            "dev_rows_of": len(dev),
            "seed": files.seed,
            "settings": repr(settings),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
            "precision": settings.fine_tune.precision,
            **{key: value for end in ends for key, value in provenance_of(end).items()},
        },
        scores=tuple(
            SubmodelScore(submodel=s, split=split, correct=e.correct, rows=e.rows)
            for split, found in ((DEV_SPLIT, scores), (DEV_SPLIT + TRUNCATED, truncated))
            for s, e in found.items()
        ),
    )
    register_model(farm, model, name)
    register_task(farm, files.spec, splits)
    return model


def subset(examples: Sequence[Example], rows: int | None, seed: int) -> list[Example]:
    """``rows`` of the examples, drawn by ``seed``, in their order; None, or as many as there are: all."""
    if rows is None or rows >= len(examples):
        return list(examples)
    return [examples[i] for i in sorted(random.Random(seed).sample(range(len(examples)), rows))]


def _training_key(
    base: str,
    files: TaskFiles,
    settings: ElasticSettings,
    pooling: str,
    examples: tuple[Sequence[Example], ...],
) -> str:
    """Names the workspace of one training: whatever changes its outcome changes the name."""
    spec = files.spec.model_dump(mode="json")
    parts = [base, spec, repr(settings), pooling, files.seed, split_digest(examples[0])]
    return sha256_hex(canonical_json(parts))[:20]


def training_settings(phase: TrainSettings, elastic_steps: int | None) -> ElasticSettings:
    """Three phases alike; ``elastic_steps`` caps the second and third apart from the first."""
    elastic = phase if elastic_steps is None else replace(phase, max_steps=elastic_steps)
    return ElasticSettings(phase, elastic, elastic)
