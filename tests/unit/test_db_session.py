"""Opening stores that are missing, damaged, locked, full or not ours."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import text

import db.session
from db.errors import StoreError, StoreFullError, StoreUnreachableError, StoreVersionError
from db.events import record_event
from db.session import KNOWN_REVISIONS, open_store, parse_url, schema_state, sqlite_url, upgrade
from sti_runtime.errors import InputError


def test_known_revisions_are_the_migrations() -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(db.session.__file__).parent / "migrations"))
    revisions = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    assert tuple(reversed(revisions)) == KNOWN_REVISIONS


def test_missing_file_is_created_with_wal_and_kept(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "new folder" / "a%20b?.sqlite")
    with open_store(url) as store:
        first = store.store_id
        with store.reader() as session:
            assert session.execute(text("PRAGMA journal_mode")).scalar() == "wal"
            assert session.execute(text("PRAGMA foreign_keys")).scalar() == 1
            assert session.execute(text("PRAGMA busy_timeout")).scalar() == 30_000
    assert (tmp_path / "new folder" / "a%20b?.sqlite").exists()
    with open_store(url) as store:
        assert store.store_id == first


def test_file_whose_creator_was_killed_is_finished(tmp_path: Path) -> None:
    empty = tmp_path / "empty.sqlite"
    empty.touch()
    headed = tmp_path / "headed.sqlite"
    with closing(sqlite3.connect(headed)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    assert headed.stat().st_size > 0
    for path in (empty, headed):
        with open_store(sqlite_url(path)) as store:
            assert store.store_id


def test_schema_states(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "s.sqlite")
    with open_store(url) as store, store.engine.connect() as connection:
        assert schema_state(connection) == "current"
        assert schema_state(connection, (*KNOWN_REVISIONS, "9999")) == "older"
        assert schema_state(connection, ("0000",)) == "newer"


def test_store_without_schema_names_the_verb() -> None:
    for state, what in (("older", "an older stifarm"), ("empty", "no schema yet")):
        with pytest.raises(StoreVersionError, match=what) as caught:
            db.session.require_current(state, "here")
        assert "stifarm db upgrade" in str(caught.value)


@pytest.mark.parametrize(
    "url", ["nonsense", "mysql://host/x", "sqlite://", "sqlite:///:memory:", "oracle+foo://x"]
)
def test_urls_that_are_not_a_store(url: str) -> None:
    with pytest.raises(InputError, match=r"sqlite:////path"):
        open_store(url)


def test_postgres_urls_mean_psycopg_and_hide_the_password() -> None:
    assert parse_url("postgresql://u:secret@h/d").drivername == "postgresql+psycopg"
    unreachable = f"postgresql://u:secret@127.0.0.1:{9}/d?connect_timeout=2"
    with pytest.raises(StoreUnreachableError, match="cannot be reached") as caught:
        open_store(unreachable)
    assert "secret" not in str(caught.value)
    assert "PostgreSQL server runs" in caught.value.remedy


def test_not_a_database(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("no database at all, and long enough to have a header. " * 40)
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"notes\.txt is not a SQLite database") as caught:
        open_store(sqlite_url(path))
    assert "backup" in caught.value.remedy
    with pytest.raises(StoreError, match="not a SQLite database"):
        upgrade(sqlite_url(path))
    assert path.read_bytes() == before


def test_damaged_store(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    open_store(sqlite_url(path)).close()
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"s\.sqlite is damaged") as caught:
        open_store(sqlite_url(path))
    assert "backup" in caught.value.remedy


def test_full_disk_loses_nothing(tmp_path: Path) -> None:
    # SQLite reports its page limit as it does a full disk: SQLITE_FULL.
    with open_store(sqlite_url(tmp_path / "s.sqlite")) as store:
        with store.session() as session:
            record_event(session, "info", "kept", "before")
            pages = session.execute(text("PRAGMA page_count")).scalar_one()
        with store.session() as session:
            session.execute(text(f"PRAGMA max_page_count = {pages}"))
        with pytest.raises(StoreFullError, match="disk is full") as caught, store.session() as session:
            record_event(session, "info", "big", "x" * 1_000_000)
        assert "nothing half-written" in caught.value.remedy
        with store.session() as session:
            session.execute(text("PRAGMA max_page_count = 1000000"))
            record_event(session, "info", "kept", "after")
        with store.reader() as session:
            kinds = session.execute(text("SELECT kind FROM events")).scalars().all()
            assert kinds == ["kept", "kept"]


def test_locked_store_says_so(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    with open_store(sqlite_url(path)) as store:
        with store.reader() as session:
            session.execute(text("PRAGMA busy_timeout = 50"))
        with closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with (
                pytest.raises(StoreUnreachableError, match="locked by another process"),
                store.session() as session,
            ):
                record_event(session, "info", "x", "y")
            with store.reader() as session:
                assert session.execute(text("SELECT count(*) FROM events")).scalar() == 0
            other.execute("ROLLBACK")


def test_read_only_file(tmp_path: Path) -> None:
    path = tmp_path / "s.sqlite"
    open_store(sqlite_url(path)).close()
    with (
        open_store(f"sqlite:///file:{path}?mode=ro&uri=true") as store,
        pytest.raises(StoreError, match="cannot be written") as caught,
        store.session() as session,
    ):
        record_event(session, "info", "x", "y")
    assert "writable" in caught.value.remedy


def test_folders_that_cannot_be_made_or_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="Not a directory"):
        open_store(sqlite_url(tmp_path / "file" / "sub" / "s.sqlite"))
    # Nobody, root included, may make files in /proc.
    with pytest.raises(StoreError, match="cannot be opened or created"):
        open_store("sqlite:////proc/store.sqlite")
