"""The database's clock, which hosts whose own clocks differ agree on."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import text
from sqlalchemy.orm import Session

_CLOCKS = {
    "sqlite": "SELECT CAST(ROUND((julianday('now') - 2440587.5) * 86400000.0) AS INTEGER) * 1000000",
    "postgresql": "SELECT CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS BIGINT) * 1000",
}


def database_wall_ns(session: Session) -> int:
    """The database's wall clock, in ns since the epoch (resolution: SQLite 1 ms, PostgreSQL 1 µs)."""
    return int(session.execute(text(_CLOCKS[session.get_bind().dialect.name])).scalar_one())


def utc_text(wall_ns: int) -> str:
    """A moment for people: ``2026-03-01 14:05 UTC``."""
    return f"{datetime.fromtimestamp(wall_ns // 10**9, UTC):%Y-%m-%d %H:%M} UTC"
