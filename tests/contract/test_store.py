"""One suite over every kind of store, SQLite and PostgreSQL: schema, jobs, devices and leases."""

from __future__ import annotations

import multiprocessing
import uuid

import pytest
from sqlalchemy import create_engine, inspect, text
from sqlalchemy.exc import IntegrityError

from db import leases
from db.devices import (
    device_by_name,
    latest_facts,
    list_devices,
    record_facts,
    register_device,
)
from db.errors import LeaseHeldError, StoreError, StoreVersionError
from db.events import latest_events
from db.jobs import (
    begin_attempt,
    create_job,
    get_job,
)
from db.session import KNOWN_REVISIONS, Store, open_store, parse_url, upgrade
from tests.contract import store_world as world
from tests.contract.store_rows import EXPECTED_ROWS, PROCESSES, counts, make, put

# ------------------------------------------------------------------ schema


def test_upgrade_twice_keeps_store_id(url: str) -> None:
    with open_store(url) as first:
        store_id = first.store_id
    assert upgrade(url) == KNOWN_REVISIONS[-1]
    with open_store(url) as again:
        assert again.store_id == store_id
        assert uuid.UUID(store_id)


def _upgrade_and_report(url: str, out: multiprocessing.Queue[str]) -> None:
    upgrade(url)
    with open_store(url) as store:
        out.put(store.store_id)


def test_stores_created_by_several_processes_at_once_are_one(fresh_url: str) -> None:
    out = PROCESSES.Queue()
    processes = [PROCESSES.Process(target=_upgrade_and_report, args=(fresh_url, out)) for _ in range(3)]
    for process in processes:
        process.start()
    ids = {out.get(timeout=300) for _ in processes}
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * 3
    assert len(ids) == 1


def test_newer_schema_is_refused(url: str) -> None:
    engine = create_engine(parse_url(url))
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(StoreVersionError, match="newer stifarm"):
        open_store(url)
    with pytest.raises(StoreVersionError, match="newer stifarm"):
        upgrade(url)


def test_foreign_database_is_left_alone(fresh_url: str) -> None:
    engine = create_engine(parse_url(fresh_url))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE cats (name TEXT)"))
    with pytest.raises(StoreError, match="not a stifarm store"):
        open_store(fresh_url)
    with pytest.raises(StoreError, match="not a stifarm store"):
        upgrade(fresh_url)
    assert inspect(engine).get_table_names() == ["cats"]
    engine.dispose()


def test_enumerations_and_references_are_enforced(store: Store) -> None:
    made = make(store)
    with pytest.raises(IntegrityError), store.session() as session:
        get_job(session, made.job.id).state = "confused"
    with pytest.raises(IntegrityError), store.session() as session:
        record_facts(session, 999, {}, boot_id="b", os_build=None, kernel=None)
    with store.reader() as session:
        assert get_job(session, made.job.id).state == "running"


# ------------------------------------------------------------------ jobs


def test_the_same_key_is_the_same_job(store: Store) -> None:
    made = make(store)
    key = "work of job-1"
    renamed = made.job.model_copy(update={"id": "job-2"})
    with store.session() as session:
        found = create_job(session, renamed, key=key, kind="test", device_id=made.device_id)
        assert found.id == made.job.id
    with pytest.raises(StoreError, match="there already"), store.session() as session:
        create_job(session, made.job, key="another", kind="test", device_id=made.device_id)


def test_new_attempt_gives_up_the_open_one_and_late_records_still_count(store: Store) -> None:
    made = make(store)
    with store.session() as session:
        assert begin_attempt(session, made.job.id, lease_counter=2) == 2
    assert put(store, made, world.journal(made.job, made.plan)).complete
    assert counts(store) == EXPECTED_ROWS
    with store.reader() as session:
        assert get_job(session, made.job.id).state == "running"


# ------------------------------------------------------------------ devices and leases


def test_device_identity_is_its_hardware(store: Store) -> None:
    with store.session() as session:
        first = register_device(
            session, identity="hw-1", name="p", transport="adb", engine="native", emulated=False
        )
        same = register_device(
            session, identity="hw-1", name="q", transport="adb", engine="native", emulated=False
        )
        assert (same.id, same.name) == (first.id, "q")
        other = register_device(
            session, identity="hw-2", name="q", transport="adb", engine="native", emulated=False
        )
        assert device_by_name(session, "q").id == other.id
        assert [d.identity for d in list_devices(session)] == ["hw-2"]
        assert len(list_devices(session, retired=True)) == 2
        assert [e.kind for e in latest_events(session)] == ["device-replaced"]
        with pytest.raises(StoreError, match="no device named 'p'"):
            device_by_name(session, "p")


def test_facts_are_appended_only_when_they_change(store: Store) -> None:
    made = make(store)
    with store.session() as session:
        before = latest_facts(session, made.device_id)
        assert before is not None
        same = record_facts(
            session, made.device_id, {"cpu": "x"}, boot_id="boot-1", os_build="os-1", kernel="6.1"
        )
        assert same.id == before.id
        rebooted = record_facts(
            session, made.device_id, {"cpu": "x"}, boot_id="boot-2", os_build="os-1", kernel="6.1"
        )
        assert rebooted.id > before.id


def _take_counters(url: str, device_id: int, out: multiprocessing.Queue[list[int]]) -> None:
    taken = []
    with open_store(url) as store:
        for _ in range(10):
            with store.session() as session:
                taken.append(leases.acquire_lease(session, device_id, "host", 10**12).counter)
    out.put(taken)


def test_fencing_counters_are_never_given_twice(url: str, store: Store) -> None:
    made = make(store)
    out = PROCESSES.Queue()
    processes = [PROCESSES.Process(target=_take_counters, args=(url, made.device_id, out)) for _ in range(2)]
    for process in processes:
        process.start()
    taken = [out.get(timeout=300) for _ in processes]
    for process in processes:
        process.join(300)
    assert sorted(counter for one in taken for counter in one) == list(range(1, 21))
    assert all(one == sorted(one) for one in taken)


def test_a_lease_has_one_owner_until_it_expires(store: Store) -> None:
    made = make(store)
    hour_ns = 3600 * 10**9
    with store.session() as session:
        mine = leases.acquire_lease(session, made.device_id, "host-a", hour_ns)
    with pytest.raises(LeaseHeldError, match="in use by host-a"), store.session() as session:
        leases.acquire_lease(session, made.device_id, "host-b", hour_ns)
    with store.session() as session:
        mine = leases.renew_lease(session, mine, -1)
    with store.session() as session:
        theirs = leases.acquire_lease(session, made.device_id, "host-b", hour_ns)
        assert theirs.counter == mine.counter + 1
    with pytest.raises(LeaseHeldError, match="lost to another"), store.session() as session:
        leases.renew_lease(session, mine, hour_ns)
    with store.session() as session:
        leases.release_lease(session, mine)
        with pytest.raises(LeaseHeldError):
            leases.acquire_lease(session, made.device_id, "host-a", hour_ns)
        leases.release_lease(session, theirs)
        assert leases.acquire_lease(session, made.device_id, "host-a", hour_ns).counter == 3
