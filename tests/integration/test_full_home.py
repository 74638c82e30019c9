"""A state folder on a full or read-only file system: every verb ends with what happened and what to do."""

from __future__ import annotations

import json
import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog

from orchestrator.cli import main
from tests.farm_world import DESK, open_world, write_inventory

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system"),
]
Run = Callable[..., tuple[int, str, str]]

UP = ("host", "up", "--listen", "127.0.0.1:0")
PROBE = ("devices", "probe")
CAMPAIGN = ("campaign", "run", "alive.yaml")
JOIN = ("host", "join", "127.0.0.1:1")


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """The state folder of a farm that was used, 8 MB large."""
    folder = tmp_path / ".stifarm"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted: {mounted.stderr.strip()}")
    try:
        write_inventory(tmp_path, DESK)
        (tmp_path / "alive.yaml").write_text("version: 1\nname: alive\nkinds: [health]\ndevices: all\n")
        with open_world(tmp_path):
            pass
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def run(home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs the command line in this process; (exit code, stdout, stderr as one line)."""
    handlers = list(logging.getLogger().handlers)
    monkeypatch.chdir(home.parent)

    def command(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            main(["--home", str(home), *words])
        said = capsys.readouterr()
        return int(done.value.code or 0), said.out, " ".join(said.err.split())

    yield command
    structlog.reset_defaults()
    logging.getLogger().handlers[:] = handlers


def fill(home: Path) -> Path:
    """Take all the room that there is."""
    path = home / "filler"
    with path.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(4096))
        except OSError:
            return path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (UP, "store.sqlite cannot grow: the disk is full."),
        (PROBE, "store.sqlite cannot grow: the disk is full."),
        (CAMPAIGN, "store.sqlite cannot grow: the disk is full."),
        (JOIN, "host.json cannot be written: No space left on device."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_on_a_full_disk_it_is_said_and_the_same_command_goes_on(
    home: Path, run: Run, words: tuple[str, ...], said: str
) -> None:
    filler = fill(home)
    code, out, err = run(*words)
    assert (code, out) == (1, "")
    assert said in err
    assert "Free some space" in err
    (disk,) = (one for one in json.loads(run("doctor", "--json")[1]) if one["subject"] == "disk")
    assert disk["state"] == "problem"
    filler.unlink()
    assert run("devices", "list")[0] == 0
    assert not list(home.glob(".*")), "something half-written was kept"


def test_a_command_whose_store_cannot_grow_ends_at_once(home: Path, run: Run) -> None:
    (home / "controller.lock").write_text("1")
    with open_world(home.parent):  # so the log and its index are there, and the store can be read
        fill(home)
        code, out, err = run(*PROBE)
    assert (code, out) == (1, "")
    assert "cannot grow: the disk is full" in err
    assert "waiting" not in err


@pytest.mark.parametrize(
    ("words", "named", "elsewhere"),
    [
        (CAMPAIGN, "store.sqlite", False),
        (UP, "ray_token", True),
        (PROBE, "controller.lock", True),
        (JOIN, "host.lock", False),
    ],
    ids=["store", "token", "controller", "host"],
)
def test_on_a_read_only_file_system_the_file_is_named(
    home: Path, run: Run, words: tuple[str, ...], named: str, elsewhere: bool
) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(home)], check=True)
    store = ("--db-url", f"sqlite:///{home.parent}/elsewhere.sqlite") if elsewhere else ()
    code, out, err = run(*store, *words)
    assert (code, out) == (1, "")
    assert f"{home / named}" in err
    assert ("this user may write" if named == "store.sqlite" else "mounted read-only: mount it") in err
    assert "a file stays" not in err
    findings = [one for one in json.loads(run("doctor", "--json")[1]) if one["subject"] == "state folder"]
    assert ["mounted read-only" in one["text"] for one in findings] == [True]
