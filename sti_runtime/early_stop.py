"""When a training phase ends before its last step, and which weights it keeps.

Held-out rows are scored now and then. The best weights so far are kept aside; after ``patience`` checks in a
row without a gain the phase ends. Whether it ends early or not, the best weights are its result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from sti_runtime.errors import FormatError

if TYPE_CHECKING:
    from torch import Tensor  # reports need this module, and not PyTorch

Measure = Literal["loss", "accuracy"]

CHECKS = 10
"""Checks in a whole phase, about."""

NANO = 1_000_000_000


@dataclass(frozen=True, slots=True)
class EarlyStop:
    """``patience``: checks without a gain that end the phase. ``least_gain_nano``: a check must be better by
    more than this to count; nano-nats of the mean loss, or 10⁻⁹ of the accuracy. Both are means over the
    submodels that the phase trains."""

    patience: int = 3
    measure: Measure = "loss"
    least_gain_nano: int = 0

    def is_due(self, done: int, total: int) -> bool:
        """Whether held-out rows are scored after step ``done`` of ``total``."""
        return done == total or done % max(1, -(-total // CHECKS)) == 0


@dataclass(frozen=True, slots=True)
class PhaseEnd:
    """How a phase ended: ``why`` "all-steps" or "no-gain". ``epoch_steps``: steps of one epoch.

    ``best_step``, ``best_nano``: the check whose weights are its result (loss, or accuracy); None: not
    checked, the last step's are. ``overflows``: steps that float16 could not take.
    """

    phase: str
    steps: int
    planned: int
    epoch_steps: int
    why: Literal["all-steps", "no-gain"]
    measure: Measure
    best_step: int | None
    best_nano: int | None
    overflows: int


class Best:
    """The best weights so far and the checks without a gain since."""

    def __init__(self, rule: EarlyStop) -> None:
        self.rule = rule
        self.step: int | None = None
        self.nano: int | None = None
        self.stale = 0
        self.tensors: dict[str, Tensor] = {}

    @property
    def patience_left(self) -> int:
        """Checks without a gain that are still borne."""
        return max(0, self.rule.patience - self.stale)

    def check(self, nano: int, step: int, parameters: Mapping[str, Tensor]) -> None:
        """Take the score after ``step``; better weights are copied."""
        if self.nano is None or self._gain(nano, self.nano) > self.rule.least_gain_nano:
            self.step, self.nano, self.stale = step, nano, 0
            self.tensors = {name: tensor.detach().clone() for name, tensor in parameters.items()}
        else:
            self.stale += 1

    def put_back(self, parameters: Mapping[str, Tensor]) -> None:
        """Overwrite the parameters with the best ones."""
        for name, tensor in self.tensors.items():
            parameters[name].detach().copy_(tensor)

    def state(self) -> str:
        """All but the weights, for the state file."""
        return json.dumps({"step": self.step, "nano": self.nano, "stale": self.stale}, sort_keys=True)

    def restore(self, state: str, tensors: Mapping[str, Tensor]) -> None:
        """Go on from ``state()``. Raises: FormatError."""
        try:
            found = json.loads(state)
            self.step, self.nano, self.stale = found["step"], found["nano"], int(found["stale"])
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError(f"The state of early stopping is damaged: {error}.") from error
        self.tensors = dict(tensors)

    def _gain(self, new: int, old: int) -> int:
        return new - old if self.rule.measure == "accuracy" else old - new


def provenance_of(end: PhaseEnd) -> dict[str, str | int]:
    """The phase's part of a model's provenance, flat: ``widths_steps``, ``widths_ended``, …"""
    name = end.phase.replace("-", "_")
    facts = {
        key: value
        for key, value in asdict(end).items()
        if key not in ("phase", "why", "measure") and value is not None
    }
    if end.best_step is not None:
        facts["measure"] = end.measure
    return {f"{name}_ended": end.why} | {f"{name}_{key}": value for key, value in facts.items()}
