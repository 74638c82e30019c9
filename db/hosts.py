"""Queries about lab hosts."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from db.documents import now_wall_ns, storable
from db.errors import StoreError
from db.models import HostRow
from db.upsert import save_new


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
    """Insert or update what is known of a host; one that is present was seen now."""
    values = {
        "state": state,
        "stifarm": storable(stifarm)[:64],
        "protocol": protocol,
        "offer_json": offer_json,
        "refused": storable(refused),
        "joined_wall_ns": joined_wall_ns,
    }
    if state == "present":
        values["last_seen_wall_ns"] = now_wall_ns()
    save_new(session, HostRow, {"name": name, "last_seen_wall_ns": None, **values})
    session.execute(update(HostRow).where(HostRow.name == name).values(**values))


def hosts_are_away(session: Session, *, but: Sequence[str]) -> None:
    """Hosts that were present, or refused, and are none of ``but`` are away."""
    gone = update(HostRow).where(HostRow.state.in_(("present", "refused")), HostRow.name.not_in(list(but)))
    session.execute(gone.values(state="away"))


def list_hosts(session: Session) -> Sequence[HostRow]:
    """Every host that ever joined, by name."""
    return session.scalars(
        select(HostRow).order_by(HostRow.name).execution_options(populate_existing=True)
    ).all()


def forget_host(session: Session, name: str) -> None:
    """Remove a host. Its devices and what was measured on them stay. Raises: StoreError if unknown."""
    found = session.execute(delete(HostRow).where(HostRow.name == name).returning(HostRow.name))
    if found.first() is None:
        raise StoreError(f"The store knows no host named {name!r}.", "See stifarm host list.")
