"""Summaries of compacted samples, borrowed profiles, and which job a profile is fitted from."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
QUESTION = (
    "device_id", "task", "policy", "target_ns", "preload_bytes", "working_bytes", "planned_wall_ns",
)  # fmt: skip

_BORROWED = """
UPDATE plans SET borrowed = true WHERE EXISTS (
  SELECT 1 FROM device_profiles f WHERE f.id = plans.device_profile_id AND f.device_id <> plans.device_id)
"""
_JOBS = """
UPDATE device_profiles SET job_id = (
  SELECT min(j.job_id) FROM journal_records j
  WHERE j.device_id = device_profiles.device_id AND j.type = 'result' AND j.rejected IS NULL
  AND j.ingested_wall_ns = device_profiles.measured_wall_ns)
"""
"""A profile's newest sample was ingested at the very ns that the profile names."""


def upgrade() -> None:
    """Apply the revision."""
    op.create_table(
        "sample_summaries",
        sa.Column("id", INT64, nullable=False),
        sa.Column("journal_id", INT64, nullable=False),
        sa.Column("kind", sa.String(length=64), nullable=False),
        sa.Column("quantity", sa.String(length=64), nullable=False),
        sa.Column("device_id", INT64, nullable=False),
        sa.Column("bundle_digest", sa.String(length=64), nullable=False),
        sa.Column("engine", sa.String(length=64), nullable=False),
        sa.Column("emulated", sa.Boolean(), nullable=False),
        sa.Column("warmup", sa.Boolean(), nullable=False),
        sa.Column("valid", sa.Boolean(), nullable=False),
        sa.Column("reasons_json", sa.Text(), nullable=False),
        sa.Column("beside_compute", sa.Boolean(), nullable=True),
        sa.Column("versions", INT64, nullable=True),
        sa.Column("width", INT64, nullable=True),
        sa.Column("fidelity", INT64, nullable=True),
        sa.Column("count", INT64, nullable=False),
        sa.Column("min_ns", INT64, nullable=False),
        sa.Column("mean_ns", INT64, nullable=False),
        sa.Column("median_ns", INT64, nullable=False),
        sa.Column("median_low_ns", INT64, nullable=True),
        sa.Column("median_high_ns", INT64, nullable=True),
        sa.Column("p95_ns", INT64, nullable=False),
        sa.Column("max_ns", INT64, nullable=False),
        sa.Column("compacted_wall_ns", INT64, nullable=False),
        sa.CheckConstraint(
            "kind IN ('io', 'compute', 'fixed', 'request')", name=op.f("ck_sample_summaries_kind")
        ),
        sa.CheckConstraint(
            "quantity IN ('duration', 'decompress', 'compute', 'embed_io', 'embed_compute', 'head',"
            " 'latency', 'stall')",
            name=op.f("ck_sample_summaries_quantity"),
        ),
        sa.ForeignKeyConstraint(
            ["bundle_digest"], ["bundles.digest"], name=op.f("fk_sample_summaries_bundle_digest")
        ),
        sa.ForeignKeyConstraint(["device_id"], ["devices.id"], name=op.f("fk_sample_summaries_device_id")),
        sa.ForeignKeyConstraint(
            ["journal_id"], ["journal_records.id"], name=op.f("fk_sample_summaries_journal_id")
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sample_summaries")),
    )
    op.create_index("ix_sample_summaries_journal_id", "sample_summaries", ["journal_id"], unique=False)
    op.create_index(op.f("ix_sample_summaries_device_id"), "sample_summaries", ["device_id"], unique=False)
    op.add_column("journal_records", sa.Column("compacted_wall_ns", INT64, nullable=True))
    op.add_column("plans", sa.Column("borrowed", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_index("ix_plans_question", "plans", list(QUESTION), unique=False)
    # As text: SQLite takes a reference with a new column only, and only in the column itself.
    name = "CONSTRAINT fk_device_profiles_job_id " if op.get_bind().dialect.name == "postgresql" else ""
    op.execute(f"ALTER TABLE device_profiles ADD COLUMN job_id VARCHAR(64) {name}REFERENCES jobs (id)")
    op.create_index(op.f("ix_device_profiles_job_id"), "device_profiles", ["job_id"], unique=False)
    op.execute(_BORROWED)
    op.execute(_JOBS)
