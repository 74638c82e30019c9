"""The importance heat map: what each shard's fidelity is worth to a task."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from orchestrator.figures.style import new_figure, save
from sti_runtime.importance_profile import ImportanceProfile

_PERCENTILE = 95
"""Of all magnitudes: from here on colours are deepest, or one shard would leave the others pale."""


def draw_importance(profile: ImportanceProfile, subject: str, path: Path) -> None:
    """Draw the loss that each shard at 32 bits saves, layers upwards as they compute, slices across.

    Blue saves, orange harms; lightness tells them apart too. Raises: InputError, ResourceError.
    """
    figure = new_figure(2.6 + 0.5 * profile.slices, 1.9 + 0.45 * profile.layers)
    from matplotlib.colors import LinearSegmentedColormap

    gains = [profile.gain_nano((s.layer, s.slice)) / 1e6 for s in profile.scores]
    worth = np.array(gains).reshape(profile.layers, profile.slices)
    limit = float(np.percentile(np.abs(worth), _PERCENTILE)) or float(np.abs(worth).max()) or 1.0
    colours = LinearSegmentedColormap.from_list(
        "worth", ("#8c2d04", "#fdae6b", "#ffffff", "#6baed6", "#08306b")
    )
    axes = figure.add_subplot()
    image = axes.imshow(worth, cmap=colours, vmin=-limit, vmax=limit, origin="lower", aspect="auto")
    axes.set_xticks(range(profile.slices))
    axes.set_yticks(range(profile.layers))
    axes.set_xlabel("slice", fontsize=8)
    axes.set_ylabel("layer", fontsize=8)
    axes.set_title(f"Importance of shards: {subject}", fontsize=9)
    clipped = bool((np.abs(worth) > limit).any())
    bar = figure.colorbar(image, ax=axes, extend="both" if clipped else "neither")
    bar.set_label("loss saved, milli-nats", fontsize=8)
    for (layer, index), value in np.ndenumerate(worth):
        axes.text(
            index, layer, f"{value:+.1f}" if abs(value) < 9.95 else f"{value:+.0f}", ha="center", va="center",
            fontsize=6.5, color="white" if abs(value) > 0.6 * limit else "black",
        )  # fmt: skip
    save(figure, path)
