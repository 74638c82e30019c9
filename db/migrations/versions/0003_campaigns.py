"""Campaigns, their runs, and schedules."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Apply the revision."""
    op.create_table(
        "campaigns",
        sa.Column("id", INT64, nullable=False),
        sa.Column("name", sa.String(length=200), nullable=False),
        sa.Column("spec_json", sa.Text(), nullable=False),
        sa.Column("spec_digest", sa.String(length=64), nullable=False),
        sa.Column("priority", INT64, nullable=False),
        sa.Column("deadline_ns", INT64, nullable=True),
        sa.Column("seed", INT64, nullable=False),
        sa.Column("created_wall_ns", INT64, nullable=False),
        sa.Column("updated_wall_ns", INT64, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_campaigns")),
        sa.UniqueConstraint("name", name=op.f("uq_campaigns_name")),
    )
    op.create_table(
        "schedules",
        sa.Column("id", INT64, nullable=False),
        sa.Column("campaign_id", INT64, nullable=False),
        sa.Column("cron", sa.Text(), nullable=False),
        sa.Column("timezone", sa.String(length=64), nullable=False),
        sa.Column("catch_up", sa.String(length=64), nullable=False),
        sa.Column("overlap", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=64), nullable=False),
        sa.Column("settled_wall_ns", INT64, nullable=False),
        sa.Column("created_wall_ns", INT64, nullable=False),
        sa.CheckConstraint("catch_up IN ('once', 'skip')", name=op.f("ck_schedules_catch_up")),
        sa.CheckConstraint("overlap IN ('skip', 'queue')", name=op.f("ck_schedules_overlap")),
        sa.CheckConstraint("state IN ('active', 'paused', 'removed')", name=op.f("ck_schedules_state")),
        sa.ForeignKeyConstraint(["campaign_id"], ["campaigns.id"], name=op.f("fk_schedules_campaign_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_schedules")),
        sa.UniqueConstraint("campaign_id", name=op.f("uq_schedules_campaign_id")),
    )
    op.create_table(
        "campaign_runs",
        sa.Column("id", INT64, nullable=False),
        sa.Column("campaign_id", INT64, nullable=False),
        sa.Column("schedule_id", INT64, nullable=True),
        sa.Column("number", INT64, nullable=False),
        sa.Column("trigger", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=64), nullable=False),
        sa.Column("cause", sa.Text(), nullable=True),
        sa.Column("due_wall_ns", INT64, nullable=False),
        sa.Column("deadline_wall_ns", INT64, nullable=True),
        sa.Column("started_wall_ns", INT64, nullable=True),
        sa.Column("ended_wall_ns", INT64, nullable=True),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'done', 'failed', 'cancelled', 'skipped')",
            name=op.f("ck_campaign_runs_state"),
        ),
        sa.CheckConstraint(
            "trigger IN ('manual', 'schedule', 'catch-up')", name=op.f("ck_campaign_runs_trigger")
        ),
        sa.ForeignKeyConstraint(["campaign_id"], ["campaigns.id"], name=op.f("fk_campaign_runs_campaign_id")),
        sa.ForeignKeyConstraint(["schedule_id"], ["schedules.id"], name=op.f("fk_campaign_runs_schedule_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_campaign_runs")),
        sa.UniqueConstraint("campaign_id", "number", name=op.f("uq_campaign_runs_campaign_id_number")),
        sa.UniqueConstraint(
            "schedule_id", "due_wall_ns", name=op.f("uq_campaign_runs_schedule_id_due_wall_ns")
        ),
    )
    op.create_index(op.f("ix_campaign_runs_state"), "campaign_runs", ["state"], unique=False)
    op.create_table(
        "campaign_batches",
        sa.Column("id", INT64, nullable=False),
        sa.Column("run_id", INT64, nullable=False),
        sa.Column("number", INT64, nullable=False),
        sa.Column("device", sa.String(length=200), nullable=True),
        sa.Column("kind", sa.String(length=64), nullable=False),
        sa.Column("bundle_digest", sa.String(length=64), nullable=True),
        sa.Column("task", sa.Text(), nullable=True),
        sa.Column("engine", sa.String(length=64), nullable=True),
        sa.Column("repeat", INT64, nullable=False),
        sa.Column("fresh", sa.Boolean(), nullable=False),
        sa.Column("state", sa.String(length=64), nullable=False),
        sa.Column("owner", sa.Text(), nullable=True),
        sa.Column("claimed_until_wall_ns", INT64, nullable=True),
        sa.Column("tries", INT64, nullable=False),
        sa.Column("not_before_wall_ns", INT64, nullable=False),
        sa.Column("cause", sa.Text(), nullable=True),
        sa.Column("started_wall_ns", INT64, nullable=True),
        sa.Column("ended_wall_ns", INT64, nullable=True),
        sa.CheckConstraint(
            "kind IN ('health', 'importance', 'profile', 'execute', 'evaluate')",
            name=op.f("ck_campaign_batches_kind"),
        ),
        sa.CheckConstraint("state IN ('queued', 'running', 'ended')", name=op.f("ck_campaign_batches_state")),
        sa.ForeignKeyConstraint(["run_id"], ["campaign_runs.id"], name=op.f("fk_campaign_batches_run_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_campaign_batches")),
        sa.UniqueConstraint("run_id", "number", name=op.f("uq_campaign_batches_run_id_number")),
    )
    op.create_index(
        "ix_campaign_batches_run_id_state_device",
        "campaign_batches",
        ["run_id", "state", "device"],
        unique=False,
    )
    op.create_table(
        "campaign_cells",
        sa.Column("id", INT64, nullable=False),
        sa.Column("run_id", INT64, nullable=False),
        sa.Column("batch_id", INT64, nullable=False),
        sa.Column("number", INT64, nullable=False),
        sa.Column("target", sa.String(length=64), nullable=True),
        sa.Column("target_ns", INT64, nullable=True),
        sa.Column("preload_bytes", INT64, nullable=True),
        sa.Column("policy", sa.String(length=64), nullable=True),
        sa.Column("state", sa.String(length=64), nullable=False),
        sa.Column("cause", sa.Text(), nullable=True),
        sa.Column("plan_digest", sa.String(length=64), nullable=True),
        sa.Column("job_id", sa.String(length=64), nullable=True),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'done', 'failed', 'skipped', 'infeasible', 'cancelled')",
            name=op.f("ck_campaign_cells_state"),
        ),
        sa.ForeignKeyConstraint(
            ["batch_id"], ["campaign_batches.id"], name=op.f("fk_campaign_cells_batch_id")
        ),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_campaign_cells_job_id")),
        sa.ForeignKeyConstraint(["run_id"], ["campaign_runs.id"], name=op.f("fk_campaign_cells_run_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_campaign_cells")),
        sa.UniqueConstraint("batch_id", "number", name=op.f("uq_campaign_cells_batch_id_number")),
    )
    op.create_index(op.f("ix_campaign_cells_job_id"), "campaign_cells", ["job_id"], unique=False)
    op.create_index(op.f("ix_campaign_cells_run_id"), "campaign_cells", ["run_id"], unique=False)
