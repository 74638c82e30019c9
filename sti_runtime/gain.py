"""The additive gain model: what a choice of submodel and fidelities is expected to save of the loss.

The importance profile measures each shard raised alone from the base fidelity to 32 bits. The gains of shards
add up; each fidelity brings the same share of every shard's. Where the profile holds the losses of
submodels with all shards at one fidelity (its ``levels``), these are reproduced: each fidelity's share is
measured, a submodel's gains are scaled to what it gains altogether, and it starts from its own loss at the
base. Without them the loss is taken to fall as the squared error of the weights does (its second-order term),
and a shard that the submodel leaves out has all of its weights' energy as error.

How good this is: docs/planner.md, measured by ``bench/gain_model.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

from sti_runtime.importance_profile import ImportanceProfile
from sti_runtime.model import Submodel
from sti_runtime.plan import Plan
from sti_runtime.profile import PPM

ERROR_PPM: dict[int, int] = {0: 1_000_000, 2: 128_500, 3: 36_800, 4: 9_730, 5: 2_540, 6: 762, 32: 0}
"""Squared error over energy of Gaussian weights as GOBO stores them at k bits; 0: not there at all."""

LEAST_SHARE = 100
"""No shard's gain is less than the mean of the positive ones divided by this: no version of more bits is
expected to hurt, whatever one noisy score says."""


def assumed_shares(base_fidelity: int) -> dict[int, int]:
    """Which share of a shard's gain, in ppm, each fidelity brings by the squared error of weights."""
    base = ERROR_PPM[base_fidelity]
    return {k: (base - error) * PPM // base for k, error in ERROR_PPM.items()}


def measured_shares(importance: ImportanceProfile) -> dict[int, int] | None:
    """The same by the whole model's losses, made to rise with the bits; None without them.

    What is left to 32 bits is mostly noise, so that no fidelity lacks less than its squared error.
    """
    losses = whole_losses(importance)
    base, full = importance.base.loss_nano, losses.get(32)
    if full is None or len(losses) < 3 or base <= full:
        return None
    fidelities = sorted(losses)
    shares = [
        0
        if k == importance.base_fidelity
        else min(PPM - ERROR_PPM[k], (base - losses[k]) * PPM // (base - full))
        for k in fidelities
    ]
    rising = zip(fidelities, accumulate(shares, max), strict=True)
    return assumed_shares(importance.base_fidelity) | dict(rising)


def whole_losses(importance: ImportanceProfile) -> dict[int, int]:
    """Loss of the whole model by fidelity of all its shards, the base's too."""
    shards = importance.layers * importance.slices
    found: dict[int, int] = {importance.base_fidelity: importance.base.loss_nano}
    return found | {
        level.fidelity: level.score.loss_nano
        for level in importance.levels
        if level.submodel.shards == shards
    }


@dataclass(frozen=True)
class GainModel:
    """Units: nano-nats of mean loss. ``full_nano[l·M + s]``: gain of a shard from the base to 32 bits.

    ``shares_ppm``: by fidelity, in ascending order. ``spans``: of measured submodels (submodel, what it loses
    at the base beside the whole model there, what it gains from there to 32 bits).
    """

    base_fidelity: int
    slices: int
    full_nano: tuple[int, ...]
    shares_ppm: tuple[tuple[int, int], ...]
    spans: tuple[tuple[Submodel, int, int], ...] = ()

    @classmethod
    def of(cls, importance: ImportanceProfile) -> GainModel:
        """The model that an importance profile gives."""
        measured = [importance.gain_nano((s.layer, s.slice)) for s in importance.scores]
        positive = [gain for gain in measured if gain > 0]
        least = max(1, sum(positive) // (LEAST_SHARE * len(positive))) if positive else 1
        shares = measured_shares(importance) or assumed_shares(importance.base_fidelity)
        return cls(
            importance.base_fidelity,
            importance.slices,
            tuple(max(least, g) for g in measured),
            tuple(sorted(shares.items())),
            _spans(importance),
        )

    def within(self, submodel: Submodel) -> GainModel:
        """The gains of shards in ``submodel``, fitted to what it gains altogether if that was measured and is
        above 0; else as they are, so that fidelities still have an order."""
        for known, _, gain in self.spans:
            if known == submodel and gain > 0:
                total = sum(self.full_nano[row] for row in self._held(submodel))
                return replace(self, full_nano=tuple(max(1, full * gain // total) for full in self.full_nano))
        return self

    def shard_nano(self, row: int, fidelity: int) -> int:
        """Gain of shard ``row`` = l·M + s at ``fidelity``, 0 at the base, less below it."""
        return self.full_nano[row] * self._shares[fidelity] // PPM

    def absent_nano(self, submodel: Submodel) -> int:
        """What the submodel gains at the base beside the whole model there: where that was not measured,
        what the shards that it leaves out lose, at most 0."""
        for known, loss, _ in self.spans:
            if known == submodel:
                return -loss
        held = set(self._held(submodel))
        return sum(self.shard_nano(row, 0) for row in range(len(self.full_nano)) if row not in held)

    def choice_nano(self, rows: Sequence[int], fidelities: Sequence[int]) -> int:
        """Gain of shards ``rows`` at ``fidelities``."""
        return sum(self.shard_nano(row, k) for row, k in zip(rows, fidelities, strict=True))

    def plan_nano(self, plan: Plan) -> int:
        """Expected gain of a plan over the whole model at the base fidelity."""
        rows = [s.source_layer * self.slices + s.slice for s in plan.shards]
        gains = self.within(plan.submodel)
        return self.absent_nano(plan.submodel) + gains.choice_nano(rows, [s.fidelity for s in plan.shards])

    @cached_property
    def _shares(self) -> Mapping[int, int]:
        return dict(self.shares_ppm)

    def _held(self, submodel: Submodel) -> list[int]:
        return [layer * self.slices + s for layer in submodel.kept for s in range(submodel.width)]


def _spans(importance: ImportanceProfile) -> tuple[tuple[Submodel, int, int], ...]:
    """Of the submodels measured at the base and at 32 bits."""
    whole = Submodel(kept=tuple(range(importance.layers)), width=importance.slices)
    losses = {(level.submodel, level.fidelity): level.score.loss_nano for level in importance.levels}
    losses[whole, importance.base_fidelity] = importance.base.loss_nano
    found = []
    for submodel in dict.fromkeys(level.submodel for level in importance.levels):
        base, full = losses.get((submodel, importance.base_fidelity)), losses.get((submodel, 32))
        if base is not None and full is not None:
            found.append((submodel, base - importance.base.loss_nano, base - full))
    return tuple(found)
