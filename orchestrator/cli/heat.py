"""A heat map in the terminal: numbers on colours that colour-blind readers can tell apart.

Without colours (a pipe, NO_COLOR) the numbers stay. Wider than the terminal: in blocks of columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.text import Text

NARROW = 80
"""Columns that a heat map is made for, however wide the terminal."""

_CELL = 5
_STEPS = 4
_POSITIVE = ("#deebf7", "#9ecae1", "#4292c6", "#08519c")
_NEGATIVE = ("#fee6ce", "#fdae6b", "#e6750d", "#8c2d04")
_DARK = 2
"""From this step on the text is white."""


def heat_map(
    row_names: Sequence[str],
    column_names: Sequence[str],
    values: Sequence[Sequence[float]],
    *,
    write: Callable[[float], str],
) -> list[Text]:
    """Lines of a map of ``values`` [rows][columns], each written by ``write`` in at most four characters.

    Blue: above 0, orange: below, white near 0; deeper is further, up to the 90th percentile of all.
    """
    scale = _scale([value for row in values for value in row])
    margin = max(map(len, row_names), default=0)
    per_block = max(1, (NARROW - margin) // _CELL)
    shown: list[Text] = []
    for first in range(0, len(column_names), per_block):
        part = slice(first, first + per_block)
        if shown:
            shown.append(Text())
        shown.append(Text(" " * margin + "".join(f"{name:>{_CELL}}" for name in column_names[part])))
        for name, row in zip(row_names, values, strict=True):
            line = Text(name.ljust(margin))
            for value in row[part]:
                line.append(f"{write(value):>{_CELL}}", _style(value, scale))
            shown.append(line)
    return shown


def _scale(values: Sequence[float]) -> float:
    """The magnitude from which a colour is deepest; 0 when all values are 0."""
    magnitudes = sorted(abs(value) for value in values)
    return (magnitudes[len(magnitudes) * 9 // 10] or magnitudes[-1]) if magnitudes else 0.0


def _style(value: float, scale: float) -> str:
    step = min(_STEPS, int(abs(value) / scale * (_STEPS + 1))) if scale else 0
    if step == 0:
        return "black on #ffffff"
    background = (_POSITIVE if value > 0 else _NEGATIVE)[step - 1]
    return f"{'white' if step > _DARK else 'black'} on {background}"


def milli(value: float) -> str:
    """A signed number in at most four characters: +0.3, -12, +216, +12k."""
    return f"{value:+.1f}" if round(abs(value), 1) < 10 else whole(value)


def whole(value: float) -> str:
    """A signed whole number in at most four characters: +3, -12, +216, +12k."""
    if round(abs(value)) < 1000:
        return f"{value:+.0f}"
    return f"{max(-99.0, min(99.0, value / 1000)):+.0f}k"
