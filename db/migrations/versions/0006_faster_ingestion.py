"""What an attempt's journal holds stands on the attempt; samples refer to their record alone; requests are
measured from an index."""

from __future__ import annotations

import re

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
SAMPLES = ("io_samples", "compute_samples", "fixed_samples")
MEASURED = ("run_id", "warmup", "valid", "latency_ns", "stall_ns", "storage_bytes", "planned_bytes",
            "mode_asked", "mode_proven")  # fmt: skip
COPIES = ("device_id", "bundle_digest")
"""Columns of samples that are copied from their record's job."""

_OF_ATTEMPT = "FROM journal_records j WHERE j.job_id = attempts.job_id AND j.attempt = attempts.number"
_PROGRESS = f"""
UPDATE attempts SET
  records = (SELECT count(*) {_OF_ATTEMPT}),
  results = (SELECT count(*) {_OF_ATTEMPT} AND j.type = 'result' AND j.rejected IS NULL),
  failures = (SELECT count(*) {_OF_ATTEMPT} AND j.type = 'failure' AND j.rejected IS NULL),
  rejected = (SELECT count(*) {_OF_ATTEMPT} AND j.rejected IS NOT NULL),
  ended = EXISTS (SELECT 1 {_OF_ATTEMPT} AND j.type = 'end' AND j.rejected IS NULL),
  next_seq = CASE WHEN EXISTS (SELECT 1 {_OF_ATTEMPT} AND j.seq = 0) THEN
    (SELECT min(j.seq) + 1 {_OF_ATTEMPT} AND NOT EXISTS (
      SELECT 1 FROM journal_records k WHERE k.device_id = j.device_id AND k.job_id = j.job_id
      AND k.attempt = j.attempt AND k.seq = j.seq + 1))
  ELSE 0 END
"""


def upgrade() -> None:
    """Apply the revision."""
    for name in ("records", "next_seq", "results", "failures", "rejected"):
        op.add_column("attempts", sa.Column(name, INT64, nullable=False, server_default=sa.text("0")))
    op.add_column("attempts", sa.Column("ended", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.drop_index(op.f("ix_journal_records_job_id"), table_name="journal_records")
    op.create_index(
        op.f("ix_journal_records_job_id_attempt_unit"), "journal_records", ["job_id", "attempt", "unit"]
    )
    op.execute(_PROGRESS)
    op.create_index("ix_requests_measured", "requests", list(MEASURED))
    for table in SAMPLES:
        if op.get_bind().dialect.name == "sqlite":
            _rebuild_without(table, COPIES)
        else:
            for column in COPIES:
                op.drop_constraint(op.f(f"fk_{table}_{column}"), table, type_="foreignkey")


def _rebuild_without(table: str, columns: tuple[str, ...]) -> None:
    """SQLite drops no constraint: the table is made anew, without these references, and filled."""
    connection = op.get_bind()
    of_table = "FROM sqlite_master WHERE tbl_name = :table AND type = :type AND sql IS NOT NULL"
    made = connection.execute(
        sa.text(f"SELECT sql {of_table}"), {"table": table, "type": "table"}
    ).scalar_one()
    indexes = connection.execute(
        sa.text(f"SELECT sql {of_table}"), {"table": table, "type": "index"}
    ).scalars()
    again = list(indexes)
    for column in columns:
        reference = rf"\s*CONSTRAINT fk_{table}_{column} FOREIGN KEY\s*\({column}\) REFERENCES \w+ \(\w+\),"
        made, found = re.subn(reference, "", made)
        if found != 1:
            raise RuntimeError(f"{table} has no reference fk_{table}_{column} that could be dropped")
    op.execute(re.sub(rf"CREATE TABLE \"?{table}\"?", f"CREATE TABLE {table}_new", made, count=1))
    op.execute(f"INSERT INTO {table}_new SELECT * FROM {table}")
    op.drop_table(table)
    op.execute(f"ALTER TABLE {table}_new RENAME TO {table}")
    for statement in again:
        op.execute(statement)
