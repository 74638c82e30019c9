"""An agent whose wall clock is years off and jumps in the middle of its job: timings do not rest on it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from agent.spool import Spool
from sti_runtime.messages import ExecuteResult, ResultRecord
from tests.agents import TORCH, agent_called
from tests.contract.agent_world import (
    Content,
    a_job,
    execute,
    job_path,
    journal_of,
    journal_path,
    lines_in,
    numbered,
    run,
    units_of,
)
from tests.machine import Machine
from tests.wrong_clock import DAY_NS, WrongClock

YEARS_DAYS = 4000


@pytest.mark.parametrize("name", [TORCH, "aarch64"])
def test_a_clock_years_off_that_jumps_changes_no_timing_and_no_record(
    name: str, spool: Spool, content: Content, tmp_path: Path
) -> None:
    agent, clock = agent_called(name), WrongClock(tmp_path / "clock", -YEARS_DAYS)
    skewed, turns = agent.in_environment(**clock.environment), Machine(tmp_path / "machine.lock")
    units = numbered([execute(0, content.plan())] * 3)
    job = a_job(agent, spool, content, units=units, machine_lock=str(turns.path))
    began, began_wall_ns = time.monotonic_ns(), time.time_ns()
    with turns:
        process = skewed.start("run", job_path(spool, job), "--spool", spool.root)
        turns.let_through(lambda: lines_in(journal_path(spool, job)) >= 2, "a unit")
        before = len(journal_of(spool, job))
        clock.set(YEARS_DAYS)
    _, errors = process.communicate(timeout=300)
    took_ns = time.monotonic_ns() - began
    assert process.returncode == 0, errors.decode()
    records = journal_of(spool, job)
    assert [record.seq for record in records] == list(range(records[0].seq, records[0].seq + len(records)))
    assert units_of(records) == [0, 1, 2]
    off_days = [round((record.wall_ns - began_wall_ns) / DAY_NS) for record in records]
    assert off_days[:before] == [-YEARS_DAYS] * before
    assert off_days[-1] == YEARS_DAYS
    for record in records:
        if isinstance(record.payload, ResultRecord):
            assert isinstance(record.payload.result, ExecuteResult)
            assert all(0 < each.latency_ns < took_ns for each in record.payload.result.requests)
    assert run(skewed, spool, job)[0] == 0  # it is done: nothing is done again
    assert journal_of(spool, job) == records
