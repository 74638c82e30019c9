"""Campaigns, claims and schedules over every kind of store: SQLite and PostgreSQL."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from sqlalchemy import select, update
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
    find_campaign,
    go_on,
    has_content,
    last_run,
    lock_campaign,
    open_runs,
    reopen_run,
    runs_of,
    save_campaign,
    start_queued,
)
from db.errors import ReplacedError
from db.events import latest_events
from db.ingest import ingest
from db.jobs import begin_attempt, create_job
from db.leases import database_wall_ns
from db.models import (
    BundleRow,
    CampaignBatchRow,
    CampaignRow,
    CampaignRunRow,
    RequestRow,
    RunRow,
    ScheduleRow,
    TaskDataRow,
)
from db.plans import save_plan
from db.schedules import (
    list_schedules,
    lock_schedule,
    put_schedule,
    schedule_of,
    set_schedule_state,
)
from db.session import Store
from orchestrator.campaigns.compare import Asked, compare_runs
from orchestrator.campaigns.conclude import conclude_run
from orchestrator.campaigns.ends import RunEnds
from orchestrator.campaigns.report import rows_of
from orchestrator.campaigns.spec import CampaignSpec
from sti_runtime.errors import InputError
from sti_runtime.records import Record
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


def test_each_end_of_a_run_is_told_once(store: Store) -> None:
    ended(store, (batch(0, "a", "health"), CellEnd("done")))
    ends = RunEnds(store)
    begin(store, [batch(0, "a", "health"), batch(1, "b", "health")])
    assert ends.look() == []  # one ended before, one has not
    for each, state in zip(ready(store), ("done", "failed"), strict=True):
        assert claim(store, each.batch_id, "me")
        assert finish(store, each.batch_id, "me", state)
    with store.session() as session:
        (run,) = open_runs(session)
        assert conclude_run(session, run)
        cause = "run 2 was still under way"
        create_run(session, campaign(session), [], trigger="schedule", state="skipped", cause=cause)
    end, skipped = ends.look()
    assert end.elapsed_ns is not None
    assert str(end).startswith("run 2 of night: failed; 2 cells: 1 done, 1 failed; took ")
    assert str(skipped) == "run 3 of night: skipped (run 2 was still under way)"
    assert ends.look() == []


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


def ended(store: Store, *batches: tuple[NewBatch, CellEnd]) -> int:
    """A run whose batches, each of one cell, ended so, concluded."""
    run_id = begin(store, [each for each, _ in batches])
    with store.session() as session:
        for row in session.scalars(select(CampaignBatchRow).where(CampaignBatchRow.run_id == run_id)).all():
            assert work.claim(session, row.id, "me")
            (cell,) = work.cells_of(session, row.id)
            assert work.end_batch(session, row.id, "me", {cell.id: batches[row.number][1]})
        assert conclude_run(session, session.get_one(CampaignRunRow, run_id))
    return run_id


def told(store: Store, kind: str) -> list[tuple[str, str]]:
    """(level, what) of the events of a kind, oldest first."""
    with store.reader() as session:
        return [(e.level, e.what) for e in reversed(latest_events(session)) if e.kind == kind]


def test_a_run_with_nothing_to_do_again_stays_as_it_ended(store: Store) -> None:
    with store.session() as session:
        failed = create_run(session, campaign(session), [], trigger="schedule", state="failed", cause="gone")
        assert failed is not None
    done = begin(store, [batch(0, "a", "health")])
    (only,) = ready(store)
    assert claim(store, only.batch_id, "me")
    assert finish(store, only.batch_id, "me")
    with store.session() as session:
        assert cancel_run(session, done, "too late")
    with store.session() as session:
        for run_id, state in ((failed.id, "failed"), (done, "cancelled")):
            assert reopen_run(session, run_id) == 0
            run = session.get_one(CampaignRunRow, run_id, populate_existing=True)
            assert (run.state, run.cause is None, run.ended_wall_ns is None) == (state, False, False)


def test_a_campaign_that_was_replaced_has_no_run_to_go_on_with(store: Store) -> None:
    run_id = ended(store, (batch(0, "a", "health"), CellEnd("failed", "no")))
    with store.session() as session:
        last = last_run(session, campaign(session))
        assert last is not None
        assert last.id == run_id
        assert last_run(session, campaign(session, content="two", replace=True)) is None
        made = create_run(session, campaign(session, content="two"), [], trigger="manual")
        create_run(session, campaign(session, content="two"), [], trigger="schedule", state="skipped")
        last = last_run(session, campaign(session, content="two"))
        assert made is not None
        assert last is not None
        assert last.id == made.id


def test_a_run_is_taken_of_what_the_campaign_asks_now(store: Store) -> None:
    run_id = ended(store, (batch(0, "a", "health"), CellEnd("failed", "no")))
    with store.session() as session:
        read = campaign(session)
    with store.session() as session:
        campaign(session, content="two", replace=True)  # as another host does, behind the first one's back
    with pytest.raises(ReplacedError, match="other content meanwhile"), store.session() as session:
        go_on(session, read.id, Spec(name="one"))
    assert counts(store, run_id) == {"failed": 1}
    with store.session() as session:
        assert go_on(session, read.id, Spec(name="two")) is None  # a new run is to begin
    assert counts(store, run_id) == {"failed": 1}


def test_what_is_missing_is_taken_once_and_then_what_is_open(store: Store) -> None:
    run_id = ended(store, (batch(0, "a", "health"), CellEnd("failed", "no")))
    with store.session() as session:
        read = campaign(session)
        assert go_on(session, read.id, Spec(name="one"), again=True) is None
    for how, missing in (("reopened", 1), ("open", 0)):
        with store.session() as session:
            taken = go_on(session, read.id, Spec(name="one"))
            assert taken is not None
            assert taken.run is not None
            assert (taken.run.id, taken.how, taken.missing) == (run_id, how, missing)
    (only,) = ready(store)
    assert claim(store, only.batch_id, "me")
    assert finish(store, only.batch_id, "me")
    with store.session() as session:
        assert conclude_run(session, session.get_one(CampaignRunRow, run_id))
    with store.session() as session:
        taken = go_on(session, read.id, Spec(name="one"))
        assert taken is not None
        assert (taken.run, taken.how) == (None, "complete")


def test_nobody_replaces_a_campaign_while_a_run_of_it_is_taken(store: Store) -> None:
    run_id = ended(store, (batch(0, "a", "health"), CellEnd("failed", "no")))
    begun = threading.Event()

    def replace_it() -> None:
        begun.set()
        with store.session() as session:
            campaign(session, content="two", replace=True)

    with ThreadPoolExecutor(1) as pool:
        with store.session() as session:
            read = find_campaign(session, "night")
            assert read is not None
            lock_campaign(session, read.id, Spec(name="one"))
            replaced = pool.submit(replace_it)
            assert begun.wait(60)
            taken = go_on(session, read.id, Spec(name="one"))
            assert taken is not None
            assert taken.how == "reopened"
        with pytest.raises(InputError, match="is open"):
            replaced.result(60)
    assert counts(store, run_id) == {"queued": 1}


class LaterSpec(Spec):
    """What a later version reads: a field more, with a default."""

    notes: str = ""


class Asks(Record):
    """What asks a number of requests."""

    requests: int


class OtherSpec(Record):
    """What cannot be read from a ``Spec``."""

    number: int


def test_content_that_an_earlier_version_kept_is_the_same_content(store: Store) -> None:
    with store.session() as session:
        kept = campaign(session, content="one")
    assert kept.spec_digest != LaterSpec(name="one").digest
    assert has_content(kept, LaterSpec(name="one"))
    assert not has_content(kept, LaterSpec(name="one", notes="new"))
    assert not has_content(kept, LaterSpec(name="two"))
    assert not has_content(kept, OtherSpec(number=1))


def test_a_device_without_data_is_told_with_the_reason(store: Store) -> None:
    known = CellEnd("done", "its accuracy was known")
    ended(store, (batch(0, "a", "evaluate"), known), (batch(1, "b", "evaluate"), known))
    assert told(store, "data-missing") == []
    ended(store, (batch(0, "a", "execute"), CellEnd("infeasible", "no plan meets its T")))
    ended(store, (batch(0, "a", "profile"), CellEnd("done", "the store's profile is used")))
    assert told(store, "data-missing") == [
        ("error", "run 2 of night has no data of a: no plan meets its T"),
        ("error", "run 2 of night has no data of b: run 1 had some, and this one does not select it"),
        ("error", "run 3 of night has no data of a: nothing was measured anew"),
    ]


def test_a_plan_that_was_lost_and_found_is_a_change(store: Store) -> None:
    with store.session() as session:
        made = world.populate(session)
    plan = CellEnd("done", plan_digest=made.plan.digest, job_id=made.job.id)
    none = CellEnd("infeasible", "no plan meets its T; the smallest that works is 199.624182ms")
    profile = (batch(0, "board", "profile"), CellEnd("done", job_id=made.job.id))
    for end in (plan, none, none, plan):
        ended(store, profile, (batch(1, "board", "execute"), end))
    lost, found = told(store, "plan-changed")
    assert lost[0] == "warning"
    assert "predicted → no plan meets its T; the smallest that works is 200 ms (new: profile)" in lost[1]
    assert found[0] == "info"
    assert "the smallest that works is 200 ms → 1×2 at" in found[1]


def test_two_nights_are_compared_by_device_and_metric(store: Store) -> None:
    with store.session() as session:
        made = world.populate(session)
    jobs = [
        made.job,
        made.job.model_copy(update={"id": "job-2"}),
        made.job.model_copy(update={"id": "job-3"}),
    ]
    nights = []
    for number, job in enumerate(jobs):
        with store.session() as session:
            if number:
                create_job(session, job, key=job.id, kind="test", device_id=made.device_id)
                begin_attempt(session, job.id, lease_counter=1)
            records = world.journal(job, made.plan)
            ingest(session, device_id=made.device_id, job_id=job.id, attempt=1, records=records)
            if number == 2:
                runs = select(RunRow.id).where(RunRow.job_id == job.id)
                slower = update(RequestRow).where(RequestRow.run_id.in_(runs))
                session.execute(slower.values(latency_ns=2 * RequestRow.latency_ns))
        end = CellEnd("done", plan_digest=made.plan.digest, job_id=job.id)
        nights.append(ended(store, (batch(0, "board", "execute"), end)))
    nights.append(ended(store, (batch(0, "twin", "execute"), CellEnd("failed", "no link"))))
    with store.reader() as session:
        one, two, slow, lost = nights
        for before, after, verdict in ((one, two, "same"), (two, slow, "worse"), (slow, two, "better")):
            (metric,) = compare_runs(session, before, after).metrics
            assert (metric.device, metric.verdict) == ("board", verdict)
            assert (metric.metric, metric.unit, metric.lacking) == ("latency", "ns", ("", ""))
            assert metric.asked == Asked("", "sst-2", "native", "100ms", 1, "sti")
            assert metric.ratio is not None
            assert metric.ratio.low_ppm <= metric.ratio.value_ppm <= metric.ratio.high_ppm
        found = compare_runs(session, slow, lost)
    assert found.missing == ("board",)
    board, twin = found.metrics
    assert {(each.ratio, each.verdict) for each in (board, twin)} == {(None, "not enough data")}
    assert (board.device, board.samples[1], board.lacking) == ("board", 0, ("", "it was not asked"))
    assert (twin.device, twin.samples, twin.lacking) == ("twin", (0, 0), ("it was not asked", "no link"))


def test_bundles_of_one_name_are_told_apart(store: Store) -> None:
    with store.session() as session:
        world.populate(session)
        row = session.scalars(select(BundleRow)).one()
        kept = {column.name: getattr(row, column.name) for column in BundleRow.__table__.columns}
        digests = [letter * 64 for letter in "bcd"]
        for digest, name in zip(digests, ("one", "one", "other"), strict=True):
            session.add(BundleRow(**{**kept, "digest": digest, "name": name}))
    batches = [replace(batch(n, "board", "execute"), bundle_digest=each) for n, each in enumerate(digests)]
    nights = [ended(store, *((each, CellEnd("failed", "no link")) for each in batches)) for _ in range(2)]
    with store.reader() as session:
        found = compare_runs(session, *nights).metrics
    assert [one.asked.bundle for one in found] == [f"one {'b' * 12}", f"one {'c' * 12}", "other"]


def scored_on_a_draw(store: Store) -> tuple[CellEnd, CellEnd]:
    """The ends of a cell whose plan ran on a draw of the dev rows, and of one that took its accuracy."""
    with store.session() as session:
        made = world.populate(session)
        session.execute(update(TaskDataRow).values(split="dev-40-seed-1"))  # draws answer who asks for them
        records = world.journal(made.job, made.plan)
        ingest(session, device_id=made.device_id, job_id=made.job.id, attempt=1, records=records)
    ran = CellEnd("done", plan_digest=made.plan.digest, job_id=made.job.id)
    return ran, CellEnd("done", "its accuracy was known", plan_digest=made.plan.digest)


def test_an_accuracy_that_was_known_is_compared_on_the_rows_of_its_run(store: Store) -> None:
    ran, known = scored_on_a_draw(store)
    nights = [
        ended(store, (batch(0, "board", "execute"), ran), (batch(1, "board", "evaluate"), known))
        for _ in range(2)
    ]
    with store.reader() as session:
        found = compare_runs(session, *nights).metrics
    (accuracy,) = (each for each in found if each.metric == "accuracy")
    assert (accuracy.before, accuracy.samples, accuracy.verdict) == (750_000, (40, 40), "same")


def test_a_report_has_the_accuracy_that_was_known_on_the_rows_of_its_run(store: Store) -> None:
    ran, known = scored_on_a_draw(store)
    run_id = ended(store, (batch(0, "board", "evaluate"), ran), (batch(1, "twin", "evaluate"), known))
    with store.reader() as session:
        shares = [
            row.accuracy and (row.accuracy.correct.count, row.accuracy.correct.total)
            for row in rows_of(session, run_id)
        ]
    assert shares == [(30, 40), (30, 40)]


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
        assert work.durations(session) == [("a", "health", 1, 7 * S)]
        assert work.had(session, database_wall_ns(session)) == {(run_id, "a"): 7 * S}
        assert work.left(session) == {run_id: {("a", "health"): 1}}


def test_durations_are_of_what_was_measured_by_its_size(store: Store) -> None:
    kinds = ("execute", "execute", "evaluate", "execute")
    batches = [batch(n, "a", kind, cells=3) for n, kind in enumerate(kinds)]
    need = replace(batch(4, "a", "profile"), fresh=False)  # the store may have it
    with store.session() as session:
        made = world.populate(session)
        asked = save_campaign(session, Asks(requests=5), name="night", priority=1, deadline_ns=None, seed=0)
        run = create_run(session, asked, [*batches, need], trigger="manual")
        assert run is not None
        sizes = {("a", "execute"): (3, 9 * 5), ("a", "evaluate"): (1, 3), ("a", "profile"): (1, 1)}
        assert work.sizes(session, run.id) == sizes
        assert work.left(session, run.id) == {run.id: {("a", "execute"): 3, ("a", "evaluate"): 1}}
    measured, no_plan = CellEnd("done", job_id=made.job.id), CellEnd("infeasible", "no plan")
    known = CellEnd("done", "its accuracy was known")
    found = ([measured] * 3, [measured, measured, no_plan], [known] * 3, [no_plan] * 3, [known])
    with store.session() as session:
        rows = session.scalars(select(CampaignBatchRow).order_by(CampaignBatchRow.number)).all()
        for row, ends in zip(rows, found, strict=True):
            assert work.claim(session, row.id, "me")
            cells = work.cells_of(session, row.id)
            kept = {cell.id: end for cell, end in zip(cells, ends, strict=True)}
            assert work.end_batch(session, row.id, "me", kept)
        took = [(device, kind, parts) for device, kind, parts, _ in work.durations(session)]
    assert sorted(took) == [("a", "execute", 2 * 5), ("a", "execute", 3 * 5)]


def test_a_campaign_that_says_no_requests_has_those_of_its_default(store: Store) -> None:
    run_id = begin(store, [batch(0, "a", "execute", cells=3)])  # of a spec without the field
    default = CampaignSpec.model_fields["requests"].default
    with store.reader() as session:
        assert work.sizes(session, run_id) == {("a", "execute"): (1, 3 * default)}


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
        session.execute(
            update(ScheduleRow).values(settled_wall_ns=7)
        )  # as after a night without a controller
        set_schedule_state(session, schedule_id, "active")
        resumed = lock_schedule(session, schedule_id)
        assert resumed is not None
        assert resumed.settled_wall_ns == 7
        set_schedule_state(session, schedule_id, "removed")
        assert schedule_of(session, campaign(session).id) is None
        assert put(session) == schedule_id
