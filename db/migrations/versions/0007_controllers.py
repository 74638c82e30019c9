"""Controllers and their heartbeats."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Apply the revision."""
    op.create_table(
        "controllers",
        sa.Column("id", sa.String(length=36), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("home", sa.Text(), nullable=False),
        sa.Column("stifarm", sa.String(length=64), nullable=False),
        sa.Column("pid", INT64, nullable=False),
        sa.Column("started_wall_ns", INT64, nullable=False),
        sa.Column("heartbeat_wall_ns", INT64, nullable=False),
        sa.Column("ended_wall_ns", INT64, nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_controllers")),
        sa.UniqueConstraint("name", name=op.f("uq_controllers_name")),
    )
