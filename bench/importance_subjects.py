"""What ``bench.importance`` and ``bench.codecs`` score: the demo model, MiniLM tuned a little on SST-2,
or a model that ``stifarm model train`` made of a GLUE task.

MiniLM and GLUE come from STIFARM_SHARED (default ../shared). Profile rows are held out of SST-2's train
split. The fine-tuning is kept in the cache folder, and goes on there when it was interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bench.engine_model import cache_folder
from orchestrator.demo.demo_model import load_demo_model
from orchestrator.demo.demo_task import TASK, demo_splits
from sti_runtime.checkpoint import import_checkpoint
from sti_runtime.importance import prepare_rows
from sti_runtime.model import HeadConfig, ModelConfig
from sti_runtime.model_store import load_model
from sti_runtime.rows import LabelledRows
from sti_runtime.shard import F32
from sti_runtime.tasks import PRESETS, build_task_data, read_tsv, split_profile
from sti_runtime.training import PhaseStatus, TrainSettings, evaluate, fine_tune, full_model, with_head

STEPS = 400
TRAIN_ROWS = 20_000
PROFILE_ROWS = 500
SEED = 0
FOLDERS = {"sst-2": "SST-2", "rte": "RTE", "qnli": "QNLI", "qqp": "QQP"}
"""GLUE's tasks and their folders."""


@dataclass(frozen=True)
class Subject:
    """A classifier, the rows that its shards are scored on, and those that only report results."""

    name: str
    config: ModelConfig
    tensors: Mapping[str, F32]
    rows: LabelledRows
    dev: LabelledRows


def demo() -> Subject:
    """The model that stifarm ships, and the whole profile split of its task."""
    model = load_demo_model()
    assert model.tokenizer_json is not None
    splits = demo_splits(1)
    profile, dev = (
        build_task_data(examples, TASK, split, config=model.config, tokenizer_json=model.tokenizer_json)
        for examples, split in ((splits.profile, "profile"), (splits.dev, "dev"))
    )
    rows, reported = prepare_rows(profile, model.config), prepare_rows(dev, model.config)
    return Subject("demo model", model.config, model.tensors, rows, reported)


def shared_folder() -> Path:
    """Where MiniLM and GLUE are."""
    return Path(os.environ.get("STIFARM_SHARED", Path(__file__).parents[2] / "shared"))


def trained(folder: Path, task: str, held_out: int) -> Subject:
    """A model folder of a home, and the rows that its training held out of train. Raises: InputError."""
    model, spec, glue = load_model(folder), PRESETS[task], glue_folder(task)
    assert model.tokenizer_json is not None
    _, profile = split_profile(read_tsv(glue / "train.tsv", spec), held_out, SEED)
    rows, reported = (
        prepare_rows(
            build_task_data(examples, spec, split, config=model.config, tokenizer_json=model.tokenizer_json),
            model.config,
        )
        for examples, split in ((profile, "profile"), (read_tsv(glue / "dev.tsv", spec), "dev"))
    )
    return Subject(f"{model.info.source} on {task}", model.config, model.tensors, rows, reported)


def glue_folder(task: str) -> Path:
    """Where a GLUE task's files are."""
    return shared_folder() / "data" / "glue" / FOLDERS[task]


def minilm(threads: int) -> Subject | None:
    """MiniLM on SST-2 after ``STEPS`` steps; None where the shared data is not."""
    checkpoint = shared_folder() / "models" / "all-MiniLM-L6-v2-fp16"
    glue = glue_folder("sst-2")
    if not checkpoint.is_dir() or not glue.is_dir():
        return None
    spec, base = PRESETS["sst-2"], import_checkpoint(checkpoint, source="all-MiniLM-L6-v2")
    tokenizer = base.tokenizer_json
    assert tokenizer is not None
    rest, held_out = split_profile(read_tsv(glue / "train.tsv", spec), PROFILE_ROWS, SEED)
    train, profile, dev = (
        build_task_data(examples, spec, split, config=base.config, tokenizer_json=tokenizer)
        for examples, split in (
            (rest[:TRAIN_ROWS], "train"),
            (held_out, "profile"),
            (read_tsv(glue / "dev.tsv", spec), "dev"),
        )
    )
    head = HeadConfig(pooling="mean", activation="none", labels=spec.labels)
    config, tensors = with_head(base.config, base.tensors, head, SEED)
    settings = TrainSettings(
        learning_rate=6e-5, max_steps=STEPS, max_tokens=spec.max_tokens, seed=SEED, threads=threads
    )
    tuned = fine_tune(
        tensors, config, train, settings, workspace=cache_folder() / "importance", progress=_report
    ).tensors
    score = evaluate(tuned, config, full_model(config), dev, threads=threads)
    print(f"MiniLM on SST-2: {STEPS} steps of {settings.batch}, dev accuracy {score.accuracy:.1%}")
    rows, reported = prepare_rows(profile, config), prepare_rows(dev, config)
    return Subject("MiniLM on SST-2", config, tuned, rows, reported)


def _report(status: PhaseStatus) -> None:
    if status.done % 50 == 0:
        sys.stderr.write(f"{status.phase}: step {status.done} of {status.total}, loss {status.loss:.3f}\n")
