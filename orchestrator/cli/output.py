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
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import structlog
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from sti_runtime.errors import StifarmError

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

_NOT_SHOWN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""What a terminal obeys (C0 and C1 control characters), what reorders or breaks a line (Unicode's own), and
halves of characters, which have no UTF-8. Tabs and line breaks are text."""

WIDE = 220
"""Columns of a table when the output is no terminal: nothing is cut in logs and pipes."""


def note(text: str) -> None:
    """A line for people, on stderr."""
    err.print(_text(text), soft_wrap=True)


def success(text: str) -> None:
    """A line that says what was done, on stderr."""
    err.print(Text("✓ ", "green"), _text(text), sep="", soft_wrap=True)


def warn(text: str) -> None:
    """A line that wants attention, on stderr."""
    err.print(Text("! ", "yellow"), _text(text), sep="", soft_wrap=True)


def fail(error: StifarmError) -> None:
    """An error: what happened, then what to do."""
    err.print(Text("error ", "bold red"), _text(error.what), sep="", soft_wrap=True)
    if error.remedy:
        err.print(_text(f"      {error.remedy.strip()}"), soft_wrap=True)


def emit_json(value: Any) -> None:
    """One JSON document on stdout."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
    # Only the texts in it can hold these, where JSON takes the escape for the same character.
    sys.stdout.write(_NOT_SHOWN.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n")


def heading(text: str) -> None:
    """A line above several tables, on stdout."""
    out.print(_text(text, "bold"), "", sep="\n", soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "") -> None:
    """A table on stdout; a column whose name starts with ">" is right-aligned."""
    console = out if out.is_terminal else Console(highlight=False, width=WIDE)
    console.print(grid(title, columns, rows, caption=caption))


def grid(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "") -> Table:
    """The same table, to be shown by the caller."""
    made = Table(title=_text(title, "bold"), caption=_text(caption) if caption else None, box=SIMPLE_HEAD,
                 title_justify="left", caption_justify="left", pad_edge=False)  # fmt: skip
    for column in columns:
        made.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left")
    for row in rows:
        made.add_row(*(_text(" ".join(cell.splitlines())) for cell in row))
    return made


Advance = Callable[[int, int], None]
"""Called with (done, total)."""


class Steps:
    """Progress bars of one command; silent when stderr is no terminal, except for a line a step."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._named: dict[str, TaskID] = {}

    def show(self, key: str, label: str, done: int, total: int) -> None:
        """Set the bar called ``key``, making it when it is new."""
        if self._progress is None:
            if key not in self._named:
                self._named[key] = TaskID(0)
                note(f"… {label}")
            return
        if key not in self._named:
            self._named[key] = self._progress.add_task(plain(label), total=total)
        self._progress.update(self._named[key], description=plain(label), completed=done, total=total)

    @contextmanager
    def step(self, label: str, total: int | None = None) -> Iterator[Advance]:
        """One bar. The yielded function sets done and total."""
        if self._progress is None:
            note(f"… {label}")
            yield lambda _done, _total: None
            return
        bar = self._progress
        task: TaskID = bar.add_task(plain(label), total=total)

        def advance(done: int, whole: int) -> None:
            bar.update(task, completed=done, total=whole)

        try:
            yield advance
        finally:
            state = next(t for t in bar.tasks if t.id == task)
            if state.total is None:
                bar.update(task, total=1, completed=1)


@contextmanager
def steps(*, quiet: bool = False) -> Iterator[Steps]:
    """Progress bars on a terminal, plain lines elsewhere."""
    if quiet or not err.is_terminal:
        yield Steps(None)
        return
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=err,
    ) as progress:
        yield Steps(progress)


def plain(text: str) -> str:
    """The text with what a terminal would obey written out, as in Python's own ``repr``."""
    return _NOT_SHOWN.sub(lambda found: found[0].encode("unicode-escape").decode(), text)


def _text(text: str, style: str = "") -> Text:
    """A text of which rich takes nothing for markup."""
    return Text(plain(text), style)


# ------------------------------------------------------------------ logs


class _PlainFormatter(logging.Formatter):
    """The line of a log record, plain."""

    def format(self, record: logging.LogRecord) -> str:
        return plain(super().format(record))


def _plain_values(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {name: plain(value) if isinstance(value, str) else value for name, value in event.items()}


def show_logs(level: int) -> None:
    """Logs of this process go to stderr, from ``level`` on; what a device said in them is plain, too."""

    *before, renderer = structlog.get_config()["processors"]
    if _plain_values not in before:
        before.append(_plain_values)
    structlog.configure(
        processors=[*before, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_PlainFormatter("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
