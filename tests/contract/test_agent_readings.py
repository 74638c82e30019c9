"""The sensors between samples, over all agents: a clock that drops in the middle of a unit.

The clock's ceiling is a named pipe in which as many records wait as the agent takes readings: each reading
takes one, so that the drop comes at a certain reading, whatever the machine's speed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agent.spool import Spool
from sti_runtime.messages import (
    ComputeProfileUnit,
    FixedProfileUnit,
    IoProfileUnit,
    ResultRecord,
    Unit,
)
from tests.agents import Agent
from tests.contract.agent_world import ROWS, Content, a_job, execute, journal_of, run

FULL_KHZ, HELD_KHZ = 2_000_000, 1_200_000
RECORD_BYTES = 63
"""What an agent reads of a file that holds one number."""
DROP = 3
"""The reading, from 0 at the unit's start, in which the lower clock is seen first."""
WARMING_READS = 2
"""Reads of the profile-io unit below that come before its samples."""


@contextmanager
def ceilings(cpufreq: Path, khz: Sequence[int]) -> Iterator[None]:
    """What the agent's readings of a CPU's ceiling give, one after the other; then nothing more."""
    cpufreq.mkdir(parents=True)
    path = cpufreq / "scaling_max_freq"
    os.mkfifo(path)
    pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        for value in khz:
            assert os.write(pipe, str(value).encode().ljust(RECORD_BYTES)) == RECORD_BYTES
        yield
        with pytest.raises(BlockingIOError):  # all were taken, no more and no fewer
            os.read(pipe, 1)
    finally:
        os.close(pipe)


def units(content: Content) -> dict[str, tuple[Unit, int, int]]:
    """Each kind that is watched: the unit, its samples, the readings before the first sample's."""
    rows = tuple(range(ROWS))
    plan = content.plan()
    return {
        "execute": (execute(0, plan, rows=rows, warmups=1), ROWS, 0),
        "spawn-cold": (execute(0, plan, rows=rows[:DROP], request_kind="spawn-cold"), DROP, 0),
        "profile-io": (
            IoProfileUnit(number=0, kind="profile-io", widths=(2,), fidelities=(4,), repeats=3, seed=1),
            2 * 3,
            WARMING_READS,
        ),
        "profile-compute": (
            ComputeProfileUnit(
                number=0, kind="profile-compute", width=2, fidelities=(2, 4), warmups=1, repeats=2
            ),
            10,
            0,
        ),
        "profile-fixed": (FixedProfileUnit(number=0, kind="profile-fixed", warmups=1, rows=rows), ROWS, 0),
    }


def result_of_unit(agent: Agent, spool: Spool, content: Content, unit: Unit, cpu: int) -> Any:
    job = a_job(agent, spool, content, units=(unit,), cpus=(cpu,), threads=1)
    code, report = run(agent, spool, job)
    assert (code, report["done"]) == (0, 1), report
    payload = journal_of(spool, job)[1].payload
    assert isinstance(payload, ResultRecord), payload
    return payload.result


@pytest.mark.parametrize("kind", ["execute", "spawn-cold", "profile-io", "profile-compute", "profile-fixed"])
def test_a_clock_that_drops_in_the_middle_of_a_unit_counts_against_the_later_samples(
    agent: Agent, spool: Spool, content: Content, tmp_path: Path, kind: str
) -> None:
    unit, count, skipped = units(content)[kind]
    cpu = min(os.sched_getaffinity(0))
    high = skipped + DROP
    more = len(unit.fidelities) if isinstance(unit, ComputeProfileUnit) else 0  # when reads beside end
    readings = [FULL_KHZ] * high + [HELD_KHZ] * (skipped + count + 1 + more - high)
    sysfs = tmp_path / "sys"
    with ceilings(sysfs / f"devices/system/cpu/cpu{cpu}/cpufreq", readings):
        result = result_of_unit(agent.in_environment(STIFARM_SYSFS=str(sysfs)), spool, content, unit, cpu)
    # Sample i lies between readings i and i + 1.
    expected = [i + 1 >= DROP for i in range(count)]
    if kind in ("execute", "spawn-cold"):
        assert ["throttled" in sample.verdict.reasons for sample in result.requests] == expected
        assert not any(s.verdict.valid for s in result.requests if "throttled" in s.verdict.reasons)
        assert (result.before.throttled, result.after.throttled) == (None, None)
    else:
        assert [sample.throttled for sample in result.samples] == expected
    if kind == "profile-compute":  # all are beside layers that are
        assert {(read.throttled, read.valid) for read in result.reads} == {(True, False)}
    if kind == "profile-io":
        assert not any(sample.valid for sample in result.samples if sample.throttled)
    found = {reading.after: reading for reading in result.readings}
    assert (min(found), max(found)) == (0, count)
    assert DROP in found  # where it changed, a reading is kept
    for after, reading in found.items():
        low = after >= DROP
        assert reading.ceilings_khz == (HELD_KHZ if low else FULL_KHZ,)
        assert (reading.throttled, reading.clocks_khz, reading.temperature_milli_c) == (low, (None,), None)
