"""INSERT … ON CONFLICT DO NOTHING on either database."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import InstrumentedAttribute, Session

from db.models import Base


def insert_new(
    session: Session, table: type[Base], row: Mapping[str, Any], returning: InstrumentedAttribute[int]
) -> int | None:
    """Insert ``row`` unless one with a key of it is there; the ``returning`` column, None if not inserted.

    A row that a concurrent transaction is inserting is waited for.
    """
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    statement = insert(table).on_conflict_do_nothing().values(**row).returning(returning)
    return session.execute(statement).scalar_one_or_none()


def save_new(session: Session, table: type[Base], row: Mapping[str, Any]) -> None:
    """Insert ``row`` unless one with a key of it is there already."""
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    session.execute(insert(table).on_conflict_do_nothing().values(**row))
