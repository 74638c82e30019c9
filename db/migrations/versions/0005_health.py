"""Reservations, quarantine, health checks, recovery steps, alerts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _device(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name=op.f(f"fk_{table}_device_id"))


def _job(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f(f"fk_{table}_job_id"))


def _one_of(table: str, column: str, *values: str) -> sa.CheckConstraint:
    listed = ", ".join(f"'{value}'" for value in values)
    return sa.CheckConstraint(f"{column} IN ({listed})", name=op.f(f"ck_{table}_{column}"))


def upgrade() -> None:
    """Apply the revision."""
    op.create_table(
        "reservations",
        sa.Column("device_id", INT64, nullable=False),
        sa.Column("holder", sa.String(length=200), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("lets_finish", sa.Boolean(), nullable=False),
        sa.Column("since_wall_ns", INT64, nullable=False),
        sa.Column("until_wall_ns", INT64, nullable=False),
        _device("reservations"),
        sa.PrimaryKeyConstraint("device_id", name=op.f("pk_reservations")),
    )
    op.create_table(
        "quarantines",
        sa.Column("device_id", INT64, nullable=False),
        sa.Column("cause", sa.Text(), nullable=False),
        sa.Column("since_wall_ns", INT64, nullable=False),
        sa.Column("passes", INT64, nullable=False),
        sa.Column("released_wall_ns", INT64, nullable=True),
        sa.Column("released_by", sa.Text(), nullable=True),
        _device("quarantines"),
        sa.PrimaryKeyConstraint("device_id", name=op.f("pk_quarantines")),
    )
    op.create_table(
        "device_failures",
        sa.Column("id", INT64, nullable=False),
        sa.Column("device_id", INT64, nullable=False),
        sa.Column("job_id", sa.String(length=64), nullable=True),
        sa.Column("error", sa.String(length=64), nullable=False),
        sa.Column("what", sa.Text(), nullable=False),
        sa.Column("wall_ns", INT64, nullable=False),
        _device("device_failures"),
        _job("device_failures"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_device_failures")),
    )
    op.create_index(op.f("ix_device_failures_device_id"), "device_failures", ["device_id"], unique=False)
    op.create_table(
        "recovery_steps",
        sa.Column("id", INT64, nullable=False),
        sa.Column("device_id", INT64, nullable=False),
        sa.Column("step", sa.String(length=64), nullable=False),
        sa.Column("outcome", sa.String(length=64), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("wall_ns", INT64, nullable=False),
        _one_of("recovery_steps", "step", "reconnect", "fresh-server", "reboot", "quarantine"),
        _one_of("recovery_steps", "outcome", "recovered", "failed", "skipped"),
        _device("recovery_steps"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_recovery_steps")),
    )
    op.create_index(op.f("ix_recovery_steps_device_id"), "recovery_steps", ["device_id"], unique=False)
    op.create_table(
        "health_checks",
        sa.Column("id", INT64, nullable=False),
        sa.Column("device_id", INT64, nullable=False),
        sa.Column("job_id", sa.String(length=64), nullable=True),
        sa.Column("passed", sa.Boolean(), nullable=False),
        sa.Column("wall_ns", INT64, nullable=False),
        _device("health_checks"),
        _job("health_checks"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_health_checks")),
    )
    op.create_index(op.f("ix_health_checks_device_id"), "health_checks", ["device_id"], unique=False)
    op.create_table(
        "health_results",
        sa.Column("check_id", INT64, nullable=False),
        sa.Column("item", sa.String(length=64), nullable=False),
        sa.Column("verdict", sa.String(length=64), nullable=False),
        sa.Column("required", sa.Boolean(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        _one_of("health_results", "verdict", "pass", "fail", "ungated"),
        sa.ForeignKeyConstraint(["check_id"], ["health_checks.id"], name=op.f("fk_health_results_check_id")),
        sa.PrimaryKeyConstraint("check_id", "item", name=op.f("pk_health_results")),
    )
    op.create_table(
        "alerts",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=64), nullable=False),
        sa.Column("target_json", sa.Text(), nullable=False),
        sa.Column("level", sa.String(length=64), nullable=False),
        sa.Column("cursor_event_id", INT64, nullable=False),
        sa.Column("tries", INT64, nullable=False),
        sa.Column("retry_wall_ns", INT64, nullable=True),
        sa.Column("failing_since_wall_ns", INT64, nullable=True),
        sa.Column("last_problem", sa.Text(), nullable=True),
        sa.Column("busy_until_wall_ns", INT64, nullable=True),
        sa.Column("created_wall_ns", INT64, nullable=False),
        _one_of("alerts", "kind", "webhook", "command"),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_alerts")),
    )
    op.create_table(
        "alert_deliveries",
        sa.Column("alert", sa.String(length=64), nullable=False),
        sa.Column("event_id", INT64, nullable=False),
        sa.Column("outcome", sa.String(length=64), nullable=False),
        sa.Column("wall_ns", INT64, nullable=False),
        _one_of("alert_deliveries", "outcome", "delivered", "given-up"),
        sa.ForeignKeyConstraint(["alert"], ["alerts.name"], name=op.f("fk_alert_deliveries_alert")),
        sa.ForeignKeyConstraint(["event_id"], ["events.id"], name=op.f("fk_alert_deliveries_event_id")),
        sa.PrimaryKeyConstraint("alert", "event_id", name=op.f("pk_alert_deliveries")),
    )
