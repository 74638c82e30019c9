"""Timed units wait for a stable temperature, over all agents.

The machine's lock is in the test's hands: the agent takes one reading each time it is let through, so that
what it reads is what the test wrote before, however fast or slow either is.
"""

from __future__ import annotations

from pathlib import Path

from agent.spool import Spool
from sti_runtime.messages import FailureRecord, ResultRecord
from tests.agent_data import OPEN_GATES, probes
from tests.agents import Agent
from tests.contract.agent_world import a_job, journal_of, result_of, run, wait_for
from tests.machine import Machine

GATES = OPEN_GATES.model_copy(update={"max_temperature_milli_c": 40_000, "wait_limit_s": 600})


class Thermometer:
    """The one thermal zone of a device."""

    def __init__(self, sysfs: Path) -> None:
        self._zone = sysfs / "class/thermal/thermal_zone0"
        self._zone.mkdir(parents=True)
        (self._zone / "type").write_text("soc\n")

    def shows(self, milli_c: int) -> None:
        """What is read from now on."""
        (self._zone / "next").write_text(f"{milli_c}\n")
        (self._zone / "next").rename(self._zone / "temp")


def test_a_job_waits_once_where_nothing_changes(agent: Agent, spool: Spool, tmp_path: Path) -> None:
    Thermometer(tmp_path / "sys").shows(30_000)
    job = a_job(agent, spool, gates=GATES, units=probes(4))
    code, report = run(agent.in_environment(STIFARM_SYSFS=str(tmp_path / "sys")), spool, job)
    assert (code, report["done"]) == (0, 4)
    log = (spool.job(job.id, 1) / "agent.log").read_text()
    assert log.count("waits for its gates") == 1
    assert "Unit 0 waits for its gates: temperature: 30000m°C <= 40000m°C, stable or not shows in 2 s" in log


def test_a_device_that_warms_is_waited_for_and_says_so(agent: Agent, spool: Spool, tmp_path: Path) -> None:
    thermometer, machine = Thermometer(tmp_path / "sys"), Machine(tmp_path / "machine.lock")
    thermometer.shows(30_000)
    job = a_job(agent, spool, gates=GATES, units=probes(1), machine_lock=str(machine.path))
    waiting = spool.job(job.id, 1) / "waiting"

    def says(what: str) -> bool:
        return waiting.exists() and what in waiting.read_text()

    with machine:
        started = agent.in_environment(STIFARM_SYSFS=str(tmp_path / "sys")).start(
            "run", spool.job(job.id, 1) / "job.json", "--spool", spool.root
        )
        for shown, said in (
            (30_000, "stable or not shows in 2 s"),
            (30_600, "warming: was 30000m°C a moment ago"),
            (29_900, "cooling: was 30600m°C a moment ago"),
        ):
            wait_for(lambda: machine.is_open_in(started.pid), "the agent to ask for the machine")
            thermometer.shows(shown)
            machine.let_one_through()
            wait_for(lambda said=said: says(said), f"the agent to wait, {said}")  # type: ignore[misc]
        wait_for(lambda: machine.is_open_in(started.pid), "the agent to ask for the machine")
    output, errors = started.communicate(timeout=300)
    assert started.returncode == 0, (output, errors)
    record = result_of(ResultRecord, journal_of(spool, job)[1].payload)
    assert record.unit == 0
    assert not waiting.exists()


def test_a_wait_that_is_too_short_to_tell_ends_in_a_gate_error(
    agent: Agent, spool: Spool, tmp_path: Path
) -> None:
    Thermometer(tmp_path / "sys").shows(30_000)
    gates = GATES.model_copy(update={"wait_limit_s": 1})
    job = a_job(agent, spool, gates=gates, units=probes(1))
    run(agent.in_environment(STIFARM_SYSFS=str(tmp_path / "sys")), spool, job)
    failure = result_of(FailureRecord, journal_of(spool, job)[1].payload)
    assert failure.error == "GateError"
    assert "stayed shut for 1 s (limit 1 s): temperature: 30000m°C <= 40000m°C, stable or not" in failure.what
