"""What a device says reaches the user's terminal as text: no control sequence, no markup, no broken table."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from rich.console import Console

from db.audit import Audit
from orchestrator import report
from orchestrator.audit import DeviceAudit
from orchestrator.cli import output
from orchestrator.cli.context import Options
from orchestrator.cli.fitting import TableText
from orchestrator.cli.store import show_audits
from orchestrator.cli.wrapping import pieces
from orchestrator.errors import StableError
from sti_runtime.units import NONE
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


COLUMNS = ("device", ">rate", "what to do")
FINGERPRINT = "SHA256:" + "k" * 43
ROWS = (("board", "1.25 GB/s", f"compare {FINGERPRINT} with what the board says"), ("desk", "7 B/s", ""))


def tables(monkeypatch: pytest.MonkeyPatch, columns: int) -> str:
    """The table as a terminal of so many columns shows it."""
    shown = io.StringIO()
    console = Console(file=shown, width=columns, force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr(output, "out", console)
    output.table("Devices", COLUMNS, ROWS, caption="that is all")
    return shown.getvalue()


@pytest.mark.parametrize("columns", [140, 100, 80, 40, 20])
def test_nothing_in_a_table_is_cut_nor_a_word_broken(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    shown = tables(monkeypatch, columns)
    assert FINGERPRINT in shown
    assert "1.25 GB/s" in shown
    assert "…" not in shown
    if columns >= 80:  # then it fits as a table
        assert max(map(len, shown.splitlines())) <= columns
        assert "───" in shown
    else:
        assert re.search(r"^  device +board\n  rate +1.25 GB/s\n  what to do  compare", shown, re.MULTILINE)
        assert shown.endswith("that is all\n")


WIDEST_PLAN = (
    "240 ms", "12×12¹", "27.5", "1.05 MB", "2.42 MB", "9.99 ms", "76.7 ms [70.8–81.6]", "8.11 ms", "20/20",
    "61.4", "98.5 [97.5–99.1]", "1.26 MB",
)  # fmt: skip


def plans(monkeypatch: pytest.MonkeyPatch, columns: int, other: str = "short") -> list[str]:
    """Plans and a table beside them, as a terminal of so many columns shows them."""
    shown = io.StringIO()
    console = Console(file=shown, width=columns, force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr(output, "out", console)
    output.tables(
        [
            TableText("board", report.PLAN_COLUMNS, [WIDEST_PLAN], report.PLAN_CAPTION),
            TableText("Others", ("device", ">why"), [("board", other)]),
        ]
    )
    return shown.getvalue().splitlines()


def test_plans_fit_a_terminal_of_120_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (110, 120, 140):
        shown = plans(monkeypatch, columns)
        assert max(map(len, shown)) <= max(columns, 120)
        assert sum("───" in line for line in shown) == 2
        row = next(line for line in shown if "12×12" in line)
        assert ("98.5 [97.5–99.1]" in row) == (columns >= 120)
        assert "1.26 MB" in row


def test_the_tables_of_one_result_have_one_form(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns, shown in ((80, plans(monkeypatch, 80)), (120, plans(monkeypatch, 120, "x" * 130))):
        assert not any("───" in line for line in shown)
        assert "  device  board" in shown
        assert shown[shown.index("Others") - 1] == ""
        # Lines break between words, not where the terminal ends.
        assert all(len(line) <= columns or "x" * 130 in line for line in shown)


OTHER_PLAN = (
    "120 ms", "6×4", "2.9", "83 kB", "217 kB", "8 ms", "17.2 ms [14–21.5]", "42 ms", "39/40", "6.1",
    "97.4 [96.2–98.2]", "872 kB",
)  # fmt: skip
GROUNDS = (
    (
        "board",
        "240 ms",
        "sti",
        "9.99 ms [5.01–12.3]",
        "450d2a6f925e, 5 h",
        NONE,
        "exhaustive, 5 h",
        "500",
        "no",
    ),
    ("desk", "60 ms", "preload-32", "8 ms [7–9]", "37b50b92d792, 2 h", NONE, "exhaustive, 5 h", "500", "no"),
)


def narrow(monkeypatch: pytest.MonkeyPatch, columns: int, *rows: Sequence[str]) -> list[str]:
    """Plans of two devices and what they rest on, as a terminal of so many columns shows them."""
    shown = io.StringIO()
    console = Console(file=shown, width=columns, force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr(output, "out", console)
    plan_rows = [WIDEST_PLAN, *rows]
    output.tables(
        [
            TableText("board", report.PLAN_COLUMNS, plan_rows, "", report.PLAN_LESS),
            TableText("desk", report.PLAN_COLUMNS, plan_rows[:2], "", report.PLAN_LESS),
            TableText("Grounds", report.GROUNDS_COLUMNS, GROUNDS, "that is all", report.GROUNDS_LESS),
        ]
    )
    return shown.getvalue().splitlines()


def test_a_narrow_terminal_does_without_what_is_least_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    for columns, left_out in ((140, None), (100, "stall"), (80, "stall, preload, memory, read")):
        shown = narrow(monkeypatch, columns, OTHER_PLAN)
        assert max(map(len, shown)) <= columns
        assert sum("───" in line for line in shown) == 3
        assert sum("n×m" in line and "stall" not in line for line in shown) == (2 if left_out else 0)
        found = re.search(r"room: ([^.]+)\. (\d+) columns show them", " ".join(" ".join(shown).split()))
        assert (None if found is None else found[1]) == left_out
        if found is not None:
            for room, missed in ((int(found[2]), False), (int(found[2]) - 1, True)):
                again = narrow(monkeypatch, room, OTHER_PLAN)
                assert any("Left out" in line for line in again) == missed
    assert not any("───" in line for line in narrow(monkeypatch, 40, OTHER_PLAN))


def test_what_all_rows_have_in_common_stands_below_a_table_that_is_too_wide(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not any("in all rows" in line for line in narrow(monkeypatch, 140, OTHER_PLAN))
    told = narrow(monkeypatch, 80, OTHER_PLAN)
    assert "No row has a value of: samples." in told
    assert any(line.startswith("The same in all rows: importance, age: exhaustive, 5 h.") for line in told)
    # As much of it as it takes, and what is least wanted first.
    alike = ("120 ms", "6×4", *WIDEST_PLAN[2:])
    assert narrow(monkeypatch, 100, alike).count(
        "The same in all rows: preload: 1.05 MB. stall: 61.4. memory: 1.26 MB."
    ) == 2  # fmt: skip
    # What tells something in the table beside it stays in its own; so does all of a single row.
    board = narrow(monkeypatch, 100, alike, OTHER_PLAN)
    assert sum("in all rows" in line for line in board) == 0
    assert sum("stall" in line for line in narrow(monkeypatch, 110)) == 2


def test_what_may_be_left_out_are_columns() -> None:
    for columns, less in (
        (report.PLAN_COLUMNS, report.PLAN_LESS),
        (report.GROUNDS_COLUMNS, report.GROUNDS_LESS),
    ):
        assert set(less) < {column.lstrip(">") for column in columns}


def test_a_bar_says_what_its_step_waits_for_and_that_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    console = Console(file=shown, width=80, force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr(output, "err", console)

    def step() -> str:
        with output.steps() as bars, bars.step("phone: profile") as bar:
            bar(1, 3, "battery: 12 % < 30 %")
            bars.refresh()
            bar.reach("out of reach")
            bars.refresh()
            bar(2, 3)
            bar.reach("")
            shown.write("no more\n")
            raise StableError("it broke.", device="phone")

    with pytest.raises(StableError):
        step()
    waiting, _, after = shown.getvalue().partition("no more\n")
    assert "\n  phone: profile waits: battery: 12 % < 30 %" in waiting
    assert "battery: 12 % < 30 %; out of reach" in waiting
    assert "waits" not in after
    assert "phone: profile failed" in after
    assert "2/3" in after


def test_a_bar_whose_step_failed_at_its_end_is_not_full(monkeypatch: pytest.MonkeyPatch) -> None:
    for done, total in ((1, 1), (0, 0)):
        shown = io.StringIO()
        console = Console(file=shown, width=80, force_terminal=True, color_system=None, highlight=False)
        monkeypatch.setattr(output, "err", console)
        with output.steps() as bars, bars.step("phone: deploy") as bar:
            bar(done, total)
            bar.fail()
        last = screen_of(shown.getvalue(), 80)[0]
        assert last.startswith("phone: deploy failed")
        assert "━" not in last
        assert f"{done}/{total}" not in last


def test_without_a_terminal_a_wait_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with output.steps(quiet=True) as bars, bars.step("phone: profile") as bar:
        for _ in range(3):
            bar(0, 3, "battery: 12 % < 30 %")
        bar(1, 3)
        bar.reach("out of reach")
    assert said(capsys).splitlines() == [
        "… phone: profile",
        "… phone: profile waits: battery: 12 % < 30 %",
        "… phone: profile waits: out of reach",
    ]


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


def test_a_warning_is_a_short_line_unless_all_is_logged() -> None:
    script = (
        "import logging, structlog, sys; from orchestrator.cli.output import show_logs\n"
        "show_logs(getattr(logging, sys.argv[1]))\n"
        "structlog.get_logger().warning('its agent is gone, started again', device='phone')\n"
        "structlog.get_logger().info('it had said', device='phone', detail='a\\nb')\n"
    )

    def logged(level: str) -> list[str]:
        argv = [sys.executable, "-c", script, level]
        return subprocess.run(argv, cwd=REPO, capture_output=True, text=True, check=True).stderr.splitlines()

    assert logged("WARNING") == ["! phone: its agent is gone, started again"]
    assert len(logged("INFO")) == 2
    assert "detail" in logged("INFO")[1]


def test_lines_written_beside_bars_leave_no_bar_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    console = Console(
        file=shown, width=60, height=30, force_terminal=True, color_system=None, highlight=False
    )
    monkeypatch.setattr(output, "err", console)

    def write(name: str) -> None:
        for number in range(20):
            output.note(f"{name} said {number} {'words ' * 15}")

    with (
        output.steps() as bars,
        bars.step("phone-1: run") as one,
        bars.step("phone-2: run") as two,
        ThreadPoolExecutor(2) as writers,
    ):
        for name in ("a", "b"):
            writers.submit(write, name)
        for number in range(200):  # the bars' height changes all the time
            one(number, 200, "battery" if number % 2 else "")
            two.reach("out of reach" if number % 3 else "")
            bars.refresh()
    screen = screen_of(shown.getvalue(), 60)
    assert sum(" said " in line for line in screen) == 40
    for label in ("phone-1: run ", "phone-2: run "):
        assert sum(line.startswith(label) for line in screen) == 1, screen


def test_a_long_note_breaks_at_blanks_with_an_indent(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(output, "err", Console(file=shown, width=40, force_terminal=True, color_system=None))
    output.note(f"  board: {'words ' * 20}")
    lines = shown.getvalue().splitlines()
    assert lines[0].startswith("  board: words")
    assert len(lines) > 2
    assert all(line.startswith("    words") and len(line) <= 40 for line in lines[1:])


def screen_of(written: str, width: int) -> list[str]:
    """What an endless terminal shows after rich has written this: text, cursor up, and erased lines."""
    lines, row, column = [""], 0, 0
    for code, text in re.findall(r"\x1b\[([?\d;]*[A-Za-z])|([^\x1b])", written):
        if code == "2K":
            lines[row] = ""
        elif code.endswith("A"):
            row = max(0, row - int(code[:-1] or 1))
        elif text == "\r":
            column = 0
        elif text == "\n" or (text and column == width):
            row, column = row + 1, 0
        if text and text not in "\r\n":
            lines += [""] * (row + 1 - len(lines))
            lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + 1 :]
            column += 1
        lines += [""] * (row + 1 - len(lines))
    return lines


def test_a_note_of_several_lines_keeps_them_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    console = Console(file=shown, width=40, force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr(output, "err", console)
    output.note("an entry:\n  - name: my-board\n    transport: ssh\n" + "word " * 12)
    lines = shown.getvalue().splitlines()
    assert lines[:3] == ["an entry:", "  - name: my-board", "    transport: ssh"]
    assert len(lines) == 5
    assert lines[4].startswith("  word")


def test_a_hint_names_the_farm_that_was_asked() -> None:
    assert Options().again("plans query") == "stifarm plans query"
    asked = Options(inventory=Path("my lab/inventory.yaml"), db_url="postgresql://user:secret@host/store")
    assert asked.again("plans query") == "stifarm --inventory 'my lab/inventory.yaml' plans query"


REMEDY = (
    "See their health: stifarm devices check; or end it when no program uses it any more: "
    "/a/very/long/folder/.venv/bin/adb -P 6000 kill-server. Else copy it: mkdir -p .stifarm && scp "
    "bench:lab/.stifarm/ray_token .stifarm/ray_token"
)
COMMANDS = (
    "stifarm devices check;",
    "/a/very/long/folder/.venv/bin/adb -P 6000 kill-server.",
    "mkdir -p .stifarm && scp bench:lab/.stifarm/ray_token .stifarm/ray_token",
)


@pytest.mark.parametrize("columns", [120, 80, 60, 40])
def test_what_to_do_breaks_at_blanks_and_within_no_command(
    monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    shown = io.StringIO()
    console = Console(file=shown, width=columns, force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr(output, "err", console)
    monkeypatch.setattr(output, "out", console)
    output.fail(StableError("it is not well.", REMEDY, device="phone"))
    output.listing("Doctor", [("✗", "phone", "it is not well", REMEDY)])
    output.note(REMEDY)
    output.warn(REMEDY)
    output.success(REMEDY)
    lines = shown.getvalue().splitlines()
    for command in COMMANDS:
        assert sum(command in line for line in lines) == 5
    for line in lines:
        assert len(line) <= columns or any(line.strip().endswith(command) for command in COMMANDS), line


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("Run stifarm host leave on bench1.", "stifarm host leave on bench1."),
        ("Set it: date -s as root.", "date -s as root."),
        ("(there: ssh-keygen -lf /etc/ssh/key.pub) and compare", "ssh-keygen -lf /etc/ssh/key.pub)"),
        ("Or `stifarm db backup`, or try", "`stifarm db backup`,"),
        (
            "stifarm devices reserve phone-a --for 4h --reason 'its new camera' or so",
            "stifarm devices reserve phone-a --for 4h --reason 'its new camera'",
        ),
        ("it's the phone's own adb, which is old", "adb,"),
    ],
)
def test_a_command_is_one_piece(text: str, whole: str) -> None:
    assert whole in list(pieces(text))
    assert " ".join(pieces(text)) == text


def test_an_audit_calls_a_thing_as_its_document_does(capsys: pytest.CaptureFixture[str]) -> None:
    show_audits([DeviceAudit("desk", 1, Audit(10, 20, ()), 3, ())])
    shown = capsys.readouterr().out
    assert "forgotten" in shown
    assert "gone" not in shown
