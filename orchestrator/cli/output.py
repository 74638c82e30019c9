"""What the CLI writes: tables and notes for people, one JSON document for machines, progress on stderr.

Results go to stdout. Notes, progress and errors go to stderr, so that ``--json`` and pipes stay clean.

Texts may be a device's own words, which are not trusted: here, and only here, they lose what a terminal or
rich would take for instructions (``plain``).
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
from collections.abc import Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TextIO, cast

import structlog
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from orchestrator.cli.fitting import Fit, TableText, arranged, fitted
from orchestrator.cli.wrapping import broken
from sti_runtime.errors import StifarmError

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

_NOT_SHOWN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""What a terminal obeys (C0 and C1 control characters), what reorders or breaks a line (Unicode's own), and
halves of characters, which have no UTF-8. Tabs and line breaks are text."""

_SCREEN = threading.RLock()
"""Held by whoever writes to stderr. A line goes above the bars, which are moved by their height: were they
redrawn with another height meanwhile, some would stay behind."""

WIDE = 220
"""Columns of a table when the output is no terminal: nothing is cut in logs and pipes."""


def note(text: str) -> None:
    """A line for people, on stderr; a long one breaks at blanks, indented, but not within a command."""
    with _SCREEN:
        err.print(_indented(text), soft_wrap=True)


def success(text: str) -> None:
    """A line that says what was done, on stderr."""
    with _SCREEN:
        err.print(Text("✓ ", "green"), _indented(text), sep="", soft_wrap=True)


def warn(text: str) -> None:
    """A line that wants attention, on stderr."""
    with _SCREEN:
        err.print(Text("! ", "yellow"), _indented(text), sep="", soft_wrap=True)


def fail(error: StifarmError) -> None:
    """An error: what happened, then what to do."""
    first, *others = error.what.strip().splitlines() or [""]
    with _SCREEN:
        err.print(Text("error ", "bold red"), "\n      ".join(_wrapped(first, 6, err)), sep="", markup=False,
                  soft_wrap=True)  # fmt: skip
        for line in others:
            err.print("  " + "\n    ".join(_wrapped(line, 4, err)), markup=False, soft_wrap=True)
        for line in error.remedy.strip().splitlines():
            err.print(Text("      " + "\n      ".join(_wrapped(line, 6, err))), soft_wrap=True)


def emit_json(value: Any) -> None:
    """One JSON document on stdout."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    # Only the texts in it can hold these, where JSON takes the escape for the same character.
    sys.stdout.write(_NOT_SHOWN.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")


def heading(text: str) -> None:
    """A line above several tables, on stdout."""
    out.print(_text(text, "bold"), "", sep="\n", soft_wrap=True)


def lines(texts: Iterable[str]) -> None:
    """Lines of a result, on stdout."""
    for text in texts:
        out.print(_indented(text, out) if cell_len(text) > out.width else _text(text), soft_wrap=True)


def styled(texts: Iterable[Text]) -> None:
    """Lines with colours, on stdout; only for text of our own making."""
    for text in texts:
        out.print(text, soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "") -> None:
    """A table on stdout; a column whose name starts with ">" is right-aligned.

    Nothing in it is ever cut: cells break at blanks, and what is still too wide is written as records, a
    line for each cell.
    """
    tables([TableText(title, columns, list(rows), caption)])


def tables(shown: Sequence[TableText]) -> None:
    """Tables of one result on stdout: where one of them is too wide, with all that it may leave out left out,
    all are written as records."""
    console = out if out.is_terminal else Console(highlight=False, width=WIDE)
    given = [replace(one, rows=_plain_cells(one.rows)) for one in shown]
    found = arranged(given, console.width)
    if found is None:
        for number, one in enumerate(given):
            if number:
                out.print()
            _records(one.title, [column.lstrip(">") for column in one.columns], one.rows, one.caption)
        return
    for number, (one, fit) in enumerate(zip(found.tables, found.fits, strict=True), 1):
        if one.title:
            out.print(_text(one.title, "bold"), soft_wrap=True)
        console.print(_grid("", one.columns, one.rows, fit, ""))
        if one.caption and fit.tight:  # there is no edge, which else stands between
            console.print()
        lines(one.caption.splitlines())
        if fit.tight or (one.caption and number < len(found.tables)):
            console.print()
    if found.left_out:
        names = ", ".join(found.left_out)
        lines([f"Left out, for want of room: {names}. {found.room} columns show them, and so does --json."])


def grid(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "") -> Table:
    """The same table, to be shown by the caller, who cannot show records: too narrow a terminal cuts it."""
    cells = _plain_cells(rows)
    fit = fitted(columns, cells, out.width) or Fit([None] * len(columns), tight=True)
    return _grid(title, columns, cells, fit, caption)


def _plain_cells(rows: Iterable[Sequence[str]]) -> list[list[str]]:
    return [[plain(" ".join(cell.splitlines())) for cell in row] for row in rows]


def _grid(
    title: str,
    columns: Sequence[str],
    cells: Sequence[Sequence[str]],
    fit: Fit,
    caption: str,
) -> Table:
    if caption and fit.tight:  # there is no edge, which else stands between
        caption = f"\n{caption}"
    made = Table(title=_text(title, "bold"), caption=_text(caption) if caption else None, box=SIMPLE_HEAD,
                 title_justify="left", caption_justify="left", pad_edge=False,
                 collapse_padding=fit.tight, show_edge=not fit.tight)  # fmt: skip
    for column, width in zip(columns, fit.widths, strict=True):
        made.add_column(
            column.lstrip(">"), justify="right" if column.startswith(">") else "left", width=width
        )
    for row in cells:
        made.add_row(*map(Text, row))
    return made


def _records(title: str, names: Sequence[str], cells: Sequence[Sequence[str]], caption: str) -> None:
    out.print(_text(title, "bold"), soft_wrap=True)
    width = max(map(cell_len, names))
    for row in cells:
        out.print()
        for name, cell in zip(names, row, strict=True):
            if name or cell:
                text = f"\n{' ' * (width + 4)}".join(_wrapped(cell, width + 4, out))
                out.print(Text(f"  {name.ljust(width)}  ", "dim"), Text(text), sep="", soft_wrap=True)
    if caption:
        out.print()
        lines(caption.splitlines())


def listing(title: str, entries: Sequence[tuple[str, str, str, str]]) -> None:
    """A list on stdout: (mark, subject, text, what to do) each.

    Both break at blanks, below themselves; a command in what to do stays whole, to be copied as it is.
    """
    out.print(_text(title, "bold"), soft_wrap=True)
    indent = 4 + max((cell_len(plain(subject)) for _, subject, _, _ in entries), default=0)
    for mark, subject, text, remedy in entries:
        lines = _wrapped(" ".join(text.split()), indent, out)
        head = Text.assemble(f"{mark} ", (plain(subject).ljust(indent - 2), "bold"))
        out.print(head, f"\n{' ' * indent}".join(lines), sep="", markup=False, soft_wrap=True)
        if remedy:
            lines = _wrapped(" ".join(remedy.split()), indent + 2, out)
            shown = f"\n{' ' * (indent + 2)}".join(lines)
            out.print(Text(f"{' ' * indent}→ {shown}"), soft_wrap=True)


def _wrapped(text: str, indent: int, console: Console) -> list[str]:
    """Lines of a plain text for a terminal, broken at blanks, not within commands; one line elsewhere."""
    return broken(plain(text), max(console.width - indent, 20)) if console.is_terminal else [plain(text)]


def _indented(text: str, console: Console | None = None) -> Text:
    """Lines, each broken below its own beginning where it is too long for the terminal."""
    shown = []
    for line in text.split("\n"):
        begin = len(line) - len(line.lstrip(" "))
        parts = _wrapped(line[begin:], begin + 2, console or err)
        shown.append(" " * begin + f"\n{' ' * (begin + 2)}".join(parts))
    return Text("\n".join(shown))


# ------------------------------------------------------------------ progress

_REDRAW_S = 0.1


class Bar:
    """One step's bar: called with (done, total) and, where it waits, for what.

    Without a terminal the beginning of each wait is a line.
    """

    def __init__(self, label: str, progress: Progress | None, total: int | None = None) -> None:
        self._label, self._progress = plain(label), progress
        self._waits = {"job": "", "device": ""}
        self._failed = False
        if progress is None:
            note(f"… {label}")
        else:
            self._task: TaskID = progress.add_task(self._label, total=total, waits="")

    def __call__(self, done: int, total: int, waits: str = "") -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=done, total=total)
        self._wait("job", waits)

    def reach(self, waits: str) -> None:
        """What reaching the device waits for; empty: it is there."""
        self._wait("device", waits)

    def fail(self, word: str = "failed") -> None:
        """It did not get to its end: it is shown so, and stays where it is. One that is full, for all was
        sent, is emptied: what it was for is not done."""
        self._failed = True
        if self._progress is not None:
            self._progress.update(self._task, description=f"{self._label} {word}", failed=True)

    def close(self) -> None:
        """The step has ended: what had no total is whole, unless it failed."""
        self._waits = dict.fromkeys(self._waits, "")
        if self._progress is None:
            return
        state = next(task for task in self._progress.tasks if task.id == self._task)
        if state.total is None:
            self._progress.update(self._task, total=1, completed=0 if self._failed else 1)
        self._progress.update(self._task, waits="")
        self._progress.stop_task(self._task)

    def _wait(self, source: str, waits: str) -> None:
        before = " ".join(filter(None, self._waits.values()))
        self._waits[source] = waits
        now = "; ".join(filter(None, self._waits.values()))
        if self._progress is not None:
            self._progress.update(self._task, waits=f"{self._label} waits: {plain(now)}" if now else "")
        elif now and not before:
            note(f"… {self._label} waits: {now}")


class _BarColumn(BarColumn):
    """Bars, red as far as a step that failed came, and empty where such a one would be full."""

    def render(self, task: Task) -> ProgressBar:
        bar = super().render(task)
        if task.fields.get("failed"):
            bar.complete_style = bar.finished_style = "red"
            bar.pulse = False
            if not bar.total or bar.completed >= bar.total:
                bar.total, bar.completed = 1, 0
        return bar


class _CountColumn(MofNCompleteColumn):
    """How far a step is; nothing where it failed at its end."""

    def render(self, task: Task) -> Text:
        over = task.fields.get("failed") and (not task.total or task.completed >= task.total)
        return Text("") if over else super().render(task)


class _Bars(Progress):
    """Bars, and below them a line for each that waits: what for. Drawn by whoever holds ``_SCREEN``."""

    def start(self) -> None:
        with _SCREEN:
            super().start()

    def stop(self) -> None:
        with _SCREEN:
            super().stop()

    def refresh(self) -> None:
        with _SCREEN:
            super().refresh()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        yield from (
            Text(f"  {task.fields['waits']}", "yellow") for task in self.tasks if task.fields["waits"]
        )
        yield from (
            Text(f"  {task.fields['detail']}", "dim") for task in self.tasks if task.fields.get("detail")
        )


class Steps:
    """Progress bars of one command; silent when stderr is no terminal, except for a line a step."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._named: dict[str, TaskID] = {}

    def show(self, key: str, label: str, done: int, total: int, detail: str = "") -> None:
        """Set the bar called ``key``, making it when it is new; ``detail`` stands in a line below the bars
        until it is empty."""
        if self._progress is None:
            if key not in self._named:
                self._named[key] = TaskID(0)
                note(f"… {label}")
            return
        if key not in self._named:
            self._named[key] = self._progress.add_task(plain(label), total=total, waits="")
        self._progress.update(
            self._named[key], description=plain(label), completed=done, total=total, detail=plain(detail)
        )

    def refresh(self) -> None:
        """Draw the bars as they are now."""
        if self._progress is not None:
            self._progress.refresh()

    @contextmanager
    def step(self, label: str, total: int | None = None) -> Iterator[Bar]:
        """One bar, to be told how far the block is. An error that leaves the block is seen at the bar."""
        bar = Bar(label, self._progress, total)
        try:
            yield bar
        except BaseException as error:
            bar.fail("failed" if isinstance(error, Exception) else "interrupted")
            raise
        finally:
            bar.close()


@contextmanager
def steps(*, quiet: bool = False) -> Iterator[Steps]:
    """Progress bars on a terminal, plain lines elsewhere."""
    if quiet or not err.is_terminal:
        yield Steps(None)
        return
    with (
        _Bars(
            TextColumn("{task.description}", markup=False),
            _BarColumn(bar_width=28),
            _CountColumn(),
            TimeElapsedColumn(),
            console=err,
            auto_refresh=False,
        ) as progress,
        _redrawn(progress),
    ):
        yield Steps(progress)


@contextmanager
def _redrawn(progress: Progress) -> Iterator[None]:
    """Within the block the bars are drawn anew every ``_REDRAW_S``."""
    ended = threading.Event()

    def redraw() -> None:
        while not ended.wait(_REDRAW_S):
            progress.refresh()

    thread = threading.Thread(target=redraw, name="bars", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


# ------------------------------------------------------------------ text


def plain(text: str) -> str:
    """The text with what a terminal would obey written out, as in Python's own ``repr``."""
    return _NOT_SHOWN.sub(lambda found: found[0].encode("unicode-escape").decode(), text)


def _text(text: str, style: str = "") -> Text:
    """A text of which rich takes nothing for markup."""
    return Text(plain(text), style)


# ------------------------------------------------------------------ logs


class _Stderr:
    """Stderr as it is at each write: while bars are shown, rich has lines go above them. Whole lines only."""

    def __init__(self) -> None:
        self._begun = ""

    def write(self, text: str) -> int:
        with _SCREEN:
            self._begun += text
            if self._begun.endswith("\n"):
                whole, self._begun = self._begun, ""
                sys.stderr.write(whole)
        return len(text)

    def flush(self) -> None:
        with _SCREEN:
            sys.stderr.flush()


class _PlainFormatter(logging.Formatter):
    """The line of a log record, plain."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


def _plain_values(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {name: plain(value) if isinstance(value, str) else value for name, value in event.items()}


def _short_line(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> str:
    """A warning as a line for people: of whom, what, and its values but for when and how grave."""
    of = next((f"{event.pop(name)}: " for name in ("device", "host") if name in event), "")
    what = event.pop("event", "")
    values = [
        str(value) if name == "cause" else f"{name} {value}"
        for name, value in event.items()
        if name not in ("timestamp", "level") and value is not None
    ]
    more = f" ({', '.join(values).rstrip('.')})" if values else ""
    return " ".join(f"! {of}{what}{more}".split())


def show_logs(level: int) -> None:
    """Logs of this process go to stderr, from ``level`` on; what a device said in them is plain, too.

    Warnings are short lines, unless more than warnings is asked for.
    """
    structlog.reset_defaults()
    *before, renderer = structlog.get_config()["processors"]
    structlog.configure(
        processors=[*before, _plain_values, _short_line if level >= logging.WARNING else renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _Stderr())),
    )
    handler = logging.StreamHandler(cast(TextIO, _Stderr()))
    handler.setFormatter(_PlainFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
