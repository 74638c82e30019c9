"""What a device says reaches the user's terminal as text: no control sequence, no markup, no broken table."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from orchestrator.cli import output
from orchestrator.errors import StableError
from tests.agent_data import REPO

NASTY = "\x1b[2J\x1b]0;pwned\x07[bold]x[/nope] :smile:\r\nnext\x9b31m\u202egnp\u2028\ud800\x7f\\"
UNSEEN = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\u2028\ud800]")
"""None of these may come out; a newline only where the table or the text has one."""


def said(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return captured.out + captured.err


def test_lines_for_people_hold_no_control_sequence(capsys: pytest.CaptureFixture[str]) -> None:
    for write in (output.note, output.success, output.warn, output.heading):
        write(NASTY)
        shown = said(capsys)
        assert UNSEEN.search(shown) is None
        assert r"\x1b[2J\x1b]0;pwned\x07[bold]x[/nope] :smile:\r" in shown
    output.fail(StableError(NASTY, NASTY, device="phone"))
    shown = said(capsys)
    assert UNSEEN.search(shown) is None
    assert shown.startswith(r"error phone: \x1b[2J")


def test_a_row_stays_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(
        f"title {NASTY[:20]}", ("device", ">model"), [("a", NASTY), ("b", "[red]plain")], caption="[/]"
    )
    shown = said(capsys)
    assert UNSEEN.search(shown) is None
    rows = [line for line in shown.splitlines() if line.strip().startswith(("a ", "b "))]
    assert len(rows) == 2
    assert "pwned" in rows[0]
    assert "next" in rows[0]
    assert "[red]plain" in rows[1]


def test_json_says_the_same_without_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    output.emit_json({NASTY: [NASTY, "Ωß"]})
    shown = said(capsys)
    assert UNSEEN.search(shown) is None
    assert json.loads(shown) == {NASTY: [NASTY, "Ωß"]}
    assert "Ωß" in shown


def test_logs_are_plain() -> None:
    script = (
        "import logging, structlog, sys; from orchestrator.cli.output import show_logs\n"
        "for _ in range(2): show_logs(logging.WARNING)\n"
        "structlog.get_logger().warning('said', device='d', cause='a\\x1b[31mb')\n"
        "logging.getLogger('paramiko').warning('banner %s', '\\x1b]0;x\\x07')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert UNSEEN.search(done.stderr) is None
    assert r"a\x1b[31mb" in done.stderr
    assert r"banner \x1b]0;x\x07" in done.stderr
