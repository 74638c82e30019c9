"""A board whose clock is years off and jumps in the middle of a job: the farm's records stay whole."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from sqlalchemy import select

from db.models import AttemptRow, DeviceRow
from orchestrator import fleet
from orchestrator.cli.context import Session
from orchestrator.cli.doctor import examine
from orchestrator.dispatch import run_job
from orchestrator.doctor import findings_of
from orchestrator.farm import Farm
from orchestrator.worker import HostWorker
from sti_runtime.messages import ResultRecord
from tests.agent_data import REPO
from tests.farm_world import journal, open_world, probe_request, stored_records, write_inventory
from tests.machine import Machine
from tests.ssh_server import SshServer
from tests.wrong_clock import DAY_NS, WrongClock

YEARS_DAYS = 4000
UNITS = 4


@contextmanager
def board(root: Path, clock: WrongClock) -> Iterator[tuple[Farm, HostWorker]]:
    """A farm with a board behind ssh, on which everything sees that clock; its agent is the Python one."""
    server = SshServer(root / "sshd")
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    seen = {"HOME": str(server.home), "PATH": path, "PYTHONPATH": str(REPO), **clock.environment}
    server.options = {"SetEnv": " ".join(f"{name}={value}" for name, value in seen.items())}
    server.start()
    try:
        write_inventory(
            root, f"{{name: board, threads: 1, engine: torch, workdir: {root / 'board'}, {server.fields()}}}"
        )
        with open_world(root) as farm:
            worker = HostWorker(farm.settings, farm.inventory.devices)
            try:
                yield farm, worker
            finally:
                worker.close()
    finally:
        server.stop()


def test_a_job_under_a_clock_that_jumps_by_years_is_stored_once_and_whole(tmp_path: Path) -> None:
    clock = WrongClock(tmp_path / "clock", -YEARS_DAYS)
    began_ns = time.time_ns()
    with board(tmp_path, clock) as (farm, worker), ThreadPoolExecutor(1) as pool:
        session = Session(farm, farm.inventory.devices, worker, pool=None)
        said = [finding.text for finding in findings_of(examine(session, farm.inventory.devices[0]))]
        assert any(f"its clock is {YEARS_DAYS} days behind this host's" in text for text in said), said
        request, turns = probe_request(farm, worker, UNITS), Machine(tmp_path / "turns")
        request = replace(request, target=replace(request.target, machine_lock=str(turns.path)))
        jobs = tmp_path / "board/jobs"
        with turns:
            ran = pool.submit(run_job, farm.store, worker, farm.owner, request)
            turns.let_through(lambda: ran.done() or results(jobs) > 0, "a unit")
            clock.set(YEARS_DAYS)
        outcome = ran.result(timeout=300)
        outcome.require_complete()
        there = journal(jobs / outcome.job_id / "1")
        assert stored_records(farm, outcome.job_id, 1) == there
        units = [record.payload.unit for record in there if isinstance(record.payload, ResultRecord)]
        assert units == list(range(UNITS))
        off_days = {round((record.wall_ns - began_ns) / DAY_NS) for record in there}
        assert off_days == {-YEARS_DAYS, YEARS_DAYS}
        with fleet.leased(farm, request.device_id) as lease:  # the job's has been given back
            assert lease.counter > 0
        with farm.store.reader() as reader:
            (attempt,), (device,) = (
                reader.scalars(select(AttemptRow)).all(),
                reader.scalars(select(DeviceRow)).all(),
            )
        assert began_ns <= device.created_wall_ns <= device.last_seen_wall_ns <= time.time_ns()
        assert attempt.state == "done"
        assert run_job(farm.store, worker, farm.owner, request).ran is False


def results(jobs: Path) -> int:
    """Results that are journalled so far."""
    return sum(path.read_bytes().count(b'"result"') for path in jobs.glob("*/1/journal.log"))
