"""While one command drives the devices, doctor and probe say so, and what can be known beside it."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.beside import look_beside
from orchestrator.cli.context import FAILED
from orchestrator.farm import Farm, controlling, shown_command
from tests.farm_world import (
    BOARD,
    DESK,
    job_folders,
    machine_of,
    open_world,
    start_controller,
    wait_for,
    write_inventory,
)
from tests.unit.test_cli_input import Run, run  # noqa: F401 - a fixture

APART = "{name: apart, transport: local, machine_lock: /another/machine}"


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Farm]:
    write_inventory(tmp_path, DESK, BOARD, APART)
    with open_world(tmp_path) as opened:
        yield opened


@pytest.fixture
def controller(farm: Farm, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A command that drives a job on the desk, which does not end meanwhile."""
    with machine_of(tmp_path):
        started = start_controller(tmp_path, 1)
        wait_for(lambda: bool(job_folders(tmp_path, "desk", "probe")), "its job")
        yield started
        started.kill()
        started.communicate()


def test_devices_in_use_are_left_alone_and_the_others_looked_at(
    farm: Farm,
    controller: subprocess.Popen[str],
    tmp_path: Path,
    run: Run,  # noqa: F811
) -> None:
    desk, board, apart = look_beside(farm, farm.inventory.devices)
    assert desk.why.startswith("it is in use by ")
    assert board.why == "desk, which shares its machine, is in use"
    assert (desk.seen, board.seen, apart.why, apart.error) == (None, None, "", None)
    assert apart.seen is not None
    assert desk.known is not None  # probed by the other command
    assert board.known is None

    shown = run(tmp_path, "doctor", "--devices", "all")
    assert "error" not in shown.err
    said = " ".join(shown.out.split())
    assert f"(process {controller.pid})" in said
    assert "tests.farm_world" in said
    assert "doctor --devices all --wait" in shown.out
    assert "not looked at, for it is in use by" in said
    assert "its agent was not asked" in said

    (known, unseen, *_) = json.loads(run(tmp_path, "devices", "probe", "--json").out)
    assert (known["name"], known["cpus"] != [], unseen["seen_ns_ago"]) == ("desk", True, None)
    assert known["lease"] is not None
    listed = run(tmp_path, "devices", "probe", "--devices", "desk")
    assert listed.code == FAILED
    assert "Facts that the store has" in listed.out
    assert "devices probe --devices desk --wait" in listed.err


def test_a_command_can_wait_until_the_other_has_ended(farm: Farm) -> None:
    told, entered = list[str](), threading.Event()

    def second() -> None:
        with controlling(farm, waits=told.append):
            entered.set()

    with controlling(farm):
        waiting = threading.Thread(target=second)
        waiting.start()
        wait_for(lambda: bool(told), "it to say whom it waits for")
        assert not entered.is_set()
    waiting.join()
    assert entered.is_set()
    assert len(told) == 1
    assert "is driving the devices" in told[0]


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["/v/bin/python3", "/v/bin/stifarm", "eval", "-d", "all"], "stifarm eval -d all"),
        (["stifarm", "--db-url", "postgresql://u:secret@h/d", "serve"], "stifarm --db-url … serve"),
        (["stifarm", "--db-url=postgresql://u:secret@h/d", "serve"], "stifarm --db-url=… serve"),
        (["python", "-m", "tests.farm_world"], "python -m tests.farm_world"),
        ([], ""),
    ],
)
def test_a_command_is_shown_without_its_interpreter_and_secrets(words: list[str], shown: str) -> None:
    assert shown_command(words) == shown
