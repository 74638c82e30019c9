"""How tables fit a terminal: how wide their columns are, what is said below them, what is left out. Pure.

Nothing is ever cut. A table is shown whole where it fits, else with cells broken at blanks. One that says
what it may leave out first has the columns of one and the same cell in a line below it; where it still does
not fit, columns are left out, those that are least wanted first, and with them those of this name in the
tables beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from rich.cells import cell_len

from sti_runtime.units import NONE

MODERATE = 120
"""A table that would be wider than this moves its columns together."""


@dataclass(frozen=True)
class TableText:
    """A table that may be shown with others. A column whose name starts with ">" is right-aligned.

    ``less``: names of columns that may be left out on a narrow terminal, the least wanted first.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    less: Sequence[str] = ()

    @property
    def names(self) -> list[str]:
        """Those of its columns."""
        return [column.lstrip(">") for column in self.columns]

    def without(self, *names: str) -> TableText:
        """The same without these columns."""
        kept = [number for number, name in enumerate(self.names) if name not in names]
        return replace(
            self,
            columns=[self.columns[number] for number in kept],
            rows=[[row[number] for number in kept] for row in self.rows],
        )


@dataclass(frozen=True)
class Fit:
    """Widths of a table's columns. ``tight``: with two blanks between them, not three, and no edge."""

    widths: Sequence[int | None]
    tight: bool


@dataclass(frozen=True)
class Arranged:
    """Tables as they are to be shown, and how each fits. ``left_out``: names of columns; ``room``: columns of
    a terminal that shows these, too."""

    tables: Sequence[TableText]
    fits: Sequence[Fit]
    left_out: Sequence[str]
    room: int


def arranged(shown: Sequence[TableText], room: int) -> Arranged | None:
    """How tables of one result fit a terminal of ``room`` columns; None where they do not."""
    tables = whole = _without_constants(shown, room)
    left_out: list[str] = []
    while True:
        fits = [fitted(one.columns, one.rows, room) for one in tables]
        fitting = [fit for fit in fits if fit is not None]
        if len(fitting) == len(tables):
            return Arranged(tables, fitting, left_out, max(map(_least_room, whole), default=0))
        wide = tables[fits.index(None)]
        name = next((name for name in wide.less if name in wide.names), None)
        if name is None:
            return None
        left_out.append(name)
        tables = [one.without(name) for one in tables]


def _without_constants(shown: Sequence[TableText], room: int) -> list[TableText]:
    """Tables without as many of their columns of one and the same cell as it takes for no cell to break: the
    caption has these. A table's first column stays, and one that tells something in a table beside it."""
    telling = {name for one in shown if one.less for name in one.names if name not in _same(one)}
    return [_with_constants_said(one, telling, room) if one.less else one for one in shown]


def _same(one: TableText) -> dict[str, str]:
    """The cells of columns that have the same in all of several rows."""
    if len(one.rows) < 2:
        return {}
    columns = zip(one.names, *one.rows, strict=True)
    return {name: cells[0] for name, *cells in list(columns)[1:] if len(set(cells)) == 1}


def _with_constants_said(one: TableText, telling: Collection[str], room: int) -> TableText:
    """Columns without a value go first, then what is least wanted, then the others from the right."""
    same = {name: cell for name, cell in _same(one).items() if name not in telling}
    empty = [name for name, cell in same.items() if cell == NONE]
    order = dict.fromkeys([*empty, *(name for name in one.less if name in same), *reversed(same)])
    moved: list[str] = []
    while len(moved) < len(order) and not _is_whole(one.without(*moved), room):
        moved = list(order)[: len(moved) + 1]
    known = ". ".join(f"{name}: {same[name]}" for name in one.names if name in moved and name not in empty)
    unknown = ", ".join(name for name in empty if name in moved)
    said = [f"The same in all rows: {known}."] if known else []
    said += [f"No row has a value of: {unknown}."] if unknown else []
    return replace(one.without(*moved), caption="\n".join(filter(None, [*said, one.caption])))


def _is_whole(one: TableText, room: int) -> bool:
    return sum(_whole(one.columns, one.rows)) + _gaps(one.columns) <= room


def fitted(columns: Sequence[str], cells: Sequence[Sequence[str]], room: int) -> Fit | None:
    """How a table fits; None where it does not."""
    whole = _whole(columns, cells)
    if sum(whole) + 3 * len(columns) <= min(room, MODERATE):
        return Fit(whole, tight=False)
    widths = _widths(columns, cells, room - _gaps(columns))
    return None if widths is None else Fit(widths, tight=True)


def _whole(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> list[int]:
    """Widths in which nothing breaks."""
    return [
        max(map(cell_len, [column.lstrip(">"), *(row[number] for row in cells)]))
        for number, column in enumerate(columns)
    ]


def _gaps(columns: Sequence[str]) -> int:
    return 2 * (len(columns) - 1)


def _least_room(one: TableText) -> int:
    return sum(_least(one.columns, one.rows)) + _gaps(one.columns)


def _least(columns: Sequence[str], cells: Sequence[Sequence[str]]) -> list[int]:
    """Widths below which a word breaks, or a right-aligned cell."""
    least = []
    for number, column in enumerate(columns):
        name, texts = column.lstrip(">"), [row[number] for row in cells]
        parts = texts if column.startswith(">") else [word for text in texts for word in text.split()]
        least.append(max(map(cell_len, [*name.split(), *parts]), default=0))
    return least


def _widths(columns: Sequence[str], cells: Sequence[Sequence[str]], room: int) -> list[int] | None:
    """Widths of a table's columns that break no word, nor a right-aligned cell; None where there are none.
    Their names break first."""
    least = _least(columns, cells)
    most = [
        max(map(cell_len, [*column.lstrip(">").split(), *(row[number] for row in cells)]))
        for number, column in enumerate(columns)
    ]
    if sum(least) > room:
        return None
    for limit in range(max(most), 0, -1):
        widths = [max(low, min(high, limit)) for low, high in zip(least, most, strict=True)]
        if sum(widths) <= room:
            return widths
    return least
