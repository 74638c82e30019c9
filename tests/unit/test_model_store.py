"""Model folders: what is written is read back, complete or not at all, and damage is noticed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from sti_runtime.checkpoint import import_checkpoint
from sti_runtime.errors import DigestError, FormatError, ResourceError
from sti_runtime.model import Submodel
from sti_runtime.model_store import (
    Model,
    SubmodelScore,
    load_model,
    make_model,
    save_model,
    tensors_digest,
)
from tests.checkpoints import random_model, write_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A small imported classifier."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return import_checkpoint(write_checkpoint(folder, random_model("bert", "classifier")), source="org/small")


def same(first: Model, second: Model) -> bool:
    """Info, tokenizer and every tensor are equal to the bit."""
    return (
        first.info == second.info
        and first.tokenizer_json == second.tokenizer_json
        and first.tensors.keys() == second.tensors.keys()
        and all(first.tensors[name].tobytes() == second.tensors[name].tobytes() for name in first.tensors)
    )


def test_round_trip(model: Model, tmp_path: Path) -> None:
    path = save_model(model, tmp_path)
    assert path == tmp_path / "models" / model.digest
    assert sorted(file.name for file in path.iterdir()) == [
        "model.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert same(load_model(path), model)
    assert [file.name for file in path.parent.iterdir()] == [model.digest]


def test_saving_again_changes_nothing(model: Model, tmp_path: Path) -> None:
    path = save_model(model, tmp_path)
    before = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    assert save_model(model, tmp_path) == path
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == before


def test_trained_model_without_tokenizer(model: Model, tmp_path: Path) -> None:
    grid = (Submodel(kept=(0, 1, 2), width=4), Submodel(kept=(0,), width=2))
    trained = make_model(
        model.config,
        model.tensors,
        None,
        submodels=grid,
        untrained=False,
        source="org/small",
        provenance={"seed": 1, "learning_rate": "2e-5"},
        scores=(SubmodelScore(submodel=grid[1], split="dev", correct=3, rows=4),),
    )
    assert trained.digest != model.digest
    assert trained.info.tensors_digest == model.info.tensors_digest
    assert same(load_model(save_model(trained, tmp_path)), trained)


def test_digest_covers_tensors_tokenizer_and_info(model: Model) -> None:
    tensors = {name: array.copy() for name, array in model.tensors.items()}
    tensors["layers.1.ffn.out.bias"][3] = np.nextafter(tensors["layers.1.ffn.out.bias"][3], np.float32(9))
    assert tensors_digest(tensors, model.config) != model.info.tensors_digest

    def made(**changes: object) -> str:
        values: dict[str, Any] = {
            "config": model.config,
            "tensors": model.tensors,
            "tokenizer_json": model.tokenizer_json,
            "submodels": model.info.submodels,
            "untrained": True,
            "source": "org/small",
            "provenance": model.info.provenance,
        }
        return make_model(**(values | changes)).digest

    assert made() == model.digest
    changed = {made(tensors=tensors), made(tokenizer_json=b"{}"), made(source="other"), made(untrained=False)}
    assert len(changed | {model.digest}) == 5


def test_tensors_that_do_not_fit_are_refused(model: Model) -> None:
    def refused(tensors: dict[str, Any], named: str) -> None:
        with pytest.raises(FormatError, match=named):
            make_model(
                model.config, tensors, None, submodels=model.info.submodels, untrained=True, source="x"
            )

    name = "layers.0.attention.q.weight"
    whole = dict(model.tensors)
    refused({key: value for key, value in whole.items() if key != name}, name)
    refused(whole | {"layers.9.attention.q.weight": whole[name]}, "layers.9.attention.q.weight")
    refused(whole | {name: whole[name][:-1]}, name)
    refused(whole | {name: whole[name].astype(np.float64)}, name)


# ------------------------------------------------------------------ damage


def flip(file: Path, position: int) -> None:
    """Invert the bits of one byte."""
    content = bytearray(file.read_bytes())
    content[position] ^= 0xFF
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_flipped_byte(model: Model, tmp_path: Path, name: str) -> None:
    path = save_model(model, tmp_path)
    flip(path / name, -5)
    with pytest.raises(DigestError, match=name):
        load_model(path)


@pytest.mark.parametrize("name", ["model.json", "model.safetensors", "tokenizer.json"])
def test_missing_and_truncated_files(model: Model, tmp_path: Path, name: str) -> None:
    path = save_model(model, tmp_path)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(FormatError, match=name):
        load_model(path)
    (path / name).unlink()
    with pytest.raises(FormatError, match=name):
        load_model(path)


def test_edited_info_does_not_pass_for_the_model(model: Model, tmp_path: Path) -> None:
    path = save_model(model, tmp_path)
    info = json.loads((path / "model.json").read_text())
    (path / "model.json").write_text(json.dumps(info | {"untrained": False}))
    with pytest.raises(DigestError, match=r"model\.json"):
        load_model(path)
    (path / "model.json").write_text(json.dumps(info | {"version": 2}))
    with pytest.raises(FormatError, match="version"):
        load_model(path)


def test_tensors_of_another_shape(model: Model, tmp_path: Path) -> None:
    path = save_model(model, tmp_path)
    tensors = load_file(path / "model.safetensors")
    tensors["embeddings.norm.bias"] = tensors["embeddings.norm.bias"][:-1]
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(FormatError, match=r"embeddings\.norm\.bias"):
        load_model(path)


def test_saving_again_repairs_a_damaged_folder(model: Model, tmp_path: Path) -> None:
    path = save_model(model, tmp_path)
    flip(path / "model.safetensors", -5)
    assert save_model(model, tmp_path) == path
    assert same(load_model(path), model)
    assert [file.name for file in path.parent.iterdir()] == [model.digest]


def test_leftovers_of_killed_writers_are_removed_and_living_ones_kept(model: Model, tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as alive:
        for pid in (dead.pid, alive.pid):
            (tmp_path / "models" / f".new-{pid}-abc").mkdir(parents=True)
        save_model(model, tmp_path)
        found = {file.name for file in (tmp_path / "models").iterdir()}
        alive.communicate(b"\n")
    assert found == {model.digest, f".new-{alive.pid}-abc"}


_SAVE_WITH_LITTLE_ROOM = """
import resource, sys
from pathlib import Path
from sti_runtime.errors import ResourceError
from sti_runtime.model_store import load_model, save_model
model = load_model(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save_model(model, Path(sys.argv[2]))
except ResourceError as error:
    sys.exit(f"refused: {error}")
"""


def test_storage_that_takes_no_more_leaves_nothing_half_done(model: Model, tmp_path: Path) -> None:
    path = save_model(model, tmp_path / "a")
    done = subprocess.run(
        [sys.executable, "-c", _SAVE_WITH_LITTLE_ROOM, str(path), str(tmp_path / "b")],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.stderr.startswith("refused: ")
    assert "could not be written" in done.stderr
    assert list((tmp_path / "b" / "models").iterdir()) == []
    assert same(load_model(save_model(model, tmp_path / "b")), model)


def test_place_that_cannot_be_written(model: Model, tmp_path: Path) -> None:
    (tmp_path / "models").write_text("in the way")
    with pytest.raises(ResourceError, match="could not be written"):
        save_model(replace(model), tmp_path)
