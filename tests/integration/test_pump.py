"""The jobs of a fleet in one loop, on fake devices: by the rules of a single job, each record once."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from db.errors import LeaseHeldError
from db.leases import acquire_lease
from db.models import AttemptRow, DeviceRow, LeaseRow, ProbeRow
from orchestrator import fleet
from orchestrator.dispatch import Request
from orchestrator.errors import LinkError
from orchestrator.farm import Farm
from orchestrator.health.check import OPEN_GATES
from orchestrator.jobs import DeviceTarget
from orchestrator.pump import watch
from orchestrator.pump.loop import Pump
from orchestrator.pump.watch import Drained, Order
from orchestrator.worker import HostWorker
from sti_runtime.messages import ProbeUnit
from tests.farm_world import attempts_of, open_world, stored_records, wait_for, write_inventory

COUNT, UNITS = 6, 3
QUICK = "job: 300ms, seed: 2"


def fakes(fields: str, count: int = COUNT) -> list[str]:
    """Entries of fake devices."""
    return [f"{{name: f{number}, transport: fake, fake: {{{fields}}}}}" for number in range(count)]


def farm_at(root: Path, fields: str, count: int = COUNT) -> Iterator[Farm]:
    """A farm of such devices."""
    write_inventory(root, *fakes(fields, count))
    with open_world(root) as farm:
        yield farm


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Farm]:
    yield from farm_at(tmp_path, f"{QUICK}, link_faults: 0.02, deaths: 0.2")


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Farm]:
    yield from farm_at(tmp_path, "job: 1h", count=2)


def request_of(farm: Farm, worker: HostWorker, place: int, again: int = 0) -> Request:
    """A job of probe units on a device."""
    device = farm.inventory.devices[place]
    device_id, facts = fleet.probe_device(farm, worker, device)
    target = DeviceTarget(facts.identity, "native", 1, 1, (), None, None, OPEN_GATES)
    units = tuple(ProbeUnit(number=number, kind="probe") for number in range(UNITS))
    return Request(device.name, device_id, facts.agent_digest, target, "probe", None, None, units, again)


def attempts(farm: Farm) -> dict[tuple[str, int], str]:
    """The state of every attempt."""
    with farm.store.reader() as session:
        return {(row.job_id, row.number): row.state for row in session.scalars(select(AttemptRow))}


def require_as_on_device(farm: Farm, worker: HostWorker, requests: Sequence[Request]) -> None:
    """The store holds what the devices journalled, record by record, and nobody holds a device any more."""
    for request in requests:
        on_device = fleet_journal(worker, request)
        assert stored_records(farm, request.job_id, 1) == on_device
    with farm.store.reader() as session:
        assert session.scalars(select(LeaseRow.owner)).all() == [None] * COUNT


def fleet_journal(worker: HostWorker, request: Request) -> list[Any]:
    """What a device holds of a job, over a link that may fail."""
    while True:
        try:
            return list(worker.poll(request.device, request.job_id, 1, 0, 0).records)
        except LinkError:
            continue


def test_many_jobs_over_bad_links_with_dying_agents_come_in_once(farm: Farm) -> None:
    worker = HostWorker(farm.settings, farm.inventory.devices)
    requests = [request_of(farm, worker, place, again) for again in range(3) for place in range(COUNT)]
    told: list[tuple[int, int, str]] = []
    with Pump(farm.store, worker, farm.owner) as pump, ThreadPoolExecutor(COUNT) as threads:

        def run(place: int) -> list[bool]:
            mine = requests[place::COUNT]
            return [pump.run_job(each, advance=lambda *at: told.append(at)).complete for each in mine]

        assert list(threads.map(run, range(COUNT))) == [[True] * 3] * COUNT
        again = pump.run_job(requests[0])
        assert (again.ran, sorted(again.results)) == (False, [0, 1, 2])
    assert set(attempts(farm).values()) == {"done"}
    assert (UNITS, UNITS, "") in told
    require_as_on_device(farm, worker, requests)
    with farm.store.reader() as session:
        emulated = session.scalars(select(ProbeRow.emulated)).all()
        assert emulated == [True] * (len(requests) * UNITS)
        assert all(session.scalars(select(DeviceRow.emulated)))
    worker.close()


class Forgetful(HostWorker):
    """A host whose worker dies now and then: its watches are gone, and answers on their way with it."""

    lost = 0

    def exchange(self, name: str, orders: Sequence[Order], leave: Sequence[str], wait_s: float) -> Drained:
        """As the host's; the first answers with something in them are lost."""
        drained = super().exchange(name, orders, leave, wait_s)
        if drained.stretches and self.lost < 3:
            self.lost += 1
            assert self._pump is not None
            self._pump.close()
            self._pump = None
            raise LinkError("its host is gone.", device=name)
        return drained


def test_what_a_host_had_drained_when_it_died_is_drained_again(farm: Farm) -> None:
    worker = Forgetful(farm.settings, farm.inventory.devices)
    requests = [request_of(farm, worker, place) for place in range(COUNT)]
    with Pump(farm.store, worker, farm.owner) as pump, ThreadPoolExecutor(COUNT) as threads:
        assert all(each.complete for each in threads.map(pump.run_job, requests))
    assert worker.lost == 3
    require_as_on_device(farm, worker, requests)
    worker.close()


def test_a_drain_that_is_not_answered_is_given_again(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "AGAIN_S", 0.0)
    worker = HostWorker(farm.settings, farm.inventory.devices)
    request = request_of(farm, worker, 0)
    order = Order(1, request.device, request.job_id, 1, 0)
    first = worker.exchange(request.device, [order], [], 60).stretches
    assert [stretch.number for stretch in first] == [1]
    assert worker.exchange(request.device, [order], [], 60).stretches == first
    assert worker.exchange(request.device, [], [request.device], 0).stretches == ()
    worker.close()


def test_stop_leaves_a_job_that_then_goes_on_in_the_same_attempt(slow: Farm) -> None:
    worker = HostWorker(slow.settings, slow.inventory.devices)
    request, stop = request_of(slow, worker, 0), threading.Event()
    errors: list[BaseException] = []
    with Pump(slow.store, worker, slow.owner) as pump:

        def run() -> None:
            try:
                pump.run_job(request, stop=stop)
            except KeyboardInterrupt as error:
                errors.append(error)

        for _ in range(2):
            thread = threading.Thread(target=run)
            thread.start()
            wait_for(lambda: bool(fleet_journal(worker, request)), "the job to begin")
            wait_for(lambda: attempts(slow) == {(request.job_id, 1): "running"}, "its attempt")
            stop.set()
            thread.join()
            stop.clear()
    assert len(errors) == 2
    assert attempts(slow) == {(request.job_id, 1): "running"}
    with slow.store.reader() as session:
        assert session.scalars(select(LeaseRow.owner)).all() == [None]
    worker.close()


def test_closing_leaves_what_is_under_way(slow: Farm) -> None:
    worker = HostWorker(slow.settings, slow.inventory.devices)
    request = request_of(slow, worker, 0)
    pump = Pump(slow.store, worker, slow.owner)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            pump.run_job(request)
        except KeyboardInterrupt as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    wait_for(lambda: bool(fleet_journal(worker, request)), "the job to begin")
    pump.close()
    thread.join()
    assert len(errors) == 1
    worker.close()


def test_a_device_that_another_controller_holds_holds_up_no_other(farm: Farm) -> None:
    worker = HostWorker(farm.settings, farm.inventory.devices)
    requests = [request_of(farm, worker, place) for place in range(COUNT)]
    with farm.store.session() as session:
        acquire_lease(session, requests[0].device_id, "lab2:/srv/farm", 90 * 10**9)
    with Pump(farm.store, worker, farm.owner) as pump, ThreadPoolExecutor(COUNT) as threads:
        running = [threads.submit(pump.run_job, each) for each in requests]
        with pytest.raises(LeaseHeldError, match="f0 is in use by lab2:/srv/farm"):
            running[0].result()
        assert all(each.result().complete for each in running[1:])
    worker.close()


class Overtaken(HostWorker):
    """Before the first records of f0 are drained, another controller takes the device."""

    farm: Farm
    device_id: int
    overtaken = False

    def exchange(self, name: str, orders: Sequence[Order], leave: Sequence[str], wait_s: float) -> Drained:
        """As the host's."""
        drained = super().exchange(name, orders, leave, wait_s)
        found = any(each.device == "f0" and each.polled and each.polled.records for each in drained.stretches)
        if found and not self.overtaken:
            self.overtaken = True
            with self.farm.store.session() as session:
                session.execute(
                    update(LeaseRow).where(LeaseRow.device_id == self.device_id).values(expires_wall_ns=0)
                )
                acquire_lease(session, self.device_id, "lab2:/srv/farm", 90 * 10**9)
        return drained


def test_a_controller_that_lost_a_lease_writes_nothing_of_that_device(tmp_path: Path) -> None:
    for farm in farm_at(tmp_path, QUICK):
        worker = Overtaken(farm.settings, farm.inventory.devices)
        requests = [request_of(farm, worker, place) for place in range(COUNT)]
        worker.farm, worker.device_id = farm, requests[0].device_id
        with Pump(farm.store, worker, farm.owner) as pump, ThreadPoolExecutor(COUNT) as threads:
            running = [threads.submit(pump.run_job, each) for each in requests]
            with pytest.raises(LeaseHeldError, match="was lost to another controller"):
                running[0].result()
            assert all(each.result().complete for each in running[1:])
        assert stored_records(farm, requests[0].job_id, 1) == []
        # When the other controller is done, what the device had measured comes in, and is not measured again.
        with farm.store.session() as session:
            session.execute(update(LeaseRow).values(expires_wall_ns=0))
        with Pump(farm.store, worker, farm.owner) as pump:
            outcome = pump.run_job(requests[0])
        assert (outcome.complete, outcome.ran) == (True, False)
        assert attempts_of(farm, requests[0].job_id) == [(1, "done"), (2, "lost")]
        worker.close()
