"""What plans are expected to gain, by the additive model that the planner ``exact`` maximises."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sqlalchemy.orm import Session

from db.models import PlanRow
from db.plans import plan_by_digest
from sti_runtime.gain import GainModel
from sti_runtime.importance_profile import ImportanceProfile


def expected_gains(
    session: Session, plans: Iterable[PlanRow], profiles: Mapping[str, ImportanceProfile]
) -> dict[str, int]:
    """By plan: expected gain over the whole model at the base fidelity, nano-nats; of those that rest on one
    of the importance ``profiles``."""
    models = {digest: GainModel.of(profile) for digest, profile in profiles.items()}
    gains = {}
    for row in plans:
        model = models.get(row.importance_digest or "")
        if model is not None:
            gains[row.digest] = model.plan_nano(plan_by_digest(session, row.digest))
    return gains
