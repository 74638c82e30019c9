"""Fetching checkpoints, over HTTP from a stand-in for the hub on loopback."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from orchestrator.hub import HubUnreachableError, fetch_checkpoint
from sti_runtime.checkpoint import import_checkpoint
from sti_runtime.errors import CheckpointError, StifarmError
from tests.checkpoints import random_model, write_checkpoint
from tests.hub_server import Hub, Repository, serve_hub

pytestmark = pytest.mark.skipif(
    constants.HF_HUB_OFFLINE, reason="needs huggingface_hub to be allowed to connect; unset HF_HUB_OFFLINE"
)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as repositories hold it: beside files that an import does not read."""
    folder = write_checkpoint(tmp_path_factory.mktemp("published"), random_model("bert", "classifier"))
    (folder / "pytorch_model.bin").write_bytes(b"\x80" * 5000)
    (folder / "README.md").write_text("# A model\n")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(b"x")
    return folder


@pytest.fixture
def hub(published: Path, tmp_path: Path) -> Iterator[Hub]:
    """A hub with one good repository, one gated and one of pickled weights only."""
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("nothing here\n")
    with serve_hub(
        {
            "org/small": Repository(published, revisions=("main", "v1.0")),
            "org/gated": Repository(published, gated=True),
            "org/pickled": Repository(pickled),
            "org/empty": Repository(tmp_path / "empty"),
        }
    ) as running:
        yield running


def test_a_local_folder_is_taken_as_it_is(published: Path, tmp_path: Path) -> None:
    assert fetch_checkpoint(str(published), tmp_path / "cache") == published
    assert not (tmp_path / "cache").exists()


def test_download_and_import(hub: Hub, published: Path, tmp_path: Path) -> None:
    folder = fetch_checkpoint("org/small", tmp_path / "cache", endpoint=hub.endpoint)
    assert folder.name == hub.repositories["org/small"].commit
    assert folder.is_relative_to(tmp_path / "cache")
    assert hub.downloaded() == ["config.json", "model.safetensors", "vocab.txt"]
    assert import_checkpoint(folder, source="x").digest == import_checkpoint(published, source="x").digest


def test_second_fetch_downloads_nothing(hub: Hub, tmp_path: Path) -> None:
    first = fetch_checkpoint("org/small", tmp_path, endpoint=hub.endpoint)
    hub.requests.clear()
    assert fetch_checkpoint("org/small", tmp_path, endpoint=hub.endpoint) == first
    assert hub.downloaded() == []


def test_revision(hub: Hub, tmp_path: Path) -> None:
    commit = hub.repositories["org/small"].commit
    for revision in ("v1.0", commit):
        folder = fetch_checkpoint("org/small", tmp_path, revision=revision, endpoint=hub.endpoint)
        assert folder.name == commit
    with pytest.raises(CheckpointError, match=r"no revision 'v9'.*branch, a tag"):
        fetch_checkpoint("org/small", tmp_path, revision="v9", endpoint=hub.endpoint)


def test_endpoint_from_the_environment(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint + "/")
    assert (fetch_checkpoint("org/small", tmp_path) / "config.json").is_file()
    assert hub.downloaded() != []


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("org/absent", ["neither a local folder nor a repository", "HF_TOKEN"]),
        ("org/gated", ["accepted its terms", "/org/gated", "hf auth login"]),
        ("org/pickled", ["no model.safetensors", "save_pretrained"]),
        ("org/empty", ["no config.json"]),
        ("not an id", ["neither a local folder nor a hub id"]),
    ],
)
def test_repositories_that_give_no_checkpoint(hub: Hub, tmp_path: Path, name: str, told: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        fetch_checkpoint(name, tmp_path / "cache", endpoint=hub.endpoint)
    for part in [name, *told]:
        assert part in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize("path", ["/nowhere/model", "./absent", "a/b/c", "~/absent-model", "absent/"])
def test_a_path_is_never_looked_up_on_the_hub(hub: Hub, tmp_path: Path, path: str) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        fetch_checkpoint(path, tmp_path, endpoint=hub.endpoint)
    assert hub.requests == []


def test_a_file_is_no_checkpoint(published: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a file"):
        fetch_checkpoint(str(published / "config.json"), tmp_path)


@pytest.fixture
def closed_port() -> Iterator[str]:
    """An endpoint nobody listens on; its port is taken, so that no other program begins to."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_hub_out_of_reach(closed_port: str, tmp_path: Path) -> None:
    with pytest.raises(HubUnreachableError) as caught:
        fetch_checkpoint("org/small", tmp_path, endpoint=closed_port)
    assert closed_port in caught.value.what
    assert "HF_ENDPOINT" in caught.value.remedy
    assert isinstance(caught.value, StifarmError)


def test_hub_out_of_reach_with_a_copy_in_the_cache(
    hub: Hub, closed_port: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = fetch_checkpoint("org/small", tmp_path, endpoint=hub.endpoint)
    with caplog.at_level(logging.WARNING):
        assert fetch_checkpoint("org/small", tmp_path, endpoint=closed_port) == first
    assert "taken from the cache" in caplog.text


def test_offline_by_the_environment(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from orchestrator.hub import *\n"
            "try:\n    fetch_checkpoint('org/small', Path(sys.argv[1]))\n"
            "except HubUnreachableError as error:\n    sys.exit(str(error))",
            str(tmp_path),
        ],
        env={"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "HF_HUB_OFFLINE" in done.stderr


def test_interrupted_download_goes_on(hub: Hub, published: Path, tmp_path: Path) -> None:
    hub.cuts["model.safetensors"] = 1000
    try:
        folder = fetch_checkpoint("org/small", tmp_path, endpoint=hub.endpoint)
    except HubUnreachableError:
        folder = fetch_checkpoint("org/small", tmp_path, endpoint=hub.endpoint)
    for name in ("config.json", "model.safetensors", "vocab.txt"):
        assert (folder / name).read_bytes() == (published / name).read_bytes()
    assert hub.cuts == {}
    assert hub.downloaded().count("model.safetensors") == 2
