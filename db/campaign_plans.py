"""What a run of a campaign plans by, and what changed in each device's plans from one run to another."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from db.models import CampaignBatchRow, CampaignCellRow, PlanRow
from sti_runtime.units import format_bytes, format_ns, in_words

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
    """Another plan for the same, or none where there was one, or the reverse: ``before`` and ``after`` in
    words, ``why``: what of it is new, ``feasible``: whether there is a plan now."""

    key: PlanKey
    before: str
    after: str
    why: tuple[str, ...]
    feasible: bool = True

    def __str__(self) -> str:
        key = self.key
        size = format_bytes(key.preload_bytes)
        asked = f"{key.device}, {key.task}, {key.policy} at T = {key.target}, |S| = {size}"
        what = in_words(f"{self.before} → {self.after}")
        return f"{asked}: {what} (new: {', '.join(self.why) or 'nothing known'})"


def plan_changes(session: Session, before: int, after: int) -> list[PlanChange]:
    """What both runs (row ids) planned for and answered differently."""
    old, new = _answers(session, before), _answers(session, after)
    profiled = _profiled(session, after)
    changes = []
    for key in sorted(old.keys() & new.keys()):
        was, now = old[key], new[key]
        if was.plan is not None and now.plan is not None:
            if was.plan.content_digest == now.plan.content_digest:
                continue
            pair = was.plan, now.plan
            why = [word for word, column in _RESTS_ON if getattr(pair[0], column) != getattr(pair[1], column)]
        elif was.plan is now.plan:
            continue
        else:
            # What has no plan is not kept with what it rests on.
            new_profile = (key.device, now.bundle, key.engine) in profiled
            why = ["bundle"] * (was.bundle != now.bundle) + ["profile"] * new_profile
        changes.append(PlanChange(key, was.words, now.words, tuple(why), now.plan is not None))
    return changes


def ranking_of_run(session: Session, run_id: int, bundle_digest: str | None, task: str) -> str | None:
    """The digest of the importance profile that a run plans by; None where it has kept none."""
    batch, cell = CampaignBatchRow, CampaignCellRow
    query = (
        select(cell.plan_digest)
        .join(batch, batch.id == cell.batch_id)
        .where(batch.run_id == run_id, batch.kind == "importance", cell.state == "done")
        .where(batch.bundle_digest == bundle_digest, batch.task == task)
    )
    return session.scalars(query).first()


@dataclass(frozen=True)
class _Answer:
    """What a run's cell came to: a plan, or the cause of there being none. ``bundle``: its digest."""

    plan: PlanRow | None
    bundle: str | None
    cause: str | None

    @property
    def words(self) -> str:
        """For people."""
        if self.plan is None:
            return self.cause or "no plan"
        plan, bits = self.plan, self.plan.mean_fidelity_milli / 1000
        return (
            f"{plan.depth}×{plan.width} at {bits:.1f} bits, {format_bytes(plan.preloaded_bytes)} preloaded,"
            f" {format_ns(plan.predicted_latency_ns)} predicted"
        )


def _answers(session: Session, run_id: int) -> dict[PlanKey, _Answer]:
    """The newest answer to each question of a run, of those that have one."""
    batch, cell = CampaignBatchRow, CampaignCellRow
    query = (
        select(batch, cell, PlanRow)
        .join(batch, batch.id == cell.batch_id)
        .outerjoin(PlanRow, PlanRow.digest == cell.plan_digest)
        .where(cell.run_id == run_id, or_(PlanRow.id.is_not(None), cell.state == "infeasible"))
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
        ): _Answer(plan, row.bundle_digest, each.cause)
        for row, each, plan in session.execute(query)
    }


def _profiled(session: Session, run_id: int) -> set[tuple[str | None, str | None, str | None]]:
    """(device, bundle, engine) of which the run has measured a new profile."""
    batch, cell = CampaignBatchRow, CampaignCellRow
    query = (
        select(batch.device, batch.bundle_digest, batch.engine)
        .join(cell, cell.batch_id == batch.id)
        .where(batch.run_id == run_id, batch.kind == "profile", cell.job_id.is_not(None))
    )
    return {(device, bundle, engine) for device, bundle, engine in session.execute(query)}
