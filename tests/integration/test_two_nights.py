"""Two nights of a campaign, end to end: a board gets slower between them, and its plan follows."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import select, update

from db.campaign_plans import ranking_of_run
from db.campaign_work import waiting
from db.events import latest_events
from db.leases import database_wall_ns
from db.models import CampaignRunRow, PlanRow, ScheduleRow
from db.schedules import put_schedule
from orchestrator.campaigns import claims
from orchestrator.campaigns.schedules import fire_due
from orchestrator.campaigns.start import keep_campaign
from orchestrator.campaigns.steps import perform
from orchestrator.cli import main
from orchestrator.farm import Farm
from orchestrator.measure import importance_of
from orchestrator.scoring import score_importance
from orchestrator.worker import HostWorker
from tests.campaign_world import campaign, cells, means_of, run_state, work_off
from tests.farm_world import InProcess, as_controller, fill, open_world, require_storage, write_inventory

pytestmark = pytest.mark.slow

DAY_NS = 24 * 3600 * 10**9
NIGHTLY = """
name: night
devices: [board]
kinds: [profile, execute]
targets: [100ms]
preload: [0kB]
working: 1MB
policies: [sti]
requests: 10
"""


def board(root: Path, read_bandwidth: str) -> None:
    """The inventory: one board that reads so fast."""
    write_inventory(
        root,
        f"{{name: board, transport: local, threads: 1, machine_lock: {root}/board.lock, "
        f"emulate: {{read_bandwidth: {read_bandwidth}, mechanism: agent}}}}",
    )


def fall_due(farm: Farm) -> int:
    """The run that the schedule begins now; what it began before was a day ago."""
    with farm.store.session() as session:
        back = CampaignRunRow.due_wall_ns - DAY_NS
        session.execute(update(CampaignRunRow).values(due_wall_ns=back))
        now = database_wall_ns(session)
        session.execute(update(ScheduleRow).values(settled_wall_ns=now - 90 * 10**9))
    assert fire_due(farm) == ["night"]
    with farm.store.reader() as session:
        return max(session.scalars(select(CampaignRunRow.id)))


def rank(farm: Farm, worker: HostWorker) -> None:
    """Do the importance of the open run, and no more of it."""
    with as_controller(farm):
        with farm.store.reader() as session:
            (first,) = [one for one in waiting(session, database_wall_ns(session)) if one.device is None]
        batch = claims.claimed(farm, first.batch_id)
        assert batch is not None
        means = means_of(farm, worker)
        claims.settle(
            means, batch, perform(means, batch, lambda known: claims.note(farm, batch, known)), None
        )


def plan_of(farm: Farm, run_id: int) -> PlanRow:
    """The plan of a run's only question."""
    (digest,) = {cell.plan_digest for batch, cell in cells(farm, run_id) if batch.kind == "execute"}
    with farm.store.reader() as session:
        return session.scalars(select(PlanRow).where(PlanRow.digest == digest)).one()


def test_a_board_that_got_slower_has_another_plan_and_the_morning_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require_storage(tmp_path)
    board(tmp_path, "20MB/s")
    with open_world(tmp_path) as farm:
        work = fill(farm)
        with farm.store.session() as session:
            row = keep_campaign(session, campaign(NIGHTLY))
            put_schedule(session, row.id, cron="* * * * *", timezone="UTC", catch_up="once", overlap="skip")
        first = fall_due(farm)
        with closing(HostWorker(farm.settings, farm.inventory.devices)) as worker:
            work_off(farm, worker)
    board(tmp_path, "700kB/s")
    with open_world(tmp_path) as farm:
        second = fall_due(farm)
        with closing(HostWorker(farm.settings, farm.inventory.devices)) as worker:
            rank(farm, worker)
            ranked = importance_of(farm, work.bundle, work.task).digest
            # Somebody scores anew meanwhile; the night goes on with the ranking that it began with.
            score_importance(farm, InProcess(), work.bundle, work.task, rows=6, workers=1)
            assert importance_of(farm, work.bundle, work.task).digest != ranked
            work_off(farm, worker)
        assert [run_state(farm, run_id) for run_id in (first, second)] == ["done", "done"]
        plans = [plan_of(farm, run_id) for run_id in (first, second)]
        assert plans[0].content_digest != plans[1].content_digest
        assert plans[0].device_profile_digest != plans[1].device_profile_digest
        assert {plan.importance_digest for plan in plans} == {ranked}
        with farm.store.reader() as session:
            told = [event for event in latest_events(session) if event.kind == "plan-changed"]
            nights = (first, second)
            kept = [ranking_of_run(session, each, work.bundle.digest, work.task) for each in nights]
        assert kept == [ranked, ranked]
    (event,) = told
    assert event.what.startswith("run 2 of night: board, demo, sti at T = 100ms")
    assert event.what.endswith("(new: profile)")
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        main(["--inventory", str(tmp_path / "inventory.yaml"), "campaign", "compare", "night", "--json"])
    assert not done.value.code
    found = json.loads(capsys.readouterr().out)
    assert (found["before"], found["after"], found["missing"]) == (1, 2, [])
    verdicts = {one["metric"]: one["verdict"] for one in found["metrics"]}
    assert (verdicts["latency"], verdicts["read"]) == ("worse", "worse")
    (change,) = found["plans"]
    assert (change["why"], change["feasible"]) == (["profile"], True)
