"""The agents as processes: killed, stopped, fenced off, out of space; nothing lost, nothing twice."""

from __future__ import annotations

import contextlib
import json
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.identity import boot_id
from agent.journal import Journal
from agent.sensors import read_sensors
from agent.spool import Spool
from sti_runtime.journal_format import PROTOCOL_VERSION
from sti_runtime.messages import (
    Job,
    ProbeResult,
    ResultRecord,
    StartRecord,
)
from sti_runtime.records import canonical_json
from tests.agent_data import agent_emulation, probes
from tests.agents import Agent, abandon
from tests.contract.agent_world import (
    a_job,
    job_path,
    journal_of,
    journal_path,
    lines_in,
    refusal,
    result_of,
    run,
    units_of,
    wait_for,
)
from tests.machine import Machine


def written_journal(spool: Spool, job: Job) -> Path:
    """A journal in which every unit of a job of probes is done and the end is not yet written."""
    journal = Journal(journal_path(spool, job), boot_id())
    sensors = read_sensors(spool.root)
    journal.append(
        StartRecord(
            type="start", job=job.id, attempt=job.attempt, lease=job.lease, first_unit=0, agent="test",
            agent_digest="0" * 64, protocol=PROTOCOL_VERSION, emulated=False, sensors=sensors,
        )
    )  # fmt: skip
    for unit in range(len(job.units)):
        result = ProbeResult(kind="probe", sensors=sensors, verified=None)
        journal.append(ResultRecord(type="result", unit=unit, result=result))
    journal.close()
    return journal_path(spool, job)


def test_another_agents_journal_is_gone_on_with(agent: Agent, spool: Spool) -> None:
    """Torn in the seventh line, which is cut off; the units before it are not run again."""
    job = a_job(agent, spool)
    journal = written_journal(spool, job)
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:6]) + lines[6][:100])
    assert run(agent, spool, job)[0] == 0
    records = journal_of(spool, job)
    assert units_of(records) == list(range(10))
    assert b"".join(lines[:6]) == journal.read_bytes()[: sum(map(len, lines[:6]))]
    starts = [r.payload.first_unit for r in records if isinstance(r.payload, StartRecord)]
    assert starts == [0, 5]
    assert "cut off 100 bytes" in (journal.parent / "agent.log").read_text()


def test_a_damaged_journal_is_left_as_it_is(agent: Agent, spool: Spool) -> None:
    job = a_job(agent, spool)
    journal = written_journal(spool, job)
    damaged = bytearray(journal.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    journal.write_bytes(damaged)
    code, report = run(agent, spool, job)
    assert (code, report["error"]["type"]) == (1, "FormatError")
    assert "new attempt" in report["error"]["remedy"]
    assert journal.read_bytes() == damaged


def test_a_finished_job_is_not_touched(agent: Agent, spool: Spool) -> None:
    job = a_job(agent, spool, units=probes(3))
    ended = (0, {"state": "ended", "done": 3, "failed": 0})
    assert agent.call("status", job.id, 1, "--spool", spool.root)[1]["state"] == "stopped"
    assert run(agent, spool, job) == ended
    before = journal_path(spool, job).read_bytes()
    assert run(agent, spool, job) == ended
    assert journal_path(spool, job).read_bytes() == before
    status = agent.call("status", job.id, 1, "--spool", spool.root)[1]
    assert status == {
        "state": "ended", "pid": None, "journal_bytes": len(before), "units": 3, "done": 3, "failed": 0,
        "refused": None,
    }  # fmt: skip
    start = result_of(StartRecord, journal_of(spool, job)[0].payload)
    assert (start.first_unit, start.emulated, start.lease) == (0, False, job.lease)
    version = agent.call("version")[1]
    assert (start.agent, start.agent_digest, start.protocol) == (
        version["agent"],
        version["agent_digest"],
        version["protocol"],
    )


def test_killed_and_resumed_no_unit_is_lost_or_done_twice(agent: Agent, spool: Spool, tmp_path: Path) -> None:
    """Killed while a unit begins, runs or is journalled; units come one by one, so the job cannot be over."""
    machine = Machine(tmp_path / "machine.lock")
    job = a_job(agent, spool, units=probes(60), machine_lock=str(machine.path))
    journal = journal_path(spool, job)
    rng = random.Random(3)
    with machine:
        for _ in range(3):
            before = lines_in(journal)
            process = agent.start("run", job_path(spool, job), "--spool", spool.root)
            machine.let_through(lambda at=before: lines_in(journal) > at + 5, "some units")  # type: ignore[misc]
            machine.let_one_through()
            time.sleep(rng.uniform(0, 0.004))
            process.kill()
            process.communicate()
    assert run(agent, spool, job)[1] == {"state": "ended", "done": 60, "failed": 0}
    records = journal_of(spool, job)
    assert units_of(records) == list(range(60))
    assert [record.seq for record in records] == list(range(len(records)))
    starts = [r.payload.first_unit for r in records if isinstance(r.payload, StartRecord)]
    assert len(starts) == 4
    assert starts == sorted(set(starts))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_unit(agent: Agent, spool: Spool, number: signal.Signals) -> None:
    job = a_job(agent, spool, units=probes(50_000))
    journal = journal_path(spool, job)
    process = agent.start("run", job_path(spool, job), "--spool", spool.root)
    wait_for(lambda: lines_in(journal) > 3, "a few units")
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + number, errors.decode()
    assert json.loads(output)["state"] == "stopped"
    assert not (journal.parent / "pid").exists()
    done = units_of(journal_of(spool, job))
    assert done == list(range(len(done)))
    assert 0 < len(done) < 50_000


def test_a_second_signal_abandons_the_unit(agent: Agent, spool: Spool) -> None:
    """The probe of a device slowed to 500 kB/s takes a quarter of a minute."""
    job = a_job(agent, spool, units=probes(1), emulation=agent_emulation(500_000))
    log = job_path(spool, job).parent / "agent.log"
    process = agent.start("run", job_path(spool, job), "--spool", spool.root)
    wait_for(lambda: log.exists() and "Unit 0 (probe)" in log.read_text(), "the unit to begin")
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert process.poll() is None, "the first signal must let the unit end"
    abandon(process)
    assert process.returncode == 143
    assert units_of(journal_of(spool, job)) == []


def test_one_job_at_a_time_and_stop_reaches_the_agent(agent: Agent, spool: Spool, tmp_path: Path) -> None:
    machine = Machine(tmp_path / "machine.lock")
    job = a_job(agent, spool, machine_lock=str(machine.path))
    other = a_job(agent, spool, id="other")
    with machine:
        process = agent.start("run", job_path(spool, job), "--spool", spool.root)
        wait_for(lambda: lines_in(journal_path(spool, job)) == 1, "the start record")
        status = agent.call("status", job.id, 1, "--spool", spool.root)[1]
        assert (status["state"], status["pid"]) == ("running", process.pid)
        assert [name for name in open_files(process.pid) if name.startswith("socket:")] == []
        for verb in (("run", job_path(spool, other)), ("clean",), ("verify", "0" * 64)):
            code, report = agent.call(*verb, "--spool", spool.root)
            assert (code, report["error"]["type"]) == (5, "BusyError")
            assert "probe/1" in report["error"]["what"]
        assert lines_in(journal_path(spool, job)) == 1, "a timed unit ran without its machine"
        assert agent.call("stop", job.id, 1, "--spool", spool.root)[1] == {"signalled": process.pid}
        output, _ = process.communicate(timeout=120)
    assert (process.returncode, json.loads(output)["state"]) == (143, "stopped")
    assert agent.call("status", job.id, 1, "--spool", spool.root)[1]["state"] == "stopped"
    assert agent.call("stop", job.id, 1, "--spool", spool.root)[1] == {"signalled": None}


def open_files(pid: int) -> list[str]:
    """What the descriptors of a process lead to."""
    found = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found.append(str(descriptor.readlink()))
    assert found
    return found


def test_another_process_under_the_pid_is_let_alone(agent: Agent, spool: Spool) -> None:
    """Alive and of the same boot, but started at another time."""
    job = a_job(agent, spool, units=probes(1))
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as innocent:
        record = {"pid": innocent.pid, "start_ticks": 1, "boot_id": boot_id()}
        (job_path(spool, job).parent / "pid").write_bytes(canonical_json(record))
        assert agent.call("status", job.id, 1, "--spool", spool.root)[1]["state"] == "stopped"
        assert agent.call("stop", job.id, 1, "--spool", spool.root)[1] == {"signalled": None}
        assert innocent.poll() is None
        innocent.communicate(b"\n")
        assert innocent.returncode == 0
    assert run(agent, spool, job)[0] == 0


def test_a_job_gives_way_to_a_younger_lease(agent: Agent, spool: Spool, tmp_path: Path) -> None:
    machine = Machine(tmp_path / "machine.lock")
    job = a_job(agent, spool, machine_lock=str(machine.path))
    with machine:
        process = agent.start("run", job_path(spool, job), "--spool", spool.root)
        wait_for(lambda: lines_in(journal_path(spool, job)) == 1, "the start record")
        code, report = agent.call("collect", "--spool", spool.root, "--lease", "store-a:2")
        assert code in (0, 5), report  # the fence has moved in either case
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 3, errors.decode()
    assert json.loads(output)["state"] == "refused"
    assert "superseded" in refusal(spool, job)
    assert len(units_of(journal_of(spool, job))) < 10


def test_full_storage_ends_the_run_and_loses_nothing(agent: Agent, spool: Spool) -> None:
    """The kernel refuses to let any file of the agent grow beyond 12,000 bytes."""
    job = a_job(agent, spool, units=probes(100))

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))

    code, report = run(agent, spool, job, preexec_fn=limited)
    assert (code, report["error"]["type"]) == (4, "StorageFullError")
    assert "no space left" in (job_path(spool, job).parent / "agent.log").read_text().lower()
    kept = units_of(journal_of(spool, job))
    assert kept == list(range(len(kept)))
    assert 0 < len(kept) < 100
    assert agent.call("status", job.id, 1, "--spool", spool.root)[1]["state"] == "stopped"
    assert run(agent, spool, job)[0] == 0
    assert units_of(journal_of(spool, job)) == list(range(100))
