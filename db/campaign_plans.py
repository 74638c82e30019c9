"""What changed in each device's plans from one run of a campaign to another, and why."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from db.models import CampaignBatchRow, CampaignCellRow, PlanRow

_RESTS_ON = (
    ("bundle", "bundle_digest"),
    ("importance", "importance_digest"),
    ("profile", "device_profile_digest"),
    ("planner", "planner"),
)


@dataclass(frozen=True, order=True)
class PlanKey:
    """What is planned for, whatever the bundle's digest. ``preload_bytes``: |S|."""

    device: str
    task: str
    engine: str
    target: str
    preload_bytes: int
    policy: str


@dataclass(frozen=True)
class PlanChange:
    """Another plan for the same: ``before`` and ``after`` in words, ``why``: what of it is new."""

    key: PlanKey
    before: str
    after: str
    why: tuple[str, ...]

    def __str__(self) -> str:
        key = self.key
        asked = f"{key.device}, {key.task}, {key.policy} at T={key.target}, |S|={key.preload_bytes} B"
        return f"{asked}: {self.before} → {self.after} (new: {', '.join(self.why) or 'nothing known'})"


def plan_changes(session: Session, before: int, after: int) -> list[PlanChange]:
    """Plans whose content differs between two runs (row ids), of what both planned."""
    old, new = _plans(session, before), _plans(session, after)
    changes = []
    for key in sorted(old.keys() & new.keys()):
        was, now = old[key], new[key]
        if was.content_digest != now.content_digest:
            why = tuple(word for word, column in _RESTS_ON if getattr(was, column) != getattr(now, column))
            changes.append(PlanChange(key, _words(was), _words(now), why))
    return changes


def _plans(session: Session, run_id: int) -> dict[PlanKey, PlanRow]:
    """The newest plan of each question of a run."""
    batch, cell = CampaignBatchRow, CampaignCellRow
    query = (
        select(batch, cell, PlanRow)
        .join(batch, batch.id == cell.batch_id)
        .join(PlanRow, PlanRow.digest == cell.plan_digest)
        .where(cell.run_id == run_id)
        .order_by(batch.number, PlanRow.id)
    )
    return {
        PlanKey(
            row.device or "",
            row.task or "",
            row.engine or "",
            each.target or "",
            each.preload_bytes or 0,
            each.policy or "",
        ): plan
        for row, each, plan in session.execute(query)
    }


def _words(plan: PlanRow) -> str:
    bits = plan.mean_fidelity_milli / 1000
    return (
        f"{plan.depth}×{plan.width} at {bits:.1f} bits, {plan.preloaded_bytes} B preloaded,"
        f" {plan.predicted_latency_ns / 1e6:.3g} ms predicted"
    )
