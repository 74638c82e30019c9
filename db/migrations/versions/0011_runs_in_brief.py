"""A run holds its requests' figures in brief, for plan queries."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

_FIGURES = sa.text(
    "SELECT run_id, warmup, valid, latency_ns, stall_ns, storage_bytes, planned_bytes,"
    " mode_asked, mode_proven"
    " FROM requests WHERE run_id > :after AND run_id <= :upto ORDER BY run_id, ordinal"
)
_MANY = 1000  # runs read at once


def upgrade() -> None:
    """Apply the revision."""
    op.add_column("runs", sa.Column("measured_json", sa.Text(), nullable=False, server_default="{}"))
    connection = op.get_bind()
    last = connection.execute(sa.text("SELECT coalesce(max(id), 0) FROM runs")).scalar_one()
    keep = sa.text("UPDATE runs SET measured_json = :brief WHERE id = :run")
    for after in range(0, last, _MANY):
        rows = connection.execute(_FIGURES, {"after": after, "upto": after + _MANY}).all()
        briefs = [
            {"run": run, "brief": _in_brief(list(requests))}
            for run, requests in groupby(rows, key=lambda row: row.run_id)
        ]
        if briefs:
            connection.execute(keep, briefs)


def _in_brief(requests: Sequence[Any]) -> str:
    counted = [each for each in requests if not each.warmup]
    valid = [each for each in counted if each.valid]
    modes = Counter((each.mode_asked, each.mode_proven) for each in counted)
    brief = {
        "latency_ns": [each.latency_ns for each in valid],
        "stall_ns": sum(each.stall_ns for each in valid),
        "storage_bytes": sorted(Counter(each.storage_bytes for each in valid).items()),
        "planned_bytes": sorted(Counter(each.planned_bytes for each in valid).items()),
        "invalid": len(counted) - len(valid),
        "modes": [(*mode, count) for mode, count in sorted(modes.items())],
    }
    return json.dumps(brief, sort_keys=True, separators=(",", ":"))
