"""A process that the native agent starts: what it says arrives, and its end is awaited in bounds."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from orchestrator.toolchain import SOURCE_FOLDERS
from tests.native.sanitized import ENVIRONMENT, build_sanitized

RUNTIME, AGENT = SOURCE_FOLDERS
BASE = [RUNTIME / name for name in ("base.c", "digest.c", "json.c", "json_fields.c", "json_write.c")]
LONG_S, SHORT_S = 60, 1
LIVE_ON = "exec <&- >&- 2>&-; exec sleep 1000"
"""Closes its standard streams and goes on living."""


@pytest.fixture(scope="module")
def program() -> str:
    program = Path(__file__).with_name("child_program.c")
    return str(build_sanitized("address,undefined", program, AGENT / "child.c", runtime=BASE))


def run(program: str, folder: Path, script: str, limit_s: int = LONG_S, sigchld: str = "default") -> Any:
    """What came of the script; no process of it is left."""
    done = subprocess.run(
        [program, str(limit_s), str(folder / "stop"), sigchld, script],
        cwd=folder, capture_output=True, text=True, timeout=50, check=False, env=os.environ | ENVIRONMENT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found.pop("left")
    return found


def test_what_it_says_and_how_it_ends_arrive(program: str, tmp_path: Path) -> None:
    found = run(program, tmp_path, "read line; echo $line; echo words >&2; exit 3")
    assert (found["error"], found["out"], found["words"]) == ("", "input\n", "words\n")
    assert os.waitstatus_to_exitcode(found["status"]) == 3
    ended = run(program, tmp_path, "kill -9 $$")
    assert (ended["error"], os.waitstatus_to_exitcode(ended["status"])) == ("", -9)


def test_one_that_ends_after_its_streams_is_awaited(program: str, tmp_path: Path) -> None:
    found = run(program, tmp_path, "exec <&- >&- 2>&-; sleep 0.3; exit 5")
    assert (found["error"], os.waitstatus_to_exitcode(found["status"])) == ("", 5)


@pytest.mark.parametrize("script", [LIVE_ON, "exec sleep 1000"], ids=["streams closed", "streams open"])
def test_one_that_lives_on_is_killed_at_the_limit(program: str, tmp_path: Path, script: str) -> None:
    found = run(program, tmp_path, script, SHORT_S)
    assert (found["error"], found["what"]) == (
        "SpawnedRequestError",
        "A request's process had not ended after 1 s.",
    )


@pytest.mark.parametrize("script", [LIVE_ON, "exec sleep 1000"], ids=["streams closed", "streams open"])
def test_one_that_lives_on_is_killed_when_the_agent_is_to_stop(
    program: str, tmp_path: Path, script: str
) -> None:
    assert run(program, tmp_path, f": > stop; {script}")["error"] == "stopped"


def test_an_end_that_nobody_sees_is_an_error(program: str, tmp_path: Path) -> None:
    """With SIGCHLD ignored the kernel keeps no exit status."""
    found = run(program, tmp_path, "exit 0", sigchld="ignore")
    assert (found["error"], found["status"]) == ("SpawnedRequestError", -1)
    assert "The end of a request's process was not seen: No child processes." in found["what"]
    assert "SIGCHLD" in found["remedy"]
