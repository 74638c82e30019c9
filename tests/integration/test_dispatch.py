"""Driving one job to its end: after an interruption it goes on in the same attempt, nothing counts twice."""

from __future__ import annotations

import multiprocessing
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from db.leases import release_lease
from db.models import AttemptRow, JournalRecordRow
from orchestrator import fleet
from orchestrator.dispatch import Request, run_job, take_lease
from orchestrator.errors import LinkError
from orchestrator.farm import Farm, open_farm
from orchestrator.jobs import DeviceTarget
from orchestrator.settings import load_settings
from orchestrator.tailing import PollResult
from orchestrator.worker import HostWorker
from sti_runtime.messages import Job, ProbeUnit, ResultRecord
from tests.agent_data import OPEN_GATES
from tests.farm_world import journal_lines, wait_for
from tests.machine import Machine

INVENTORY = "version: 1\ndevices: [{name: desk, transport: local, threads: 1, workdir: work/desk}]"
UNITS = 40


class InterruptedWorker(HostWorker):
    """The host's worker; Ctrl-C comes with the first results."""

    def poll(self, name: str, job_id: str, attempt: int, offset: int, wait_s: float) -> PollResult:
        """As the host's; raises KeyboardInterrupt once a result has been seen."""
        polled = super().poll(name, job_id, attempt, offset, wait_s)
        if any(isinstance(record.payload, ResultRecord) for record in polled.records):
            raise KeyboardInterrupt
        return polled


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Farm]:
    (tmp_path / "inventory.yaml").write_text(INVENTORY)
    with open_farm(load_settings(environ={}, cwd=tmp_path)) as opened:
        yield opened


def request_of(farm: Farm, worker: HostWorker) -> Request:
    device_id, facts = fleet.probe_device(farm, worker, farm.inventory.devices[0])
    target = DeviceTarget(
        identity=facts.identity,
        engine="native",
        threads=1,
        queue_depth=1,
        cpus=(),
        machine_lock=str(farm.settings.home / "machine.lock"),
        emulation=None,
        gates=OPEN_GATES,
    )
    units = tuple(ProbeUnit(number=number, kind="probe") for number in range(UNITS))
    return Request("desk", device_id, facts.agent_digest, target, "probe", None, None, units)


def attempts_and_results(farm: Farm) -> tuple[int, Counter[int | None]]:
    with farm.store.reader() as session:
        attempts = session.scalars(select(AttemptRow.number)).all()
        table = JournalRecordRow
        units = session.scalars(
            select(table.unit).where(table.type == "result", table.rejected.is_(None))
        ).all()
    return len(attempts), Counter(units)


def require_once(farm: Farm) -> None:
    attempts, results = attempts_and_results(farm)
    assert attempts == 1
    assert results == Counter(range(UNITS))


def let_a_unit_through(machine: Machine, farm: Farm) -> None:
    """Let the agent do a unit of the job, or a few, then none."""
    jobs = farm.settings.inventory.parent / "work/desk/jobs"
    machine.let_through(lambda: any(journal_lines(folder) > 1 for folder in jobs.glob("*/1")), "a unit")


def test_after_ctrl_c_the_same_request_goes_on_in_the_same_attempt(farm: Farm) -> None:
    devices = farm.inventory.devices
    interrupted = InterruptedWorker(farm.settings, devices)
    request = request_of(farm, interrupted)
    with Machine(farm.settings.home / "machine.lock") as machine:
        agent = threading.Thread(target=let_a_unit_through, args=(machine, farm))
        agent.start()
        with pytest.raises(KeyboardInterrupt):
            run_job(farm.store, interrupted, farm.owner, request)
        agent.join()
    assert attempts_and_results(farm)[1].total() < UNITS
    assert run_job(farm.store, HostWorker(farm.settings, devices), farm.owner, request).complete
    require_once(farm)


class CutWorker(HostWorker):
    """The host's worker over a link that is cut: ``cuts`` polls and starts in a row fail, again and again."""

    def __init__(self, farm: Farm, cuts: int) -> None:
        super().__init__(farm.settings, farm.inventory.devices)
        self._cuts, self._left, self.lost = cuts, cuts, 0

    def _through(self) -> None:
        self._left = self._cuts if self._left == 0 else self._left - 1
        if self._left != self._cuts:
            self.lost += 1
            raise LinkError("its cable is out.", "Put it in.", device="desk")

    def start_job(self, name: str, job: Job) -> bool:
        """As the host's, when the link is there."""
        self._through()
        return super().start_job(name, job)

    def poll(self, name: str, job_id: str, attempt: int, offset: int, wait_s: float) -> PollResult:
        """As the host's, when the link is there."""
        self._through()
        return super().poll(name, job_id, attempt, offset, wait_s)


def test_a_link_that_comes_and_goes_costs_no_record(farm: Farm) -> None:
    worker = CutWorker(farm, cuts=2)
    assert run_job(farm.store, worker, farm.owner, request_of(farm, worker)).complete
    assert worker.lost > 0
    require_once(farm)


def test_stop_ends_a_job_that_waits_for_its_link(farm: Farm) -> None:
    worker, stop = CutWorker(farm, cuts=10**9), threading.Event()
    request = request_of(farm, worker)
    outcomes: list[BaseException] = []

    def drive() -> None:
        try:
            run_job(farm.store, worker, farm.owner, request, stop=stop)
        except KeyboardInterrupt as interrupt:
            outcomes.append(interrupt)

    driver = threading.Thread(target=drive)
    driver.start()
    wait_for(lambda: worker.lost > 1, "the link to be lost")
    stop.set()
    driver.join()
    assert len(outcomes) == 1
    assert run_job(
        farm.store, HostWorker(farm.settings, farm.inventory.devices), farm.owner, request
    ).complete
    require_once(farm)


def _control(folder: Path) -> None:
    with open_farm(load_settings(environ={}, cwd=folder)) as farm:
        worker = HostWorker(farm.settings, farm.inventory.devices)
        run_job(farm.store, worker, farm.owner, request_of(farm, worker))


@pytest.mark.parametrize("leased_between", [False, True], ids=["plain", "after-verifying-its-emulation"])
def test_after_kill_9_of_the_controller_the_same_request_goes_on_in_the_same_attempt(
    farm: Farm, tmp_path: Path, leased_between: bool
) -> None:
    controller = multiprocessing.get_context("spawn").Process(target=_control, args=(tmp_path,))
    with Machine(farm.settings.home / "machine.lock") as machine:
        controller.start()
        let_a_unit_through(machine, farm)
        wait_for(lambda: attempts_and_results(farm)[1].total() > 0, "results in the store")
        assert controller.is_alive()
        controller.kill()
        controller.join()
    worker = HostWorker(farm.settings, farm.inventory.devices)
    request = request_of(farm, worker)
    if leased_between:  # what making an emulated device ready does before every job
        with farm.store.session() as session:
            grant = take_lease(session, request.device_id, farm.owner)
        with farm.store.session() as session:
            release_lease(session, grant)
    assert run_job(farm.store, worker, farm.owner, request).complete
    require_once(farm)
