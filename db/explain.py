"""What databases report, in words: StoreError with a remedy."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DBAPIError, OperationalError

from db.errors import StoreError, StoreFullError, StoreUnreachableError
from sti_runtime.errors import StifarmError

BUSY_TIMEOUT_S = 30
"""How long a writer waits for another one's lock on a SQLite store."""


@contextmanager
def explained(place: str) -> Iterator[None]:
    """Turn what a database reports into StoreError with a remedy.

    Errors that mean a bug of ours (constraint violated, bad SQL) pass unchanged.
    """
    try:
        yield
    except (DBAPIError, sqlite3.Error) as error:
        known = _explain(error, place)
        if known is None:
            raise
        raise known from error


_SQLITE_CAUSES: tuple[tuple[str, str, str], ...] = (
    ("SQLITE_NOTADB", "is not a SQLite database, or its head is damaged", "Restore it from a backup."),
    (
        "SQLITE_CORRUPT",
        "is damaged",
        "Keep the file, then restore a backup made by `stifarm db backup`, or try `sqlite3 FILE .recover`.",
    ),
    (
        "SQLITE_READONLY",
        "cannot be written",
        "Make the file and its folder writable for this user, or set another store URL.",
    ),
    (
        "SQLITE_CANTOPEN",
        "cannot be opened or created",
        "Check that its folder exists and this user may write there, or set another store URL.",
    ),
    (
        "SQLITE_PERM",
        "may not be accessed",
        "Make the file and its folder writable for this user.",
    ),
    (
        "SQLITE_BUSY",
        f"has been locked by another process for {BUSY_TIMEOUT_S} s",
        "Wait for the other stifarm process or end it, then run the same command again.",
    ),
    ("SQLITE_LOCKED", "is locked", "Wait for the other stifarm process, then run the same command again."),
    (
        "SQLITE_IOERR",
        "failed to read or write",
        "Check the disk (dmesg, free space); nothing half-written was kept. Then run the same command again.",
    ),
)


_SQLITE_FULL = ("SQLITE_FULL", "SQLITE_IOERR_SHMSIZE")
"""No room for the database or its log, or for the index of the log, which even a reader makes."""

_SQLITE_LOCKED = ("SQLITE_BUSY", "SQLITE_LOCKED")
"""Somebody else writes: another try may find it free."""

_AWAY = ("08", "57P0")
"""SQLSTATE classes of a connection that failed and of a server that stops, crashed or starts."""

_REFUSED = ("28", "3D")
_REFUSED_WORDS = ("authentication failed", "does not exist", "no pg_hba.conf entry", "no password supplied")
"""A wrong user, password or database: no use to try again. (No SQLSTATE comes with a connection refused.)"""


def _explain(error: DBAPIError | sqlite3.Error, place: str) -> StifarmError | None:
    # SQLAlchemy passes through what SQLite says while a connection is being set up.
    cause = error.orig if isinstance(error, DBAPIError) else error
    if isinstance(cause, sqlite3.Error):
        name = getattr(cause, "sqlite_errorname", None) or ""
        if name in _SQLITE_FULL:
            return StoreFullError(
                f"The store {place} cannot grow: the disk is full.",
                "Free some space and run the same command again; nothing half-written was kept.",
            )
        for prefix, what, remedy in _SQLITE_CAUSES:
            if name.startswith(prefix):
                kind = StoreUnreachableError if prefix in _SQLITE_LOCKED else StoreError
                return kind(f"The store {place} {what} ({cause}).", remedy)
        return None
    lost = isinstance(error, DBAPIError) and error.connection_invalidated
    if not isinstance(error, OperationalError) and not lost:
        return None
    state = getattr(cause, "sqlstate", None) or ""
    first = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
    if state == "53100":
        return StoreFullError(
            f"The store {place} cannot grow: the server's disk is full ({first}).",
            "Free some space on the database server and run the same command again.",
        )
    refused = state.startswith(_REFUSED) or any(word in str(cause) for word in _REFUSED_WORDS)
    away = lost or state.startswith(_AWAY) or not state
    kind = StoreUnreachableError if away and not refused else StoreError
    return kind(
        f"The store {place} cannot be reached or failed: {first}.",
        "Check that the PostgreSQL server runs, that host, database, user and password are right, "
        "then run the same command again.",
    )
