"""What benches score a trained model on: the rows that its training held out, and the dev rows."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.importance_subjects import SEED, trained
from orchestrator.demo.demo_task import generate, tokenizer_json
from sti_runtime.model import all_submodels
from sti_runtime.model_store import make_model, save_model
from sti_runtime.tasks import PRESETS, read_tsv, split_profile
from tests.bundles import random_tensors
from tests.farm_world import tiny_config


def test_a_trained_model_is_scored_on_the_rows_held_out_of_its_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    glue = tmp_path / "data" / "glue" / "SST-2"
    glue.mkdir(parents=True)
    for split, rows in (("train", generate(40, 1)), ("dev", generate(9, 2))):
        lines = [f"{row.text}\t{row.label}" for row in rows]
        (glue / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    monkeypatch.setenv("STIFARM_SHARED", str(tmp_path))
    config = tiny_config().model_copy(update={"positions": 64})  # as long as the task's rows
    model = make_model(
        config, random_tensors(config), tokenizer_json(), submodels=all_submodels(2, 2), untrained=False,
        source="tests", provenance={},
    )  # fmt: skip
    found = trained(save_model(model, tmp_path / "models"), "sst-2", 12)
    _, held_out = split_profile(read_tsv(glue / "train.tsv", PRESETS["sst-2"]), 12, SEED)
    assert found.name == "tests on sst-2"
    assert found.rows.labels.tolist() == [row.label for row in held_out]
    assert len(found.dev.labels) == 9
    assert found.tensors.keys() == model.tensors.keys()
