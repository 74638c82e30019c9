"""Opening, creating and upgrading the store; sessions; database errors in words.

SQLite runs with WAL, foreign keys on and a busy timeout; a writing session takes the write lock when it
begins (a lock upgraded half-way cannot wait). PostgreSQL runs with its defaults.
"""

from __future__ import annotations

import sqlite3
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, inspect, select, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError
from sqlalchemy.orm import Session

from db.errors import StoreError, StoreVersionError
from db.explain import BUSY_TIMEOUT_S, explained
from db.models import StoreMetaRow
from db.views import drop_views, make_views
from sti_runtime.errors import InputError

KNOWN_REVISIONS = ("0001", "0002", "0003", "0004", "0005", "0006", "0007", "0008", "0009", "0010", "0011")
"""Schema revisions in order, as in migrations/versions; this program works with the last."""

READ_ONLY = "stifarm_read_only"
"""Execution option of connections that only read."""

_MIGRATION_LOCK = 0x5371_F0A2
_UPGRADE = "Run `stifarm db upgrade`."


@dataclass(frozen=True)
class Store:
    """An open store. ``store_id`` is half of every fencing token; ``url`` shows no password.

    ``patience`` is given what connects to a server at the beginning of each transaction, and may do it again
    when that fails; a transaction that has begun is never repeated.
    """

    url: str
    store_id: str
    engine: Engine
    patience: Callable[[Callable[[], Connection]], Connection] = field(default=lambda connect: connect())
    _reading: Engine = field(init=False, repr=False, compare=False)
    _reading_quickly: Engine = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        reading = self.engine.execution_options(**{READ_ONLY: True})
        quickly = reading
        if self.engine.dialect.name != "sqlite":
            quickly = reading.execution_options(isolation_level="AUTOCOMMIT")
        object.__setattr__(self, "_reading", reading)
        object.__setattr__(self, "_reading_quickly", quickly)

    @contextmanager
    def session(self) -> Iterator[Session]:
        """One writing transaction: committed at the end, rolled back on any error.

        Raises: StoreError when the database fails.
        """
        with (
            explained(self.url),
            self._connected(self.engine) as bind,
            Session(bind, expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session

    @contextmanager
    def reader(self, *, quick: bool = False) -> Iterator[Session]:
        """A read-only look; takes no write lock. Raises: as ``session``.

        Of a file at one moment; of a server each statement sees its own, as at its default level. ``quick``
        saves a server the transaction, which is two trips to it; for statements whose rows come at once.
        """
        engine = self._reading_quickly if quick else self._reading
        with (
            explained(self.url),
            self._connected(engine) as bind,
            Session(bind, expire_on_commit=False) as session,
        ):
            yield session

    @contextmanager
    def _connected(self, engine: Engine) -> Iterator[Engine | Connection]:
        """Where a transaction is made: a server's connection, once there is one; of a file, its engine."""

        def connect() -> Connection:
            with explained(self.url):
                return engine.connect()

        if engine.dialect.name == "sqlite":
            yield engine
            return
        with self.patience(connect) as connection:
            yield connection

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_store(url: str) -> Store:
    """Open the store at ``url``; a SQLite file that does not exist is created.

    Raises: InputError for a URL that is not one; StoreVersionError when the schema is older or newer than
    this program; StoreError when the database is damaged, unreachable or full.
    """
    parsed = parse_url(url)
    shown = parsed.render_as_string(hide_password=True)
    if _is_new_file(parsed):
        upgrade(url)
    engine = make_engine(parsed)
    try:
        with explained(shown), engine.execution_options(**{READ_ONLY: True}).connect() as connection:
            require_current(schema_state(connection), shown)
            store_id = connection.execute(select(StoreMetaRow.store_id)).scalar_one()
    except BaseException:
        engine.dispose()
        raise
    return Store(url=shown, store_id=store_id, engine=engine)


def upgrade(url: str) -> str:
    """Create the schema or bring it to this program's; safe to run twice and from two processes at once.

    Returns the revision. Raises: as ``open_store``.
    """
    parsed = parse_url(url)
    shown = parsed.render_as_string(hide_password=True)
    if parsed.get_backend_name() == "sqlite":
        _make_parent(Path(parsed.database or ""))
    engine = make_engine(parsed)
    try:
        with explained(shown):
            if engine.dialect.name == "sqlite":
                _enable_wal(engine)
            with engine.begin() as connection:
                _migrate(connection, shown)
    finally:
        engine.dispose()
    return KNOWN_REVISIONS[-1]


def schema_state(connection: Connection, known: Sequence[str] = KNOWN_REVISIONS) -> str:
    """What the database holds: "current", "older", "newer", "empty" or "foreign" (not a store)."""
    names = inspect(connection).get_table_names()
    if not names:
        return "empty"
    if "alembic_version" not in names or "store_meta" not in names:
        return "foreign"
    revision = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    if revision == known[-1]:
        return "current"
    return "older" if revision in known else "newer"


def parse_url(url: str) -> URL:
    """A validated SQLAlchemy URL; plain ``postgresql://`` means psycopg 3. Raises: InputError."""
    remedy = "Write it like sqlite:////path/to/store.sqlite or postgresql://user@host/stifarm."
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError) as error:
        raise InputError("The store's URL does not parse.", remedy) from error
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "sqlite+pysqlite", "postgresql+psycopg"):
        raise InputError(f"A store cannot be kept in {parsed.drivername!r}.", remedy)
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise InputError("A store in memory would be lost with the process.", remedy)
    return parsed


def sqlite_url(path: Path) -> str:
    """The URL of a SQLite store at ``path``."""
    return URL.create("sqlite", database=str(path.absolute())).render_as_string(hide_password=False)


def require_current(state: str, place: str) -> None:
    """Refuse a schema that is not this program's. Raises: StoreVersionError, StoreError."""
    if state == "current":
        return
    if state == "foreign":
        raise StoreError(
            f"The database {place} holds tables but is not a stifarm store.",
            "Set another store URL; nothing was changed.",
        )
    if state == "newer":
        raise StoreVersionError(
            f"The store {place} was made by a newer stifarm.",
            "Install that version here, or run `stifarm db upgrade` with it on every host; "
            "a store is never taken back.",
        )
    what = "has no schema yet" if state == "empty" else "has the schema of an older stifarm"
    raise StoreVersionError(f"The store {place} {what}.", _UPGRADE)


def _migrate(connection: Connection, place: str, revision: str = "head") -> None:
    # Alembic is slow to import and needed by this one verb only.
    from alembic import command
    from alembic.config import Config

    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
    state = schema_state(connection)
    if state in ("foreign", "newer"):
        require_current(state, place)
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.attributes["connection"] = connection
    drop_views(connection)
    command.upgrade(config, revision)
    if revision in ("head", KNOWN_REVISIONS[-1]):
        make_views(connection)
    if connection.execute(select(StoreMetaRow.id)).first() is None:
        connection.execute(
            StoreMetaRow.__table__.insert(),  # type: ignore[attr-defined]
            {"id": 1, "store_id": str(uuid.uuid4()), "created_wall_ns": time.time_ns()},
        )


def make_engine(url: URL) -> Engine:
    """An engine whose transactions are as the store wants them. Raises: InputError without the driver."""
    try:
        # A server that restarted has closed what the pool holds: it is asked first (SQLite: a local file).
        engine = create_engine(url, pool_pre_ping=url.get_backend_name() != "sqlite")
    except (ImportError, NoSuchModuleError) as error:
        raise InputError(
            f"No driver for {url.drivername!r} is installed.", "Install stifarm[postgres]."
        ) from error
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _: object) -> None:
    # The driver must not open transactions by itself: ``_begin_sqlite`` says which kind.
    connection.isolation_level = None
    for pragma in (
        f"busy_timeout = {BUSY_TIMEOUT_S * 1000}",
        "foreign_keys = ON",
        "synchronous = FULL",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    read_only = connection.get_execution_options().get(READ_ONLY, False)
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


def _enable_wal(engine: Engine) -> None:
    """Switch the file to WAL, which persists. SQLite does not wait for a lock here, so we do."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    connection = engine.raw_connection()
    try:
        while True:
            try:
                connection.cursor().execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                busy = error.sqlite_errorname.startswith(("SQLITE_BUSY", "SQLITE_LOCKED"))
                if not busy or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
    finally:
        connection.close()


def _is_new_file(url: URL) -> bool:
    """True when the SQLite file is missing, or holds no table (its creator was killed)."""
    if url.get_backend_name() != "sqlite" or str(url.database).startswith("file:"):
        return False
    path = Path(url.database or "")
    try:
        if not path.exists() or path.stat().st_size == 0:
            return True
    except OSError as error:
        raise StoreError(
            f"The store {path} cannot be looked at: {error.strerror}.",
            "Check that this user may enter its folder, or set another store URL.",
        ) from error
    engine = make_engine(url)
    try:
        with (
            explained(str(path)),
            engine.execution_options(**{READ_ONLY: True}).connect() as connection,
        ):
            return schema_state(connection) == "empty"
    finally:
        engine.dispose()


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"The folder of the store, {path.parent}, cannot be made: {error.strerror}.",
            "Make it writable for this user, or set another store URL.",
        ) from error
