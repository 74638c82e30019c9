"""The importance heat map: what each shard's fidelity is worth to a task."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from orchestrator.figures.style import new_figure, save
from sti_runtime.importance_profile import ImportanceProfile

_PERCENTILE = 95
"""Of all magnitudes: from here on colours are deepest, or one shard would leave the others pale."""

_COLOURS = ("#8c2d04", "#fdae6b", "#ffffff", "#6baed6", "#08306b")

_EXTENDS = {(True, True): "both", (True, False): "max", (False, True): "min", (False, False): "neither"}

_MOST_NUMBERS = 400
"""Shards up to which every cell has its number."""


def draw_importance(profile: ImportanceProfile, subject: str, path: Path) -> None:
    """Draw what each shard is worth to ``path``, layers upwards as they compute, slices across.

    Blue is worth, orange is harm; the two differ in lightness and hue for every colour vision.
    Raises: InputError without Matplotlib; ResourceError when the file cannot be written.
    """
    figure = new_figure(2.6 + 0.52 * profile.slices, 1.9 + 0.46 * profile.layers)
    from matplotlib.colors import LinearSegmentedColormap

    by_rows = profile.method == "exhaustive-accuracy"
    worth = np.array(profile.worth(), float).reshape(profile.layers, profile.slices)
    worth = worth if by_rows else worth / 1e6
    limit = float(np.percentile(np.abs(worth), _PERCENTILE)) or float(np.abs(worth).max()) or 1.0
    colours = LinearSegmentedColormap.from_list("worth", _COLOURS)

    axes = figure.add_subplot()
    image = axes.imshow(worth, cmap=colours, vmin=-limit, vmax=limit, origin="lower", aspect="auto")
    axes.set_xticks(range(profile.slices))
    axes.set_yticks(range(profile.layers))
    axes.set_xlabel("slice")
    axes.set_ylabel("layer")
    axes.set_title(f"Importance of shards: {subject}\n{_method(profile)}", fontsize=10)
    above, below = bool((worth > limit).any()), bool((worth < -limit).any())
    bar = figure.colorbar(image, ax=axes, extend=_EXTENDS[above, below])
    bar.set_label("correct rows gained" if by_rows else "loss saved, milli-nats")
    if worth.size <= _MOST_NUMBERS:
        for (layer, index), value in np.ndenumerate(worth):
            axes.text(
                index,
                layer,
                f"{value:+.0f}" if by_rows or abs(value) >= 9.95 else f"{value:+.1f}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if abs(value) > 0.6 * limit else "black",
            )
    save(figure, path)


def _method(profile: ImportanceProfile) -> str:
    how = {
        "exhaustive": "each raised to 32 bits alone",
        "exhaustive-accuracy": "each raised to 32 bits alone, by accuracy",
        "gradient": "estimated from slopes",
    }[profile.method]
    return f"{how}, others at {profile.base_fidelity} bits, {profile.rows} rows"
