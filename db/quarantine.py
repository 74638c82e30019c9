"""Quarantine: devices that the farm does not rely on, and the rows by which it comes to that and back.

What to do is decided by pure functions over those rows (orchestrator.health); here they are kept. Times are
the database's clock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from db.clock import database_wall_ns, utc_text
from db.documents import storable
from db.errors import QuarantinedError
from db.events import record_event
from db.models import (
    DeviceFailureRow,
    DeviceRow,
    HealthCheckRow,
    HealthResultRow,
    QuarantineRow,
    RecoveryStepRow,
)
from db.upsert import save_new

PASSES_TO_RELEASE = 3
"""Health checks passed in a row that end a quarantine."""


@dataclass(frozen=True)
class Item:
    """What a health check found of one thing. ``required``: the check passes only if this does."""

    item: str
    verdict: str
    detail: str
    required: bool = True


def quarantines(session: Session) -> Mapping[int, QuarantineRow]:
    """The devices in quarantine now, by row id."""
    query = select(QuarantineRow).where(QuarantineRow.released_wall_ns.is_(None))
    return {row.device_id: row for row in session.scalars(query)}


def quarantine_of(session: Session, device_id: int) -> QuarantineRow | None:
    """The quarantine that a device is in now."""
    row = session.get(QuarantineRow, device_id, populate_existing=True)
    return None if row is None or row.released_wall_ns is not None else row


def begin_quarantine(session: Session, device_id: int, cause: str) -> bool:
    """Put a device in quarantine; False when it is in one already, whose cause stays."""
    now = database_wall_ns(session)
    save_new(
        session,
        QuarantineRow,
        {"device_id": device_id, "cause": "", "since_wall_ns": now, "passes": 0, "released_wall_ns": now},
    )
    begun = session.execute(
        update(QuarantineRow)
        .where(QuarantineRow.device_id == device_id, QuarantineRow.released_wall_ns.is_not(None))
        .values(cause=storable(cause), since_wall_ns=now, passes=0, released_wall_ns=None, released_by=None)
        .returning(QuarantineRow.device_id)
    ).all()
    if begun:
        record_event(
            session,
            "error",
            "device-quarantined",
            f"{_name(session, device_id)}: {cause}",
            device_id=device_id,
        )
    return bool(begun)


def end_quarantine(session: Session, device_id: int, by: str) -> bool:
    """Release a device; False when it was in no quarantine."""
    ended = session.execute(
        update(QuarantineRow)
        .where(QuarantineRow.device_id == device_id, QuarantineRow.released_wall_ns.is_(None))
        .values(released_wall_ns=database_wall_ns(session), released_by=storable(by))
        .returning(QuarantineRow.device_id)
    ).all()
    if ended:
        record_event(
            session,
            "info",
            "device-released",
            f"{_name(session, device_id)} is out of quarantine: {by}.",
            device_id=device_id,
        )
    return bool(ended)


def refuse_quarantined(session: Session, device_id: int) -> None:
    """Raises: QuarantinedError when the device is in quarantine."""
    row = quarantine_of(session, device_id)
    if row is not None:
        name = _name(session, device_id)
        raise QuarantinedError(
            f"{name} is in quarantine since {utc_text(row.since_wall_ns)}: {row.cause}",
            f"It comes back after {PASSES_TO_RELEASE} passed health checks in a row ({row.passes} so far): "
            f"stifarm devices check --devices {name}; or by your word: stifarm devices release {name}.",
        )


def record_check(
    session: Session, device_id: int, items: Sequence[Item], *, passed: bool, job_id: str | None
) -> bool:
    """Keep a health check; whether it ended a quarantine."""
    check = HealthCheckRow(
        device_id=device_id, job_id=job_id, passed=passed, wall_ns=database_wall_ns(session)
    )
    session.add(check)
    session.flush()
    session.add_all(
        HealthResultRow(
            check_id=check.id,
            item=item.item,
            verdict=item.verdict,
            required=item.required,
            detail=storable(item.detail),
        )
        for item in items
    )
    session.flush()
    if not passed:
        failed = "; ".join(f"{item.item}: {item.detail}" for item in items if item.verdict != "pass")
        record_event(
            session,
            "warning",
            "health-check-failed",
            f"{_name(session, device_id)}: {failed}",
            device_id=device_id,
            job_id=job_id,
        )
    passes = session.execute(
        update(QuarantineRow)
        .where(QuarantineRow.device_id == device_id, QuarantineRow.released_wall_ns.is_(None))
        .values(passes=QuarantineRow.passes + 1 if passed else 0)
        .returning(QuarantineRow.passes)
    ).scalar_one_or_none()
    if passes is None or passes < PASSES_TO_RELEASE:
        return False
    return end_quarantine(session, device_id, f"{passes} health checks passed in a row")


def count_checks(session: Session, device_id: int) -> int:
    """How often a device's health was checked."""
    query = select(func.count()).select_from(HealthCheckRow).where(HealthCheckRow.device_id == device_id)
    return session.execute(query).scalar_one()


def latest_check(session: Session, device_id: int) -> tuple[HealthCheckRow, Sequence[HealthResultRow]] | None:
    """A device's newest health check with its results."""
    query = select(HealthCheckRow).where(HealthCheckRow.device_id == device_id)
    check = session.scalars(query.order_by(HealthCheckRow.id.desc()).limit(1)).one_or_none()
    if check is None:
        return None
    results = session.scalars(
        select(HealthResultRow).where(HealthResultRow.check_id == check.id).order_by(HealthResultRow.item)
    ).all()
    return check, results


def record_failure(session: Session, device_id: int, *, error: str, what: str, job_id: str | None) -> None:
    """A device let a job down."""
    row = DeviceFailureRow(device_id=device_id, error=error, what=storable(what), job_id=job_id)
    row.wall_ns = database_wall_ns(session)
    session.add(row)
    session.flush()
    record_event(session, "warning", "device-failed", what, device_id=device_id, job_id=job_id)


def failures_since(session: Session, device_id: int, wall_ns: int) -> Sequence[DeviceFailureRow]:
    """How a device failed since a moment and since it was last released, oldest first."""
    since = max(wall_ns, _released(session, device_id))
    query = select(DeviceFailureRow).where(
        DeviceFailureRow.device_id == device_id, DeviceFailureRow.wall_ns > since
    )
    return session.scalars(query.order_by(DeviceFailureRow.id)).all()


def record_step(session: Session, device_id: int, step: str, outcome: str, detail: str) -> None:
    """Keep a step of the recovery ladder, and tell of it."""
    row = RecoveryStepRow(device_id=device_id, step=step, outcome=outcome, detail=storable(detail))
    row.wall_ns = database_wall_ns(session)
    session.add(row)
    session.flush()
    record_event(
        session,
        "warning" if outcome == "failed" else "info",
        "device-recovery",
        f"{_name(session, device_id)}: {step}: {outcome}{f' ({detail})' if detail else ''}",
        device_id=device_id,
    )


def steps_since(session: Session, device_id: int, wall_ns: int) -> Sequence[RecoveryStepRow]:
    """The steps taken since a moment and since the device was last released, oldest first."""
    since = max(wall_ns, _released(session, device_id))
    query = select(RecoveryStepRow).where(
        RecoveryStepRow.device_id == device_id, RecoveryStepRow.wall_ns > since
    )
    return session.scalars(query.order_by(RecoveryStepRow.id)).all()


def _released(session: Session, device_id: int) -> int:
    query = select(QuarantineRow.released_wall_ns).where(QuarantineRow.device_id == device_id)
    return session.execute(query).scalar_one_or_none() or 0


def _name(session: Session, device_id: int) -> str:
    return session.scalars(select(DeviceRow.name).where(DeviceRow.id == device_id)).one()
