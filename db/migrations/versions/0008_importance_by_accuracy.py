"""Correct rows of each half of an importance score."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply the revision."""
    count = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.add_column("importance_scores", sa.Column("half_a_correct", count, nullable=True))
