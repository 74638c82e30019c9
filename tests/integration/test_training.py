"""A user's own checkpoint folder and TSV through the command line to an elastic model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import main
from tests.checkpoints import TOKENIZER_WORDS, random_model, write_checkpoint
from tests.farm_world import DESK, write_inventory

LABELS = ("no", "maybe", "yes")
WORDS = [word for word in TOKENIZER_WORDS if word.isascii() and word[0] not in "[#"]

Run = Callable[..., tuple[str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)
    write_inventory(tmp_path, DESK)

    def command(*words: str) -> tuple[str, str]:
        with pytest.raises(SystemExit) as done:
            main(words)
        captured = capsys.readouterr()
        assert not done.value.code, captured.err
        return captured.out, captured.err

    return command


def write_tsv(path: Path, rows: int, first: int) -> None:
    """Rows whose third column says how they are labelled, in columns of a user's own names."""
    lines = [
        f"{i}\t{WORDS[i % 3]} {WORDS[i * 5 % len(WORDS)]} {WORDS[i * 7 % len(WORDS)]} {i}\t{LABELS[i % 3]}"
        for i in range(first, first + rows)
    ]
    path.write_text("\n".join(["ticket\tmessage\tqueue", *lines]) + "\n")


def phases(provenance: dict[str, Any], what: str) -> list[Any]:
    return [provenance[f"{phase}_{what}"] for phase in ("fine_tune", "widths", "depths")]


@pytest.mark.timeout(600)
def test_a_checkpoint_folder_and_a_tsv_of_the_user_s_own_become_an_elastic_model(
    run: Run, tmp_path: Path
) -> None:
    write_checkpoint(
        tmp_path / "mine", random_model("distilbert", "encoder", dim=32, n_heads=2, hidden_dim=64, n_layers=2)
    )
    write_tsv(tmp_path / "train.tsv", 120, 0)
    write_tsv(tmp_path / "dev.tsv", 30, 200)
    run("model", "import", "mine", "--name", "base")
    train = (
        *("model", "train", "base", "--task", "tickets", "--train", "train.tsv", "--dev", "dev.tsv"),
        *("--text", "message", "--label", "queue", "--max-tokens", "12", "--profile-rows", "30"),
        *("--steps", "20", "--elastic-steps", "10", "--batch", "8", "--learning-rate", "0.002"),
        *("--train-rows", "64", "--dev-rows", "21", "--patience", "2", "--least-gain", "1"),
        *("--threads", "1", "--on", "cpu"),
    )
    out, _ = run(*train)
    assert "Trained on a subset: 64 of 90 train rows, seed 0, fp32 on cpu" in out
    assert "elastic widths: 3 of 10 steps (0.38 epochs), ended early for want of a gain" in out
    assert "elastic depths: 3 of 10 steps" in out
    assert "Submodels were scored on 21 of 30 dev rows, drawn by the seed." in out

    # Nothing gains a whole nat: each phase ends two checks after its first.
    answer = json.loads(run(*train, "--json")[0])
    info = answer["info"]
    provenance = info["provenance"]
    assert phases(provenance, "ended") == ["no-gain"] * 3
    assert phases(provenance, "steps") == [6, 3, 3]
    assert phases(provenance, "planned") == [20, 10, 10]
    assert phases(provenance, "best_step") == [2, 1, 1]
    assert (provenance["train_rows"], provenance["train_rows_of"]) == (64, 90)
    assert tuple(info["config"]["head"]["labels"]) == tuple(sorted(LABELS))
    assert info["untrained"] is False
    trained = [score for score in info["scores"] if score["split"] == "dev"]
    assert len(trained) == len(info["submodels"]) > 1
    assert {score["rows"] for score in trained} == {21}

    # The whole recipe goes on from nothing that was trained on fewer rows.
    fewer = ("--train-rows", "64", "--dev-rows", "21")
    whole = json.loads(run(*(word for word in train if word not in fewer), "--json")[0])
    assert whole["info"]["provenance"]["train_rows"] == 90
    assert {score["rows"] for score in whole["info"]["scores"]} == {30}
    assert whole["digest"] != answer["digest"]
