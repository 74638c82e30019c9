"""Why a plan may no longer hold, in words for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Row, ScalarSelect, Select, func, select

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


def with_state(query: Select[Any]) -> Select[Any]:
    """A query of the tables of plans, their bundles, devices and device profiles, with the columns that
    ``stale_reasons`` reads added."""
    bundle, device, profile = BundleRow.__table__.c, DeviceRow.__table__.c, DeviceProfileRow.__table__.c
    newest = BundleRow.__table__.alias()
    of_name = select(newest.c.digest).where(newest.c.name == bundle.name)
    newest_bundle = of_name.order_by(newest.c.created_wall_ns.desc()).limit(1)
    facts = DeviceFactsRow.__table__
    then, now, all_facts = facts.alias(), facts.alias(), facts.alias()
    latest = select(func.max(all_facts.c.id)).where(all_facts.c.device_id == device.id).scalar_subquery()
    return (
        query.add_columns(
            newest_bundle.scalar_subquery().label("newest_bundle"),
            _newer_profile().label("newer_profile"),
            *(then.c[name].label(f"then_{name}") for name in _FACTS),
            *(now.c[name].label(f"now_{name}") for name in _FACTS),
        )
        .outerjoin(then, then.c.id == profile.facts_id)
        .outerjoin(now, now.c.id == latest)
    )


_FACTS = ("id", "digest", "os_build", "kernel", "facts_json")


def _newer_profile() -> ScalarSelect[int]:
    """Another profile of this kind that the device got since the plan was last the planner's answer.

    Counted from the planning and not from the plan's profile: who goes back to an older setting of the
    device (threads, rates) and plans again rests on the older profile rightly.
    """
    plan, profile = PlanRow.__table__.c, DeviceProfileRow.__table__.c
    other = DeviceProfileRow.__table__.alias().c
    newer = select(other.id).where(
        other.device_id == plan.device_id,
        other.bundle_digest == plan.bundle_digest,
        other.engine == profile.engine,
        other.sequence_length == plan.sequence_length,
        other.id != profile.id,
        other.created_wall_ns > plan.planned_wall_ns,
    )
    return newer.limit(1).scalar_subquery()


def stale_reasons(row: Row[Any]) -> tuple[str, ...]:
    """What changed since the profile that a plan rests on was measured; of ``REASONS``.

    ``row``: of ``db.plan_answers``. What changed on a device says nothing of a profile borrowed from another
    one, whose plans are flagged as such.
    """
    found: set[str] = set()
    if row.newest_bundle != row.bundle_digest:
        found.add(BUNDLE_REBUILT)
    if row.profile_id is None:
        found.add(PROFILE_UNKNOWN)
    else:
        if row.newer_profile is not None:
            found.add(NEWER_PROFILE)
        if row.profile_device_id == row.device_id:
            found |= _changes(row)
    return tuple(reason for reason in REASONS if reason in found)


def _changes(row: Row[Any]) -> set[str]:
    """What changed on the device since its profile was measured, as far as both states are known."""
    found: set[str] = set()
    agents = (row.profile_agent_digest, row.device_agent_digest)
    if None not in agents and agents[0] != agents[1]:
        found.add(AGENT_CHANGED)
    if row.then_id is not None and row.now_id is not None:
        if row.then_os_build != row.now_os_build:
            found.add(OS_CHANGED)
        if row.then_kernel != row.now_kernel:
            found.add(KERNEL_CHANGED)
        if row.then_digest != row.now_digest and _clocks_differ(
            parse(row.then_facts_json), parse(row.now_facts_json)
        ):
            found.add(CLOCKS_CHANGED)
    return found


def _clocks_differ(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether governors or the bounds of the clocks differ, as far as both are known."""
    return any(
        before.get(name) and after.get(name) and before[name] != after[name]
        for name in ("min_khz", "max_khz", "governors")
    )
