"""Controllers as rows over every kind of store: who lives, who is succeeded, who is given up for dead."""

from __future__ import annotations

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from db.clock import database_wall_ns
from db.controllers import (
    HEARTBEAT_TTL_NS,
    Begun,
    beat,
    begin_controller,
    end_controller,
    list_controllers,
)
from db.errors import LeaseHeldError
from db.events import latest_events
from db.leases import acquire_lease, renew_lease, require_lease, resume_lease
from db.models import CampaignBatchRow, ControllerRow
from db.session import Store
from orchestrator.controllers import state_of, verb_of
from tests.contract.store_rows import make
from tests.contract.test_campaign_store import batch, begin, claim, ready

HOUR_NS = 3600 * 10**9


@pytest.fixture
def device(store: Store) -> int:
    return make(store).device_id


def enter(store: Store, host: str, home: str = "/farm") -> Begun:
    with store.session() as session:
        return begin_controller(session, host=host, home=home, stifarm="1.0", pid=7)


def silence(session: Session, name: str, silent_ns: int) -> None:
    """As if the last heartbeat had been so long ago."""
    then = database_wall_ns(session) - silent_ns
    session.execute(update(ControllerRow).where(ControllerRow.name == name).values(heartbeat_wall_ns=then))


def alive(store: Store) -> list[str]:
    with store.reader() as session:
        return [row.name for row in list_controllers(session)]


def owner_of(store: Store, batch_id: int) -> str | None:
    with store.reader() as session:
        return session.get_one(CampaignBatchRow, batch_id).owner


def test_a_controller_is_a_row_until_it_ends(store: Store) -> None:
    name = enter(store, "bench").name
    assert name.startswith("bench:/farm#")
    assert alive(store) == [name]
    with store.session() as session:
        assert beat(session, name)
        (row,) = list_controllers(session)
        assert row.heartbeat_wall_ns >= row.started_wall_ns
        end_controller(session, name)
    assert alive(store) == []
    with store.reader() as session:
        assert [row.name for row in list_controllers(session, ended=True)] == [name]


@pytest.mark.parametrize(
    ("words", "verb"),
    [
        ("/venv/bin/python /venv/bin/stifarm serve --listen 192.0.2.7:6379", "serve"),
        ("stifarm --home serve -v --db-url=x --inventory a.yaml profile --devices all", "profile"),
        ("stifarm campaign run nightly", "campaign"),
        ("stifarm --home", None),
        ("python own_program.py serve", None),
        ("", None),
    ],
)
def test_a_process_is_known_by_its_verb(words: str, verb: str | None) -> None:
    assert verb_of(words.split()) == verb


def test_a_silent_one_may_work_on_nothing(store: Store) -> None:
    names = [enter(store, "bench").name, enter(store, "other").name]

    def living(session: Session) -> set[str]:
        now = database_wall_ns(session)
        rows = list_controllers(session, ended=True)
        return {row.name for row in rows if state_of(row, now) == "alive"}

    with store.session() as session:
        assert living(session) == {*names}
        silence(session, names[0], HEARTBEAT_TTL_NS + HEARTBEAT_TTL_NS)
        assert living(session) == {names[1]}
        end_controller(session, names[1])
        assert living(session) == set()


def test_a_killed_one_is_succeeded_under_its_leases(store: Store, device: int) -> None:
    begin(store, [batch(0, "a", "health")])
    (each,) = ready(store)
    killed = enter(store, "bench").name
    with store.session() as session:
        grant = acquire_lease(session, device, killed, HOUR_NS)
    assert claim(store, each.batch_id, killed)
    begun = enter(store, "bench")
    assert begun.succeeded == (killed,)
    assert alive(store) == [begun.name]
    assert owner_of(store, each.batch_id) == begun.name
    with store.session() as session:
        resumed = resume_lease(session, device, begun.name, grant.counter, HOUR_NS)
        assert resumed is not None
        assert resumed.counter == grant.counter
    with store.session() as session, pytest.raises(LeaseHeldError):
        renew_lease(session, grant, HOUR_NS)
    with store.session() as session, pytest.raises(LeaseHeldError):
        require_lease(session, grant)


def test_what_a_program_without_controllers_held_is_gone_on_with(store: Store, device: int) -> None:
    with store.session() as session:
        grant = acquire_lease(session, device, "bench:/farm", HOUR_NS)
    name = enter(store, "bench").name
    with store.session() as session:
        assert resume_lease(session, device, name, grant.counter, HOUR_NS) is not None


def test_two_of_one_home_on_two_machines_are_told_apart(store: Store, device: int) -> None:
    here, there = enter(store, "bench1").name, enter(store, "bench2").name
    assert set(alive(store)) == {here, there}
    with store.session() as session:
        grant = acquire_lease(session, device, here, HOUR_NS)
    with store.session() as session, pytest.raises(LeaseHeldError, match="in use by bench1:/farm#"):
        acquire_lease(session, device, there, HOUR_NS)
    with store.session() as session:
        assert resume_lease(session, device, there, grant.counter, HOUR_NS) is None
        assert renew_lease(session, grant, HOUR_NS)


def test_what_a_silent_one_held_is_free_under_a_new_counter(store: Store, device: int) -> None:
    begin(store, [batch(0, "a", "health")])
    (each,) = ready(store)
    silent, other = enter(store, "bench1").name, enter(store, "bench2").name
    with store.session() as session:
        grant = acquire_lease(session, device, silent, HOUR_NS)
    assert claim(store, each.batch_id, silent)
    with store.session() as session:
        silence(session, silent, HEARTBEAT_TTL_NS - 10**10)
        assert beat(session, other)
    assert set(alive(store)) == {silent, other}  # not long enough
    with store.session() as session:
        silence(session, silent, HEARTBEAT_TTL_NS + 10**9)
        assert beat(session, other)
    assert alive(store) == [other]
    assert claim(store, each.batch_id, other)
    with store.session() as session:
        assert acquire_lease(session, device, other, HOUR_NS).counter > grant.counter
    # It was only asleep: it writes nothing, and knows.
    for held in (renew_lease, lambda session, *_: require_lease(session, grant)):
        with store.session() as session, pytest.raises(LeaseHeldError):
            held(session, grant, HOUR_NS)
    with store.session() as session:
        assert resume_lease(session, device, silent, grant.counter, HOUR_NS) is None
        assert not beat(session, silent)
        assert beat(session, silent)
    assert set(alive(store)) == {silent, other}
    with store.reader() as session:
        (lost,) = [row for row in latest_events(session) if row.kind == "controller-lost"]
    assert silent in lost.what


def test_nobody_is_given_up_after_the_database_was_away(store: Store) -> None:
    one, two = enter(store, "bench1").name, enter(store, "bench2").name
    with store.session() as session:
        for name in (one, two):
            silence(session, name, HEARTBEAT_TTL_NS + 10**9)
        assert beat(session, one)
        assert beat(session, two)
    assert set(alive(store)) == {one, two}
