"""Alerts: who is told of which events, and how far that is. Delivery is at least once.

An event's row id is given before its transaction commits, so a lower one may appear after a higher one. The
cursor therefore follows only behind events that are SETTLED_AFTER_NS old; above it each delivery is a row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import and_, delete, func, not_, or_, select, update
from sqlalchemy.orm import Session

from db.clock import database_wall_ns
from db.documents import document, storable
from db.errors import StoreError, UnknownNameError
from db.events import record_event
from db.models import AlertDeliveryRow, AlertRow, DeviceRow, EventRow
from db.models.work import EVENT_LEVELS
from db.upsert import save_new

SETTLED_AFTER_NS = 600 * 10**9
"""No transaction that writes an event lasts so long."""

GIVEN_UP = "alert-given-up"
"""The kind of event that tells of an event nobody took; the alert that failed is not told of it."""


def add_alert(session: Session, name: str, kind: str, target: Any, level: str) -> AlertRow:
    """Tell somebody of events from now on. Raises: StoreError when there is an alert of that name."""
    if session.get(AlertRow, name) is not None:
        raise StoreError(f"There is an alert {name!r} already.", f"Remove it: stifarm alerts remove {name}.")
    newest = session.execute(select(func.max(EventRow.id))).scalar_one()
    row = AlertRow(name=name, kind=kind, target_json=document({"target": target}), level=level, tries=0)
    row.cursor_event_id, row.created_wall_ns = newest or 0, database_wall_ns(session)
    session.add(row)
    session.flush()
    return row


def remove_alert(session: Session, name: str) -> None:
    """Tell them no more. Raises: UnknownNameError."""
    get_alert(session, name)
    session.execute(delete(AlertDeliveryRow).where(AlertDeliveryRow.alert == name))
    session.execute(delete(AlertRow).where(AlertRow.name == name))


def list_alerts(session: Session) -> Sequence[AlertRow]:
    """All alerts by name."""
    return session.scalars(select(AlertRow).order_by(AlertRow.name)).all()


def get_alert(session: Session, name: str) -> AlertRow:
    """An alert by name. Raises: UnknownNameError."""
    row = session.get(AlertRow, name, populate_existing=True)
    if row is None:
        raise UnknownNameError(f"There is no alert {name!r}.", "See them: stifarm alerts list.")
    return row


def target_of(row: AlertRow) -> Any:
    """Where an alert goes; see ``AlertRow``."""
    return json.loads(row.target_json)["target"]


def claim(session: Session, name: str, length_ns: int) -> bool:
    """Be the one that delivers this alert for so long; False while another does."""
    now = database_wall_ns(session)
    done = session.execute(
        update(AlertRow)
        .where(
            AlertRow.name == name,
            or_(AlertRow.busy_until_wall_ns.is_(None), AlertRow.busy_until_wall_ns <= now),
        )
        .values(busy_until_wall_ns=now + length_ns)
        .returning(AlertRow.name)
    ).all()
    return bool(done)


def extend(session: Session, name: str, length_ns: int) -> None:
    """Go on being the one that delivers an alert."""
    until = database_wall_ns(session) + length_ns
    session.execute(update(AlertRow).where(AlertRow.name == name).values(busy_until_wall_ns=until))


def give_back(session: Session, name: str) -> None:
    """Let others deliver this alert, and move its cursor behind what is settled for good."""
    row = session.get(AlertRow, name, populate_existing=True)
    if row is None:
        return  # it was removed meanwhile
    row.busy_until_wall_ns = None
    old = database_wall_ns(session) - SETTLED_AFTER_NS
    last = session.execute(
        select(func.max(EventRow.id)).where(EventRow.id > row.cursor_event_id, EventRow.wall_ns < old)
    ).scalar_one()
    first = session.execute(select(func.min(EventRow.id)).where(_pending(row))).scalar_one()
    settled = last if first is None else min(last or 0, first - 1)
    if settled is not None and settled > row.cursor_event_id:
        row.cursor_event_id = settled


def next_event(session: Session, row: AlertRow) -> EventRow | None:
    """The oldest event that an alert still has to tell of."""
    return session.scalars(select(EventRow).where(_pending(row)).order_by(EventRow.id).limit(1)).one_or_none()


def count_pending(session: Session, row: AlertRow) -> int:
    """How many events an alert still has to tell of."""
    return session.execute(select(func.count()).select_from(EventRow).where(_pending(row))).scalar_one()


def event_document(session: Session, store_id: str, row: EventRow) -> Mapping[str, Any]:
    """What is told of an event. ``id`` is the same each time it is told, so that doubles can be dropped."""
    device = None if row.device_id is None else session.get(DeviceRow, row.device_id)
    return {
        "id": f"{store_id}/{row.id}",
        "level": row.level,
        "kind": row.kind,
        "what": row.what,
        "device": None if device is None else device.name,
        "job": row.job_id,
        "wall_ns": row.wall_ns,
    }


def delivered(session: Session, name: str, event_id: int) -> None:
    """An event was taken."""
    _settle(session, name, event_id, "delivered")
    session.execute(
        update(AlertRow)
        .where(AlertRow.name == name)
        .values(tries=0, retry_wall_ns=None, failing_since_wall_ns=None, last_problem=None)
    )


def given_up(session: Session, name: str, event_id: int, problem: str) -> None:
    """An event was not taken until it was too old; an event says so, to other alerts."""
    _settle(session, name, event_id, "given-up")
    record_event(session, "warning", GIVEN_UP, f"{_of(name)}event {event_id} was not taken: {problem}")


def failed(session: Session, name: str, problem: str, pause_ns: int) -> None:
    """An event was not taken this time; it is tried again after a pause."""
    row = get_alert(session, name)
    now = database_wall_ns(session)
    row.tries, row.retry_wall_ns, row.last_problem = row.tries + 1, now + pause_ns, storable(problem)
    row.failing_since_wall_ns = row.failing_since_wall_ns or now


def _settle(session: Session, name: str, event_id: int, outcome: str) -> None:
    now = database_wall_ns(session)
    save_new(
        session,
        AlertDeliveryRow,
        {"alert": name, "event_id": event_id, "outcome": outcome, "wall_ns": now},
    )


def _pending(row: AlertRow) -> Any:
    levels = EVENT_LEVELS[EVENT_LEVELS.index(row.level) :]
    settled = select(AlertDeliveryRow.event_id).where(
        AlertDeliveryRow.alert == row.name, AlertDeliveryRow.event_id > row.cursor_event_id
    )
    own = and_(EventRow.kind == GIVEN_UP, EventRow.what.startswith(_of(row.name), autoescape=True))
    return and_(
        EventRow.id > row.cursor_event_id,
        EventRow.level.in_(levels),
        EventRow.id.not_in(settled),
        not_(own),
    )


def _of(name: str) -> str:
    return f"alert {name}: "
