"""Reservations and quarantine in the store, on both databases."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import select, update

from db.clock import database_wall_ns
from db.errors import DeviceReservedError, LeaseHeldError, QuarantinedError
from db.events import latest_events
from db.leases import acquire_lease, release_lease, renew_lease, resume_lease
from db.models import HealthResultRow, ReservationRow
from db.quarantine import (
    PASSES_TO_RELEASE,
    Item,
    begin_quarantine,
    count_checks,
    end_quarantine,
    failures_since,
    latest_check,
    quarantine_of,
    quarantines,
    record_check,
    record_failure,
    record_step,
    refuse_quarantined,
    steps_since,
)
from db.reservations import holders, reserve, unreserve
from db.session import Store
from tests.contract.store_rows import make

HOUR_NS = 3600 * 10**9
WELL = (Item("reach", "pass", "it answers"), Item("battery", "ungated", "unreadable", required=False))
ILL = (Item("reach", "fail", "nobody answers"),)


@pytest.fixture
def device(store: Store) -> int:
    return make(store).device_id


def test_a_reserved_device_is_leased_to_nobody_and_the_refusal_says_all(
    store: Store,
    device: int,
) -> None:
    with store.session() as session:
        running = acquire_lease(session, device, "farm", HOUR_NS)
        row = reserve(session, device, holder="ann@lab", reason="camera", length_ns=4 * HOUR_NS)
        assert row.until_wall_ns - row.since_wall_ns == 4 * HOUR_NS
        held = holders(session)[device]
        assert (held.lease_owner, held.reservation) == ("farm", row)
    attempts = (
        lambda session: acquire_lease(session, device, "farm", HOUR_NS),
        lambda session: resume_lease(session, device, "farm", running.counter, HOUR_NS),
        lambda session: renew_lease(session, running, HOUR_NS),
        lambda session: reserve(session, device, holder="bob", reason=None, length_ns=1),
    )
    for attempt in attempts:
        with (
            pytest.raises(DeviceReservedError, match=r"reserved by ann@lab until .* UTC \(camera\)"),
            store.session() as session,
        ):
            attempt(session)
    with store.session() as session:
        release_lease(session, running)
        assert unreserve(session, device) is not None
        assert unreserve(session, device) is None
        assert acquire_lease(session, device, "farm", HOUR_NS).counter == running.counter + 1
        assert [event.kind for event in latest_events(session, device_id=device)][:2] == [
            "device-unreserved",
            "device-reserved",
        ]


def test_a_reservation_ends_by_itself_and_may_let_a_job_finish(
    store: Store,
    device: int,
) -> None:
    with store.session() as session:
        running = acquire_lease(session, device, "farm", HOUR_NS)
        reserve(session, device, holder="ann", reason=None, length_ns=HOUR_NS, lets_finish=True)
        renew_lease(session, running, HOUR_NS)
        with pytest.raises(DeviceReservedError):
            acquire_lease(session, device, "farm", HOUR_NS)
    with store.session() as session:
        past = database_wall_ns(session) - 1
        session.execute(update(ReservationRow).values(until_wall_ns=past))
    with store.session() as session:
        assert holders(session)[device].reservation is None
        assert acquire_lease(session, device, "farm", HOUR_NS).counter == running.counter + 1


def test_nobody_leases_a_device_while_it_is_being_reserved(store: Store, device: int) -> None:
    """One of the two waits for the other, and sees what it did."""
    begun = threading.Event()
    leased: list[object] = []

    def lease() -> None:
        begun.set()
        try:
            with store.session() as session:
                leased.append(acquire_lease(session, device, "farm", HOUR_NS))
        except LeaseHeldError as error:
            leased.append(error)

    with store.session() as session:
        reserve(session, device, holder="ann", reason=None, length_ns=HOUR_NS)
        other = threading.Thread(target=lease)
        other.start()
        begun.wait()
    other.join()
    assert isinstance(leased[0], DeviceReservedError)


def test_quarantine_begins_once_and_ends_by_checks_passed_in_a_row(
    store: Store,
    device: int,
) -> None:
    with store.session() as session:
        assert begin_quarantine(session, device, "it vanished")
        assert not begin_quarantine(session, device, "another cause")
        assert quarantines(session)[device].cause == "it vanished"
    with pytest.raises(QuarantinedError, match="it vanished"), store.session() as session:
        refuse_quarantined(session, device)
    checks = [True, False, *[True] * PASSES_TO_RELEASE]
    for number, passed in enumerate(checks, 1):
        with store.session() as session:
            ended = record_check(session, device, WELL if passed else ILL, passed=passed, job_id=None)
            assert ended == (number == len(checks))
    with store.session() as session:
        assert quarantine_of(session, device) is None
        refuse_quarantined(session, device)
        assert count_checks(session, device) == len(checks)
        found = latest_check(session, device)
        assert found is not None
        assert [row.item for row in found[1]] == ["battery", "reach"]
        assert len(session.scalars(select(HealthResultRow)).all()) == 2 * len(checks) - 1
        kinds = [event.kind for event in latest_events(session, device_id=device)]
        assert kinds == ["device-released", "health-check-failed", "device-quarantined"]
        assert begin_quarantine(session, device, "again")
        assert end_quarantine(session, device, "released by ann")
        assert not end_quarantine(session, device, "released by ann")


def test_what_came_before_a_release_no_longer_counts(store: Store, device: int) -> None:
    with store.session() as session:
        record_failure(session, device, error="LinkError", what="lost", job_id=None)
        record_step(session, device, "reconnect", "failed", "nobody answers")
        assert len(failures_since(session, device, 0)) == len(steps_since(session, device, 0)) == 1
        begin_quarantine(session, device, "it vanished")
        assert len(failures_since(session, device, 0)) == 1
    with store.session() as session:
        end_quarantine(session, device, "by a person")
    with store.session() as session:
        assert [*failures_since(session, device, 0), *steps_since(session, device, 0)] == []
