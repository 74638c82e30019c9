"""Lab hosts as rows over every kind of store: who may say how a host is, and for how long it holds."""

from __future__ import annotations

import pytest
from sqlalchemy import update

from db.clock import database_wall_ns
from db.errors import StoreUnreachableError, StoreVersionError
from db.hosts import SEEN_TTL_NS, list_hosts, note_host, state_now
from db.models import HostRow
from db.session import Store
from orchestrator.errors import PoolError
from orchestrator.host_book import note_hosts, note_seen
from orchestrator.hosts import SeenHost, Versions
from sti_runtime.errors import StifarmError


def note(store: Store, state: str, joined_wall_ns: int | None, *, refused: str = "") -> None:
    """As a controller writes it that sees the host on its board."""
    offer = None if joined_wall_ns is None else "{}"
    with store.session() as session:
        note_host(
            session,
            "bench1",
            state=state,
            stifarm="1.0",
            protocol=1,
            offer_json=offer,
            joined_wall_ns=joined_wall_ns,
            refused=refused,
        )


def state(store: Store, later_ns: int = 0) -> str:
    """How it is."""
    with store.reader() as session:
        (row,) = list_hosts(session)
        return state_now(row, database_wall_ns(session) + later_ns)


@pytest.mark.parametrize(
    "error",
    [PoolError("The board is silent."), StoreUnreachableError("The store is away.")],
    ids=["board", "store"],
)
def test_a_board_or_a_store_that_is_away_is_asked_again(store: Store, error: StifarmError) -> None:
    seen = SeenHost("bench1", Versions.own(), None, "refused", "of another version")

    def away() -> tuple[SeenHost, ...]:
        raise error

    note_seen(store, away)
    note_seen(store, lambda: (seen,))
    with store.reader() as session:
        assert [row.name for row in list_hosts(session)] == ["bench1"]


def test_a_store_that_no_waiting_mends_ends_the_watch(store: Store) -> None:
    def newer() -> tuple[SeenHost, ...]:
        raise StoreVersionError("The store is of a newer stifarm.")

    with pytest.raises(StoreVersionError):
        note_seen(store, newer)


def test_a_controller_without_a_head_says_nothing_of_hosts_of_others(store: Store) -> None:
    note(store, "present", 5)
    note_hosts(store, ())
    assert state(store) == "present"


def test_a_host_that_nobody_has_seen_for_a_while_is_away(store: Store) -> None:
    note(store, "present", 5)
    assert state(store, SEEN_TTL_NS // 2) == "present"
    assert state(store, 2 * SEEN_TTL_NS) == "away"
    note(store, "left", 5)
    assert state(store, 2 * SEEN_TTL_NS) == "left"


def test_a_host_is_judged_where_it_joined_last(store: Store) -> None:
    note(store, "present", 5)
    note(store, "present", 7)  # another head
    for said in ("away", "left"):  # what the first one's board still says
        note(store, said, 5)
        assert state(store) == "present"
    note(store, "refused", None, refused="of another version")
    assert state(store) == "present"
    note(store, "away", 7)
    assert state(store) == "away"


def test_a_host_that_is_refused_where_nobody_sees_it_present_is_refused(store: Store) -> None:
    note(store, "present", 5)
    with store.session() as session:
        long_ago = database_wall_ns(session) - 2 * SEEN_TTL_NS
        session.execute(update(HostRow).values(last_seen_wall_ns=long_ago))
    note(store, "refused", None, refused="of another version")
    assert state(store) == "refused"
    note(store, "present", 9)
    assert state(store) == "present"
