"""One line of the headline: what is claimed, what was found, and the verdict."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.results.paired import Difference

Verdict = Literal["reached", "not reached", "not known", "nothing to compare"]
"""not known: cells are missing, or estimates. nothing to compare: none is, and there is no pair of plans that
meet T."""


@dataclass(frozen=True)
class Claim:
    """One line of the headline. ``found``: None where nothing is known. ``detail``: the figures it is made
    of, and what it leaves out; ``cause``: of what is not reached, why, as far as the run's figures tell."""

    what: str
    reach: str
    found: str | None
    verdict: Verdict
    detail: tuple[str, ...] = ()
    cause: tuple[str, ...] = ()

    def because(self, lines: Iterable[str]) -> Claim:
        """With its cause, where it is not reached; ``lines`` are made only then."""
        return replace(self, cause=tuple(lines)) if self.verdict == "not reached" else self


def verdict(holds: bool | None, *, missing: bool) -> Verdict:
    """A claim over cells that are not all there is not decided; None: nothing was compared."""
    if missing:
        return "not known"
    if holds is None:
        return "nothing to compare"
    return "reached" if holds else "not reached"


def told_mean(mean: Difference | None, tasks: int) -> str | None:
    """A mean over tasks; how many where some are left out."""
    if mean is None:
        return None
    return f"{mean}" if mean.of == tasks else f"{mean} ({mean.of} of {tasks} tasks)"
