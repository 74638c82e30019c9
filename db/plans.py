"""Keeping plans. What is known of them: ``db.plan_answers``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from sqlalchemy import Label, func, select, update
from sqlalchemy.orm import Session

from db.documents import document, now_wall_ns
from db.errors import StoreError
from db.models import BundleRow, DeviceProfileRow, DeviceRow, PlanRow
from db.models.plans import QUESTION
from db.upsert import save_new
from sti_runtime.errors import InputError
from sti_runtime.plan import PLAN_CAP_BYTES, Plan


def save_plan(session: Session, plan: Plan, *, device_id: int, task: str) -> int:
    """Keep a plan as the planner's newest answer for a device and task; its row id is returned.

    Raises: StoreError when its bundle is not registered.
    """
    plan_id = ensure_plan(session, plan, device_id=device_id, task=task)
    session.execute(update(PlanRow).where(PlanRow.id == plan_id).values(planned_wall_ns=now_wall_ns()))
    return plan_id


def ensure_plan(session: Session, plan: Plan, *, device_id: int, task: str) -> int:
    """As ``save_plan``, but a plan that is there already does not become the newest answer."""
    digest, now = plan.digest, now_wall_ns()
    if session.get(BundleRow, plan.bundle) is None:
        raise StoreError(
            f"The store does not know bundle {plan.bundle[:12]} of plan {digest[:12]}.",
            "Build the bundle with this store: `stifarm bundle build`.",
        )
    device = session.get_one(DeviceRow, device_id)
    profile = _profile_of(session, device_id, plan.device_profile)
    save_new(
        session,
        PlanRow,
        {
            "digest": digest,
            "content_digest": plan.content_digest,
            "device_id": device_id,
            "task": task,
            "bundle_digest": plan.bundle,
            "importance_digest": plan.importance,
            "device_profile_digest": plan.device_profile,
            "device_profile_id": None if profile is None else profile.id,
            "planner": plan.planner,
            "policy": plan.policy,
            "target_ns": plan.target_ns,
            "preload_bytes": plan.preload_bytes,
            "working_bytes": plan.working_bytes,
            "sequence_length": plan.sequence_length,
            "depth": plan.submodel.depth,
            "width": plan.submodel.width,
            "mean_fidelity_milli": plan.mean_fidelity_milli,
            "preloaded_bytes": plan.preloaded_bytes,
            "streamed_bytes": plan.streamed_bytes,
            "predicted_latency_ns": plan.predicted.latency_ns,
            "predicted_median_latency_ns": plan.predicted.median_latency_ns,
            "predicted_stall_ns": plan.predicted.stall_ns,
            "within_target": plan.within_target,
            "borrowed": profile is not None and profile.device_id != device_id,
            "emulated": device.emulated or (profile is not None and profile.emulated),
            "plan_json": document(plan),
            "created_wall_ns": now,
            "planned_wall_ns": now,
        },
    )
    query = select(PlanRow.id).where(
        PlanRow.device_id == device_id, PlanRow.task == task, PlanRow.digest == digest
    )
    return session.scalars(query).one()


def place_among_answers() -> Label[int]:
    """A plan's ``place`` among those to its question, the newest first."""
    plan = PlanRow.__table__.c
    order = (plan.planned_wall_ns.desc(), plan.id.desc())
    partition = [plan[name] for name in QUESTION]
    return func.row_number().over(partition_by=partition, order_by=order).label("place")


def plan_by_digest(session: Session, digest: str) -> Plan:
    """The plan whose digest starts so. Raises: InputError when none or several do."""
    query = select(PlanRow).where(PlanRow.digest.startswith(digest, autoescape=True))
    rows = {row.digest: row for row in session.scalars(query)}
    if len(rows) != 1:
        raise InputError(
            f"{digest!r} starts the digests of {len(rows)} plans.",
            "See `stifarm plans query`, and give enough of one's digest.",
        )
    return _plan(next(iter(rows.values())))


def _profile_of(session: Session, device_id: int, digest: str) -> DeviceProfileRow | None:
    """The named profile: the device's own, else the device's it was borrowed from."""
    rows: Sequence[DeviceProfileRow] = session.scalars(
        select(DeviceProfileRow).where(DeviceProfileRow.digest == digest).order_by(DeviceProfileRow.id)
    ).all()
    return next((row for row in rows if row.device_id == device_id), rows[0] if rows else None)


def _plan(row: PlanRow) -> Plan:
    return parsed_plan(row.plan_json, row.digest)


@lru_cache(maxsize=256)
def parsed_plan(text: str, digest: str) -> Plan:
    """The plan of a row. (Devices alike have plans alike, and who asks once asks again.)"""
    return Plan.from_json(text.encode(), source=f"plan {digest[:12]}", cap_bytes=PLAN_CAP_BYTES)
