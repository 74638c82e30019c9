"""Results of a campaign that compares bundles of a task, or engines, taken apart to be judged each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from orchestrator.results.gather import Cell, Results


def variants(results: Results) -> Iterator[tuple[str, Results]]:
    """(what tells it from the others, its results), in the campaign's order; one without a name mostly.

    The first bundle of every task belongs to the first engine of every device, and so on: a farm where each
    device has an engine of its own is one variant.
    """
    bundles: dict[str, dict[str, int]] = {}
    engines: dict[str, dict[str, int]] = {}
    parts: dict[tuple[int, int], list[Cell]] = {}
    for cell in results.cells:
        asked = cell.asked
        known, own = bundles.setdefault(asked.task, {}), engines.setdefault(asked.device, {})
        place = known.setdefault(asked.bundle, len(known)), own.setdefault(asked.engine, len(own))
        parts.setdefault(place, []).append(cell)
    for _, cells in sorted(parts.items()):
        names = dict.fromkeys(cell.bundle for cell in cells) if _several(bundles) else {}
        names |= dict.fromkeys(cell.asked.engine for cell in cells) if _several(engines) else {}
        yield f"({', '.join(names)}) " if names else "", replace(results, cells=tuple(cells))


def _several(found: dict[str, dict[str, int]]) -> bool:
    return any(len(each) > 1 for each in found.values())
