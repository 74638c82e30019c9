"""Which device an importance score was measured on."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Apply the revision."""
    op.add_column("importance_scores", sa.Column("device", sa.Text(), nullable=True))
