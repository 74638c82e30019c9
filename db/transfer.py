"""Export of tables to files, and backup of a SQLite store."""

from __future__ import annotations

import csv
import json
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import IO, Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from db.errors import StoreError
from db.models import Base
from db.session import parse_url
from sti_runtime.errors import InputError, ResourceError

_ROWS_AT_ONCE = 1000


def tables() -> tuple[str, ...]:
    """Names of all tables that can be exported."""
    return tuple(sorted(Base.metadata.tables))


def export_table(session: Session, name: str, path: Path, format: str) -> int:
    """Write a table to ``path`` as "csv" or "json" (one array of objects); the number of rows.

    The file appears when it is complete. Raises: InputError; ResourceError when it cannot be written.
    """
    table = Base.metadata.tables.get(name)
    if table is None:
        raise InputError(f"The store has no table {name!r}.", f"It has: {', '.join(tables())}.")
    if format not in _WRITERS:
        raise InputError(f"Cannot export to {format!r}.", f"Formats: {', '.join(_WRITERS)}.")
    columns = [column.name for column in table.columns]
    query = select(table).order_by(*table.primary_key.columns).execution_options(yield_per=_ROWS_AT_ONCE)
    partial = path.with_name(path.name + ".part")
    try:
        with partial.open("w", newline="", encoding="utf-8") as stream:
            count = _WRITERS[format](stream, columns, session.execute(query))
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise ResourceError(
            f"{path}: the export cannot be written: {error.strerror}.",
            "Free some space or choose another folder.",
        ) from error
    return count


def backup(url: str, path: Path) -> None:
    """Copy a SQLite store, in use or not, to the new file ``path``, which appears when it is complete.

    Raises: InputError when ``path`` exists or the store is PostgreSQL; StoreError when it fails.
    """
    parsed = parse_url(url)
    if parsed.get_backend_name() != "sqlite":
        shown = parsed.set(drivername="postgresql").render_as_string(hide_password=True)
        raise InputError(
            "A PostgreSQL store is backed up by PostgreSQL's own tools.",
            f"Run: pg_dump --format=custom --file={path} '{shown}'",
        )
    source = Path(parsed.database or "")
    if path.exists():
        raise InputError(f"{path} exists already.", "Name a file that does not; backups are never replaced.")
    if not source.exists():
        raise InputError(f"{source}: there is no store to back up.", "Check the store's URL.")
    partial = path.with_name(path.name + ".part")
    try:
        with closing(sqlite3.connect(source)) as store, closing(sqlite3.connect(partial)) as copy:
            store.backup(copy)
        partial.rename(path)
    except (sqlite3.Error, OSError) as error:
        with suppress(OSError):
            partial.unlink()
        raise StoreError(
            f"The store {source} could not be copied to {path}: {error}.",
            "Free some space, or check that this user may write there.",
        ) from error


def _write_csv(stream: IO[str], columns: Sequence[str], rows: Iterable[Any]) -> int:
    writer = csv.writer(stream)
    writer.writerow(columns)
    count = 0
    for row in rows:
        writer.writerow(row)
        count += 1
    return count


def _write_json(stream: IO[str], columns: Sequence[str], rows: Iterable[Any]) -> int:
    stream.write("[")
    count = 0
    for row in rows:
        stream.write(",\n" if count else "\n")
        json.dump(dict(zip(columns, row, strict=True)), stream, ensure_ascii=False)
        count += 1
    stream.write("\n]\n")
    return count


_WRITERS: dict[str, Callable[[IO[str], Sequence[str], Iterable[Any]], int]] = {
    "csv": _write_csv,
    "json": _write_json,
}
