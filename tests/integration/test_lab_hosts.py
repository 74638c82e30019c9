"""Lab hosts for real: a head node and hosts as processes, killed with -9 in the middle of jobs."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from db.campaigns import cancel_run, open_runs
from db.models import CampaignBatchRow
from orchestrator import fleet
from orchestrator.audit import audit_device
from orchestrator.content_cache import CACHE_BYTES
from orchestrator.dispatch import Outcome, run_job
from orchestrator.errors import HostAwayError, HostError, PoolError, StableError
from orchestrator.farm import Farm
from orchestrator.hosts import OWN
from orchestrator.lab_hosts import LabHosts
from orchestrator.ray.access import authenticated
from orchestrator.ray.board import Board, Endpoint
from orchestrator.ray.join import Joining, keep_joined
from orchestrator.settings import load_settings
from sti_runtime.errors import StifarmError
from tests.agent_data import REPO
from tests.farm_world import fill, journal_lines, open_world, stored_records, wait_for
from tests.host_world import HIDDEN, HOSTS, HostWorld, driving, probe_request, require_namespaces
from tests.machine import Machine

SEED = 5
UNITS = 6
VICTIM, OTHER = "bench1", "bench2"
KILLS = ("join", "raylet", "actor")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostWorld]:
    require_namespaces()
    world = HostWorld(tmp_path_factory.mktemp("farm"))
    world.prepare()
    for folder in ("bundles", "tasks"):
        (world.root / ".stifarm" / folder).mkdir(parents=True)
    try:
        world.up()
        for host in HOSTS:
            world.join(host)
        yield world
    finally:
        world.end()


@pytest.fixture(scope="module")
def farm(world: HostWorld) -> Iterator[Farm]:
    with open_world(world.root) as opened:
        yield opened


def job_folder(world: HostWorld, host: str, device: str, job_id: str) -> Path:
    """Where a host's local device keeps the first attempt of a job: below that host's own home."""
    return world.root / host / ".stifarm/devices" / device / "jobs" / job_id / "1"


def test_a_hosts_devices_are_driven_there_and_content_is_shipped_to_it(world: HostWorld, farm: Farm) -> None:
    with driving(farm) as hosts:
        found = hosts.farm_devices()
        assert dict(found.hosts) == {"own": OWN, "one": "bench1", "two": "bench2"}
        assert dict(found.refused) == {"both": "two hosts name it: bench1 and bench2."}
        with pytest.raises(StableError, match=r"both: two hosts name it: bench1 and bench2"):
            hosts.worker.facts("both")
        with pytest.raises(StableError, match="no host offers it"):
            hosts.worker.facts("nothing")
        work = fill(farm)
        rows = farm.settings.tasks / f"{work.task_data}.safetensors"
        bundle = work.bundle.bundle.path
        devices = [device for device in farm.inventory.devices if device.name != "both"]
        for deployed in fleet.deploy(farm, hosts.worker, devices, bundle, [rows], verify=True):
            assert deployed.error is None
            assert not any(report.already for report in deployed.reports)
        again = fleet.deploy(farm, hosts.worker, devices, bundle, [rows])
        assert all(report.already for deployed in again for report in deployed.reports)
    for host, names in HOSTS.items():
        home = world.root / host / ".stifarm"
        assert (home / "devices" / names[0] / "bundles" / work.bundle.digest).is_dir()
        shipped = {path.name for path in home.glob("shipped/*/*")}
        assert shipped == ({work.bundle.digest, work.task_data} if host == HIDDEN else set())


def test_hosts_are_listed(world: HostWorld) -> None:
    listed = world.verb("", "host", "list", "--json")
    assert listed.returncode == 0, listed.stderr
    found = json.loads(listed.stdout)
    assert found["controller"] == world.address
    assert {host["name"]: host["state"] for host in found["hosts"]} == dict.fromkeys(HOSTS, "present")
    assert found["hosts"][0]["devices"][0] == {
        "name": "one",
        "transport": "local",
        "labels": {"bench": "bench1"},
    }


def test_a_campaign_has_the_devices_of_hosts(world: HostWorld, farm: Farm) -> None:
    (world.root / "alive.yaml").write_text("version: 1\nname: alive\nkinds: [health]\ndevices: all\n")
    asked = world.verb("", "campaign", "run", "alive.yaml", "--detach")
    assert asked.returncode == 0, asked.stderr
    with farm.store.session() as session:
        (run,) = open_runs(session)
        batches = session.scalars(select(CampaignBatchRow).where(CampaignBatchRow.run_id == run.id))
        assert {batch.device for batch in batches} == {"own", "one", "two"}
        cancel_run(session, run.id, "it was only asked for")


def refusal(world: HostWorld, token: Path, *, name: str = "third", address: str | None = None) -> str:
    """Why a third host cannot join."""
    folder = world.root / "third"
    folder.mkdir(exist_ok=True)
    (folder / "inventory.yaml").write_text("version: 1\ndevices: []")
    joining = Joining(Endpoint.parse(address or world.address), name, None, None, CACHE_BYTES)
    with pytest.raises((HostError, PoolError)) as caught:
        keep_joined(load_settings(environ={}, cwd=folder), joining, token, print, threading.Event())
    return str(caught.value)


def test_who_may_not_join_is_told_why(world: HostWorld) -> None:
    token, wrong = world.root / ".stifarm/ray_token", world.root / "wrong_token"
    wrong.write_text("0" * 64)
    assert "has no token of the farm" in refusal(world, world.root / "no_token")
    assert "refuses the token of this machine" in refusal(world, wrong)
    assert "A host called bench1 is there already" in refusal(world, token, name="bench1")
    assert "No controller answers at 127.0.0.1:1:" in refusal(world, token, address="127.0.0.1:1")
    with authenticated(token):
        board = Board(Endpoint.parse(world.address))
        controller = board.controller()
        newer = controller.versions.model_copy(update={"stifarm": "99.0", "protocol": 99})
        board.announce(controller.model_copy(update={"versions": newer}))
        try:
            said = refusal(world, token)
        finally:
            board.announce(controller)
        own = controller.versions
        assert f"stifarm {own.stifarm} against 99.0, protocol {own.protocol} against 99" in said
        assert "Install stifarm 99.0" in said
        host = board.hosts()[0].offer
        assert host is not None
        board.offer(host.model_copy(update={"name": "newer", "versions": newer}))
        seen = next(host for host in board.hosts() if host.name == "newer")
        assert (seen.state, seen.offer) == ("refused", None)
        assert f"stifarm {own.stifarm} against 99.0" in seen.refused


def _drive(farm: Farm, hosts: LabHosts, device: str, again: int, ends: dict[str, Outcome | str]) -> None:
    try:
        request = probe_request(farm, hosts.worker, device, UNITS, again=again)
        ends[device] = run_job(farm.store, hosts.worker, farm.owner, request)
    except StifarmError as error:
        ends[device] = str(error)


def require_audited(farm: Farm, hosts: LabHosts, *devices: str) -> None:
    """The store has every record of every journal on these devices, once."""
    for device in devices:
        device_id = probe_request(farm, hosts.worker, device, 1).device_id
        audit = audit_device(farm, hosts.worker, device, device_id)
        assert audit.ok, audit
        assert audit.journals > 0


def test_jobs_outlive_hosts_that_are_killed(world: HostWorld, farm: Farm) -> None:
    chance = random.Random(SEED)
    with driving(farm) as hosts:
        for again, victim in enumerate(chance.sample(KILLS, len(KILLS))):
            ends: dict[str, Outcome | str] = {}
            request = probe_request(farm, hosts.worker, "one", UNITS, again=again)
            folder = job_folder(world, VICTIM, "one", f"probe-{request.key[:20]}")
            with Machine(world.root / "machine.lock") as machine:
                drivers = [
                    threading.Thread(target=_drive, args=(farm, hosts, device, again, ends))
                    for device in ("one", "two")
                ]
                for driver in drivers:
                    driver.start()
                wanted = 1 + chance.randrange(UNITS - 1)
                machine.let_through(lambda: journal_lines(folder) > wanted, f"{wanted} units")  # noqa: B023
                joins = world.joins(VICTIM)
                world.node_processes(VICTIM)[victim].kill()
                if victim == "join":
                    world.running.pop(VICTIM).wait(60)
                    with pytest.raises(HostAwayError, match="one: host bench1 is out of reach"):
                        wait_for(lambda: not hosts.worker.facts("one"), "the host to be missed", 30)
            # The machine is free: agents go on by themselves, and the other host's job ends.
            drivers[1].join(120)
            assert not isinstance(ends["two"], str), ends["two"]
            if victim == "join":
                world.join(VICTIM)
            elif victim == "raylet":
                wait_for(lambda: world.joins(VICTIM) > joins, "the host to join again by itself")  # noqa: B023
            drivers[0].join(120)
            for end in ends.values():
                assert not isinstance(end, str), end
                assert end.complete
                assert len(stored_records(farm, end.job_id, 1)) == UNITS + 2  # one start, one end: one agent
        require_audited(farm, hosts, "one", "two")


def test_hosts_join_a_new_head_by_themselves_and_jobs_go_on(world: HostWorld, farm: Farm) -> None:
    units = UNITS + 1
    argv = (sys.executable, "-m", "tests.host_world", str(world.root), "one", str(units))
    jobs = world.root / VICTIM / ".stifarm/devices/one/jobs"
    before = set(jobs.glob("*"))
    with Machine(world.root / "machine.lock") as machine:
        controller = subprocess.Popen(argv, cwd=REPO, stderr=subprocess.DEVNULL)

        def begun() -> bool:
            return any(journal_lines(job / "1") > 2 for job in set(jobs.glob("*")) - before)

        machine.let_through(begun, "a unit of the job")
        joins = {host: world.joins(host) for host in HOSTS}
        world.kill("head")
        controller.kill()
        controller.wait(60)
        world.up()
    for host in HOSTS:
        wait_for(lambda: world.joins(host) > joins[host], f"{host} to join again")  # noqa: B023
    assert subprocess.run(argv, cwd=REPO, timeout=120, check=False).returncode == 0
    with driving(farm) as hosts:
        require_audited(farm, hosts, "one")
    left = world.verb(VICTIM, "host", "leave")
    assert left.returncode == 0, left.stderr
    world.running.pop(VICTIM).wait(60)
    listed = json.loads(world.verb("", "host", "list", "--json").stdout)
    states = {host["name"]: host["state"] for host in listed["hosts"]}
    assert (states["bench1"], states["bench2"]) == ("left", "present")
    for name, code in (("bench1", 0), ("bench1", 2), ("bench2", 1)):  # while the head node runs
        assert world.verb("", "host", "leave", name).returncode == code
        listed = json.loads(world.verb("", "host", "list", "--json").stdout)
        assert {host["name"] for host in listed["hosts"]} & set(HOSTS) == {"bench2"}
