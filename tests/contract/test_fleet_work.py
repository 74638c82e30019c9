"""Many jobs' steps at once: the store is as if each had been done alone, on SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import Select, select, update

from db.arrivals import Arrived, TakenIn, take_in
from db.clock import database_wall_ns
from db.devices import register_device
from db.errors import LeaseHeldError, StoreError
from db.fleet_work import Opening, found_of, give_back, open_plain, renew
from db.ingest import ingest
from db.jobs import begin_attempt, create_job, failures_of, results_of
from db.leases import LeaseGrant, acquire_lease, release_lease
from db.models import (
    AttemptRow,
    Base,
    ComputeSampleRow,
    DeviceRow,
    EventRow,
    FixedSampleRow,
    IoSampleRow,
    JobRow,
    JournalRecordRow,
    LeaseRow,
    ProbeRow,
    RequestRow,
    RunRow,
)
from db.quarantine import begin_quarantine
from db.reservations import reserve
from db.session import Store
from sti_runtime.messages import Job, JournalRecord, ProbeUnit, ResultRecord
from tests.contract import store_world as world

TTL_NS = 60 * 10**9
OWNER = "lab:/farm"
TABLES: tuple[type[Base], ...] = (
    JournalRecordRow,
    IoSampleRow,
    ComputeSampleRow,
    FixedSampleRow,
    ProbeRow,
    RunRow,
    RequestRow,
    EventRow,
)
OWN = {"id", "device_id", "job_id", "journal_id", "run_id", "plan_id", "plan_digest", "facts_id", "digest"}
"""Columns by which rows of two devices differ though they say the same."""


def made(store: Store, number: int) -> tuple[world.World, LeaseGrant]:
    """A device with an open attempt, under a lease."""
    with store.session() as session:
        built = world.populate(
            session, name=f"b{number}", identity=f"hw-{number}", job_id=f"job-{number}", emulated=False
        )
        return built, acquire_lease(session, built.device_id, OWNER, TTL_NS)


def arrived(of: world.World, grant: LeaseGrant, records: Sequence[JournalRecord]) -> Arrived:
    """Records of a device's attempt."""
    return Arrived(of.device_id, of.job, 1, grant, records)


def take(store: Store, *arrivals: Arrived) -> list[TakenIn | StoreError]:
    """Take records in, in a transaction."""
    with store.session() as session:
        return take_in(session, arrivals)


def rows_of(store: Store, device_id: int) -> dict[str, list[dict[str, Any]]]:
    """What the store says of a device, without what is the device's own."""
    volatile = {*OWN, "ingested_wall_ns", "record_json", "what"}
    found: dict[str, list[dict[str, Any]]] = {}
    with store.reader() as session:
        for table in TABLES:
            query: Select[Any]
            if table is RequestRow:
                query = select(table).join(RunRow, RunRow.id == RequestRow.run_id)
                query = query.where(RunRow.device_id == device_id)
            else:
                query = select(table).where(table.device_id == device_id)  # type: ignore[attr-defined]
            found[table.__tablename__] = [
                {
                    name: getattr(row, name)
                    for name in table.__table__.columns.keys()  # noqa: SIM118 - a collection of its own
                    if name not in volatile and not name.endswith("wall_ns")
                }
                for row in session.scalars(query.order_by(table.id))  # type: ignore[attr-defined]
            ]
        attempts = select(AttemptRow).where(AttemptRow.device_id == device_id)
        found["attempts"] = [
            {"state": row.state, "agent": row.agent_digest, "emulated": row.agent_emulated}
            for row in session.scalars(attempts)
        ]
        found["jobs"] = [
            {"state": state}
            for state in session.scalars(select(JobRow.state).where(JobRow.device_id == device_id))
        ]
        found["devices"] = [{"agent": session.get_one(DeviceRow, device_id).agent_digest}]
    return found


def alone(store: Store, of: world.World, records: Sequence[JournalRecord]) -> None:
    """Take records in as a single job's."""
    with store.session() as session:
        ingest(session, device_id=of.device_id, job_id=of.job.id, attempt=1, records=records)


def test_many_at_once_leave_what_each_alone_would(store: Store) -> None:
    (first, grant), (second, other), (reference, _) = (made(store, number) for number in (1, 2, 3))
    alone(store, reference, world.journal(reference.job, reference.plan))
    journals = [world.journal(each.job, each.plan) for each in (first, second)]
    # In uneven pieces, the second device's a piece behind.
    pieces = [[0, 1, 5, 8], [0, 3, 4, 8]]
    answers = []
    for at in range(3):
        parts = [journal[cut[at] : cut[at + 1]] for journal, cut in zip(journals, pieces, strict=True)]
        answers = take(store, arrived(first, grant, parts[0]), arrived(second, other, parts[1]))
    assert answers == [TakenIn(6, complete=True), TakenIn(6, complete=True)]
    expected = rows_of(store, reference.device_id)
    assert rows_of(store, first.device_id) == expected
    assert rows_of(store, second.device_id) == expected
    assert expected["jobs"] == [{"state": "done"}]
    with store.reader() as session:
        found = found_of(session, [first.job.id])[first.job.id]
        assert dict(found.results) == dict(results_of(session, first.job.id))
        assert dict(found.failures) == dict(failures_of(session, first.job.id))
        assert (found.rejected, found.refused) == ((), None)


def lying(of: world.World) -> list[JournalRecord]:
    """A journal whose execution cannot be true."""
    records = world.journal(of.job, of.plan)
    nan = world.request(2).model_copy(update={"logits": (float("nan"), 0.0)})
    requests = [world.request(i, warmup=i < 2) for i in range(12)]
    requests[2] = nan
    result = world.execute_result(of.plan, tuple(requests))
    lie = ResultRecord(type="result", unit=4, result=result)
    records[5] = records[5].model_copy(update={"payload": lie})
    return records


def test_what_is_not_plain_is_judged_as_alone(store: Store) -> None:
    (liar, grant), (honest, other), (reference, _) = (made(store, number) for number in (1, 2, 3))
    alone(store, reference, lying(reference))
    together = (
        arrived(liar, grant, lying(liar)),
        arrived(honest, other, world.journal(honest.job, honest.plan)),
    )
    assert take(store, *together) == [TakenIn(5, complete=True), TakenIn(6, complete=True)]
    assert rows_of(store, liar.device_id) == rows_of(store, reference.device_id)
    # The same again, and then with another content.
    assert take(store, *together) == [TakenIn(5, complete=True), TakenIn(6, complete=True)]
    changed = [record.model_copy(update={"wall_ns": record.wall_ns + 1}) for record in together[1].records]
    assert take(store, arrived(honest, other, changed)) == [
        TakenIn(6, complete=True, conflicts=tuple(range(8)))
    ]
    assert len(rows_of(store, honest.device_id)["journal_records"]) == 8


def test_gaps_and_failures_are_those_of_a_single_job(store: Store) -> None:
    (first, grant), (reference, _) = made(store, 1), made(store, 2)
    for built in (first, reference):
        records = world.journal(built.job, built.plan)
        late = [records[3], *records[5:]]
        if built is first:
            assert take(store, arrived(first, grant, late)) == [TakenIn(3, complete=False)]
            assert take(store, arrived(first, grant, records[:5])) == [TakenIn(6, complete=True)]
        else:
            alone(store, built, late)
            alone(store, built, records[:5])
    mine, theirs = rows_of(store, first.device_id), rows_of(store, reference.device_id)
    assert mine == theirs


def test_under_a_lost_lease_nothing_is_written_and_the_others_are(store: Store) -> None:
    (lost, grant), (kept, other) = made(store, 1), made(store, 2)
    with store.session() as session:
        release_lease(session, grant)
        acquire_lease(session, lost.device_id, "lab2:/farm", TTL_NS)
    records = [world.journal(each.job, each.plan) for each in (lost, kept)]
    answers = take(store, arrived(lost, grant, records[0]), arrived(kept, other, records[1]))
    assert isinstance(answers[0], LeaseHeldError)
    assert answers[1] == TakenIn(6, complete=True)
    assert rows_of(store, lost.device_id)["journal_records"] == []
    with store.session() as session:
        renewed = renew(session, [grant, other], 2 * TTL_NS)
    assert isinstance(renewed[0], LeaseHeldError)
    assert isinstance(renewed[1], LeaseGrant)
    assert renewed[1].expires_wall_ns > other.expires_wall_ns
    with store.session() as session:
        give_back(session, [grant, other])
    with store.reader() as session:
        owners = {row.device_id: row.owner for row in session.scalars(select(LeaseRow))}
    assert owners == {lost.device_id: "lab2:/farm", kept.device_id: None}


# ------------------------------------------------------------------ opening


def opening(store: Store, number: int, *, leased: bool = True, kind: str = "probe") -> Opening:
    """A job that is to begin on a device of its own, which was used before."""
    with store.session() as session:
        device = register_device(
            session,
            identity=f"hw-{number}",
            name=f"d{number}",
            transport="fake",
            engine="native",
            emulated=True,
        )
        if leased:
            release_lease(session, acquire_lease(session, device.id, OWNER, TTL_NS))
        return Opening(device.id, f"key-{number}", kind, probe_job(number))


def probe_job(number: int) -> Job:
    """A job of one probe unit."""
    bundle = world.manifest()
    job = world.job(bundle.digest, world.plan(bundle.digest, "0" * 64), job_id=f"probe-{number}")
    return job.model_copy(update={"units": (ProbeUnit(number=0, kind="probe"),), "bundle": None})


def opened(store: Store, *openings: Opening) -> dict[str, LeaseGrant]:
    """Those that could be opened together."""
    with store.session() as session:
        return open_plain(session, OWNER, openings, TTL_NS, even_quarantined="health")


def test_plain_jobs_are_registered_and_opened_together(store: Store) -> None:
    fresh, registered = opening(store, 1), opening(store, 2)
    with store.session() as session:
        create_job(session, registered.job, key=registered.key, kind="probe", device_id=registered.device_id)
    grants = opened(store, fresh, registered)
    assert sorted(grants) == ["probe-1", "probe-2"]
    assert [grant.counter for grant in grants.values()] == [2, 2]
    with store.reader() as session:
        assert session.scalars(select(JobRow.state)).all() == ["running", "running"]
        attempts = session.execute(
            select(AttemptRow.job_id, AttemptRow.number, AttemptRow.state, AttemptRow.lease_counter)
        ).all()
        assert sorted(attempts) == [("probe-1", 1, "running", 2), ("probe-2", 1, "running", 2)]
        assert session.scalars(select(LeaseRow.owner)).all() == [OWNER, OWNER]
        assert session.scalar(select(JobRow.job_json).where(JobRow.id == "probe-1"))
    assert opened(store, fresh, registered) == {}


def test_a_device_that_something_stands_in_the_way_of_is_left_out(store: Store) -> None:
    names = ("held", "reserved", "quarantined", "checked", "under-way", "never-leased", "lapsed", "free")
    by_name = {
        name: opening(
            store,
            number,
            leased=name != "never-leased",
            kind="health" if name == "checked" else "probe",
        )
        for number, name in enumerate(names)
    }
    with store.session() as session:
        now = database_wall_ns(session)
        acquire_lease(session, by_name["held"].device_id, "lab2:/farm", TTL_NS)
        acquire_lease(session, by_name["lapsed"].device_id, "lab2:/farm", TTL_NS)
        session.execute(
            update(LeaseRow)
            .where(LeaseRow.device_id == by_name["lapsed"].device_id)
            .values(expires_wall_ns=now - 1)
        )
        begin_quarantine(session, by_name["quarantined"].device_id, "it fell")
        begin_quarantine(session, by_name["checked"].device_id, "it fell")
        reserve(
            session,
            by_name["reserved"].device_id,
            holder="ann",
            reason="",
            length_ns=TTL_NS,
        )
        other = probe_job(100)
        create_job(session, other, key="other", kind="probe", device_id=by_name["under-way"].device_id)
        begin_attempt(session, other.id, lease_counter=1)
    grants = opened(store, *by_name.values())
    assert {name for name, each in by_name.items() if each.job.id in grants} == {
        "checked",
        "never-leased",
        "lapsed",
        "free",
    }


@pytest.mark.parametrize("state", ["done", "failed", "cancelled"])
def test_a_job_that_was_begun_before_is_left_out(store: Store, state: str) -> None:
    before = opening(store, 1)
    with store.session() as session:
        create_job(session, before.job, key=before.key, kind="probe", device_id=before.device_id)
        session.execute(update(JobRow).values(state=state))
    assert opened(store, before) == {}
