"""Who holds a device besides a lease, how well it is, and who is told of events."""

from __future__ import annotations

from sqlalchemy import ForeignKey, String
from sqlalchemy.orm import Mapped, mapped_column

from db.models.base import Base, DeviceId, Id, Int64, Word, one_of

RESULT_VERDICTS = ("pass", "fail", "ungated")
"""pass: read, and as it should be. fail: read, and not so. ungated: it cannot be read, which is no pass."""

RECOVERY_STEPS = ("reconnect", "fresh-server", "reboot", "quarantine")
"""The rungs of the recovery ladder, in order (docs/health.md)."""

RECOVERY_OUTCOMES = ("recovered", "failed", "skipped")
"""recovered: the device answered afterwards. failed: it did not. skipped: it could not be done here."""

ALERT_KINDS = ("webhook", "command")
"""webhook: a POST of JSON. command: a program of the controller's host, JSON on its input."""

DELIVERY_OUTCOMES = ("delivered", "given-up")
"""delivered: taken by whom it was for. given-up: refused until the budget of retries was used up."""


class ReservationRow(Base):
    """A person's hold of a device, at most one each; over when ``until_wall_ns`` (database's clock) is past.

    ``lets_finish``: a job that ran when it began may end first; else it is asked to stop.
    """

    __tablename__ = "reservations"

    device_id: Mapped[int] = mapped_column(Int64, ForeignKey("devices.id"), primary_key=True)
    holder: Mapped[str] = mapped_column(String(200))
    reason: Mapped[str | None]
    lets_finish: Mapped[bool]
    since_wall_ns: Mapped[int]
    until_wall_ns: Mapped[int]


class QuarantineRow(Base):
    """The farm's hold of a device that cannot be relied on: one row per device that ever was in quarantine.

    ``passes``: health checks passed in a row since. ``released_wall_ns`` NULL: it is in quarantine now.
    Times are the database's clock.
    """

    __tablename__ = "quarantines"

    device_id: Mapped[int] = mapped_column(Int64, ForeignKey("devices.id"), primary_key=True)
    cause: Mapped[str]
    since_wall_ns: Mapped[int]
    passes: Mapped[int]
    released_wall_ns: Mapped[int | None]
    released_by: Mapped[str | None]


class DeviceFailureRow(Base):
    """A device let a job down (database's clock): lost, its agent dead, its journal damaged."""

    __tablename__ = "device_failures"

    id: Mapped[Id]
    device_id: Mapped[DeviceId]
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))
    error: Mapped[Word]
    what: Mapped[str]
    wall_ns: Mapped[int]


class RecoveryStepRow(Base):
    """One step that was taken to get a device back (database's clock)."""

    __tablename__ = "recovery_steps"
    __table_args__ = (one_of("step", RECOVERY_STEPS), one_of("outcome", RECOVERY_OUTCOMES))

    id: Mapped[Id]
    device_id: Mapped[DeviceId]
    step: Mapped[Word]
    outcome: Mapped[Word]
    detail: Mapped[str]
    wall_ns: Mapped[int]


class HealthCheckRow(Base):
    """One health check of a device (database's clock); ``job_id`` NULL: it came to no job."""

    __tablename__ = "health_checks"

    id: Mapped[Id]
    device_id: Mapped[DeviceId]
    job_id: Mapped[str | None] = mapped_column(ForeignKey("jobs.id"))
    passed: Mapped[bool]
    wall_ns: Mapped[int]


class HealthResultRow(Base):
    """What one health check found of one thing."""

    __tablename__ = "health_results"
    __table_args__ = (one_of("verdict", RESULT_VERDICTS),)

    check_id: Mapped[int] = mapped_column(Int64, ForeignKey("health_checks.id"), primary_key=True)
    item: Mapped[str] = mapped_column(String(64), primary_key=True)
    verdict: Mapped[Word]
    required: Mapped[bool]
    detail: Mapped[str]


class AlertRow(Base):
    """Who is told of events of ``level`` and worse, and how far that is.

    ``target_json``: of a webhook ``{"url": …}`` or ``{"variable": …}`` (the environment variable that holds
    it), of a command its arguments. Every event up to ``cursor_event_id`` is settled; above it, those in
    ``alert_deliveries`` are. ``tries``, ``retry_wall_ns``, ``failing_since_wall_ns``: of the next one.
    ``busy_until_wall_ns``: one process delivers at a time. Times are the database's clock.
    """

    __tablename__ = "alerts"
    __table_args__ = (one_of("kind", ALERT_KINDS),)

    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    kind: Mapped[Word]
    target_json: Mapped[str]
    level: Mapped[Word]
    cursor_event_id: Mapped[int]
    tries: Mapped[int]
    retry_wall_ns: Mapped[int | None]
    failing_since_wall_ns: Mapped[int | None]
    last_problem: Mapped[str | None]
    busy_until_wall_ns: Mapped[int | None]
    created_wall_ns: Mapped[int]


class AlertDeliveryRow(Base):
    """One event that is settled for one alert (database's clock)."""

    __tablename__ = "alert_deliveries"
    __table_args__ = (one_of("outcome", DELIVERY_OUTCOMES),)

    alert: Mapped[str] = mapped_column(String(64), ForeignKey("alerts.name"), primary_key=True)
    event_id: Mapped[int] = mapped_column(Int64, ForeignKey("events.id"), primary_key=True)
    outcome: Mapped[Word]
    wall_ns: Mapped[int]
