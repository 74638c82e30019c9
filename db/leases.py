"""Leases: who may use a device, until when, and the fencing counter that stale owners lose by.

All times are the database's clock, so that hosts whose clocks differ agree on what has expired.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import or_, select, text, update
from sqlalchemy.orm import Session

from db.errors import LeaseHeldError
from db.models import DeviceRow, LeaseRow
from db.upsert import save_new


@dataclass(frozen=True)
class LeaseGrant:
    """A lease held by ``owner`` until ``expires_wall_ns`` of the database's clock."""

    device_id: int
    owner: str
    counter: int
    expires_wall_ns: int


_CLOCKS = {
    "sqlite": "SELECT CAST(ROUND((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER) * 1000000",
    "postgresql": "SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS BIGINT) * 1000",
}


def database_wall_ns(session: Session) -> int:
    """The database's wall clock, in ns since the epoch (resolution: SQLite 1 ms, PostgreSQL 1 µs)."""
    return int(session.execute(text(_CLOCKS[session.get_bind().dialect.name])).scalar_one())


def acquire_lease(session: Session, device_id: int, owner: str, ttl_ns: int) -> LeaseGrant:
    """Take a device that is free or whose lease has expired, under a new fencing counter.

    Raises: LeaseHeldError when another owner holds it. The same owner asking again gets a new counter.
    """
    _ensure_row(session, device_id)
    row = session.scalars(
        select(LeaseRow)
        .where(LeaseRow.device_id == device_id)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).one()
    now = database_wall_ns(session)
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
    """Extend a lease that is still ours, even one that expired unclaimed. Raises: LeaseHeldError."""
    expires = database_wall_ns(session) + ttl_ns
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
        raise LeaseHeldError(
            f"The lease {grant.counter} of device {grant.device_id} was lost to another controller.",
            "Its job goes on there; start again when that controller is done.",
        )
    return LeaseGrant(grant.device_id, grant.owner, grant.counter, expires)


def resume_lease(
    session: Session, device_id: int, owner: str, counter: int, ttl_ns: int
) -> LeaseGrant | None:
    """Take a lease of ours up again, also one that expired or was given back; None if it went on to another.

    The counter stays: what was begun under it is still ours to go on with.
    """
    expires = database_wall_ns(session) + ttl_ns
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


def _ensure_row(session: Session, device_id: int) -> None:
    save_new(session, LeaseRow, {"device_id": device_id, "counter": 0})
