"""Controllers as rows: which process drives devices, whether it lives, and what becomes of what it held.

A controller's name is the owner of its leases and of the batches it claimed. It says by heartbeats, at the
database's clock, that it lives. One that was killed is succeeded by the next of its home on its machine,
which goes on under its leases at once: the home's lock says that it is dead. One that any other controller
finds without a heartbeat for HEARTBEAT_TTL_NS is given up for dead: what it held is free, under a new fencing
counter, so that a controller that was only asleep can neither start nor write anything when it wakes.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from db.clock import database_wall_ns, utc_text
from db.events import record_event
from db.models import CampaignBatchRow, ControllerRow, LeaseRow

HEARTBEAT_TTL_NS = 120 * 10**9


@dataclass(frozen=True)
class Begun:
    """A controller that has begun. ``succeeded``: the names of the dead ones whose work it goes on with."""

    name: str
    succeeded: tuple[str, ...]


def begin_controller(session: Session, *, host: str, home: str, stifarm: str, pid: int) -> Begun:
    """Enter a controller, who must hold the lock of its home: earlier ones of host and home are dead."""
    now = database_wall_ns(session)
    id_ = uuid.uuid4().hex
    base = f"{host}:{home}"
    row = ControllerRow(id=id_, name=f"{base}#{id_[:8]}", host=host, home=home, stifarm=stifarm, pid=pid)
    row.started_wall_ns = row.heartbeat_wall_ns = now
    dead = session.scalars(
        update(ControllerRow)
        .where(ControllerRow.host == host, ControllerRow.home == home, ControllerRow.ended_wall_ns.is_(None))
        .values(ended_wall_ns=now)
        .returning(ControllerRow.name)
    ).all()
    session.add(row)
    session.flush()
    # Owners without a row are those of programs before controllers were rows.
    inherited = (*sorted(dead), base)
    session.execute(update(LeaseRow).where(LeaseRow.owner.in_(inherited)).values(owner=row.name))
    session.execute(
        update(CampaignBatchRow)
        .where(CampaignBatchRow.owner.in_(inherited), CampaignBatchRow.state == "running")
        .values(owner=row.name)
    )
    for name in sorted(dead):
        record_event(session, "warning", "controller-succeeded", f"{name} had died; {row.name} goes on.")
    return Begun(row.name, tuple(sorted(dead)))


def beat(session: Session, name: str) -> bool:
    """Say that a controller lives, and give those up for dead that do not. False when it was itself given up
    meanwhile: what it held then went on to others; it counts as alive again."""
    now = database_wall_ns(session)
    row = session.scalars(
        select(ControllerRow)
        .where(ControllerRow.name == name)
        .with_for_update()
        .execution_options(populate_existing=True)
    ).one_or_none()
    if row is None:
        return False
    given_up = row.ended_wall_ns is not None
    steady = now - row.heartbeat_wall_ns < HEARTBEAT_TTL_NS // 2
    row.heartbeat_wall_ns, row.ended_wall_ns = now, None
    session.flush()
    if steady:  # else the database was away, for the others too
        _bury_silent(session, now)
    return not given_up


def end_controller(session: Session, name: str) -> None:
    """The controller has ended by itself, and has given back what it held."""
    session.execute(
        update(ControllerRow)
        .where(ControllerRow.name == name)
        .values(ended_wall_ns=database_wall_ns(session))
    )


def _bury_silent(session: Session, now_wall_ns: int) -> Sequence[str]:
    """Give up for dead who has been silent too long: their leases and claims run out now. Their names."""
    silent = session.execute(
        update(ControllerRow)
        .where(
            ControllerRow.ended_wall_ns.is_(None),
            ControllerRow.heartbeat_wall_ns < now_wall_ns - HEARTBEAT_TTL_NS,
        )
        .values(ended_wall_ns=now_wall_ns)
        .returning(ControllerRow.name, ControllerRow.heartbeat_wall_ns)
    ).all()
    names = sorted(row.name for row in silent)
    if not names:
        return names
    session.execute(
        update(LeaseRow)
        .where(LeaseRow.owner.in_(names))
        .values(owner=None, expires_wall_ns=None, counter=LeaseRow.counter + 1)
    )
    session.execute(
        update(CampaignBatchRow)
        .where(CampaignBatchRow.owner.in_(names), CampaignBatchRow.state == "running")
        .values(claimed_until_wall_ns=now_wall_ns - 1)
    )
    for row in sorted(silent):
        since = utc_text(row.heartbeat_wall_ns)
        record_event(
            session, "error", "controller-lost", f"{row.name} is silent since {since}; others take its work."
        )
    return names


def list_controllers(session: Session, *, ended: bool = False) -> Sequence[ControllerRow]:
    """The controllers that have not ended, or all; the newest first."""
    query = select(ControllerRow).order_by(ControllerRow.started_wall_ns.desc(), ControllerRow.name)
    if not ended:
        query = query.where(ControllerRow.ended_wall_ns.is_(None))
    return session.scalars(query.execution_options(populate_existing=True)).all()
