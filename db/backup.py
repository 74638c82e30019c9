"""Backup of a store of either kind to one file, and restoring from it.

A backup is a SQLite store: it can be opened as such, and restored into either kind of database. Both ways
every row is read again afterwards: counts and digests of all tables must agree, or nothing is kept.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, RowMapping, Table, delete, func, insert, select, text, update

from db.documents import now_wall_ns
from db.errors import StoreError
from db.explain import explained
from db.models import Base, EventRow, LeaseRow, StoreMetaRow
from db.session import READ_ONLY, make_engine, parse_url, require_current, schema_state, sqlite_url, upgrade
from sti_runtime.errors import InputError

COUNTER_STEP = 1_000_000
"""By how much a restore raises every fencing counter: the devices may have seen leases that were granted
after the backup, and refuse any that is not higher."""

_ROWS_AT_ONCE = 2000
_MODULUS = 1 << 256


@dataclass(frozen=True)
class TableDigest:
    """What a table holds: how many rows, and the sum of their SHA-256 (so that order does not matter)."""

    rows: int
    digest: str


Contents = Mapping[str, TableDigest]
"""By table."""


def backup(url: str, path: Path) -> Contents:
    """Copy a store, in use or not, to the new file ``path``, which appears when it is complete and verified.

    All of it is of one moment. Raises: InputError when ``path`` exists or there is no store;
    StoreVersionError when its schema is not this program's; StoreError when it fails.
    """
    parsed = parse_url(url)
    shown = parsed.render_as_string(hide_password=True)
    if path.exists():
        raise InputError(f"{path} exists already.", "Name a file that does not; backups are never replaced.")
    if parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").exists():
        raise InputError(f"{parsed.database}: there is no store to back up.", "Check the store's URL.")
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with explained(shown), _connected(url, reading=True) as source:
            require_current(schema_state(source), shown)
            if source.dialect.name == "sqlite":
                contents = _copy_pages(source, partial)
            else:
                contents = _copy_to_file(source, partial)
        _require_same(contents, contents_of(sqlite_url(partial)), f"the copy of {shown}")
        partial.rename(path)
    except (sqlite3.Error, OSError) as error:
        raise StoreError(
            f"The store {shown} could not be copied to {path}: {error}.",
            "Free some space, or check that this user may write there.",
        ) from error
    finally:
        for name in (partial.name, f"{partial.name}-wal", f"{partial.name}-shm"):
            with suppress(OSError):
                partial.with_name(name).unlink()
    return contents


def restore(url: str, path: Path) -> Contents:
    """Fill the empty store at ``url`` (made if there is none) with a backup, in one transaction.

    It becomes the store that was backed up, by its id too: the old one must not be used any more. Leases are
    free, under counters raised by ``COUNTER_STEP``. Raises: InputError when the store holds anything or
    ``path`` is no file; StoreVersionError when either schema is not this program's; StoreError.
    """
    if not path.is_file():
        raise InputError(f"{path}: there is no backup.", "Name a file that `stifarm db backup` made.")
    shown = parse_url(url).render_as_string(hide_password=True)
    with explained(str(path)), _connected(sqlite_url(path), reading=True) as source:
        require_current(schema_state(source), str(path))
        _require_empty(url, shown)
        with explained(shown), _connected(url) as target:
            _lock_all(target)
            if not _is_empty(target):
                raise _not_empty(shown)
            target.execute(delete(StoreMetaRow))
            contents = _copy_rows(source, target)
            _require_same(contents, _digests(target), shown)
            _take_over(target, path)
    return contents


def contents_of(url: str) -> Contents:
    """Counts and digests of all tables of a store."""
    with _connected(url, reading=True) as connection:
        return _digests(connection)


# ------------------------------------------------------------------ copying


def _copy_pages(source: Connection, partial: Path) -> Contents:
    """SQLite to SQLite, page by page, under the read transaction that ``source`` has begun."""
    found = _digests(source)
    driver = source.connection.dbapi_connection
    assert isinstance(driver, sqlite3.Connection)
    with closing(sqlite3.connect(partial)) as copy:
        driver.backup(copy)
        said = copy.execute("PRAGMA integrity_check").fetchone()[0]
    if said != "ok":
        raise StoreError(
            f"The copy of the store is damaged: {said}.", "Check the disk (dmesg), then try again."
        )
    return found


def _copy_to_file(source: Connection, partial: Path) -> Contents:
    upgrade(sqlite_url(partial))
    with _connected(sqlite_url(partial)) as copy:
        copy.execute(delete(StoreMetaRow))
        return _copy_rows(source, copy)


def _copy_rows(source: Connection, target: Connection) -> Contents:
    """All rows of all tables; what they were."""
    found = {}
    for table in Base.metadata.sorted_tables:

        def keep(rows: Sequence[RowMapping], table: Table = table) -> None:
            target.execute(insert(table), [dict(row) for row in rows])

        found[table.name] = _read(source, table, keep)
    return found


def _digests(connection: Connection) -> Contents:
    return {table.name: _read(connection, table, lambda _: None) for table in Base.metadata.sorted_tables}


def _read(connection: Connection, table: Table, keep: Callable[[Sequence[RowMapping]], None]) -> TableDigest:
    count = total = 0
    query = select(table).execution_options(yield_per=_ROWS_AT_ONCE)
    for rows in connection.execute(query).mappings().partitions():
        keep(rows)
        count += len(rows)
        for row in rows:
            total += int.from_bytes(hashlib.sha256(repr(tuple(row.values())).encode()).digest())
    return TableDigest(count, f"{total % _MODULUS:064x}")


def _require_same(wanted: Contents, found: Contents, place: str) -> None:
    wrong = [name for name, content in wanted.items() if found[name] != content]
    if wrong:
        raise StoreError(
            f"What was written to {place} is not what was read, in: {', '.join(wrong)}. Nothing was kept.",
            "Check disk and memory of this host (dmesg), then try again.",
        )


# ------------------------------------------------------------------ the store that is restored


def _require_empty(url: str, shown: str) -> None:
    """Make the schema where there is none. Raises: InputError, StoreVersionError."""
    parsed = parse_url(url)
    fresh = parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").exists()
    if not fresh:
        with explained(shown), _connected(url, reading=True) as connection:
            state = schema_state(connection)
            if state != "empty":
                require_current(state, shown)
                if not _is_empty(connection):
                    raise _not_empty(shown)
                return
    upgrade(url)


def _is_empty(connection: Connection) -> bool:
    tables = [table for table in Base.metadata.sorted_tables if table.name != StoreMetaRow.__tablename__]
    return not any(connection.execute(select(table).limit(1)).first() for table in tables)


def _not_empty(shown: str) -> InputError:
    return InputError(
        f"The store {shown} holds data already; a restore never replaces any.",
        "Name a new file or an empty database: stifarm --db-url URL db restore BACKUP.",
    )


def _lock_all(target: Connection) -> None:
    """Keep others from writing meanwhile (a SQLite transaction that writes does so already)."""
    if target.dialect.name == "postgresql":
        names = ", ".join(f'"{table.name}"' for table in Base.metadata.sorted_tables)
        target.execute(text(f"LOCK TABLE {names} IN EXCLUSIVE MODE"))


def _take_over(target: Connection, path: Path) -> None:
    """What must differ from the backup: leases, numbering, and an event that tells of it."""
    target.execute(
        update(LeaseRow).values(owner=None, expires_wall_ns=None, counter=LeaseRow.counter + COUNTER_STEP)
    )
    if target.dialect.name == "postgresql":
        for table in Base.metadata.sorted_tables:
            if (
                "id" in table.columns
                and table.columns["id"].autoincrement
                and table.columns["id"].primary_key
            ):
                _number_on(target, table)
    what = f"Restored from {path.name}; leases were freed, their counters raised by {COUNTER_STEP}."
    row = {"wall_ns": now_wall_ns(), "level": "warning", "kind": "store-restored", "what": what}
    target.execute(insert(EventRow), row)


def _number_on(target: Connection, table: Table) -> None:
    """The table's next row gets the next number."""
    sequence = target.execute(select(func.pg_get_serial_sequence(table.name, "id"))).scalar()
    if sequence is not None:
        highest = select(func.coalesce(func.max(table.c.id), 0) + 1).scalar_subquery()
        target.execute(select(func.setval(sequence, highest, False)))


@contextmanager
def _connected(url: str, *, reading: bool = False) -> Iterator[Connection]:
    """One transaction; a reading one sees one moment, takes no write lock and is not committed."""
    engine = make_engine(parse_url(url))
    try:
        if not reading:
            with engine.begin() as connection:
                yield connection
            return
        options: dict[str, Any] = {READ_ONLY: True}
        if engine.dialect.name == "postgresql":
            options |= {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        with engine.execution_options(**options).connect() as connection:
            yield connection
    finally:
        engine.dispose()
