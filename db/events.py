"""Events: what a person may want to know, newest first when read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from sqlalchemy import select
from sqlalchemy.orm import Session

from db.documents import now_wall_ns, storable
from db.models import EventRow

EventLevel = Literal["info", "warning", "error"]


def record_event(
    session: Session,
    level: EventLevel,
    kind: str,
    what: str,
    *,
    device_id: int | None = None,
    job_id: str | None = None,
) -> None:
    """Append one event, at this host's time."""
    row = EventRow(wall_ns=now_wall_ns(), level=level, kind=kind, what=storable(what))
    row.device_id, row.job_id = device_id, job_id
    session.add(row)
    session.flush()


def latest_events(session: Session, *, device_id: int | None = None, limit: int = 100) -> Sequence[EventRow]:
    """The newest events, of one device or of all."""
    query = select(EventRow).order_by(EventRow.wall_ns.desc(), EventRow.id.desc()).limit(limit)
    if device_id is not None:
        query = query.where(EventRow.device_id == device_id)
    return session.scalars(query).all()
