"""Agents that are killed while a unit runs, as a limit on memory does it: twice, then the unit is a failure.

Task data that is a FIFO nobody writes holds a unit for as long as the test wants.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.identity import boot_id
from agent.open_unit import KILL_LIMIT, OPEN_UNIT_FILE, OpenUnit, killed_error, oom_kills
from agent.spool import Spool
from sti_runtime.messages import (
    EndRecord,
    FailureRecord,
    Job,
    ProbeUnit,
    ResultRecord,
    StartRecord,
)
from sti_runtime.model import Submodel
from tests.agent_data import agent_emulation, probes
from tests.agents import Agent
from tests.bundles import hand_plan, make_bundle
from tests.contract.agent_world import (
    TOKENS,
    Content,
    a_job,
    config,
    execute,
    job_path,
    journal_of,
    journal_path,
    lines_in,
    numbered,
    result_of,
    run,
    units_of,
    wait_for,
)
from tests.machine import Machine
from tests.memory_limit import MemoryLimit, memory_limit


def note_path(spool: Spool, job: Job) -> Path:
    return job_path(spool, job).parent / OPEN_UNIT_FILE


def note_of(spool: Spool, job: Job) -> OpenUnit | None:
    """What the agent has noted; None where it has not begun a unit or has left."""
    path = note_path(spool, job)
    data = path.read_bytes() if path.exists() else b""
    return OpenUnit.from_json(data.partition(b"\n")[0], source=str(path)) if b"\n" in data else None


def write_note(spool: Spool, job: Job, *, unit: int, kills: int, boot: str, counted: int | None) -> None:
    note = OpenUnit(boot_id=boot, kills=kills, oom_kills=counted, unit=unit)
    note_path(spool, job).write_bytes(note.to_json() + b"\n")


def start_and_wait(agent: Agent, spool: Spool, job: Job, *, unit: int, kills: int) -> subprocess.Popen[bytes]:
    """Start the agent and wait until it has noted that it runs the unit."""

    def open_now() -> bool:
        note = note_of(spool, job)
        assert process.poll() is None, process.communicate()
        return note is not None and (note.unit, note.kills) == (unit, kills)

    process = agent.start("run", job_path(spool, job), "--spool", spool.root)
    wait_for(open_now, f"unit {unit} to begin")
    return process


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def payloads_of(spool: Spool, job: Job) -> list[object]:
    return [record.payload for record in journal_of(spool, job)]


@pytest.fixture
def rows(spool: Spool, content: Content) -> bytes:
    """Task data whose opening waits for a writer; what it should hold."""
    path = spool.task(content.task_digest)
    whole = path.read_bytes()
    path.unlink()
    os.mkfifo(path)
    return whole


def test_a_unit_that_the_agent_is_killed_in_twice_is_a_failure_and_the_next_units_run(
    agent: Agent, spool: Spool, content: Content, rows: bytes
) -> None:
    probe, run_plan = ProbeUnit(number=0, kind="probe"), execute(0, content.plan())
    job = a_job(agent, spool, content, units=numbered([probe, run_plan, probe, run_plan]))
    before = oom_kills()
    for kills in range(KILL_LIMIT):
        process = start_and_wait(agent, spool, job, unit=1, kills=kills)
        note = note_of(spool, job)
        assert note is not None
        assert note.boot_id == boot_id()
        assert (note.oom_kills is None) == (before is None)
        kill(process)
    path = spool.task(content.task_digest)
    path.unlink()
    path.write_bytes(rows)
    assert run(agent, spool, job) == (0, {"state": "ended", "done": 3, "failed": 1})
    found = payloads_of(spool, job)
    kinds = [StartRecord, ResultRecord, *[StartRecord] * KILL_LIMIT, FailureRecord]
    assert [type(item) for item in found] == [*kinds, ResultRecord, ResultRecord, EndRecord]
    assert units_of(journal_of(spool, job)) == [0, 1, 2, 3]
    failure = result_of(FailureRecord, found[4])
    assert failure.error == "ResourceError"
    assert f"killed {KILL_LIMIT} times while it ran unit 1 (execute)" in failure.what
    assert "memory" in failure.what
    assert failure.remedy == killed_error(job.units[1], KILL_LIMIT, None, None).remedy
    assert not note_path(spool, job).exists()
    log = (job_path(spool, job).parent / "agent.log").read_text()
    assert log.count("The agent was killed while it ran unit 1 (execute)") == KILL_LIMIT - 1


@pytest.mark.parametrize("counted", [None, 2**62])
def test_the_failure_says_what_the_kernel_shows(agent: Agent, spool: Spool, counted: int | None) -> None:
    """The same words from every agent. The case of a kernel that did kill is the control group's test."""
    job = a_job(agent, spool, units=probes(2))
    write_note(spool, job, unit=0, kills=KILL_LIMIT - 1, boot=boot_id(), counted=counted)
    assert run(agent, spool, job)[1] == {"state": "ended", "done": 1, "failed": 1}
    expected = killed_error(job.units[0], KILL_LIMIT, counted, oom_kills())
    assert payloads_of(spool, job)[1] == FailureRecord(
        type="failure", unit=0, error="ResourceError", what=expected.what, remedy=expected.remedy
    )


@pytest.mark.parametrize(
    ("unit", "kills", "boot"),
    [(0, KILL_LIMIT - 2, None), (0, 99, "another boot"), (7, 99, None)],
    ids=["once", "before-a-reboot", "in-another-unit"],
)
def test_a_note_that_does_not_count(
    agent: Agent, spool: Spool, unit: int, kills: int, boot: str | None
) -> None:
    job = a_job(agent, spool, units=probes(2))
    write_note(spool, job, unit=unit, kills=kills, boot=boot or boot_id(), counted=None)
    assert run(agent, spool, job)[1] == {"state": "ended", "done": 2, "failed": 0}
    assert not note_path(spool, job).exists()


@pytest.mark.parametrize(
    "data",
    [
        b"{",
        b"[]\n",
        b"\xff\xfe\n",
        b"[" * 600,
        b'{"boot_id":"x","kills":-1,"oom_kills":null,"unit":0}\n',
        b'{"boot_id":"x","kills":1,"oom_kills":null}\n',
        b'{"boot_id":"x","kills":1,"more":0,"oom_kills":null,"unit":0}\n',
    ],
)
def test_a_damaged_note_is_ignored_and_logged(agent: Agent, spool: Spool, data: bytes) -> None:
    job = a_job(agent, spool, units=probes(1))
    note_path(spool, job).write_bytes(data)
    assert run(agent, spool, job)[1] == {"state": "ended", "done": 1, "failed": 0}
    log = (job_path(spool, job).parent / "agent.log").read_text()
    assert "The note of the unit that was running is ignored: " in log
    assert str(note_path(spool, job)) in log


def test_a_note_that_cannot_be_written_ends_the_run_and_no_unit(agent: Agent, spool: Spool) -> None:
    job = a_job(agent, spool, units=probes(2))
    note_path(spool, job).symlink_to("/dev/full")
    code, report = run(agent, spool, job)
    assert (code, report["error"]["type"]) == (4, "StorageFullError")
    assert f"{note_path(spool, job)}: no space left to write" in report["error"]["what"]
    assert units_of(journal_of(spool, job)) == []
    assert run(agent, spool, job) == (0, {"state": "ended", "done": 2, "failed": 0})


def test_a_stop_that_was_asked_for_is_no_kill(agent: Agent, spool: Spool) -> None:
    """Nor does a kill before it count any more. The probe of a device slowed to 400 kB/s takes many
    seconds."""
    job = a_job(agent, spool, units=probes(1), emulation=agent_emulation(400_000))
    kill(start_and_wait(agent, spool, job, unit=0, kills=0))
    process = start_and_wait(agent, spool, job, unit=0, kills=1)
    terminate_at_once(process, job_path(spool, job).parent / "agent.log")
    assert not note_path(spool, job).exists()
    kill(start_and_wait(agent, spool, job, unit=0, kills=0))


def terminate_at_once(process: subprocess.Popen[bytes], log: Path) -> None:
    """Send SIGTERM until the unit is abandoned: two that come close together can arrive as one."""
    sent = 0

    def abandoned() -> bool:
        nonlocal sent
        if "abandoned at the second signal" in log.read_text():
            return True
        assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGTERM)
        sent += 1
        time.sleep(0.2)
        return False

    wait_for(abandoned, "the unit to be abandoned")
    assert sent > 1
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors.decode()


def test_a_kill_while_the_unit_waits_is_not_the_units(agent: Agent, spool: Spool, tmp_path: Path) -> None:
    machine = Machine(tmp_path / "machine.lock")
    job = a_job(agent, spool, units=probes(2), machine_lock=str(machine.path))
    with machine:
        for starts in range(KILL_LIMIT + 1):
            process = agent.start("run", job_path(spool, job), "--spool", spool.root)
            wait_for(lambda at=starts: lines_in(journal_path(spool, job)) > at, "the start record")  # type: ignore[misc]
            kill(process)
            assert note_of(spool, job) is None
    assert run(agent, spool, job)[1] == {"state": "ended", "done": 2, "failed": 0}


# ------------------------------------------------------------------ a real limit


@pytest.fixture
def limit(agent: Agent) -> Iterator[MemoryLimit]:
    if agent.emulated or not agent.native:
        pytest.skip("the limit would hit the emulator or PyTorch's libraries, not the agent")
    with memory_limit(16 << 20) as group:
        yield group


@pytest.mark.root
def test_a_memory_limit_that_kills(agent: Agent, spool: Spool, content: Content, limit: MemoryLimit) -> None:
    """A layer of 28 MB under a limit of 16 MB: the kernel kills the agent, and says so afterwards."""
    big = config("bert", "cls", "tanh", vocab=200, hidden=768, ffn=3072, heads=12, layers=1)
    bundle, _ = make_bundle(big, spool.bundles, fidelities=(32,))
    plan = hand_plan(
        bundle.manifest, Submodel(kept=(0,), width=12), lambda _l, _s: 32, tokens=TOKENS, preloaded=[(0, 0)]
    )
    units = numbered([execute(0, plan), ProbeUnit(number=0, kind="probe")])
    job = a_job(agent, spool, content, units=units, bundle=bundle.digest)
    before = limit.kills()
    for _ in range(KILL_LIMIT):
        process = agent.start("run", job_path(spool, job), "--spool", spool.root, preexec_fn=limit.enter)
        process.communicate(timeout=120)
        assert process.returncode == -signal.SIGKILL
    assert limit.kills() == before + KILL_LIMIT
    code, report = run(agent, spool, job, preexec_fn=limit.enter)
    assert (code, report) == (0, {"state": "ended", "done": 1, "failed": 1})
    failure = next(item for item in payloads_of(spool, job) if isinstance(item, FailureRecord))
    assert (failure.unit, failure.error) == (0, "ResourceError")
    if oom_kills() is None:
        assert "does not count" in failure.what
    else:
        counted = re.search(r"counts (\d+) out-of-memory kill", failure.what)
        assert counted is not None, failure.what
        assert int(counted[1]) >= KILL_LIMIT
    other = a_job(agent, spool, id="other", units=probes(1))
    assert run(agent, spool, other, preexec_fn=limit.enter)[0] == 0
