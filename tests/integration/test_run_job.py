"""Jobs driven by the host on real agents: whatever is killed, nothing is lost and nothing counted twice."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import update

from db.devices import list_devices
from db.errors import LeaseHeldError
from db.leases import acquire_lease, release_lease
from db.models import LeaseRow
from db.quarantine import failures_since
from orchestrator import measure
from orchestrator.dispatch import Outcome, Request, lose_attempts, next_repetition, run_job
from orchestrator.errors import AgentError, HaltedError, LinkError, StableError
from orchestrator.farm import ControllerBusyError, Farm, controlling
from orchestrator.measure import Question, RunSettings
from orchestrator.tailing import PollResult
from orchestrator.worker import HostWorker
from sti_runtime.messages import Job, ResultRecord, StartRecord
from tests.farm_world import (
    BOARD,
    DESK,
    agent_pid,
    alive,
    as_controller,
    attempts_of,
    fill,
    job_folders,
    job_states,
    journal,
    journal_lines,
    machine_of,
    make_ready,
    open_world,
    probe_request,
    require_storage,
    score,
    start_controller,
    stored_records,
    wait_for,
    write_inventory,
)

UNITS = 40


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Farm]:
    write_inventory(tmp_path, DESK, BOARD)
    with open_world(tmp_path) as opened:
        yield opened


def run(farm: Farm, worker: HostWorker, request: Request) -> Outcome:
    with as_controller(farm):
        return run_job(farm.store, worker, farm.owner, request)


def only_folder(root: Path, kind: str = "probe", device: str = "desk") -> Path:
    """The one attempt of the one job of a kind."""
    wait_for(lambda: bool(job_folders(root, device, kind)), "the job's folder")
    folders = job_folders(root, device, kind)
    assert [path.name for path in folders] == ["1"]
    return folders[0]


def journal_starts(folder: Path) -> int:
    """How often an agent has begun or resumed the attempt so far."""
    return (folder / "journal.log").read_bytes().count(b'"type":"start"')


def check_once(farm: Farm, outcome: Outcome, folder: Path) -> list[int]:
    """Every unit once, and the store holds the device's journal record by record; the agents' starts."""
    on_device = journal(folder)
    assert stored_records(farm, outcome.job_id, 1) == on_device
    units = [r.payload.unit for r in on_device if isinstance(r.payload, ResultRecord)]
    assert units == list(range(len(outcome.request.units)))
    assert outcome.complete
    assert attempts_of(farm, outcome.job_id) == [(1, "done")]
    return [r.payload.first_unit for r in on_device if isinstance(r.payload, StartRecord)]


@pytest.mark.slow
def test_every_step_measures_once(farm: Farm, worker: HostWorker, tmp_path: Path) -> None:
    require_storage(tmp_path)
    work = fill(farm)
    assert score(farm, work.bundle) == 4
    assert score(farm, work.bundle) == 0
    question = Question(10**12, 10_000, 1_000_000)
    rounds: list[list[tuple[bool, str]]] = []
    for _ in range(2):
        ready = make_ready(farm, worker, work, "desk")
        profiled = measure.profile_device(farm, worker, ready, work, again=False, advance=None)
        (answer,) = measure.make_plans(farm, ready.device, work, [question])
        assert answer.plan is not None
        settings = RunSettings(requests=3)
        ran = measure.run_plans(
            farm, worker, ready, work, [answer.plan], settings, again=False, advance=None
        )  # fmt: skip
        scored = measure.score_plans(farm, worker, ready, work, [answer.plan], advance=None)
        assert (scored is None) == bool(rounds)
        rounds.append([(profiled.ran, profiled.profile.digest), (ran.ran, ran.job_id)])
    assert [ran for ran, _ in rounds[0]] == [True, True]
    assert rounds[1] == [(False, digest) for _, digest in rounds[0]]
    assert set(job_states(farm).values()) == {"done"}
    (found,) = measure.answers_for(farm, ["desk"], task=work.task)
    assert found.measured is not None
    assert found.measured.latency.count + found.measured.invalid == 3
    assert found.accuracy is not None
    assert found.accuracy.correct.total == work.rows
    assert answer.plan is not None
    repeated = measure.run_plans(
        farm, worker, ready, work, [answer.plan], settings, again=True, advance=None
    )  # fmt: skip
    (pooled,) = measure.answers_for(farm, ["desk"], task=work.task)
    for job_id in (ran.job_id, repeated.job_id):
        (alone,) = measure.of_jobs(farm, [pooled], {job_id})
        assert alone.measured is not None
        assert alone.measured.latency.count + alone.measured.invalid == 3
        assert alone.pooled == pooled.measured is not None
        assert pooled.measured.latency.count + pooled.measured.invalid == 6
    (none,) = measure.of_jobs(farm, [pooled], ())
    assert (none.measured, none.pooled) == (None, pooled.measured)


def test_what_a_job_waits_for_is_told_to_whoever_started_it(
    farm: Farm, worker: HostWorker, tmp_path: Path
) -> None:
    request = probe_request(farm, worker, 1)
    gates = request.target.gates.model_copy(update={"min_free_bytes": 2**62, "wait_limit_s": 600})
    request = replace(request, target=replace(request.target, gates=gates))
    stop, told = threading.Event(), list[tuple[int, int, str]]()

    def advance(done: int, total: int, waits: str) -> None:
        told.append((done, total, waits))
        if waits:
            stop.set()

    with pytest.raises(KeyboardInterrupt):
        run_job(farm.store, worker, farm.owner, request, advance=advance, stop=stop)
    done, total, waits = told[-1]
    assert (done, total) == (0, 1)
    assert waits.startswith("free-space: ")


def test_a_finished_job_is_not_run_again_unless_a_repetition_is_asked(
    farm: Farm, worker: HostWorker, tmp_path: Path
) -> None:
    request = probe_request(farm, worker, 3)
    done: list[tuple[int, int, str]] = []
    first = run_job(farm.store, worker, farm.owner, request, advance=lambda *at: done.append(at))
    assert done[-1] == (3, 3, "")
    before = (only_folder(tmp_path) / "journal.log").read_bytes()
    second = run(farm, worker, request)
    assert (first.ran, second.ran) == (True, False)
    assert second.results == first.results
    assert (only_folder(tmp_path) / "journal.log").read_bytes() == before
    repetition = next_repetition(farm.store, request)
    assert repetition.again == 1
    assert run(farm, worker, repetition).ran
    assert next_repetition(farm.store, request).again == 2


def test_an_agent_killed_in_the_middle_is_started_again(
    farm: Farm, worker: HostWorker, tmp_path: Path
) -> None:
    request = probe_request(farm, worker, UNITS)
    outcomes: list[Outcome] = []
    driving = threading.Thread(target=lambda: outcomes.append(run(farm, worker, request)))
    with machine_of(tmp_path) as machine:
        driving.start()
        folder = only_folder(tmp_path)
        machine.let_through(lambda: journal_lines(folder) > 5, "some units")
        os.kill(agent_pid(folder), signal.SIGKILL)
        wait_for(lambda: journal_starts(folder) == 2, "the agent to be started again")
    driving.join()
    starts = check_once(farm, outcomes[0], folder)
    assert len(starts) == 2
    assert starts[0] == 0 < starts[1] < UNITS


def test_a_controller_killed_in_the_middle_is_succeeded_in_the_same_attempt(
    farm: Farm, worker: HostWorker, tmp_path: Path
) -> None:
    with machine_of(tmp_path) as machine:
        controller = start_controller(tmp_path, UNITS)
        folder = only_folder(tmp_path)
        job_id = folder.parent.name
        machine.let_through(lambda: journal_lines(folder) > 5, "some units")
        wait_for(lambda: len(stored_records(farm, job_id, 1)) > 1, "some results in the store")
        controller.kill()
        controller.communicate()
    assert len(stored_records(farm, job_id, 1)) < UNITS
    wait_for(lambda: journal_lines(folder) == UNITS + 2, "the agent to go on by itself")
    outcome = run(farm, worker, probe_request(farm, worker, UNITS))
    assert outcome.ran
    assert check_once(farm, outcome, folder) == [0]


@pytest.mark.slow
def test_after_ctrl_c_the_same_request_goes_on_on_a_slowed_device(tmp_path: Path) -> None:
    write_inventory(tmp_path, BOARD)
    units = 4
    with open_world(tmp_path) as farm:
        fill(farm)
    with machine_of(tmp_path) as machine:
        controller = start_controller(tmp_path, units)
        folder = only_folder(tmp_path, device="board")
        machine.let_through(lambda: journal_lines(folder) > 1, "a unit")
        controller.send_signal(signal.SIGINT)
        _, errors = controller.communicate(timeout=120)
        assert controller.returncode != 0
        assert "KeyboardInterrupt" in errors
        wait_for(lambda: not (folder / "pid").exists(), "the agent to stop")
    done = sum(isinstance(record.payload, ResultRecord) for record in journal(folder))
    assert 0 < done < units
    with open_world(tmp_path) as farm:
        worker = HostWorker(farm.settings, farm.inventory.devices)
        request = probe_request(farm, worker, units)
        assert request.target.emulation is not None
        assert request.target.emulation.io_mechanism == "agent"
        outcome = run(farm, worker, request)
        assert check_once(farm, outcome, folder) == [0, done]
        worker.close()


def test_a_device_that_another_controller_holds_is_named(
    farm: Farm, worker: HostWorker, tmp_path: Path
) -> None:
    request = probe_request(farm, worker, 1)
    with farm.store.session() as session:
        acquire_lease(session, request.device_id, "lab2:/srv/farm", 90 * 10**9)
    with pytest.raises(LeaseHeldError, match=r"desk is in use by lab2:/srv/farm, for up to \d+ s") as caught:
        run(farm, worker, request)
    assert "Wait for it" in caught.value.remedy
    assert job_folders(tmp_path, "desk", "probe") == []


class SlowController(HostWorker):
    """While it reads a journal for the first time, another controller takes the device."""

    farm: Farm
    device_id: int
    overtaken = False

    def poll(self, name: str, job_id: str, attempt: int, offset: int, wait_s: float) -> PollResult:
        found = super().poll(name, job_id, attempt, offset, wait_s)
        if found.records and not self.overtaken:
            self.overtaken = True
            with self.farm.store.session() as session:
                session.execute(update(LeaseRow).values(expires_wall_ns=0))
                release_lease(session, acquire_lease(session, self.device_id, "lab2:/srv/farm", 10**9))
        return found


def test_a_controller_that_lost_its_lease_writes_nothing(farm: Farm, tmp_path: Path) -> None:
    worker = SlowController(farm.settings, farm.inventory.devices)
    request = probe_request(farm, worker, 3)
    worker.farm, worker.device_id = farm, request.device_id
    with pytest.raises(LeaseHeldError, match="was lost to another controller"):
        run(farm, worker, request)
    assert worker.overtaken
    assert stored_records(farm, request.job_id, 1) == []
    written = only_folder(tmp_path) / "journal.log"
    wait_for(lambda: b'"type":"end"' in written.read_bytes(), "the end of the first attempt")
    # Under a lease of its own it has what was measured before, which is not measured again.
    outcome = run(farm, worker, request)
    assert (outcome.complete, outcome.ran) == (True, False)
    assert stored_records(farm, request.job_id, 1) == journal(only_folder(tmp_path))
    assert attempts_of(farm, request.job_id) == [(1, "done"), (2, "lost")]
    assert job_states(farm)[request.job_id] == "done"
    assert not run(farm, worker, request).ran
    worker.close()


def test_what_an_interrupted_job_measured_comes_in_with_the_next_job(farm: Farm, tmp_path: Path) -> None:
    worker = SlowController(farm.settings, farm.inventory.devices)
    left = probe_request(farm, worker, 3)
    worker.farm, worker.device_id = farm, left.device_id
    with pytest.raises(LeaseHeldError):
        run(farm, worker, left)
    (folder,) = job_folders(tmp_path, "desk", "probe")
    wait_for(lambda: b'"type":"end"' in (folder / "journal.log").read_bytes(), "the end of its agent")
    assert run(farm, worker, replace(left, again=1)).complete
    assert stored_records(farm, left.job_id, 1) == journal(folder)
    assert attempts_of(farm, left.job_id) == [(1, "done")]
    worker.close()


class BlinkingWorker(HostWorker):
    """The link to its device is lost for a moment each time that a journal is about to be read."""

    lost = 0

    def poll(self, name: str, job_id: str, attempt: int, offset: int, wait_s: float) -> PollResult:
        if offset == 0 and wait_s == 0 and self.lost < 2:  # what was left by another job
            self.lost += 1
            raise LinkError("its cable was pulled.", "Look at the cable.", device=name)
        return super().poll(name, job_id, attempt, offset, wait_s)


def test_a_link_that_is_lost_while_an_older_journal_comes_in_is_waited_for(
    farm: Farm, tmp_path: Path
) -> None:
    overtaken = SlowController(farm.settings, farm.inventory.devices)
    left = probe_request(farm, overtaken, 3)
    overtaken.farm, overtaken.device_id = farm, left.device_id
    with pytest.raises(LeaseHeldError):
        run(farm, overtaken, left)
    overtaken.close()
    (folder,) = job_folders(tmp_path, "desk", "probe")
    wait_for(lambda: b'"type":"end"' in (folder / "journal.log").read_bytes(), "the end of its agent")
    worker = BlinkingWorker(farm.settings, farm.inventory.devices)
    assert run(farm, worker, replace(left, again=1)).complete
    assert worker.lost == 2
    assert stored_records(farm, left.job_id, 1) == journal(folder)
    with farm.store.reader() as session:
        assert failures_since(session, left.device_id, 0) == []
    worker.close()


class HaltedController(HostWorker):
    """A person stops what is under way as it begins."""

    def start_job(self, name: str, job: Job) -> bool:
        raise HaltedError("it was stopped.", device=name)


def test_what_a_person_stops_is_no_failure_of_the_device(farm: Farm) -> None:
    worker = HaltedController(farm.settings, farm.inventory.devices)
    request = probe_request(farm, worker, 1)
    with pytest.raises(HaltedError):
        run(farm, worker, request)
    with farm.store.reader() as session:
        assert failures_since(session, request.device_id, 0) == []
    worker.close()


def test_one_controller_of_a_home_at_a_time(farm: Farm, tmp_path: Path) -> None:
    with machine_of(tmp_path):  # so its job does not end
        controller = start_controller(tmp_path, UNITS)
        only_folder(tmp_path)
        with (
            pytest.raises(ControllerBusyError, match=rf"process {controller.pid}\)") as caught,
            controlling(farm),
        ):
            pass
        assert "Wait until it ends" in caught.value.remedy
        controller.kill()
        controller.communicate()
    with controlling(farm):
        pass


def test_another_farms_device_refuses_and_says_why(farm: Farm, worker: HostWorker, tmp_path: Path) -> None:
    run(farm, worker, probe_request(farm, worker, 1))
    (other := tmp_path / "other").mkdir()
    spool = farm.settings.spool("desk")
    write_inventory(other, DESK.replace("threads", f"workdir: {spool}, threads"))
    with open_world(other) as second:
        stranger = HostWorker(second.settings, second.inventory.devices)
        with pytest.raises(AgentError, match=r"desk: .* belongs to store") as caught:
            run(second, stranger, probe_request(second, stranger, 2))
        assert "take-over" in caught.value.remedy
        with second.store.reader() as session:  # a refusal is no failure
            (row,) = list_devices(session)
            assert failures_since(session, row.id, 0) == []
        stranger.close()


def test_a_cleaned_device_gets_a_new_attempt(farm: Farm, worker: HostWorker, tmp_path: Path) -> None:
    with machine_of(tmp_path) as machine:
        controller = start_controller(tmp_path, UNITS)
        folder = only_folder(tmp_path)
        machine.let_through(lambda: journal_lines(folder) > 5, "some units")
        controller.kill()
        controller.communicate()
        agent = agent_pid(folder)
        os.kill(agent, signal.SIGKILL)
        wait_for(lambda: not alive(agent), "the agent's end")
    worker.clean("desk")
    lose_attempts(farm.store, "desk")
    outcome = run(farm, worker, probe_request(farm, worker, UNITS))
    assert outcome.complete
    assert attempts_of(farm, outcome.job_id) == [(1, "lost"), (2, "done")]
    assert stored_records(farm, outcome.job_id, 2) == journal(job_folders(tmp_path, "desk", "probe")[0])


def test_a_failed_unit_is_named_and_the_job_can_be_tried_again(
    farm: Farm, worker: HostWorker, tmp_path: Path
) -> None:
    require_storage(tmp_path)
    work = fill(farm)
    ready = make_ready(farm, worker, work, "desk")
    measure.profile_device(farm, worker, ready, work, again=False, advance=None)
    rows = farm.settings.spool("desk") / "tasks" / f"{work.task_data}.safetensors"
    kept = rows.read_bytes()
    rows.write_bytes(kept[:-8])
    with pytest.raises(StableError, match=r"desk: unit \d+ of job profile-"):
        measure.profile_device(farm, worker, ready, work, again=True, advance=None)
    rows.write_bytes(kept)
    again = measure.profile_device(farm, worker, ready, work, again=True, advance=None)
    assert again.ran
