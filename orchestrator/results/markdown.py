"""What pages are written with: tables and lists in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sti_runtime.units import NONE


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; what cells hold of its own signs is escaped."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def listed(texts: Iterable[str]) -> str:
    """Each text once, in their order."""
    return ", ".join(dict.fromkeys(texts)) or NONE
