"""A fleet of fake devices on lab hosts of one machine: the production way from dispatch to store under load.

    python -m bench.fleet [--devices 1000] [--nodes 4] [--jobs 10000] [--job 20s] [--units 4] [--seed 1]
                          [--delay 2ms] [--link-faults 0.0002] [--deaths 0.01] [--db-url URL]

Each node is a lab host that joined by ``stifarm host join``; its devices are of the shipped transport
``fake``, whose agents compute their journals from the wall clock (jobs of probe units, half to one and a half
times ``--job``). A share of the calls over their links fails, and agents die in the middle of jobs. At the
end every journal on a device is compared with the store, record by record.

The store is an SQLite file of the run's own, or that of ``--db-url`` (or STIFARM_DB_URL): a PostgreSQL
database, which must be empty and is left filled.

Included, as in production: leases and fencing, the pump that campaigns drive their jobs with (dispatch, the
hosts' watches, ingestion in one transaction for many devices), Ray between controller and hosts, restarts and
lost links. Not included: the expansion of a campaign to batches, their claims and the controller's look at
the store once a second; ``bench.looks`` measures these.

busy: of each device's time from its first job's start to its last one's end, the share that journals account
for. controller CPU: of its process, from the first dispatch to the last result, by job. Memory: PSS.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import structlog
from sqlalchemy import select

from db.models import AttemptRow, JobRow, JournalRecordRow
from db.session import upgrade
from orchestrator import fleet
from orchestrator.dispatch import Request
from orchestrator.farm import Farm, controlling, open_farm
from orchestrator.health.check import OPEN_GATES
from orchestrator.host_book import hosts_of
from orchestrator.inventory import Device
from orchestrator.jobs import DeviceTarget
from orchestrator.lab_hosts import LabHosts
from orchestrator.pump.loop import Pump
from orchestrator.ray.board import Endpoint
from orchestrator.ray.pool import RayPool
from orchestrator.settings import load_settings
from sti_runtime.messages import JournalRecord, ProbeUnit

MB = 1_000_000
_CLI = (sys.executable, "-c", "from orchestrator.cli import main; main()")
_JOIN_LIMIT_S = 180.0
_REGISTERED_AT_ONCE = 16


@dataclass(frozen=True)
class Asked:
    """The fleet and its work, as asked. ``fake``: the devices' entry in the inventories."""

    devices: int
    nodes: int
    jobs: int
    units: int
    fake: str
    db_url: str | None = None


def main() -> None:
    """Run the fleet and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("devices", 1000), ("nodes", 4), ("jobs", 10_000), ("units", 4), ("seed", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, text in (("job", "20s"), ("delay", "2ms"), ("link-faults", "0.0002"), ("deaths", "0.01")):
        parser.add_argument(f"--{name}", default=text)
    parser.add_argument("--db-url", default=os.environ.get("STIFARM_DB_URL"))
    given = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    fake = (
        f"{{job: {given.job}, delay: {given.delay}, link_faults: {given.link_faults}, "
        f"deaths: {given.deaths}, seed: {given.seed}}}"
    )
    asked = Asked(given.devices, given.nodes, given.jobs, given.units, fake, given.db_url)
    print(f"{asked.devices} devices on {asked.nodes} nodes, {asked.jobs} jobs of {given.units} units: {fake}")
    with tempfile.TemporaryDirectory(prefix="bench-fleet-") as folder:
        run(asked, Path(folder))


def run(asked: Asked, root: Path) -> None:
    """The whole of it below ``root``."""
    if asked.db_url is not None:
        upgrade(asked.db_url)
    (root / "inventory.yaml").write_text("version: 1\ndevices: [{name: unused, transport: fake}]\n")
    with (
        open_farm(load_settings(environ={}, cwd=root, db_url=asked.db_url)) as farm,
        controlling(farm),
        RayPool(farm.settings, listen=Endpoint("127.0.0.1", 0), num_cpus=1) as pool,
        _hosts(asked, root, pool.address) as joined,
    ):
        _require_empty(farm)
        hosts = hosts_of(farm, pool)
        _wait_for_hosts(hosts, asked.nodes)
        requests = _requests(farm, hosts, asked)
        print(f"{len(requests)} devices registered", flush=True)
        ran = _work(farm, hosts, requests)
        memory = _memory(joined)
        print(f"ran for {ran.wall_s:.1f} s", flush=True)
        _report(farm, hosts, ran, memory)


def _require_empty(farm: Farm) -> None:
    """Figures are of the whole store: it must hold this run alone."""
    with farm.store.reader() as session:
        if session.scalars(select(JobRow.id).limit(1)).first() is not None:
            raise SystemExit("The store of --db-url has jobs already: give an empty database.")


# ------------------------------------------------------------------ hosts


@contextmanager
def _hosts(asked: Asked, root: Path, address: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Lab hosts that join the controller, each a process with a home of its own."""
    token = (root / ".stifarm/ray_token").read_bytes()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "STIFARM_"))}
    environment = {**kept, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    joined = []
    try:
        for node in range(asked.nodes):
            folder = root / f"host{node}"
            (folder / ".stifarm").mkdir(parents=True)
            (folder / ".stifarm/ray_token").write_bytes(token)
            devices = "".join(
                f"  - {{name: fake-{number:04d}, transport: fake, threads: 1, fake: {asked.fake}}}\n"
                for number in range(node, asked.devices, asked.nodes)
            )
            (folder / "inventory.yaml").write_text(f"version: 1\ndevices:\n{devices}")
            with (root / f"host{node}.log").open("wb") as log:
                command = (*_CLI, "host", "join", address, "--name", folder.name)
                joined.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log))
        yield joined
    finally:
        for process in joined:
            process.terminate()
        for process in joined:
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
            process.wait()


def _wait_for_hosts(hosts: LabHosts, count: int) -> None:
    deadline = time.monotonic() + _JOIN_LIMIT_S
    while len(set(hosts.farm_devices().hosts.values())) < count + 1:
        if time.monotonic() > deadline:
            raise SystemExit(f"the {count} hosts did not join within {_JOIN_LIMIT_S:g} s")
        time.sleep(0.2)


# ------------------------------------------------------------------ work


@dataclass(frozen=True)
class Ran:
    """What came of the work. ``cpu_s``: of this process, from first dispatch to last result."""

    requests: Sequence[Request]
    wall_s: float
    cpu_s: float
    threads: int


def _requests(farm: Farm, hosts: LabHosts, asked: Asked) -> dict[str, list[Request]]:
    """Every device's jobs, which differ by their repetition."""
    devices = [device for device in farm.inventory.devices if device.name != "unused"]

    def registered(device: Device) -> list[Request]:
        device_id, facts = fleet.probe_device(farm, hosts.worker, device)
        target = DeviceTarget(facts.identity, "native", 1, 1, (), None, None, OPEN_GATES)
        units = tuple(ProbeUnit(number=number, kind="probe") for number in range(asked.units))
        place = devices.index(device)
        count = asked.jobs // len(devices) + (place < asked.jobs % len(devices))
        digest = facts.agent_digest
        return [
            Request(device.name, device_id, digest, target, "probe", None, None, units, again)
            for again in range(count)
        ]

    with ThreadPoolExecutor(_REGISTERED_AT_ONCE) as pool:
        return dict(zip((device.name for device in devices), pool.map(registered, devices), strict=True))


def _work(farm: Farm, hosts: LabHosts, requests: Mapping[str, Sequence[Request]]) -> Ran:
    """Run every device's jobs one after the other, the devices side by side."""
    failed: list[str] = []

    def drive(mine: Sequence[Request]) -> None:
        for request in mine:
            try:
                pump.run_job(request).require_complete()
            except Exception as error:  # noqa: BLE001 - told at the end
                failed.append(f"{request.job_id}: {type(error).__name__}: {error}")

    wall, cpu = time.monotonic(), time.process_time()
    with Pump(farm.store, hosts.worker, farm.owner) as pump:
        threads = [threading.Thread(target=drive, args=(mine,)) for mine in requests.values()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    ran = [request for mine in requests.values() for request in mine]
    for line in failed[:10]:
        print("failed:", line)
    print(f"jobs failed: {len(failed)}")
    return Ran(ran, time.monotonic() - wall, time.process_time() - cpu, len(threads))


# ------------------------------------------------------------------ figures


def _memory(joined: Sequence[subprocess.Popen[bytes]]) -> dict[str, tuple[int, int]]:
    """By kind of process: how many, and their PSS in bytes."""
    found: dict[str, tuple[int, int]] = {}
    own = psutil.Process()
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.Error):
            command = " ".join(process.cmdline()[:1])
            kind = "ray"
            if process.pid == own.pid:
                kind = "controller"
            elif process.pid in [each.pid for each in joined]:
                kind = "host join"
            elif "HostActor" in command:
                kind = "host worker"
            count, size = found.get(kind, (0, 0))
            found[kind] = (count + 1, size + process.memory_full_info().pss)
    return found


def _report(farm: Farm, hosts: LabHosts, ran: Ran, memory: Mapping[str, tuple[int, int]]) -> None:
    lost, doubled, records = _compare(farm, hosts, ran)
    busy, from_begin = _busy(farm, ran)
    jobs = len(ran.requests)
    print(f"{'records compared':34} {records:9}")
    print(f"{'lost':34} {lost:9}")
    print(f"{'doubled':34} {doubled:9}")
    print(f"{'devices busy, %':34} {100 * busy:9.1f}   wanted: 95")
    print(f"{'  from the first dispatch on, %':34} {100 * from_begin:9.1f}")
    print(f"{'controller CPU a job, ms':34} {1000 * ran.cpu_s / jobs:9.2f}   wanted: 10")
    print(f"{'jobs a second':34} {jobs / ran.wall_s:9.1f}")
    for kind, (count, size) in sorted(memory.items()):
        print(f"{f'memory of {kind} ({count}), MB':34} {size / MB:9.0f}")
    ours = sum(memory[kind][1] for kind in ("controller", "host worker"))
    print(f"{'  controller and host workers, MB':34} {ours / MB:9.0f}   wanted: 1000")


def _compare(farm: Farm, hosts: LabHosts, ran: Ran) -> tuple[int, int, int]:
    """(lost, doubled, compared) records: every journal on its device against the store's."""
    with farm.store.reader() as session:
        table = AttemptRow
        attempts = session.execute(select(table.job_id, table.number, JobRow.state).join(JobRow)).all()
        rows = session.execute(
            select(
                JournalRecordRow.job_id,
                JournalRecordRow.attempt,
                JournalRecordRow.seq,
                JournalRecordRow.record_json,
            ).order_by(JournalRecordRow.id)
        ).all()
    stored: dict[tuple[str, int], list[tuple[int, str]]] = defaultdict(list)
    for job_id, number, seq, text in rows:
        stored[job_id, number].append((seq, text))
    device_of = {request.job_id: request.device for request in ran.requests}
    unfinished = len(device_of) - len({job_id for job_id, _, state in attempts if state == "done"})
    lost, doubled, compared = unfinished, 0, 0

    def read(job_id: str, number: int) -> Sequence[JournalRecord]:
        while True:
            with suppress(Exception):
                return hosts.worker.poll(device_of[job_id], job_id, number, 0, 0).records

    with ThreadPoolExecutor(_REGISTERED_AT_ONCE) as pool:
        keys = [(job_id, number) for job_id, number, _ in attempts]
        for key, on_device in zip(keys, pool.map(lambda key: read(*key), keys), strict=True):
            have = stored[key]
            texts = {record.seq: record.to_json().decode() for record in on_device}
            compared += len(texts)
            lost += sum((seq, text) not in have for seq, text in texts.items())
            doubled += len(have) - len({seq for seq, _ in have}) + sum(seq not in texts for seq, _ in have)
    return lost, doubled, compared


def _busy(farm: Farm, ran: Ran) -> tuple[float, float]:
    """The share of the devices' time that their journals account for: of that from each one's first start,
    and of that from the first of all."""
    row = JournalRecordRow
    query = select(row.device_id, row.type, row.wall_ns).order_by(row.device_id, row.wall_ns, row.id)
    with farm.store.reader() as session:
        rows = session.execute(query).all()
    begin = min(wall_ns for _, _, wall_ns in rows)
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    busy_ns = 0
    for device, kind, wall_ns in rows:
        first.setdefault(device, wall_ns)
        if kind != "start":
            busy_ns += wall_ns - last[device]
        last[device] = wall_ns
    own = sum(last[device] - first[device] for device in first)
    return busy_ns / own, busy_ns / sum(last[device] - begin for device in first)


if __name__ == "__main__":
    main()
