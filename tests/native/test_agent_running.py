"""The native agent at a job: killed, hung up on, overtaken by a younger lease.

The executable is built with sanitizers. Python's half of each comparison runs in this process.
"""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from agent.fence import admit
from agent.spool import Spool
from sti_runtime.messages import (
    EndRecord,
    Lease,
    StartRecord,
)
from tests.agent_data import (
    agent_emulation,
    probes,
)
from tests.agents import Agent
from tests.machine import Machine
from tests.native.core import (
    LEASE,
    call,
    finish,
    journal_lines,
    journal_of,
    native_job,
    run,
    units_done,
    wait_for,
)


def test_killed_at_random_moments_nothing_is_lost_and_nothing_counted_twice(
    agent: Agent, spool: Spool, tmp_path: Path
) -> None:
    """While a unit begins, runs or is journalled; units come one by one, so the job cannot be over."""
    machine = Machine(tmp_path / "machine.lock")
    job = native_job(spool, units=probes(120), machine_lock=str(machine.path))
    rng = random.Random(5)
    with machine:
        for _ in range(12):
            before = journal_lines(spool, job)
            started = agent.start("run", spool.job("probe", 1) / "job.json", "--spool", spool.root)
            machine.let_through(lambda at=before: journal_lines(spool, job) > at + 2, "some units")  # type: ignore[misc]
            machine.let_one_through()
            time.sleep(rng.uniform(0, 0.004))
            started.kill()
            started.communicate()
    assert call(agent, spool, "status", "probe", 1)[1]["state"] == "stopped"
    assert run(agent, spool, job) == (0, {"state": "ended", "done": 120, "failed": 0})
    records = journal_of(spool, job)
    assert units_done(records) == list(range(120))
    assert [record.seq for record in records] == list(range(len(records)))
    assert sum(isinstance(record.payload, StartRecord) for record in records) == 13


def test_the_log_has_a_time_on_every_line_and_hangup_is_ignored(agent: Agent, spool: Spool) -> None:
    job = native_job(spool, units=probes(1), emulation=agent_emulation(20_000_000))
    started = agent.start("run", spool.job("probe", 1) / "job.json", "--spool", spool.root)
    wait_for(lambda: journal_lines(spool, job) == 1, "the start record")
    started.send_signal(signal.SIGHUP)
    assert finish(started)[0] == 0
    lines = (spool.job("probe", 1) / "agent.log").read_text().splitlines()
    assert len(lines) >= 2
    for line in lines:
        time.strptime(line.split(".")[0], "%Y-%m-%dT%H:%M:%S")
        assert line.split()[1] in ("INFO", "WARNING", "ERROR")


def test_a_job_stops_when_the_other_agent_let_a_younger_lease_in(
    agent: Agent, spool: Spool, tmp_path: Path
) -> None:
    machine = Machine(tmp_path / "machine.lock")
    job = native_job(spool, machine_lock=str(machine.path))
    with machine:
        started = agent.start("run", spool.job("probe", 1) / "job.json", "--spool", spool.root)
        wait_for(lambda: machine.is_open_in(started.pid), "the first unit to wait for the machine")
        admit(spool, LEASE.model_copy(update={"counter": 2}))
    code, report = finish(started)
    assert (code, report["state"]) == (3, "refused")
    end = journal_of(spool, job)[-1].payload
    assert isinstance(end, EndRecord)
    assert (end.refused or "").startswith("superseded: the lease has counter 1, 2 was seen already")
    assert len(units_done(journal_of(spool, job))) == 1


def test_a_takeover_counts_once(agent: Agent, spool: Spool, tmp_path: Path) -> None:
    """The job took the device over; another store took it back: the job's flag opens nothing now."""
    machine = Machine(tmp_path / "machine.lock")
    lease = Lease(store="store-b", counter=5, takeover=True)
    admit(spool, LEASE)
    native_job(spool, machine_lock=str(machine.path), lease=lease)
    with machine:
        started = agent.start("run", spool.job("probe", 1) / "job.json", "--spool", spool.root)
        wait_for(lambda: b"store-b" in spool.fence.read_bytes(), "the take-over")
        wait_for(lambda: machine.is_open_in(started.pid), "the first unit to wait for the machine")
        admit(spool, Lease(store="store-a", counter=1, takeover=True))
    assert finish(started)[0] == 3


@pytest.mark.parametrize("kind", ["elsewhere", "link", "other-name", "folder", "absent", "swapped"])
def test_only_job_files_of_the_spool_run(agent: Agent, spool: Spool, tmp_path: Path, kind: str) -> None:
    native_job(spool)
    real = spool.job("probe", 1) / "job.json"
    wrong = spool.job("wrong", 1) / "job.json"
    wrong.parent.mkdir(parents=True)
    if kind == "elsewhere":
        wrong = tmp_path / "jobs" / "probe" / "1" / "job.json"
        wrong.parent.mkdir(parents=True)
        wrong.write_bytes(real.read_bytes())
    elif kind == "link":
        wrong.symlink_to(real)
        wrong = spool.job("probe", 1) / "linked.json"
        wrong.symlink_to(tmp_path / "nothing")
    elif kind == "other-name":
        wrong = real.rename(real.with_name("work.json"))
    elif kind == "folder":
        wrong.mkdir()
    elif kind == "swapped":
        wrong.write_bytes(real.read_bytes())
    code, report = call(agent, spool, "run", wrong)
    assert (code, report["error"]["type"]) == (
        (3, "RefusedError") if kind == "swapped" else (2, "InputError")
    )
    assert not (tmp_path / "jobs" / "probe" / "1" / "agent.log").exists()
