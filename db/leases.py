"""Leases: who may use a device, until when, and the fencing counter that stale owners lose by.

All times are the database's clock, so that hosts whose clocks differ agree on what has expired.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import or_, select, update
from sqlalchemy.orm import Session

from db.clock import database_wall_ns
from db.errors import LeaseHeldError
from db.models import DeviceRow, LeaseRow
from db.reservations import refuse_reserved
from db.upsert import save_new

__all__ = [
    "LeaseGrant",
    "acquire_lease",
    "database_wall_ns",
    "lock_lease",
    "release_lease",
    "renew_lease",
    "resume_lease",
]


@dataclass(frozen=True)
class LeaseGrant:
    """A lease held by ``owner`` until ``expires_wall_ns`` of the database's clock."""

    device_id: int
    owner: str
    counter: int
    expires_wall_ns: int


def acquire_lease(session: Session, device_id: int, owner: str, ttl_ns: int) -> LeaseGrant:
    """Take a device that is free or whose lease has expired, under a new fencing counter.

    Raises: LeaseHeldError when another owner holds it; DeviceReservedError when a person does. The same owner
    asking again gets a new counter.
    """
    row = lock_lease(session, device_id)
    now = database_wall_ns(session)
    refuse_reserved(session, device_id, now)
    if row.owner not in (None, owner) and (row.expires_wall_ns or 0) > now:
        name = session.scalars(select(DeviceRow.name).where(DeviceRow.id == device_id)).one()
        left_s = ((row.expires_wall_ns or 0) - now) // 1_000_000_000 + 1
        raise LeaseHeldError(
            f"{name} is in use by {row.owner}, for up to {left_s} s unless renewed.",
            "Wait for it, or end the other controller.",
        )
    row.owner, row.counter = owner, row.counter + 1
    row.acquired_wall_ns, row.expires_wall_ns = now, now + ttl_ns
    session.flush()
    return LeaseGrant(device_id, owner, row.counter, now + ttl_ns)


def renew_lease(session: Session, grant: LeaseGrant, ttl_ns: int) -> LeaseGrant:
    """Extend a lease that is still ours, even one that expired unclaimed. Raises: LeaseHeldError;
    DeviceReservedError when a person has reserved the device and does not let its job finish."""
    now = database_wall_ns(session)
    refuse_reserved(session, grant.device_id, now, finishing=True)
    expires = now + ttl_ns
    done = session.execute(
        update(LeaseRow)
        .where(
            LeaseRow.device_id == grant.device_id,
            LeaseRow.owner == grant.owner,
            LeaseRow.counter == grant.counter,
        )
        .values(expires_wall_ns=expires)
        .returning(LeaseRow.counter)
    ).all()
    if not done:
        raise lease_lost(grant)
    return LeaseGrant(grant.device_id, grant.owner, grant.counter, expires)


def require_lease(session: Session, grant: LeaseGrant) -> None:
    """Keep the device's lease as it is until the transaction ends. Raises: LeaseHeldError when it went on to
    another controller: what this one still has to say of the device comes too late.
    """
    query = select(LeaseRow.owner, LeaseRow.counter).where(LeaseRow.device_id == grant.device_id)
    found = session.execute(query.with_for_update()).one_or_none()
    if found is None or (found.owner, found.counter) != (grant.owner, grant.counter):
        raise lease_lost(grant)


def lease_lost(grant: LeaseGrant) -> LeaseHeldError:
    """The error of whoever still acts under a lease that went on."""
    return LeaseHeldError(
        f"The lease {grant.counter} of device {grant.device_id} was lost to another controller.",
        "Its job goes on there; start again when that controller is done.",
    )


def resume_lease(
    session: Session, device_id: int, owner: str, counter: int, ttl_ns: int
) -> LeaseGrant | None:
    """Take a lease of ours up again, also one that expired or was given back; None if it went on to another.

    The counter stays: what was begun under it is still ours to go on with. Raises: DeviceReservedError.
    """
    now = database_wall_ns(session)
    refuse_reserved(session, device_id, now)
    expires = now + ttl_ns
    done = session.execute(
        update(LeaseRow)
        .where(
            LeaseRow.device_id == device_id,
            LeaseRow.counter == counter,
            or_(LeaseRow.owner == owner, LeaseRow.owner.is_(None)),
        )
        .values(owner=owner, expires_wall_ns=expires)
        .returning(LeaseRow.counter)
    ).all()
    return LeaseGrant(device_id, owner, counter, expires) if done else None


def release_lease(session: Session, grant: LeaseGrant) -> None:
    """Give a device back; nothing happens when the lease is no longer ours."""
    session.execute(
        update(LeaseRow)
        .where(
            LeaseRow.device_id == grant.device_id,
            LeaseRow.owner == grant.owner,
            LeaseRow.counter == grant.counter,
        )
        .values(owner=None, expires_wall_ns=None)
    )


def lock_lease(session: Session, device_id: int) -> LeaseRow:
    """The device's row, which nobody else leases by until this transaction ends."""
    _ensure_row(session, device_id)
    return session.scalars(
        select(LeaseRow)
        .where(LeaseRow.device_id == device_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).one()


def _ensure_row(session: Session, device_id: int) -> None:
    save_new(session, LeaseRow, {"device_id": device_id, "counter": 0})
