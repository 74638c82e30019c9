"""Why a plan may no longer hold, in words for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Row, ScalarSelect, Select, func, select
from sqlalchemy.orm import aliased

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
    """A query of plans with their ``BundleRow``, ``DeviceRow`` and ``DeviceProfileRow``, and besides with the
    columns that ``stale_reasons`` reads."""
    newest = aliased(BundleRow)
    of_name = select(newest.digest).where(newest.name == BundleRow.name)
    newest_bundle = of_name.order_by(newest.created_wall_ns.desc()).limit(1)
    then, now, any_facts = aliased(DeviceFactsRow), aliased(DeviceFactsRow), aliased(DeviceFactsRow)
    latest = select(func.max(any_facts.id)).where(any_facts.device_id == DeviceRow.id).scalar_subquery()
    return (
        query.add_columns(
            newest_bundle.scalar_subquery().label("newest_bundle"),
            _newer_profile().label("newer_profile"),
            *(getattr(then, name).label(f"then_{name}") for name in _FACTS),
            *(getattr(now, name).label(f"now_{name}") for name in _FACTS),
        )
        .outerjoin(then, then.id == DeviceProfileRow.facts_id)
        .outerjoin(now, now.id == latest)
    )


_FACTS = ("id", "digest", "os_build", "kernel", "facts_json")


def _newer_profile() -> ScalarSelect[int]:
    """Another profile of this kind that the device got since the plan was last the planner's answer.

    Counted from the planning and not from the plan's profile: who goes back to an older setting of the
    device (threads, rates) and plans again rests on the older profile rightly.
    """
    table = aliased(DeviceProfileRow)
    newer = select(table.id).where(
        table.device_id == DeviceRow.id,
        table.bundle_digest == PlanRow.bundle_digest,
        table.engine == DeviceProfileRow.engine,
        table.sequence_length == PlanRow.sequence_length,
        table.id != DeviceProfileRow.id,
        table.created_wall_ns > PlanRow.planned_wall_ns,
    )
    return newer.limit(1).scalar_subquery()


def stale_reasons(
    plan: PlanRow, device: DeviceRow, profile: DeviceProfileRow | None, state: Row[Any]
) -> tuple[str, ...]:
    """What changed since ``profile``, which the plan rests on, was measured; of ``REASONS``.

    ``state``: the row of a query made by ``with_state``. What changed on a device says nothing of a profile
    borrowed from another one, whose plans are flagged as such. ``profile`` None: the store does not hold it.
    """
    found: set[str] = set()
    if state.newest_bundle != plan.bundle_digest:
        found.add(BUNDLE_REBUILT)
    if profile is None:
        found.add(PROFILE_UNKNOWN)
    else:
        if state.newer_profile is not None:
            found.add(NEWER_PROFILE)
        if profile.device_id == device.id:
            found |= _changes(device, profile, state)
    return tuple(reason for reason in REASONS if reason in found)


def _changes(device: DeviceRow, profile: DeviceProfileRow, state: Row[Any]) -> set[str]:
    """What changed on the device since its profile was measured, as far as both states are known."""
    found: set[str] = set()
    agents = (profile.agent_digest, device.agent_digest)
    if None not in agents and agents[0] != agents[1]:
        found.add(AGENT_CHANGED)
    if state.then_id is not None and state.now_id is not None:
        if state.then_os_build != state.now_os_build:
            found.add(OS_CHANGED)
        if state.then_kernel != state.now_kernel:
            found.add(KERNEL_CHANGED)
        if state.then_digest != state.now_digest and _clocks_differ(
            parse(state.then_facts_json), parse(state.now_facts_json)
        ):
            found.add(CLOCKS_CHANGED)
    return found


def _clocks_differ(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether governors or the bounds of the clocks differ, as far as both are known."""
    return any(
        before.get(name) and after.get(name) and before[name] != after[name]
        for name in ("min_khz", "max_khz", "governors")
    )
