"""Backup and restore, between every kind of store."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import select, text, update

from db.backup import COUNTER_STEP, Contents, backup, contents_of, restore
from db.devices import register_device
from db.errors import StoreError, StoreVersionError
from db.events import latest_events, record_event
from db.ingest import ingest
from db.leases import acquire_lease
from db.models import LeaseRow, PlanRow
from db.plan_answers import latest_plans
from db.session import Store, open_store, sqlite_url, upgrade
from sti_runtime.errors import InputError
from tests.contract import store_world as world


def fill(store: Store) -> world.World:
    with store.session() as session:
        made = world.populate(session)
        acquire_lease(session, made.device_id, "host-a", 10**15)
        ingest(
            session,
            device_id=made.device_id,
            job_id=made.job.id,
            attempt=1,
            records=world.journal(made.job, made.plan),
        )
        record_event(session, "info", "odd", "ü ' \" \\ \n %s :x", device_id=made.device_id)
    return made


def rows(contents: Contents) -> dict[str, int]:
    return {name: content.rows for name, content in contents.items() if content.rows}


def test_a_backup_restored_into_every_kind_of_store_is_that_store(
    store: Store, url: str, fresh_url: str, tmp_path: Path
) -> None:
    made = fill(store)
    copy = tmp_path / "copy.sqlite"
    contents = backup(url, copy)
    assert contents == contents_of(url) == contents_of(sqlite_url(copy))
    assert rows(contents)["requests"] == 12
    with store.session() as session:
        record_event(session, "info", "later", "")
    target = fresh_url if fresh_url != url else sqlite_url(tmp_path / "other.sqlite")
    assert restore(target, copy) == contents
    with open_store(target) as restored, restored.session() as session:
        assert restored.store_id == store.store_id
        assert [e.kind for e in latest_events(session)] == ["store-restored", "odd"]
        (answer,) = latest_plans(session)
        assert answer.measured is not None
        assert answer.measured.latency.count == 10
        lease = session.scalars(select(LeaseRow)).one()
        assert (lease.owner, lease.counter) == (None, 1 + COUNTER_STEP)
        # New rows get new numbers.
        another = register_device(
            session, identity="hw-2", name="two", transport="ssh", engine="native", emulated=False
        )
        assert another.id > made.device_id
    # A second restore, and a backup over a file, are refused.
    with pytest.raises(InputError, match="holds data already"):
        restore(target, copy)
    with pytest.raises(InputError, match="exists already"):
        backup(url, copy)
    assert sorted(path.name for path in tmp_path.glob("copy*")) == ["copy.sqlite"]


def test_a_backup_is_of_one_moment_and_disturbs_nobody(store: Store, url: str, tmp_path: Path) -> None:
    fill(store)
    with store.session() as session:
        session.execute(update(PlanRow).values(mean_fidelity_milli=1))
        session.flush()
        backup(url, tmp_path / "during.sqlite")  # another's transaction is open
    with open_store(sqlite_url(tmp_path / "during.sqlite")) as copy, copy.reader() as session:
        assert session.scalars(select(PlanRow.mean_fidelity_milli)).one() != 1


def test_what_is_no_backup_of_this_schema_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no backup"):
        restore(url, tmp_path / "absent.sqlite")
    words = tmp_path / "words.sqlite"
    words.write_text("no database at all. " * 400)
    with pytest.raises(StoreError, match="not a SQLite database"):
        restore(url, words)
    old = tmp_path / "old.sqlite"
    upgrade(sqlite_url(old))
    with closing(sqlite3.connect(old)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '0001'")
        connection.commit()
    with pytest.raises(StoreVersionError, match="older stifarm"):
        restore(url, old)
    with open_store(url) as store, store.reader() as session:
        assert session.execute(text("SELECT count(*) FROM store_meta")).scalar() == 1


def test_there_must_be_a_store_to_back_up(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no store to back up"):
        backup(sqlite_url(tmp_path / "absent.sqlite"), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
