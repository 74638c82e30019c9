"""Queries about lab hosts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.orm import Session

from db.clock import database_wall_ns
from db.documents import storable
from db.errors import UnknownNameError
from db.models import HostRow
from db.upsert import save_new

SEEN_TTL_NS = 60 * 10**9
"""So long is a host taken for present that its cluster's controller has written down as such: it does so
every 10 s while it lives."""


def note_host(
    session: Session,
    name: str,
    *,
    state: str,
    stifarm: str,
    protocol: int,
    offer_json: str | None,
    joined_wall_ns: int | None,
    refused: str = "",
) -> None:
    """Insert or update what a cluster's board says of a host; one that is present was seen now.

    A host that has joined another cluster since is left as it is: only where it joined last, it is judged.
    """
    now = database_wall_ns(session)
    values = {
        "state": state,
        "stifarm": storable(stifarm)[:64],
        "protocol": protocol,
        "offer_json": offer_json,
        "refused": storable(refused),
        "joined_wall_ns": joined_wall_ns,
    }
    if state == "present":
        values["last_seen_wall_ns"] = now
    save_new(session, HostRow, {"name": name, "last_seen_wall_ns": None, **values})
    known = update(HostRow).where(HostRow.name == name)
    if joined_wall_ns is None:  # refused: nobody knows when it joined
        seen = func.coalesce(HostRow.last_seen_wall_ns, 0)
        known = known.where(or_(HostRow.state != "present", seen <= now - SEEN_TTL_NS))
    elif state != "present":
        known = known.where(func.coalesce(HostRow.joined_wall_ns, 0) <= joined_wall_ns)
    session.execute(known.values(**values))


def state_now(host: HostRow, now_wall_ns: int) -> str:
    """A host's state: one that nobody has seen for SEEN_TTL_NS of the database's clock is not present."""
    silent_ns = now_wall_ns - (host.last_seen_wall_ns or 0)
    return "away" if host.state == "present" and silent_ns > SEEN_TTL_NS else host.state


def list_hosts(session: Session) -> Sequence[HostRow]:
    """Every host that ever joined, by name."""
    return session.scalars(
        select(HostRow).order_by(HostRow.name).execution_options(populate_existing=True)
    ).all()


def host_states(session: Session) -> Mapping[str, str]:
    """The states that hosts were last seen in, by name, without what they offered, which may be long."""
    return {row.name: row.state for row in session.execute(select(HostRow.name, HostRow.state))}


def forget_host(session: Session, name: str) -> None:
    """Remove a host. Its devices and what was measured on them stay. Raises: UnknownNameError."""
    found = session.execute(delete(HostRow).where(HostRow.name == name).returning(HostRow.name))
    if found.first() is None:
        raise UnknownNameError(f"The store knows no host named {name!r}.", "See stifarm host list.")
