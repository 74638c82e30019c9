"""What boards are told to execute, executed by every shell of this machine that a board may have."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from orchestrator.transports.ssh_script import (
    DETACH,
    LAUNCH,
    WARDEN,
    command_line,
    not_run,
    not_started,
    quoted,
)

TOKEN = "0123456789abcdef01234567"
NASTY = ["a b", "'", "''", '"', "$HOME", "\n", "a\n\nb ", "ü", "", "\\", "-n", "`x`", "*"]


@pytest.fixture(params=["dash", "bash", "busybox", "mksh"])
def shell(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, str]:
    """An environment in which ``sh`` is that shell."""
    found = shutil.which(request.param)
    if found is None:
        pytest.skip(f"needs {request.param}")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/sh").symlink_to(found)
    return {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}


def launched(
    shell: dict[str, str], line: bytes, text: bytes = b"", *, leads: bool = True
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["sh", "-c", LAUNCH],
        input=line + text,
        capture_output=True,
        env=shell,
        start_new_session=leads,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("leads", [True, False])
def test_a_line_becomes_the_command_in_a_group_of_its_own(shell: dict[str, str], leads: bool) -> None:
    script = 'for each in "$@" "$MARK"; do printf "%s\\0" "$each"; done; cat; echo err >&2; exit 7'
    line = command_line(["sh", "-c", script, "sh", *NASTY], {"MARK": "x 'y'\n"}, TOKEN, has_input=True)
    done = launched(shell, line, b"go\ninput", leads=leads)
    head, _, output = done.stdout.partition(TOKEN.encode() + b" ")
    group, _, output = output.partition(b"\n")
    assert (head, done.returncode, done.stderr) == (b"\n", 7, TOKEN.encode() + b"\nerr\n")
    assert int(group) != os.getpgrp()
    assert output.decode().split("\0") == [*NASTY, "x 'y'\n", "input"]


@pytest.mark.parametrize(
    ("argv", "why"),
    [
        (["/no/such"], "No such file"),
        (["no such"], "No such file"),
        (["a=b"], "No such file"),
        (["/"], "Permission denied"),
        (["sh", "-c", "exit 127"], None),
        (["sh", "-c", "exit 126"], None),
        (["true"], None),
    ],
)
def test_what_cannot_be_executed_is_told_from_what_ends_so(
    shell: dict[str, str], argv: list[str], why: str | None
) -> None:
    done = launched(shell, command_line(argv, {}, TOKEN, has_input=False), b"go\n")
    said = not_run(done.stderr, done.returncode, TOKEN)
    assert (said is None) == (why is None)
    assert why is None or why in str(said)
    assert why is not None or done.stderr == TOKEN.encode() + b"\n"


def test_what_no_command_can_be_is_refused() -> None:
    for argv, env in ((["a\0b"], {}), ([], {}), ([""], {}), (["-c"], {}), (["true"], {"A;B": "x"})):
        with pytest.raises(ValueError, match=r"NUL|no name"):
            command_line(argv, env, TOKEN, has_input=False)


@pytest.mark.parametrize(
    ("argv", "why"),
    [(["/no/such"], "No such file"), (["/"], "Permission denied"), (["sh", "-c", "echo $$; exit 127"], None)],
)
def test_a_detached_command_is_known_to_run_or_not(
    shell: dict[str, str], tmp_path: Path, argv: list[str], why: str | None
) -> None:
    log = tmp_path / "deep/log"
    arguments = ["sh", "-c", DETACH, "sh", str(log), str(log.parent), *argv]
    done = launched(shell, command_line(arguments, {}, TOKEN, has_input=False), b"go\n")
    if why is not None:
        assert why in str(not_started(done.returncode))
        return
    assert done.returncode == 0
    pid = int(done.stdout.split()[-1])
    with log.open() as stream:
        while not (text := stream.read()):
            os.sched_yield()
    assert int(text) == pid


def test_the_warden_ends_groups_at_once_and_the_rest_with_the_link(shell: dict[str, str]) -> None:
    first, second = (subprocess.Popen(["sleep", "600"], start_new_session=True) for _ in range(2))
    line = b"nl=$(printf '\\nx'); nl=${nl%x}; exec sh -c " + quoted(WARDEN) + b"\n"
    orders = f"watch {first.pid} one\nwatch {second.pid} two\nend {first.pid} one\n".encode()
    done = launched(shell, line, orders)
    assert done.stdout == b"\nWARDEN-READY\none\n"
    assert (first.wait(), second.wait()) == (-9, -9)


def test_the_warden_finds_what_has_no_group(shell: dict[str, str]) -> None:
    child = subprocess.Popen(["sleep", "600"], env={**os.environ, "STIFARM_RUN": TOKEN})
    line = b"nl=$(printf '\\nx'); nl=${nl%x}; exec sh -c " + quoted(WARDEN) + b"\n"
    assert launched(shell, line, f"end 0 {TOKEN}\n".encode()).stdout.endswith(TOKEN.encode() + b"\n")
    assert child.wait() == -9
