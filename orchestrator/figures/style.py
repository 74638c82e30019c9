"""How every figure looks: colours that all eyes can tell apart, and a marker and a line of its own for each.

Source of the colours: Okabe and Ito, Color Universal Design (2008).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sti_runtime.errors import InputError, ResourceError

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#7F7F7F"

_COLOURS = (VERMILION, BLUE, GREEN, BLACK, PURPLE, ORANGE, SKY, GREY)
_MARKERS = ("o", "s", "^", "D", "v", "P", "<", "h", "*", ">", "X", "p", "d", "8")
_LINES = ("-", "--", "-.", ":")
_NUMBER = re.compile(r"-[0-9]+$")

DPI = 130


@dataclass(frozen=True)
class Look:
    """Colour, marker and line of one policy."""

    colour: str
    marker: str
    line: Any


def looks(names: Sequence[str]) -> dict[str, Look]:
    """A look for each name, the same for the same names in whatever figure; the first stands out.

    Names that differ in a number at their end (``preload-6``, ``preload-32``) share a colour.
    """
    families = list(dict.fromkeys(map(_family, names)))
    return {
        name: Look(
            _COLOURS[(families.index(_family(name)) + i // len(_MARKERS)) % len(_COLOURS)],
            _MARKERS[i % len(_MARKERS)],
            "-" if i == 0 else _LINES[1 + (i - 1) % (len(_LINES) - 1)],
        )
        for i, name in enumerate(names)
    }


def _family(name: str) -> str:
    return _NUMBER.sub("", name)


def new_figure(width: float, height: float) -> Any:
    """An empty figure, inches. Raises: InputError without Matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "Figures need Matplotlib, which is not installed.", "Install it: pip install 'stifarm[figures]'."
        ) from error
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Write a PNG; the same figure, the same bytes. Raises: ResourceError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="png", metadata={"Software": None})
    except OSError as error:
        raise ResourceError(f"{path} cannot be written: {error.strerror}.", "Choose another file.") from error


def plain_axes(axes: Any) -> None:
    """No box, a light grid behind."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)
