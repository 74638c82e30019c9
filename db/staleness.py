"""Why a plan may no longer hold, in words for people."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from db.devices import latest_facts
from db.documents import parse
from db.models import BundleRow, DeviceFactsRow, DeviceProfileRow, DeviceRow, PlanRow

BUNDLE_REBUILT = "bundle rebuilt since"
NEWER_PROFILE = "newer profile"
AGENT_CHANGED = "agent changed since"
OS_CHANGED = "OS changed since"
KERNEL_CHANGED = "kernel changed since"
CLOCKS_CHANGED = "clocks changed since"
PROFILE_UNKNOWN = "its profile is not in this store"

REASONS = (
    BUNDLE_REBUILT,
    NEWER_PROFILE,
    AGENT_CHANGED,
    OS_CHANGED,
    KERNEL_CHANGED,
    CLOCKS_CHANGED,
    PROFILE_UNKNOWN,
)
"""All there are, in the order in which they are given."""


def stale_reasons(
    session: Session, plan: PlanRow, device: DeviceRow, profile: DeviceProfileRow | None
) -> tuple[str, ...]:
    """What changed since ``profile``, which the plan rests on, was measured; of ``REASONS``.

    What changed on a device says nothing of a profile borrowed from another one, whose plans are flagged
    as such. None for ``profile``: the store does not hold it.
    """
    found: set[str] = set()
    if _newest_bundle(session, plan.bundle_digest) != plan.bundle_digest:
        found.add(BUNDLE_REBUILT)
    if profile is None:
        found.add(PROFILE_UNKNOWN)
    else:
        if _has_newer_profile(session, plan, device, profile):
            found.add(NEWER_PROFILE)
        if profile.device_id == device.id:
            found |= _changes(session, device, profile)
    return tuple(reason for reason in REASONS if reason in found)


def _newest_bundle(session: Session, digest: str) -> str:
    """The newest bundle of the name that this one has."""
    name = select(BundleRow.name).where(BundleRow.digest == digest).scalar_subquery()
    newest = select(BundleRow.digest).where(BundleRow.name == name)
    return session.scalars(newest.order_by(BundleRow.created_wall_ns.desc()).limit(1)).one()


def _has_newer_profile(session: Session, plan: PlanRow, device: DeviceRow, profile: DeviceProfileRow) -> bool:
    """Whether the device got another profile of this kind since the plan was last the planner's answer.

    Counted from the planning and not from the plan's profile: who goes back to an older setting of the
    device (threads, rates) and plans again rests on the older profile rightly.
    """
    table = DeviceProfileRow
    newer = select(table.id).where(
        table.device_id == device.id,
        table.bundle_digest == plan.bundle_digest,
        table.engine == profile.engine,
        table.sequence_length == plan.sequence_length,
        table.id != profile.id,
        table.created_wall_ns > plan.planned_wall_ns,
    )
    return session.scalars(newer.limit(1)).first() is not None


def _changes(session: Session, device: DeviceRow, profile: DeviceProfileRow) -> set[str]:
    """What changed on the device since its profile was measured, as far as both states are known."""
    found: set[str] = set()
    agents = (profile.agent_digest, device.agent_digest)
    if None not in agents and agents[0] != agents[1]:
        found.add(AGENT_CHANGED)
    then = session.get(DeviceFactsRow, profile.facts_id) if profile.facts_id else None
    now = latest_facts(session, device.id)
    if then is not None and now is not None:
        if then.os_build != now.os_build:
            found.add(OS_CHANGED)
        if then.kernel != now.kernel:
            found.add(KERNEL_CHANGED)
        if then.digest != now.digest and _clocks_differ(then, now):
            found.add(CLOCKS_CHANGED)
    return found


def _clocks_differ(then: DeviceFactsRow, now: DeviceFactsRow) -> bool:
    """Whether governors or the bounds of the clocks differ, as far as both are known."""
    before, after = parse(then.facts_json), parse(now.facts_json)
    return any(
        before.get(name) and after.get(name) and before[name] != after[name]
        for name in ("min_khz", "max_khz", "governors")
    )
