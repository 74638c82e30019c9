"""What plans are expected to gain, by the additive model that the planner ``exact`` maximises."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from db.models import PlanRow
from db.plans import parsed_plan
from sti_runtime.gain import GainModel
from sti_runtime.importance_profile import ImportanceProfile


def expected_gains(plans: Iterable[PlanRow], profiles: Mapping[str, ImportanceProfile]) -> dict[str, int]:
    """By plan: expected gain over the whole model at the base fidelity, nano-nats; of those that rest on one
    of the importance ``profiles``."""
    models = {digest: GainModel.of(profile) for digest, profile in profiles.items()}
    gains = {}
    for row in plans:
        model = models.get(row.importance_digest or "")
        if model is not None:
            gains[row.digest] = model.plan_nano(parsed_plan(row.plan_json, row.digest))
    return gains
