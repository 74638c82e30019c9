"""Lab hosts."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Apply the revision."""
    op.create_table(
        "hosts",
        sa.Column("name", sa.String(length=64), nullable=False),
        sa.Column("state", sa.String(length=64), nullable=False),
        sa.Column("stifarm", sa.String(length=64), nullable=False),
        sa.Column("protocol", INT64, nullable=False),
        sa.Column("offer_json", sa.Text(), nullable=True),
        sa.Column("refused", sa.Text(), nullable=False),
        sa.Column("joined_wall_ns", INT64, nullable=True),
        sa.Column("last_seen_wall_ns", INT64, nullable=True),
        sa.CheckConstraint("state IN ('present', 'away', 'left', 'refused')", name=op.f("ck_hosts_state")),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_hosts")),
    )
