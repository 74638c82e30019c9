"""Cells keep |S| as the campaign says it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply the revision."""
    op.add_column("campaign_cells", sa.Column("preload", sa.String(length=64), nullable=True))
