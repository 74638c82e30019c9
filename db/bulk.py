"""Many rows of one table at once: past the ORM, the compiler and a statement for each row.

A sample row costs what the database needs for it and little more: SQLite runs one prepared statement over
tuples, PostgreSQL takes them in by COPY.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from db.models import Base

Values = tuple[Any, ...]


@dataclass(frozen=True)
class Columns:
    """Columns of a table in the order in which ``insert_rows`` is given their values."""

    table: type[Base]
    names: tuple[str, ...]

    @cached_property
    def insert(self) -> str:
        """The statement for one row, as SQLite's driver wants it."""
        places = ", ".join("?" * len(self.names))
        return f"INSERT INTO {self._target} VALUES ({places})"

    @cached_property
    def copy(self) -> str:
        """The statement for all rows, as PostgreSQL wants it."""
        return f"COPY {self._target} FROM STDIN"

    @property
    def _target(self) -> str:
        return f"{self.table.__tablename__} ({', '.join(self.names)})"


def insert_rows(session: Session, columns: Columns, rows: Sequence[Values]) -> None:
    """Insert rows in the session's transaction. Raises: DBAPIError as the session's own statements do."""
    if not rows:
        return
    connection = session.connection()
    if connection.dialect.name == "postgresql":
        _copy(connection, columns.copy, rows)
    else:
        connection.exec_driver_sql(columns.insert, list(rows))


def _copy(connection: Connection, statement: str, rows: Iterable[Values]) -> None:
    driver: Any = connection.connection
    dialect = connection.dialect
    errors: Any = dialect.dbapi
    try:
        with driver.cursor() as cursor, cursor.copy(statement) as target:
            for row in rows:
                target.write_row(row)
    except errors.Error as error:
        # SQLAlchemy has no COPY; what it does with errors of its own statements is done here.
        lost = dialect.is_disconnect(error, driver, None)
        wrapped = DBAPIError.instance(
            statement, None, error, errors.Error, connection_invalidated=lost, dialect=dialect
        )
        if lost:
            connection.invalidate(error)
        raise wrapped from error
