"""Faults of the lab against the farm: each is noticed, told clearly, and gone on after."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from db.quarantine import end_quarantine, quarantine_of
from orchestrator import fleet, measure
from orchestrator.dispatch import Outcome, Request, run_job
from orchestrator.errors import AgentError, DeviceError, DeviceFullError, StableError
from orchestrator.farm import Farm, open_farm
from orchestrator.fleet import Deployed
from orchestrator.health.check import check_device
from orchestrator.health.ladder import Budgets, Step
from orchestrator.health.recovery import Recovered, recover
from orchestrator.inventory import Device, RecoverySpec
from orchestrator.lab import adb_server, machine
from orchestrator.lab import fault as faults
from orchestrator.lab.state import Lab
from orchestrator.lab.up import down
from orchestrator.lab.up import up as bring_up
from orchestrator.measure import Work
from orchestrator.processes import alive, kill
from orchestrator.settings import load_settings
from orchestrator.transports import connect
from orchestrator.worker import HostWorker
from sti_runtime.messages import JournalRecord, ProbeUnit, ResultRecord, StartRecord
from tests.agent_data import REPO
from tests.farm_world import (
    attempts_of,
    fill,
    journal,
    journal_lines,
    make_ready,
    require_storage,
    stored_records,
    wait_for,
)
from tests.lab_world import PROGRAM
from tests.machine import Machine

pytestmark = [
    pytest.mark.lab,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root (links, disks)"),
    pytest.mark.skipif(
        shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin") is None, reason="needs openssh-server"
    ),
]

BOARD, PHONE = "board-1", "phone-1"
ROWS_BYTES = 3_000_000
"""Task data that takes seconds over a slow link."""


@dataclass(frozen=True)
class World:
    """A lab of a board and a phone, the farm on it, and what it works with."""

    root: Path
    lab: Lab
    farm: Farm
    worker: HostWorker
    work: Work

    def device(self, name: str) -> Device:
        """Of the inventory."""
        return next(device for device in self.farm.inventory.devices if device.name == name)

    def deploy(self, name: str, *tasks: Path, verify: bool = False) -> Deployed:
        """The bundle and task data to one device."""
        bundle = self.work.bundle.bundle.path
        return fleet.deploy(self.farm, self.worker, [self.device(name)], bundle, tasks, verify=verify)[0]

    def content(self, name: str) -> Path:
        """A device's work folder as this process reaches it."""
        device = self.lab.device(name)
        return machine.seen_from_here(self.lab, self.lab.state(), device, device.workdir)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="stifarm-lab-") as name:
        root = Path(name)
        root.chmod(0o711)
        lab = bring_up(root / "lab", boards=1, phones=1, disk_bytes=64 << 20).lab
        try:
            settings = load_settings(environ={}, home=root / "home", inventory=lab.inventory)
            with open_farm(settings) as farm:
                worker = HostWorker(farm.settings, farm.inventory.devices)
                try:
                    yield World(root, lab, farm, worker, fill(farm))
                finally:
                    worker.close()
        finally:
            down(lab.folder)


@contextmanager
def sending(world: World, name: str) -> Iterator[tuple[Path, Future[Deployed]]]:
    """In the block, data that takes seconds is on its way to a device over a slow link."""
    rows = world.root / f"rows-{len(list(world.root.glob('rows-*')))}"
    rows.write_bytes(os.urandom(ROWS_BYTES))
    assert world.deploy(name).error is None
    faults.inject(world.lab, name, "slow")
    try:
        with ThreadPoolExecutor(1) as pool:
            sent = pool.submit(world.deploy, name, rows)
            wait_for(
                lambda: sent.done() or world.worker.progress(name).sent_bytes > 0, "the first bytes sent"
            )
            assert not sent.done()
            yield rows, sent
    finally:
        faults.restore(world.lab, name)


@pytest.mark.parametrize("name", [BOARD, PHONE])
def test_a_damaged_bundle_is_noticed_and_mended(world: World, name: str) -> None:
    assert world.deploy(name, verify=True).error is None
    faults.inject(world.lab, name, "corrupt", seed=3)
    found = world.deploy(name, verify=True).error
    assert isinstance(found, DeviceError)
    assert f"{name}: bundle {world.work.bundle.digest[:12]} was damaged on its storage" in str(found)
    assert "Deploy again" in str(found)
    mended = world.deploy(name, verify=True)
    assert mended.error is None
    assert 0 < sum(report.chunks_sent for report in mended.reports) < mended.reports[0].chunks_total
    faults.restore(world.lab, name)  # the byte is right already
    assert world.deploy(name, verify=True).error is None


@pytest.mark.parametrize(("liar", "other"), [(BOARD, PHONE), (PHONE, BOARD)])
def test_a_liar_is_rejected_with_the_reason_and_nobody_else(world: World, liar: str, other: str) -> None:
    for name in (BOARD, PHONE):
        assert world.deploy(name).error is None
    with faults.injected(world.lab, liar, "lie"):
        with pytest.raises(DeviceError, match=rf"(?s){liar}: .*memory_bytes"):
            fleet.ready_device(world.farm, world.worker, world.device(liar), world.work.bundle.digest)
        fleet.ready_device(world.farm, world.worker, world.device(other), world.work.bundle.digest)
    fleet.probe_device(world.farm, world.worker, world.device(liar))


@pytest.mark.parametrize("name", [BOARD, PHONE])
def test_a_disk_that_fills_during_a_deploy_is_told_and_the_deploy_goes_on_after(
    world: World, name: str
) -> None:
    with sending(world, name) as (rows, sent):
        faults.inject(world.lab, name, "full-disk")
        faults.restore(world.lab, name, "slow")
        error = sent.result(timeout=120).error
        assert isinstance(error, DeviceFullError), error
        assert error.remedy
    assert world.deploy(name, rows).error is None


@pytest.mark.parametrize("name", [BOARD, PHONE])
def test_a_link_cut_in_the_middle_of_a_deploy_is_waited_for(world: World, name: str) -> None:
    with sending(world, name) as (_, sent):
        with faults.injected(world.lab, name, "cut"):
            faults.restore(world.lab, name, "slow")
            assert not sent.done()
        assert sent.result(timeout=300).error is None


def test_a_phone_that_reboots_in_the_middle_of_its_profile_goes_on_with_it(world: World) -> None:
    require_storage(world.root)
    ready = make_ready(world.farm, world.worker, world.work, PHONE)
    turns = Machine(world.root / "machine.lock", mode=0o666)
    ready = replace(ready, target=replace(ready.target, machine_lock=str(turns.path)))
    done: list[int] = []
    with ThreadPoolExecutor(1) as pool:
        with turns:
            profiled = pool.submit(
                measure.profile_device,
                world.farm,
                world.worker,
                ready,
                world.work,
                again=False,
                advance=lambda units, *_: done.append(units),
            )
            turns.let_through(lambda: profiled.done() or any(done), "a unit of the profile")
            faults.hold(world.lab, PHONE, "reboot", 0.1)
        assert profiled.result(timeout=300).ran
    (folder,) = world.content(PHONE).glob("jobs/profile-*/1")
    records = journal(folder)
    assert stored_records(world.farm, folder.parent.name, 1) == records
    starts = [record for record in records if isinstance(record.payload, StartRecord)]
    assert len({record.boot_id for record in starts}) == len(starts) == 2
    units = [record.payload.unit for record in records if isinstance(record.payload, ResultRecord)]
    assert units == list(range(len(units)))
    assert attempts_of(world.farm, folder.parent.name) == [(1, "done")]


def test_jobs_go_on_while_the_adb_server_ends_and_while_another_device_reboots(world: World) -> None:
    turns = {name: Machine(world.root / f"{name}.lock", mode=0o666) for name in (BOARD, PHONE)}
    done: dict[str, list[int]] = {name: [] for name in turns}

    def drive(request: Request) -> Outcome:
        return run_job(
            world.farm.store,
            world.worker,
            world.farm.owner,
            request,
            advance=lambda finished, *_: done[request.device].append(finished),
        )

    def lines(name: str) -> int:
        return journal_lines(world.content(name) / f"jobs/{requests[name].job_id}/1")

    def goes_on(name: str) -> None:
        """Until the device has measured one unit more."""
        before = max(1, lines(name))
        turns[name].let_through(lambda: lines(name) > before, f"a unit of {name}")

    def starts(name: str) -> list[JournalRecord]:
        records = journal(world.content(name) / f"jobs/{requests[name].job_id}/1")
        return [record for record in records if isinstance(record.payload, StartRecord)]

    units = {BOARD: 8, PHONE: 6}
    requests = {name: probes_of(world, name, turn, units=units[name]) for name, turn in turns.items()}
    with ThreadPoolExecutor(2) as pool:
        with turns[BOARD], turns[PHONE]:
            jobs = {name: pool.submit(drive, request) for name, request in requests.items()}
            for name in turns:
                goes_on(name)
            server = world.lab.state().adb
            assert server is not None
            assert server.process is not None
            kill(server.process, signal.SIGKILL)
            wait_for(lambda: not alive(server.process), "the end of the adb server")
            for name in turns:
                goes_on(name)
            measured = lines(PHONE) - 1
            with world.lab.changing():
                adb_server.start(world.lab, world.lab.state())
            wait_for(lambda: max(done[PHONE], default=0) >= measured, "the host to hear of the phone again")
            assert len(starts(PHONE)) == 1
            faults.hold(world.lab, PHONE, "reboot", 0.1)
            goes_on(BOARD)
            assert not any(job.done() for job in jobs.values())
        for name, job in jobs.items():
            assert job.result(timeout=300).complete
            assert attempts_of(world.farm, requests[name].job_id) == [(1, "done")]
    assert [len(starts(name)) for name in (BOARD, PHONE)] == [1, 2]
    for name, request in requests.items():
        folder = world.content(name) / f"jobs/{request.job_id}/1"
        assert stored_records(world.farm, request.job_id, 1) == journal(folder)


def probes_of(world: World, name: str, turn: Machine, *, units: int) -> Request:
    """A job of so many readings of the sensors, each of which waits for its turn."""
    ready = make_ready(world.farm, world.worker, world.work, name)
    return Request(
        device=name,
        device_id=ready.device_id,
        agent_digest=ready.facts.agent_digest,
        target=replace(ready.target, machine_lock=str(turn.path)),
        kind="probe",
        bundle=None,
        task_data=None,
        units=tuple(ProbeUnit(number=number, kind="probe") for number in range(units)),
    )


def test_a_job_waits_until_android_has_booted(world: World) -> None:
    turn = Machine(world.root / "booting.lock", mode=0o666)
    request = probes_of(world, PHONE, turn, units=1)
    with closing(connect(world.device(PHONE))) as phone, ThreadPoolExecutor(1) as pool:
        assert phone.not_yet() == ""
        assert phone.run(["setprop", "sys.boot_completed", "0"], timeout_s=60).ok
        try:
            assert phone.not_yet() == "Android has not booted yet"
            job = pool.submit(run_job, world.farm.store, world.worker, world.farm.owner, request)
            wait_for(
                lambda: job.done() or world.worker.progress(PHONE).waits == "Android has not booted yet",
                "the job to wait",
            )
            assert not job.done()
            assert not (world.content(PHONE) / f"jobs/{request.job_id}/1/journal.log").exists()
        finally:
            assert phone.run(["setprop", "sys.boot_completed", "1"], timeout_s=60).ok
        assert job.result(timeout=300).complete


def test_a_board_that_reboots_while_it_is_verified_keeps_nothing_of_that(world: World) -> None:
    device, jobs = world.device(BOARD), world.content(BOARD) / "jobs/emulation"
    device_id, _ = fleet.probe_device(world.farm, world.worker, device)
    with fleet.leased(world.farm, device_id) as lease, ThreadPoolExecutor(1) as pool:
        verified = pool.submit(world.worker.emulation, BOARD, lease)
        wait_for(lambda: verified.done() or any(jobs.glob("*/journal.log")), "the verification")
        faults.hold(world.lab, BOARD, "reboot", 0.1)
        with pytest.raises(DeviceError):
            verified.result(timeout=300)
    left = world.content(BOARD) / "jobs/emulation"
    assert [path.name for path in left.iterdir()] == [str(lease.counter)]
    with fleet.leased(world.farm, device_id) as lease:
        assert world.worker.emulation(BOARD, lease) is not None
    assert not left.exists()


@pytest.mark.parametrize(("name", "agent"), [(BOARD, "other"), (PHONE, "other"), (BOARD, "none")])
def test_a_full_device_without_our_agent_is_cleaned(world: World, name: str, agent: str) -> None:
    assert world.deploy(name).error is None
    workdir, device = world.content(name), world.device(name)
    if agent == "none":
        shutil.rmtree(workdir / "bin")
    else:
        other_version(workdir)
    with faults.injected(world.lab, name, "full-disk"), fresh_worker(world) as worker:
        with pytest.raises(DeviceFullError):
            worker.facts(name)
        with fleet.leased(world.farm, fleet.device_to_clean(world.farm, worker, device)) as lease:
            with pytest.raises(AgentError, match="belongs to store"):
                worker.clean(name, lease.model_copy(update={"store": "another"}))
            assert any((workdir / "bundles").iterdir())
            if agent == "none":
                (workdir / "settings.journal").touch()
                with pytest.raises(DeviceFullError, match="to be put back"):
                    worker.clean(name, lease)
                (workdir / "settings.journal").unlink()
            worker.clean(name, lease)
        assert list(workdir.iterdir()) == []
    assert world.deploy(name).error is None


def test_an_agent_that_lies_is_replaced_by_the_commands_that_its_error_names(world: World) -> None:
    assert world.deploy(BOARD).error is None
    with faults.injected(world.lab, BOARD, "lie"), fresh_worker(world) as worker:
        with pytest.raises(StableError, match="memory_bytes") as refused:
            worker.facts(BOARD)
        assert f"stifarm devices clean --devices {BOARD}" in refused.value.remedy
        device_id = fleet.device_to_clean(world.farm, worker, world.device(BOARD))
        with fleet.leased(world.farm, device_id) as lease:
            worker.clean(BOARD, lease)
        assert (worker.facts(BOARD).memory_bytes or 0) > 0
    assert world.deploy(BOARD).error is None


@contextmanager
def fresh_worker(world: World) -> Iterator[HostWorker]:
    """One that knows nothing of the devices yet."""
    worker = HostWorker(world.farm.settings, world.farm.inventory.devices)
    try:
        yield worker
    finally:
        worker.close()


def other_version(workdir: Path) -> Path:
    """Make the agent in a work folder one of another version: it works, but is not the one that we build."""
    (agent,) = workdir.glob("bin/stifarm-agent-*")
    data, owner = agent.read_bytes() + b"other", agent.stat()
    other = agent.with_name(f"stifarm-agent-{hashlib.sha256(data).hexdigest()[:16]}")
    other.write_bytes(data)
    other.chmod(0o755)
    os.chown(other, owner.st_uid, owner.st_gid)
    agent.unlink()
    return other


# ------------------------------------------------------------------ getting devices back


def boot_of(world: World, name: str) -> str:
    """The boot that a device is in; the store knows the device afterwards."""
    return fleet.probe_device(world.farm, world.worker, world.device(name))[1].boot_id


def climb(world: World, device: Device, **tries: int) -> Recovered:
    """Recover a device with these budgets of the rungs, by a worker that knows the device so."""
    budgets: dict[Step, int] = {"reconnect": 0, "fresh-server": 0, "reboot": 0}
    for step in budgets:
        budgets[step] = tries.get(step.replace("-", "_"), 0)
    worker = HostWorker(world.farm.settings, [device])
    try:
        return recover(world.farm, worker, device, "its probe hangs", budgets=Budgets(budgets, 10**9))
    finally:
        worker.close()


@pytest.mark.parametrize("name", [BOARD, PHONE])
def test_a_device_that_answers_over_new_connections_is_back(world: World, name: str) -> None:
    fleet.probe_device(world.farm, world.worker, world.device(name))
    found = climb(world, world.device(name), reconnect=1)
    assert [(step, each.outcome) for step, each in found.steps] == [("reconnect", "recovered")]
    assert found.back
    items = {
        item.item: item.verdict for item in check_device(world.farm, world.worker, world.device(name)).items
    }
    assert items["reach"] == items["agent"] == items["identity"] == items["probe"] == "pass"


def test_a_phone_is_rebooted_and_a_server_of_others_left_alone(world: World) -> None:
    before = boot_of(world, PHONE)
    found = climb(world, world.device(PHONE), fresh_server=1, reboot=1)
    assert [(step, each.outcome) for step, each in found.steps] == [
        ("fresh-server", "skipped"),
        ("reboot", "recovered"),
    ], found
    assert "no server that stifarm started" in found.steps[0][1].detail
    assert boot_of(world, PHONE) != before


def test_a_board_is_rebooted_by_its_command_or_not_at_all(world: World) -> None:
    before = boot_of(world, BOARD)
    asked = replace(world.device(BOARD), recovery=RecoverySpec(reboot=True))
    refused = climb(world, asked, reboot=1)
    assert "its user may not reboot it" in refused.steps[0][1].detail
    assert refused.cause is not None
    assert "reboot failed" in refused.cause
    assert boot_of(world, BOARD) == before
    words = ("lab", "fault", BOARD, "reboot", "--for", "100ms", "--dir", str(world.lab.folder))
    command = ("env", f"PYTHONPATH={REPO}", *PROGRAM, *words)
    switched = replace(asked, recovery=RecoverySpec(reboot=True, reboot_command=command))
    with world.farm.store.session() as session:
        end_quarantine(session, device_id_of(world, BOARD), "by the test")
    assert climb(world, switched, reboot=1).steps[0][1].outcome == "recovered"
    assert boot_of(world, BOARD) != before


def test_a_board_behind_a_cut_link_comes_to_quarantine_with_its_cause(world: World) -> None:
    device_id = fleet.probe_device(world.farm, world.worker, world.device(BOARD))[0]
    with faults.injected(world.lab, BOARD, "cut"):
        found = climb(world, world.device(BOARD), reconnect=1, reboot=1)
    assert [(step, each.outcome) for step, each in found.steps] == [("reconnect", "failed")]
    with world.farm.store.session() as session:
        held = quarantine_of(session, device_id)
        assert held is not None
        assert held.cause.startswith("its probe hangs; reconnect failed (")
        assert "no reboot: its inventory does not allow a reboot" in held.cause
        end_quarantine(session, device_id, "by the test")


def device_id_of(world: World, name: str) -> int:
    """The row of a device."""
    return fleet.probe_device(world.farm, world.worker, world.device(name))[0]
