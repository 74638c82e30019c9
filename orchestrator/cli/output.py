"""What the CLI writes: tables and notes for people, one JSON document for machines, progress on stderr.

Results go to stdout. Notes, progress and errors go to stderr, so that ``--json`` and pipes stay clean.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from sti_runtime.errors import StifarmError

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

WIDE = 220
"""Columns of a table when the output is no terminal: nothing is cut in logs and pipes."""


def note(text: str) -> None:
    """A line for people, on stderr."""
    err.print(text, markup=False, soft_wrap=True)


def success(text: str) -> None:
    """A line that says what was done, on stderr."""
    err.print(f"[green]✓[/green] {_escape(text)}", soft_wrap=True)


def warn(text: str) -> None:
    """A line that wants attention, on stderr."""
    err.print(f"[yellow]![/yellow] {_escape(text)}", soft_wrap=True)


def fail(error: StifarmError) -> None:
    """An error: what happened, then what to do."""
    err.print(f"[bold red]error[/bold red] {_escape(error.what)}", soft_wrap=True)
    if error.remedy:
        err.print(f"      {_escape(error.remedy.strip())}", soft_wrap=True)


def emit_json(value: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def heading(text: str) -> None:
    """A line above several tables, on stdout."""
    out.print(f"[bold]{_escape(text)}[/bold]\n", soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, caption: str = "") -> None:
    """A table on stdout; a column whose name starts with ">" is right-aligned."""
    grid = Table(title=title, caption=caption or None, box=SIMPLE_HEAD, title_justify="left",
                 caption_justify="left", title_style="bold", pad_edge=False)  # fmt: skip
    for column in columns:
        grid.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left")
    for row in rows:
        grid.add_row(*row)
    console = out if out.is_terminal else Console(highlight=False, width=WIDE)
    console.print(grid)


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
            self._named[key] = self._progress.add_task(label, total=total)
        self._progress.update(self._named[key], description=label, completed=done, total=total)

    @contextmanager
    def step(self, label: str, total: int | None = None) -> Iterator[Advance]:
        """One bar. The yielded function sets done and total."""
        if self._progress is None:
            note(f"… {label}")
            yield lambda _done, _total: None
            return
        bar = self._progress
        task: TaskID = bar.add_task(label, total=total)

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
        TextColumn("{task.description}"),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=err,
    ) as progress:
        yield Steps(progress)


def _escape(text: str) -> str:
    return text.replace("[", r"\[")
