"""Fake devices: their journals are valid, follow from the clock, and survive deaths of the agent."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import AgentError, LinkError, StableError
from orchestrator.inventory import parse_inventory
from orchestrator.settings import load_settings
from orchestrator.transports.fake_agent import FakeAgent, FakeSpec
from orchestrator.transports.fake_device import FakeDevice
from orchestrator.worker import HostWorker
from sti_runtime.journal_format import parse_lines
from sti_runtime.messages import (
    EndRecord,
    FailureRecord,
    Gates,
    IoProfileUnit,
    Job,
    JournalRecord,
    Lease,
    ProbeUnit,
    ResultRecord,
    StartRecord,
    Unit,
)
from sti_runtime.records import sha256_hex

S = 10**9
UNITS: tuple[Unit, ...] = tuple(ProbeUnit(number=number, kind="probe") for number in range(4))


class Clock:
    """A wall clock that a test sets."""

    def __init__(self) -> None:
        self.ns = 1_000 * S

    def __call__(self) -> int:
        return self.ns


def job(units: tuple[Unit, ...] = UNITS, *, attempt: int = 1, counter: int = 1, store: str = "s") -> Job:
    """A job of an attempt under a lease."""
    return Job(
        format="stifarm-job",
        version=1,
        id="probe-1",
        attempt=attempt,
        lease=Lease(store=store, counter=counter, takeover=False),
        device="d",
        bundle=None,
        task_data=None,
        engine="native",
        threads=1,
        queue_depth=1,
        cpus=(),
        machine_lock=None,
        emulation=None,
        gates=Gates(
            max_temperature_milli_c=None,
            min_battery_percent=None,
            max_load_milli=None,
            min_free_bytes=None,
            wait_limit_s=0,
        ),
        units=units,
    )


def accept(agent: FakeAgent, given: Job) -> None:
    """Hand a job over as the host does."""
    data = given.to_json()
    lease = f"{given.lease.store}:{given.lease.counter}"
    arguments = (given.id, str(given.attempt), sha256_hex(data), "--lease", lease)
    agent.verb("accept-job", arguments, data)


def records(agent: FakeAgent) -> list[JournalRecord]:
    """The journal of the job's first attempt by now."""
    data = agent.journal("probe-1", 1)
    assert data is not None
    found = parse_lines(data, offset=0, source="fake")
    assert found.problem is None
    assert found.next_offset == len(data)
    return list(found.records)


def test_the_journal_is_what_the_clock_says() -> None:
    clock = Clock()
    agent = FakeAgent("f", FakeSpec(job_ns=20 * S, seed=3), clock)
    accept(agent, job())
    assert agent.journal("probe-1", 1) is None
    pid = agent.start("probe-1", 1)
    assert agent.process("probe-1", 1) == pid
    assert len(records(agent)) == 1
    clock.ns += 30 * S + 1
    found = records(agent)
    assert [record.payload.type for record in found] == ["start", *["result"] * 4, "end"]
    assert 10 * S <= found[-1].wall_ns - found[0].wall_ns <= 30 * S
    assert agent.process("probe-1", 1) is None
    assert agent.verb("status", ("probe-1", "1"), b"") == {"state": "ended"}
    start = found[0].payload
    assert isinstance(start, StartRecord)
    assert start.emulated


def test_an_agent_that_dies_goes_on_behind_its_last_unit_when_it_is_started_again() -> None:
    deaths = 0
    for seed in range(8):
        clock = Clock()
        agent = FakeAgent("f", FakeSpec(job_ns=20 * S, deaths_ppm=700_000, seed=seed), clock)
        accept(agent, job())
        while True:
            agent.start("probe-1", 1)
            clock.ns += 31 * S
            if isinstance(records(agent)[-1].payload, EndRecord):
                break
            deaths += 1
            assert agent.verb("status", ("probe-1", "1"), b"") == {"state": "stopped"}
            assert agent.process("probe-1", 1) is None
        found = records(agent)
        starts = [r.payload.first_unit for r in found if isinstance(r.payload, StartRecord)]
        assert starts == sorted(starts)
        assert [r.payload.unit for r in found if isinstance(r.payload, ResultRecord)] == [0, 1, 2, 3]
    assert deaths > 0


def test_it_stops_behind_its_present_unit() -> None:
    clock = Clock()
    agent = FakeAgent("f", FakeSpec(job_ns=20 * S), clock)
    accept(agent, job())
    agent.start("probe-1", 1)
    agent.verb("stop", ("probe-1", "1"), b"")
    clock.ns += 31 * S
    assert [record.payload.type for record in records(agent)] == ["start", "result"]
    agent.start("probe-1", 1)
    clock.ns += 31 * S
    assert isinstance(records(agent)[-1].payload, EndRecord)


def test_what_it_has_no_figures_for_fails() -> None:
    clock = Clock()
    agent = FakeAgent("f", FakeSpec(), clock)
    unit = IoProfileUnit(number=0, kind="profile-io", widths=(1,), fidelities=(2,), repeats=1, seed=0)
    accept(agent, job((unit,)))
    agent.start("probe-1", 1)
    clock.ns += 60 * S
    assert isinstance(records(agent)[1].payload, FailureRecord)


def worker_of(tmp_path: Path, fields: str) -> HostWorker:
    """A host with one fake device."""
    text = f"version: 1\ndevices: [{{name: f, transport: fake, fake: {{{fields}}}}}]"
    inventory = parse_inventory(text.encode(), tmp_path / "inventory.yaml")
    (device,) = inventory.devices
    assert device.emulated
    assert not device.native
    return HostWorker(load_settings(environ={}, cwd=tmp_path), inventory.devices)


def test_leases_are_kept_as_agents_do(tmp_path: Path) -> None:
    worker = worker_of(tmp_path, "job: 1h")
    worker.start_job("f", job(counter=7))
    assert not worker.start_job("f", job(counter=7))
    with pytest.raises(AgentError, match="its controller is stale"):
        worker.start_job("f", job(attempt=2, counter=6))
    with pytest.raises(AgentError, match="belongs to store") as caught:
        worker.start_job("f", job(attempt=2, counter=8, store="other"))
    assert "take-over" in caught.value.remedy
    worker.close()


def test_its_link_fails_as_often_as_was_said() -> None:
    device = FakeDevice("f", FakeSpec(link_faults_ppm=250_000, seed=1))
    lost = 0
    for _ in range(1000):
        try:
            device.run(["fake-agent", "facts"], timeout_s=1)
        except LinkError:
            lost += 1
    assert 150 < lost < 350
    with pytest.raises(StableError, match="keeps no files"):
        device.push(Path("/dev/null"), "/x")
