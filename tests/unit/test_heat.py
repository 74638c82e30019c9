from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from rich.cells import cell_len
from rich.color import Color
from rich.style import Style

from orchestrator.cli.heat import NARROW, heat_map, milli
from orchestrator.figures.importance import draw_importance
from sti_runtime.errors import ResourceError
from tests.unit.planning_data import make_importance


@pytest.mark.parametrize("columns", [1, 4, 12, 16, 32])
def test_a_map_fits_eighty_columns_and_shows_every_number(columns: int) -> None:
    values = [[(layer - 5) * 1.7 ** (index % 16) for index in range(columns)] for layer in range(12)]
    names = [f"s{index}" for index in range(columns)]
    lines = heat_map([f"layer {layer}" for layer in range(12)], names, values, write=milli)
    assert max(cell_len(line.plain) for line in lines) <= NARROW
    words = [word for line in lines for word in line.plain.split()]
    assert [word for word in words if word.startswith("s")] == names
    assert sorted(word for word in words if word[0] in "+-") == sorted(
        milli(v) for row in values for v in row
    )


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (0.0, "+0.0"),
        (-0.04, "-0.0"),
        (9.94, "+9.9"),
        (9.96, "+10"),
        (-36.2, "-36"),
        (999.7, "+1k"),
        (-1e9, "-99k"),
    ],
)
def test_a_number_takes_four_characters(value: float, word: str) -> None:
    assert milli(value) == word
    assert len(word) <= 4


def test_a_shard_of_worth_and_one_that_harms_have_other_colours() -> None:
    (_, line) = heat_map(["layer 0"], ["s0", "s1", "s2"], [[8.0, 0.01, -8.0]], write=milli)
    styles = [Style.parse(str(span.style)) for span in line.spans]
    worth, nothing, harm = (style.bgcolor for style in styles)
    assert nothing == Color.parse("#ffffff")
    assert len({worth, nothing, harm}) == 3
    for style in styles:
        assert style.color is not None
        assert style.bgcolor is not None
        assert contrast(style.color, style.bgcolor) > 4


def test_a_map_of_zeros_has_no_colours() -> None:
    (_, line) = heat_map(["layer 0"], ["s0"], [[0.0]], write=milli)
    assert line.plain.split() == ["layer", "0", "+0.0"]


def contrast(one: Color, other: Color) -> float:
    """The contrast ratio of two colours, 1 … 21 (WCAG 2.1)."""

    def luminance(colour: Color) -> float:
        parts = [part / 255 for part in colour.get_truecolor()]
        red, green, blue = (p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


# ------------------------------------------------------------------ the figure


@pytest.fixture
def picture(tmp_path: Path) -> np.ndarray:
    pytest.importorskip("matplotlib", reason="needs the extra figures")
    losses = [10**9 - (index - 8) * 10**6 for index in range(24)]
    file = tmp_path / "map.png"
    draw_importance(make_importance(6, 4, losses), "tiny on made-up", file)
    return pixels(file)


def test_a_figure_has_every_shade_from_harm_to_worth(picture: np.ndarray) -> None:
    colours, counts = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
    cells = [tuple(int(part) for part in c) for c, n in zip(colours, counts, strict=True) if n > 1500]
    assert len([c for c in cells if c[2] > c[0] + 40]) >= 8  # blue: worth
    assert len([c for c in cells if c[0] > c[2] + 40]) >= 3  # orange: harm


def test_a_figure_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra figures")
    with pytest.raises(ResourceError, match="cannot be written"):
        draw_importance(make_importance(2, 2), "tiny", tmp_path)  # a folder


def pixels(file: Path) -> np.ndarray:
    """Red, green and blue of a PNG [height, width, 3]."""
    from PIL import Image

    with Image.open(file) as image:
        assert image.format == "PNG"
        return np.array(image.convert("RGB"))
