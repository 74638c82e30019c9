"""The additive gain model: what a choice of submodel and fidelities is expected to save of the loss.

The importance profile measures each shard raised alone from the base fidelity to 32 bits. In between, the
loss is taken to fall as the squared error of the weights does (its second-order term), and the gains of
shards to add up. A shard that the submodel leaves out has all of its weights' energy as error.

How good this is: docs/planner.md, measured by ``bench/gain_model.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sti_runtime.importance_profile import ImportanceProfile
from sti_runtime.model import Submodel
from sti_runtime.plan import Plan

ERROR_PPM: dict[int, int] = {0: 1_000_000, 2: 128_500, 3: 36_800, 4: 9_730, 5: 2_540, 6: 762, 32: 0}
"""Squared error over energy of Gaussian weights as GOBO stores them at k bits; 0: not there at all."""

LEAST_SHARE = 100
"""No shard's gain is less than the mean of the positive ones divided by this: no version of more bits is
expected to hurt, whatever one noisy score says."""


@dataclass(frozen=True)
class GainModel:
    """Units: nano-nats of mean loss. ``full_nano[l·M + s]``: gain of a shard from the base to 32 bits."""

    base_fidelity: int
    slices: int
    full_nano: tuple[int, ...]

    @classmethod
    def of(cls, importance: ImportanceProfile) -> GainModel:
        """The model that an importance profile gives."""
        measured = [importance.gain_nano((s.layer, s.slice)) for s in importance.scores]
        positive = [gain for gain in measured if gain > 0]
        least = max(1, sum(positive) // (LEAST_SHARE * len(positive))) if positive else 1
        return cls(importance.base_fidelity, importance.slices, tuple(max(least, g) for g in measured))

    def shard_nano(self, row: int, fidelity: int) -> int:
        """Gain of shard ``row`` = l·M + s at ``fidelity``, 0 at the base, less below it."""
        base = ERROR_PPM[self.base_fidelity]
        return self.full_nano[row] * (base - ERROR_PPM[fidelity]) // base

    def absent_nano(self, submodel: Submodel) -> int:
        """What the shards that the submodel leaves out lose, at most 0."""
        held = {layer * self.slices + s for layer in submodel.kept for s in range(submodel.width)}
        return sum(self.shard_nano(row, 0) for row in range(len(self.full_nano)) if row not in held)

    def choice_nano(self, rows: Sequence[int], fidelities: Sequence[int]) -> int:
        """Gain of shards ``rows`` at ``fidelities``."""
        return sum(self.shard_nano(row, k) for row, k in zip(rows, fidelities, strict=True))

    def plan_nano(self, plan: Plan) -> int:
        """Expected gain of a plan over the whole model at the base fidelity."""
        return self.absent_nano(plan.submodel) + sum(
            self.shard_nano(s.source_layer * self.slices + s.slice, s.fidelity) for s in plan.shards
        )
