"""Campaigns on real agents: what is asked is measured once, whatever happens to the controller."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from sqlalchemy import select

from db.campaign_samples import found_in, profile_metrics
from db.campaign_work import under_way, waiting
from db.campaigns import cancel_run, reopen_run
from db.errors import QuarantinedError
from db.events import latest_events
from db.leases import database_wall_ns
from db.models import CampaignCellRow, DeviceProfileRow, JobRow, PlanRow
from db.quarantine import begin_quarantine, quarantine_of, steps_since
from orchestrator.campaigns import claims
from orchestrator.campaigns.compare import compare_runs
from orchestrator.campaigns.controller import Controller
from orchestrator.campaigns.estimate import GUESSES, Amount
from orchestrator.campaigns.report import importance_of_run
from orchestrator.campaigns.start import estimated_ns, resolve
from orchestrator.campaigns.steps import perform
from orchestrator.device_facts.seen import Seen
from orchestrator.errors import LinkError
from orchestrator.farm import Farm
from orchestrator.fleet import probe_device
from orchestrator.health.recovery import climb
from orchestrator.measure import importance_of
from orchestrator.recovering import Stepped
from orchestrator.scoring import estimate_importance
from orchestrator.worker import HostWorker
from sti_runtime.importance_profile import ImportanceProfile
from sti_runtime.messages import ResultRecord
from tests.campaign_world import (
    begin,
    campaign,
    cells,
    kinds_and_states,
    means_of,
    run_state,
    start_controller,
    work_off,
    write_devices,
)
from tests.farm_world import (
    InProcess,
    attempts_of,
    fill,
    job_folders,
    job_states,
    journal,
    journal_lines,
    machine_of,
    open_world,
    require_storage,
    stored_records,
    wait_for,
)

pytestmark = pytest.mark.slow

MATRIX = """
name: small
devices: [desk]
kinds: [health, profile, execute, evaluate]
targets: [1ns, 100s, 5 of whole-model compute]
preload: [10kB]
working: 1MB
policies: [sti, preload-6]
requests: 4
"""
HEALTH = "name: health\nkinds: [health]\ndevices: [desk]\n"


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Farm]:
    write_devices(tmp_path)
    with open_world(tmp_path) as opened:
        yield opened


def begun(root: Path, kind: str) -> bool:
    """Whether the agent has begun a job of this kind."""
    return any(journal_lines(folder) for folder in job_folders(root, "desk", kind))


def ended(root: Path, kind: str) -> bool:
    """Whether the agent has journalled the end of a job of this kind."""
    journals = [folder / "journal.log" for folder in job_folders(root, "desk", kind)]
    return any(b'"type":"end"' in path.read_bytes() for path in journals)


def fits_of(farm: Farm, run_id: int) -> set[str | None]:
    """The jobs whose samples the device profiles were fitted from that a run's plans rest on."""
    query = (
        select(DeviceProfileRow.job_id)
        .join(PlanRow, PlanRow.device_profile_id == DeviceProfileRow.id)
        .join(CampaignCellRow, CampaignCellRow.plan_digest == PlanRow.digest)
        .where(CampaignCellRow.run_id == run_id)
    )
    with farm.store.reader() as session:
        return set(session.scalars(query))


def test_a_matrix_is_measured_and_again_only_what_is_missing(
    farm: Farm, worker: HostWorker, tmp_path: Path
) -> None:
    require_storage(tmp_path)
    fill(farm)
    run_id = begin(farm, campaign(MATRIX))
    work_off(farm, worker)
    assert kinds_and_states(farm, run_id) == {
        ("importance", "done"): 1,
        ("health", "done"): 1,
        ("profile", "done"): 1,
        ("execute", "infeasible"): 2,
        ("execute", "done"): 4,
        ("evaluate", "infeasible"): 2,
        ("evaluate", "done"): 4,
    }
    assert run_state(farm, run_id) == "done"
    infeasible = [cell.cause for _, cell in cells(farm, run_id) if cell.state == "infeasible"]
    assert all("the smallest that works is" in (cause or "") for cause in infeasible)
    with farm.store.session() as session:
        found = found_in(session, run_id)
        assert [len(one.latency_ns) + one.invalid for one in found if one.states == {"done": 1}] == [4] * 4
        assert {each.metric for each in profile_metrics(session, run_id)} == {"read", "compute"}
        assert reopen_run(session, run_id) == 0  # nothing of it is missing
        same = [one for one in compare_runs(session, run_id, run_id).metrics if one.metric == "accuracy"]
        known = [one for one in same if one.before is not None]
        assert len(known) == 4
        assert {one.verdict for one in known} == {"same"}
    jobs = job_states(farm)
    assert (len(jobs), set(jobs.values())) == (4, {"done"})
    # Another run measures anew; it makes no new importance.
    second = begin(farm, campaign(MATRIX))
    work_off(farm, worker)
    assert run_state(farm, second) == "done"
    kinds = Counter(job_id.split("-")[0] for job_id in job_states(farm))
    assert (kinds["health"], kinds["profile"], kinds["execute"]) == (2, 2, 2)
    # It plans from the profile that it measured itself.
    assert [fits_of(farm, each) for each in (run_id, second)] == [
        {cell.job_id for batch, cell in cells(farm, each) if batch.kind == "profile"}
        for each in (run_id, second)
    ]


def test_importance_that_is_not_asked_is_the_newest_of_the_store(farm: Farm, worker: HostWorker) -> None:
    work = fill(farm)

    def run(more: str = "") -> tuple[list[str], ImportanceProfile]:
        name = f"i{len(more)}"
        run_id = begin(farm, campaign(f"name: {name}\ndevices: [desk]\nkinds: [importance]\n{more}"))
        work_off(farm, worker)
        assert run_state(farm, run_id) == "done"
        with farm.store.reader() as session:
            said = importance_of_run(session, run_id)
        return said, importance_of(farm, work.bundle, work.task)

    silent = campaign("name: i\ndevices: [desk]\nkinds: [importance]\n")
    estimate_importance(farm, InProcess(), work.bundle, work.task, rows=4)  # which is never taken
    assert estimated_ns(farm, resolve(farm, silent)) == GUESSES["importance"].ns(Amount(1, 1))
    said, made = run()
    assert estimated_ns(farm, resolve(farm, silent)) == 0
    assert (said, made.method) == ([], "exhaustive")
    said, few = run("importance_rows: 6\n")
    assert (said, few.rows) == ([], 6)
    assert few.digest != made.digest
    said, taken = run()
    assert taken.digest == few.digest
    used = f"the store's importance profile {few.digest[:12]}, of 6 rows, is used"
    assert said == [f"importance of tiny on demo: {used}"]
    said, newest = run(f"importance_rows: {made.rows}\n")
    assert (said, newest.digest) == (
        ["importance of tiny on demo: the store has the scores of all its shards"],
        made.digest,
    )
    assert made.digest[:12] in run()[0][0]


def test_a_device_that_fails_stops_no_other_and_is_reported(
    farm: Farm, worker: HostWorker, tmp_path: Path
) -> None:
    blocked = tmp_path / ".stifarm/devices"
    blocked.mkdir(parents=True)
    (blocked / "board").write_text("a file where its work folder should be")
    run_id = begin(farm, campaign(HEALTH.replace("[desk]", "all")))
    work_off(farm, worker)
    states = {batch.device: cell.state for batch, cell in cells(farm, run_id)}
    assert states == {"desk": "done", "board": "failed"}
    assert run_state(farm, run_id) == "failed"
    with farm.store.reader() as session:
        loud = {event.kind: event for event in latest_events(session)}
    assert loud["data-missing"].level == "error"
    assert "board" in loud["data-missing"].what
    (blocked / "board").unlink()
    with farm.store.session() as session:
        assert reopen_run(session, run_id) == 1
    work_off(farm, worker)
    assert run_state(farm, run_id) == "done"
    assert set(job_states(farm).values()) == {"done"}
    assert len(job_states(farm)) == 2


class LostWorker(HostWorker):
    """Its devices are lost until the ladder has come to a step, or for good."""

    back_at = "reboot"

    def __init__(self, farm: Farm) -> None:
        super().__init__(farm.settings, farm.inventory.devices)
        self.lost, self.steps = True, list[str]()

    def look(self, name: str) -> Seen:
        """Nobody answers while it is lost."""
        if self.lost:
            raise LinkError("it is lost.", "Plug it in.", device=name)
        return super().look(name)

    def recover(self, name: str, step: str) -> Stepped:
        """Each step fails but one."""
        self.steps.append(step)
        self.lost = step != self.back_at
        return Stepped("failed" if self.lost else "recovered", step)


@pytest.mark.parametrize("back_at", ["reconnect", "never"])
def test_the_ladder_is_climbed_for_a_device_that_is_lost(
    farm: Farm, worker: HostWorker, back_at: str
) -> None:
    device = farm.inventory.devices[0]
    device_id, _ = probe_device(farm, worker, device)
    lost = LostWorker(farm)
    lost.back_at = back_at
    run_id = begin(farm, campaign(HEALTH))
    work_off(farm, lost)
    lost.close()
    with farm.store.reader() as session:
        taken = [(row.step, row.outcome) for row in steps_since(session, device_id, 0)]
        quarantined = quarantine_of(session, device_id)
    if back_at == "never":
        assert taken == [("reconnect", "failed")] * 2
        assert run_state(farm, run_id) == "failed"
        assert quarantined is not None
        assert "did not reach it" in quarantined.cause
    else:
        assert taken == [("reconnect", "recovered")]
        assert run_state(farm, run_id) == "done"
        assert quarantined is None


def test_what_ends_a_batch_decides_how_high_is_climbed(farm: Farm, worker: HostWorker) -> None:
    device = farm.inventory.devices[0]
    device_id, _ = probe_device(farm, worker, device)
    lost, error = LostWorker(farm), LinkError("it is lost.", device=device.name)
    assert climb(farm, lost, device, error, quarantine=False) is error
    with farm.store.reader() as session:
        assert quarantine_of(session, device_id) is None
    assert isinstance(climb(farm, lost, device, error, quarantine=True), QuarantinedError)
    lost.close()


def test_a_batch_on_a_device_in_quarantine_fails_at_once(
    farm: Farm, worker: HostWorker, tmp_path: Path
) -> None:
    require_storage(tmp_path)
    fill(farm)
    device_id, _ = probe_device(farm, worker, farm.inventory.devices[0])
    with farm.store.session() as session:
        begin_quarantine(session, device_id, "it lies")
    run_id = begin(farm, campaign("name: p\nkinds: [profile]\ndevices: [desk]\n"))
    work_off(farm, worker)
    ((batch, cell),) = cells(farm, run_id)
    assert (cell.state, batch.tries) == ("failed", 0)
    assert "in quarantine" in (cell.cause or "")


def test_killed_at_any_point_nothing_is_lost_or_doubled(
    farm: Farm, worker: HostWorker, tmp_path: Path
) -> None:
    require_storage(tmp_path)
    fill(farm)
    run_id = begin(farm, campaign(MATRIX))
    for kind in ("profile", "execute"):
        with machine_of(tmp_path) as machine:
            process = start_controller(tmp_path)
            machine.let_through(partial(begun, tmp_path, kind), f"the {kind} job")
            process.kill()
            process.communicate()
        # Its agent goes on without a controller, to the end.
        wait_for(partial(ended, tmp_path, kind), f"the end of the {kind} job")
    work_off(farm, worker)
    assert run_state(farm, run_id) == "done"
    assert kinds_and_states(farm, run_id)["execute", "done"] == 4
    jobs = job_states(farm)
    assert sorted(job_id.split("-")[0] for job_id in jobs) == ["evaluate", "execute", "health", "profile"]
    for job_id in jobs:
        assert attempts_of(farm, job_id) == [(1, "done")]
        (folder,) = job_folders(tmp_path, "desk", job_id.split("-")[0])
        on_device = journal(folder)
        assert stored_records(farm, job_id, 1) == on_device
        units = [r.payload.unit for r in on_device if isinstance(r.payload, ResultRecord)]
        assert sorted(units) == list(range(len(units)))


def test_killed_between_a_jobs_end_and_its_keeping(farm: Farm, worker: HostWorker) -> None:
    run_id = begin(farm, campaign(HEALTH))
    with farm.store.reader() as session:
        (first,) = waiting(session, database_wall_ns(session))
    batch = claims.claimed(farm, first.batch_id)
    assert batch is not None
    perform(means_of(farm, worker), batch, lambda known: claims.note(farm, batch, known))
    with farm.store.reader() as session:
        assert [row.id for row in under_way(session)] == [first.batch_id]
    work_off(farm, worker)
    assert run_state(farm, run_id) == "done"
    (job_id,) = job_states(farm)
    assert attempts_of(farm, job_id) == [(1, "done")]


def test_an_interrupted_controller_gives_back_and_a_cancelled_run_ends(
    farm: Farm, worker: HostWorker, tmp_path: Path
) -> None:
    run_id = begin(farm, campaign(HEALTH))

    def drive(stopped: list[str]) -> threading.Thread:
        def work() -> None:
            try:
                work_off(farm, worker)
            except KeyboardInterrupt:
                stopped.append("interrupted")

        thread = threading.Thread(target=work)
        thread.start()
        return thread

    stopped: list[str] = []
    with machine_of(tmp_path):
        thread = drive(stopped)
        wait_for(lambda: bool(job_folders(tmp_path, "desk", "health")), "the job")
        folder = job_folders(tmp_path, "desk", "health")[0]
        wait_for(lambda: journal_lines(folder) > 0, "its start")
        farm.stop.set()
        thread.join(120)
        assert stopped == ["interrupted"]
        assert kinds_and_states(farm, run_id) == {("health", "queued"): 1}
        wait_for(lambda: not (folder / "pid").exists(), "its agent to stop")
        farm.stop.clear()
        thread = drive(stopped)
        wait_for(lambda: kinds_and_states(farm, run_id) == {("health", "running"): 1}, "it to go on")
        with farm.store.session() as session:
            assert cancel_run(session, run_id, "by a person")
        wait_for(lambda: kinds_and_states(farm, run_id) == {("health", "cancelled"): 1}, "its end")
        thread.join(120)
    assert run_state(farm, run_id) == "cancelled"
    with farm.store.reader() as session:
        assert session.scalars(select(JobRow.state)).all() == ["cancelled"]


def test_an_idle_controller_says_so(farm: Farm, worker: HostWorker) -> None:
    looks: list[bool] = []

    def over(idle: bool) -> bool:
        looks.append(idle)
        return True

    Controller(means_of(farm, worker)).run(over)
    assert looks == [True]
