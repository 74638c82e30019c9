"""Campaigns, claims and schedules over every kind of store: SQLite and PostgreSQL."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from db import campaign_work as work
from db.campaign_plans import plan_changes
from db.campaign_work import CLAIM_TTL_NS, CellEnd
from db.campaigns import (
    NewBatch,
    NewCell,
    cancel_run,
    cell_counts,
    create_run,
    end_run,
    open_runs,
    reopen_run,
    runs_of,
    save_campaign,
    start_queued,
)
from db.events import latest_events
from db.leases import database_wall_ns
from db.models import CampaignBatchRow, CampaignRow, CampaignRunRow
from db.plans import save_plan
from db.schedules import (
    list_schedules,
    lock_schedule,
    put_schedule,
    schedule_of,
    set_schedule_state,
)
from db.session import Store
from orchestrator.campaigns.conclude import conclude_run
from sti_runtime.errors import InputError
from tests.contract import store_world as world
from tests.contract.store_world import Spec

BUNDLE = "b" * 64
S = 10**9


def batch(number: int, device: str | None, kind: str, *, repeat: int = 0, cells: int = 1) -> NewBatch:
    return NewBatch(
        number=number,
        device=device,
        kind=kind,
        bundle_digest=None if kind == "health" else BUNDLE,
        task=None if kind == "health" else "sst-2",
        engine=None if kind in ("health", "importance") else "native",
        repeat=repeat,
        fresh=True,
        cells=tuple(NewCell(i, "100ms", "1B", 1, "sti") for i in range(cells)),
    )


def campaign(
    session: Session, name: str = "night", *, content: str = "one", replace: bool = False
) -> CampaignRow:
    return save_campaign(
        session, Spec(name=content), name=name, priority=10, deadline_ns=60 * S, seed=0, replace=replace
    )


def begin(store: Store, batches: Sequence[NewBatch], name: str = "night") -> int:
    with store.session() as session:
        run = create_run(session, campaign(session, name), batches, trigger="manual")
        assert run is not None
        return run.id


def ready(store: Store) -> list[work.Waiting]:
    with store.reader() as session:
        return [each for each in work.waiting(session, database_wall_ns(session)) if each.ready]


def finish(store: Store, batch_id: int, owner: str, state: str = "done") -> bool:
    with store.session() as session:
        ends = {cell.id: CellEnd(state) for cell in work.cells_of(session, batch_id)}
        return work.end_batch(session, batch_id, owner, ends)


def claim(store: Store, batch_id: int, owner: str) -> bool:
    with store.session() as session:
        return work.claim(session, batch_id, owner)


def expire(store: Store, batch_id: int) -> None:
    with store.session() as session:
        table = CampaignBatchRow
        session.execute(update(table).where(table.id == batch_id).values(claimed_until_wall_ns=1))


def counts(store: Store, run_id: int) -> dict[str, int]:
    with store.reader() as session:
        return dict(cell_counts(session, [run_id])[run_id])


# ------------------------------------------------------------------ campaigns and runs


def test_a_name_has_one_content(store: Store) -> None:
    with store.session() as session:
        first = campaign(session)
        assert campaign(session).id == first.id
    with pytest.raises(InputError, match="other content"), store.session() as session:
        campaign(session, content="two")
    run_id = begin(store, [batch(0, "a", "health")])
    with pytest.raises(InputError, match="open"), store.session() as session:
        campaign(session, content="two", replace=True)
    with store.session() as session:
        assert cancel_run(session, run_id, "by a person")
        assert not cancel_run(session, run_id, "again")
        assert campaign(session, content="two", replace=True).id == first.id
    assert counts(store, run_id) == {"cancelled": 1}


def test_many_cells_are_made_in_order(store: Store) -> None:
    run_id = begin(store, [batch(n, f"d{n % 3}", "execute", cells=3) for n in range(1200)])
    assert counts(store, run_id) == {"queued": 3600}
    assert [(each.device, each.left) for each in ready(store)] == [("d0", 400), ("d1", 400), ("d2", 400)]


def test_needs_come_first_and_failures_skip_what_needs_them(store: Store) -> None:
    kinds = [("importance", None), ("profile", "a"), ("execute", "a"), ("profile", "b"), ("execute", "b")]
    run_id = begin(store, [batch(n, device, kind) for n, (kind, device) in enumerate(kinds)])
    first = ready(store)
    assert [(each.kind, each.device) for each in first] == [
        ("importance", None), ("profile", "a"), ("profile", "b")
    ]  # fmt: skip
    assert claim(store, first[1].batch_id, "me")
    assert finish(store, first[1].batch_id, "me")
    assert ("execute", "a") not in [(each.kind, each.device) for each in ready(store)]
    assert claim(store, first[0].batch_id, "me")
    assert finish(store, first[0].batch_id, "me")
    assert ("execute", "a") in [(each.kind, each.device) for each in ready(store)]
    with store.session() as session:
        assert work.claim(session, first[2].batch_id, "me")
        failed = session.get_one(CampaignBatchRow, first[2].batch_id)
        ends = {cell.id: CellEnd("failed", "no") for cell in work.cells_of(session, failed.id)}
        work.end_batch(session, failed.id, "me", ends)
        work.skip_dependents(session, failed, "its profile failed")
    assert counts(store, run_id) == {"done": 2, "failed": 1, "skipped": 1, "queued": 1}


def test_a_run_ends_once_and_says_what_is_missing(store: Store) -> None:
    run_id = begin(store, [batch(0, "a", "health"), batch(1, "b", "health")])
    for each, state in zip(ready(store), ("done", "failed"), strict=True):
        claim(store, each.batch_id, "me")
        finish(store, each.batch_id, "me", state)
    with store.session() as session:
        run = session.get_one(CampaignRunRow, run_id)
        assert conclude_run(session, run)
        assert not conclude_run(session, run)
    with store.session() as session:
        events = [event for event in latest_events(session) if event.kind == "data-missing"]
        assert [event.level for event in events] == ["error", "error"]  # neither has a sample
        assert reopen_run(session, run_id) == 1
        assert not start_queued(session, run_id)
        assert end_run(session, run_id, "failed")
    assert counts(store, run_id) == {"done": 1, "queued": 1}


def test_a_plan_with_other_content_is_told_with_what_is_new(store: Store) -> None:
    with store.session() as session:
        made = world.populate(session)
        other = made.plan.model_copy(update={"sequence_length": 8, "device_profile": "f" * 64})
        save_plan(session, other, device_id=made.device_id, task=world.TASK)
    run_ids = []
    for plan in (made.plan, made.plan, other):
        run_ids.append(begin(store, [batch(0, "board", "execute")]))
        (only,) = ready(store)
        assert claim(store, only.batch_id, "me")
        with store.session() as session:
            (cell,) = work.cells_of(session, only.batch_id)
            ends = {cell.id: CellEnd("done", plan_digest=plan.digest, job_id=made.job.id)}
            assert work.end_batch(session, only.batch_id, "me", ends)
        with store.session() as session:
            assert conclude_run(session, session.get_one(CampaignRunRow, run_ids[-1]))
    with store.reader() as session:
        assert plan_changes(session, run_ids[0], run_ids[1]) == []
        (change,) = plan_changes(session, run_ids[1], run_ids[2])
        assert change.why == ("profile",)
        (event,) = [each for each in latest_events(session) if each.kind == "plan-changed"]
        assert str(change) in event.what
        assert [each.kind for each in latest_events(session)] == ["plan-changed"]


# ------------------------------------------------------------------ claims


def test_of_many_controllers_one_has_a_batch(store: Store) -> None:
    begin(store, [batch(0, "a", "health")])
    (only,) = ready(store)
    together = threading.Barrier(6)

    def race(number: int) -> bool:
        together.wait(60)
        return claim(store, only.batch_id, f"controller {number}")

    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(race, range(6))) == 1


def test_a_claim_is_its_owners_until_it_runs_out(store: Store) -> None:
    begin(store, [batch(0, "a", "health")])
    (only,) = ready(store)
    assert claim(store, only.batch_id, "me")
    assert claim(store, only.batch_id, "me")  # killed and back
    assert not claim(store, only.batch_id, "other")
    with store.session() as session:
        assert work.renew(session, [only.batch_id], "me") == {only.batch_id}
        assert work.renew(session, [only.batch_id], "other") == set()
        (row,) = work.under_way(session)
        assert (row.claimed_until_wall_ns or 0) > database_wall_ns(session) + CLAIM_TTL_NS // 2
    expire(store, only.batch_id)
    assert claim(store, only.batch_id, "other")
    # The first owner comes back too late: it keeps nothing.
    assert not finish(store, only.batch_id, "me", "failed")
    with store.session() as session:
        assert not work.put_back(session, only.batch_id, "me", cause=None)
    assert finish(store, only.batch_id, "other")


def test_what_is_put_back_waits(store: Store) -> None:
    begin(store, [batch(0, "a", "health"), batch(1, "a", "profile")])
    (first,) = ready(store)
    claim(store, first.batch_id, "me")
    with store.session() as session:
        assert work.put_back(session, first.batch_id, "me", cause="gone", wait_ns=3600 * S, failed=True)
    assert ready(store) == []  # the next of the device waits behind it
    with store.session() as session:
        assert session.get_one(CampaignBatchRow, first.batch_id).tries == 1
        assert work.put_back_causes(session, first.run_id) == ["a: gone"]


def test_what_runs_of_a_cancelled_run_is_for_its_controller_to_end(store: Store) -> None:
    run_id = begin(store, [batch(0, "a", "health"), batch(1, "a", "health")])
    (first,) = ready(store)
    claim(store, first.batch_id, "me")
    with store.session() as session:
        cancel_run(session, run_id, "by a person")
        assert work.cancelled_under_way(session, [first.batch_id]) == {first.batch_id}
    assert counts(store, run_id) == {"running": 1, "cancelled": 1}
    assert not claim(store, first.batch_id, "me")
    with store.session() as session:
        assert not work.claim(session, first.batch_id, "other", cancelled=True)
        assert work.claim(session, first.batch_id, "me", cancelled=True)
    assert finish(store, first.batch_id, "me", "cancelled")
    with store.session() as session:
        assert reopen_run(session, run_id) == 2
    assert len(ready(store)) == 1


def test_durations_and_shares_are_those_of_what_ran(store: Store) -> None:
    run_id = begin(store, [batch(0, "a", "health"), batch(1, "a", "health")])
    (first,) = ready(store)
    claim(store, first.batch_id, "me")
    finish(store, first.batch_id, "me")
    with store.session() as session:
        table = CampaignBatchRow
        session.execute(
            update(table)
            .where(table.id == first.batch_id)
            .values(ended_wall_ns=table.started_wall_ns + 7 * S)
        )
        assert work.durations(session) == [("a", "health", 7 * S)]
        assert work.had(session, database_wall_ns(session)) == {(run_id, "a"): 7 * S}
        assert work.left(session) == {run_id: {("a", "health"): 1}}


# ------------------------------------------------------------------ schedules


def test_a_due_time_is_one_run(store: Store) -> None:
    with store.session() as session:
        row = put_schedule(
            session, campaign(session).id, cron="0 2 * * *", timezone="UTC", catch_up="once", overlap="skip"
        )

    together = threading.Barrier(4)

    def fire(_: int) -> bool:
        together.wait(60)
        with store.session() as session:
            if lock_schedule(session, row.id) is None:
                return False
            made = create_run(
                session, campaign(session), [batch(0, "a", "health")],
                trigger="schedule", schedule_id=row.id, due_wall_ns=5,
            )  # fmt: skip
            return made is not None

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(fire, range(4))) == 1
    with store.reader() as session:
        (run,) = open_runs(session)
        assert (run.due_wall_ns, run.deadline_wall_ns) == (5, 5 + 60 * S)
        assert len(runs_of(session, run.campaign_id)) == 1


def test_a_schedule_rests_goes_on_and_is_removed(store: Store) -> None:
    def put(session: Session) -> int:
        row = put_schedule(
            session, campaign(session).id, cron="0 2 * * *", timezone="UTC", catch_up="once", overlap="skip"
        )
        return row.id

    with store.session() as session:
        schedule_id = put(session)
        set_schedule_state(session, schedule_id, "paused")
        assert list_schedules(session, active=True) == []
        assert len(list_schedules(session)) == 1
        assert lock_schedule(session, schedule_id) is None
        set_schedule_state(session, schedule_id, "active")
        assert lock_schedule(session, schedule_id) is not None
        set_schedule_state(session, schedule_id, "removed")
        assert schedule_of(session, campaign(session).id) is None
        assert put(session) == schedule_id
