"""A state folder with damaged files: each verb names the file and the remedy, doctor lists them all."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog

from orchestrator.cli import app, main
from orchestrator.errors import HostError
from orchestrator.processes import identify
from orchestrator.ray.board import Endpoint
from orchestrator.ray.join import Joined
from orchestrator.ray.nodes import machine_address
from tests.farm_world import DESK, write_inventory

Run = Callable[..., tuple[int, str, str]]

NEWER = b'{"format":"stifarm-%s","version":2}'
DIGEST = "ab" * 32


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The state folder of a farm with one device."""
    write_inventory(tmp_path, DESK)
    folder = tmp_path / ".stifarm"
    folder.mkdir()
    return folder


@pytest.fixture
def run(home: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs the command line in this process; (exit code, stdout, stderr)."""
    handlers = list(logging.getLogger().handlers)

    def command(*words: str) -> tuple[int, str, str]:
        before = ["--home", str(home), "--inventory", str(home.parent / "inventory.yaml")]
        with pytest.raises(SystemExit) as done:
            main([*before, *words])
        said = capsys.readouterr()
        return int(done.value.code or 0), said.out, said.err

    yield command
    structlog.reset_defaults()
    logging.getLogger().handlers[:] = handlers


def damage(path: Path, content: bytes | None) -> None:
    """Leave this at a path; None: a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir() if content is None else path.write_bytes(content)


def one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(
    "words",
    [
        ("host", "list"),
        ("host", "up", "--listen", "127.0.0.1:0"),
        ("devices", "probe"),
        ("serve", "--once"),
    ],
    ids=" ".join,
)
def test_a_head_file_that_does_not_tell_is_named(home: Path, run: Run, words: tuple[str, ...]) -> None:
    damage(home / "head.json", b"{")
    code, out, err = run(*words)
    assert (code, out) == (1, "")
    assert f"{home / 'head.json'}: not a valid Head" in one_line(err)
    assert f"rm {home / 'head.json'}" in one_line(err)


@pytest.mark.parametrize("content", [b"", NEWER % b"joined", None], ids=["empty", "newer", "a folder"])
def test_a_host_file_that_does_not_tell_is_named(home: Path, run: Run, content: bytes | None) -> None:
    damage(home / "host.json", content)
    code, _, err = run("host", "leave")
    assert code == 1
    assert f"error {home / 'host.json'}: " in one_line(err)
    assert f"rm {home / 'host.json'}" in one_line(err)


@pytest.mark.parametrize("content", [b"", b"\n", b"\0\xff", None], ids=["empty", "blank", "bytes", "folder"])
def test_a_token_that_is_none_is_named_before_ray_starts(home: Path, run: Run, content: bytes | None) -> None:
    damage(home / "ray_token", content)
    code, _, err = run("devices", "probe")
    assert code == 1
    assert f"error The farm's token {home / 'ray_token'} " in one_line(err)
    assert f"rm {home / 'ray_token'}" in one_line(err)


def test_a_lock_that_is_none_is_named(home: Path, run: Run) -> None:
    damage(home / "controller.lock", None)
    code, _, err = run("devices", "probe")
    assert code == 1
    assert f"{home / 'controller.lock'}, which is to be locked, cannot be opened" in one_line(err)


def test_doctor_lists_what_is_damaged_and_looks_at_the_rest(home: Path, run: Run) -> None:
    damaged = {
        "head.json": b"{",
        "host.json": b"",
        "ray_token": b"",
        "controller.lock": None,
        f"bundles/{DIGEST}/manifest.json": b"{}",
        f"models/{DIGEST}/model.json": b"[",
        f"tasks/{DIGEST}.safetensors": b"",
        "emulation": b"no folder",
    }
    for name, content in damaged.items():
        damage(home / name, content)
    damage(home / "bundles/.build-left/manifest.json", b"of a build that goes on")
    code, out, _ = run("doctor", "--json")
    assert code == 1
    findings = json.loads(out)
    problems = [one for one in findings if one["state"] == "problem" and one["subject"] == "state folder"]
    for name in damaged:
        (found,) = (one for one in problems if str(home / name) in one["text"])
        assert found["remedy"], found
    assert len(problems) == len(damaged)
    assert {"store", "inventory", "compiler", "Ray", "disk"} <= {one["subject"] for one in findings}


def test_doctor_tells_a_name_without_an_address_as_ray_s(home: Path, run: Run) -> None:
    own = identify(os.getpid())
    assert own is not None
    joined = Joined(format="stifarm-joined", version=1, name="bench1", controller="\0:6379", process=own)
    (home / "host.json").write_bytes(joined.to_json())
    _, out, _ = run("doctor", "--json")
    (found,) = [one for one in json.loads(out) if "has no address" in one["text"]]
    assert (found["subject"], found["state"]) == ("Ray", "problem")


def test_what_the_system_refused_is_told_and_where_if_asked(run: Run) -> None:
    def refuse() -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "/there/x")

    app.command("refuse", hidden=True)(refuse)
    try:
        plain, verbose = run("refuse"), run("--verbose", "refuse")
    finally:
        app.registered_commands.pop()
    for code, _, err in (plain, verbose):
        assert (code, "/there/x cannot be used" in one_line(err)) == (1, True)
    assert ["in refuse" in err for _, _, err in (plain, verbose)] == [False, True]


def test_doctor_without_a_store_looks_at_the_rest(home: Path, run: Run) -> None:
    (home / "store.sqlite").write_bytes(b"no database" * 1000)
    code, out, _ = run("doctor", "--devices", "all", "--json")
    assert code == 1
    findings = {one["subject"]: one for one in json.loads(out)}
    assert findings["store"]["state"] == "problem"
    assert "Restore it from a backup" in findings["store"]["remedy"]
    assert findings["devices"]["text"] == "not looked at: the store cannot be used"
    assert {"inventory", "compiler", "Ray", "disk"} <= set(findings)


def test_doctor_tells_why_it_could_not_look_at_devices(home: Path, run: Run) -> None:
    damage(home / "ray_token", b"")
    code, out, _ = run("doctor", "--devices", "all", "--json")
    assert code == 1
    findings = {one["subject"]: one for one in json.loads(out)}
    assert "ray_token is empty" in findings["devices"]["text"]
    assert "Ray" in findings


@pytest.mark.parametrize(
    ("ip", "said"),
    [
        ("no-such-host.invalid", "'no-such-host.invalid' has no address"),
        ("a..b", "'a..b' has no address"),
        ("", "'' has no address"),
        ("192.0.2.1", "This machine has not the address 192.0.2.1"),
        ("0.0.0.0", "0.0.0.0 means every address"),
    ],
)
def test_a_host_joins_at_an_address_that_it_has(run: Run, ip: str, said: str) -> None:
    code, _, err = run("host", "join", "127.0.0.1:1", "--ip", ip)
    assert code == 1
    assert re.search(rf"^error {re.escape(said)}", one_line(err)), err
    assert "see ip address" in one_line(err)


def test_a_name_of_this_machine_is_one_of_its_addresses() -> None:
    assert machine_address("localhost") == "127.0.0.1"


@pytest.mark.parametrize(
    "text", ["a..b:6379", ":6379", "127.0.0.1:", "127.0.0.1:²", f"127.0.0.1:{'9' * 5000}"]
)
def test_what_is_no_address_to_join_is_refused(text: str) -> None:
    with pytest.raises(HostError, match="no address"):
        Endpoint.parse(text)
