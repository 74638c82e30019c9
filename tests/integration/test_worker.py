"""The host's worker on a real agent: jobs start, are tailed, survive kills, and stop."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.deploy import DeployReport, Underway
from orchestrator.errors import AgentError, StableError
from orchestrator.inventory import parse_inventory
from orchestrator.settings import load_settings
from orchestrator.tailing import log_tail
from orchestrator.transports.local import LocalTransport
from orchestrator.worker import HostWorker
from sti_runtime.messages import (
    EndRecord,
    Job,
    JournalRecord,
    Lease,
    ProbeUnit,
    ResultRecord,
    StartRecord,
)
from sti_runtime.records import sha256_hex
from tests.agent_data import OPEN_GATES, tiny_bundle
from tests.farm_world import agent_pid, journal_lines
from tests.machine import Machine

DESK = "name: desk, transport: local, threads: 1, workdir: work/desk"


def new_worker(farm: Path) -> HostWorker:
    path = farm / "inventory.yaml"
    devices = parse_inventory(path.read_bytes(), path).devices
    return HostWorker(load_settings(environ={}, cwd=farm), devices)


@pytest.fixture(params=["native", "torch"])
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def worker(tmp_path: Path, engine: str) -> Iterator[HostWorker]:
    (tmp_path / "inventory.yaml").write_text(f"version: 1\ndevices: [{{{DESK}, engine: {engine}}}]")
    started = new_worker(tmp_path)
    yield started
    started.close()


def a_job(worker: HostWorker, farm: Path, units: int = 3, *, id_: str = "job-1", counter: int = 1) -> Job:
    return Job(
        format="stifarm-job",
        version=1,
        id=id_,
        attempt=1,
        lease=Lease(store="test", counter=counter, takeover=False),
        device=worker.facts("desk").identity,
        bundle=None,
        task_data=None,
        engine=worker.facts("desk").engines[0],
        threads=1,
        queue_depth=1,
        cpus=(),
        machine_lock=str(farm / "machine.lock"),
        emulation=None,
        gates=OPEN_GATES,
        units=tuple(ProbeUnit(number=number, kind="probe") for number in range(units)),
    )


def follow(worker: HostWorker, job: Job, offset: int = 0) -> tuple[list[JournalRecord], str, int]:
    """Everything from ``offset`` until the job does not run."""
    records: list[JournalRecord] = []
    for _ in range(100):
        polled = worker.poll("desk", job.id, job.attempt, offset, 5.0)
        records += polled.records
        offset = polled.next_offset
        if polled.state != "running":
            return records, polled.state, offset
    raise AssertionError("the job does not end")


def test_what_a_unit_waits_for_is_told(worker: HostWorker, tmp_path: Path) -> None:
    gates = OPEN_GATES.model_copy(update={"min_free_bytes": 2**62, "wait_limit_s": 600})
    job = a_job(worker, tmp_path).model_copy(update={"gates": gates})
    assert worker.start_job("desk", job)
    offset, told = 0, ""
    for _ in range(100):
        polled = worker.poll("desk", job.id, 1, offset, 1.0)
        offset, told = polled.next_offset, polled.detail
        if told:
            break
    assert polled.state == "running"
    assert told.startswith("free-space: ")
    assert told.endswith(f" bytes < {2**62} bytes")
    assert worker.stop_job("desk", job.id, 1)
    _, state, _ = follow(worker, job, offset)
    assert state == "stopped"
    assert not (tmp_path / "work/desk/jobs" / job.id / "1" / "waiting").exists()


def test_a_job_runs_is_tailed_once_and_not_started_again(worker: HostWorker, tmp_path: Path) -> None:
    job = a_job(worker, tmp_path)
    assert worker.spool("desk") == str(tmp_path / "work/desk")
    assert worker.poll("desk", job.id, 1, 0, 0.0).state == "absent"
    assert worker.start_job("desk", job)
    records, state, offset = follow(worker, job)
    assert state == "ended"
    assert [record.seq for record in records] == list(range(5))
    assert isinstance(records[0].payload, StartRecord)
    assert [r.payload.unit for r in records if isinstance(r.payload, ResultRecord)] == [0, 1, 2]
    assert isinstance(records[-1].payload, EndRecord)
    again = worker.poll("desk", job.id, 1, offset, 5.0)
    assert (again.records, again.state, again.next_offset) == ((), "ended", offset)
    assert not worker.start_job("desk", job)
    assert not new_worker(tmp_path).start_job("desk", job)


def test_records_can_be_read_in_pieces_from_any_record_on(worker: HostWorker, tmp_path: Path) -> None:
    job = a_job(worker, tmp_path)
    worker.start_job("desk", job)
    whole, _, _ = follow(worker, job)
    journal = Path(f"{worker.spool('desk')}/jobs/{job.id}/1/journal.log").read_bytes()
    seen: list[JournalRecord] = []
    offset = 0
    for record in whole:
        polled = worker.poll("desk", job.id, 1, offset, 0.0)
        assert polled.records[0] == record
        offset = journal.index(b"\n", offset) + 1
        seen.append(record)
    assert seen == whole


def test_an_agent_killed_is_seen_and_resumed_by_another_worker(worker: HostWorker, tmp_path: Path) -> None:
    machine = Machine(tmp_path / "machine.lock")
    job = a_job(worker, tmp_path, units=30)
    folder = Path(worker.spool("desk")) / "jobs" / job.id / "1"
    with machine:
        assert worker.start_job("desk", job)
        machine.let_through(lambda: journal_lines(folder) >= 3, "some units")
        os.kill(agent_pid(folder), signal.SIGKILL)
        records, state, offset = follow(worker, job)
    assert state == "stopped"
    second = new_worker(tmp_path)
    assert second.start_job("desk", job)
    more, state, _ = follow(second, job, offset)
    assert state == "ended"
    records += more
    assert [record.seq for record in records] == list(range(len(records)))
    units = [r.payload.unit for r in records if isinstance(r.payload, ResultRecord)]
    assert sorted(units) == units == list(range(30))


def test_a_refused_job_ends_with_its_reason(worker: HostWorker, tmp_path: Path) -> None:
    job = a_job(worker, tmp_path).model_copy(update={"device": "0123456789abcdef"})
    worker.start_job("desk", job)
    records, state, _ = follow(worker, job)
    assert state == "ended"
    end = records[-1].payload
    assert isinstance(end, EndRecord)
    assert end.refused is not None
    assert "this is" in end.refused


def test_a_job_file_torn_by_a_power_cut_is_sent_again(worker: HostWorker, tmp_path: Path) -> None:
    job = a_job(worker, tmp_path)
    path = Path(worker.spool("desk")) / "jobs" / job.id / "1/job.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(job.to_json()[:100])
    assert worker.start_job("desk", job)
    assert path.read_bytes() == job.to_json()
    assert follow(worker, job)[1] == "ended"


def test_another_job_under_the_same_attempt_is_refused(worker: HostWorker, tmp_path: Path) -> None:
    worker.start_job("desk", a_job(worker, tmp_path))
    with pytest.raises(StableError, match=r"desk: attempt 1 of job job-1 .*higher attempt number"):
        worker.start_job("desk", a_job(worker, tmp_path, units=2))


def test_a_damaged_journal_is_reported_with_the_records_before_it(worker: HostWorker, tmp_path: Path) -> None:
    job = a_job(worker, tmp_path)
    worker.start_job("desk", job)
    follow(worker, job)
    journal = Path(worker.spool("desk")) / "jobs" / job.id / "1/journal.log"
    lines = journal.read_bytes().split(b"\n")
    lines[2] = lines[2].replace(b"probe", b"porbe")
    journal.write_bytes(b"\n".join(lines))
    polled = worker.poll("desk", job.id, 1, 0, 0.0)
    assert polled.state == "damaged"
    assert [record.seq for record in polled.records] == [0, 1]
    assert "checksum" in polled.detail


def test_a_job_is_stopped_and_the_device_cleaned(worker: HostWorker, tmp_path: Path) -> None:
    job = a_job(worker, tmp_path)
    with Machine(tmp_path / "machine.lock"):
        worker.start_job("desk", job)
        with pytest.raises(Exception, match="desk: ") as caught:
            worker.clean("desk")
        assert "busy" in str(caught.value).lower() or "in use" in str(caught.value)
        assert worker.stop_job("desk", job.id, 1)
        _, state, _ = follow(worker, job)
    assert state == "stopped"
    assert not worker.stop_job("desk", job.id, 1)
    worker.clean("desk")
    assert list(Path(worker.spool("desk")).iterdir()) == []
    assert worker.poll("desk", job.id, 1, 0, 0.0).state == "absent"


@pytest.mark.parametrize("content", [b"", b"garbage", b'{"owner": "test", "counters": {"test": Infinity}}'])
def test_a_device_whose_fence_is_damaged_is_taken_over(
    worker: HostWorker, tmp_path: Path, content: bytes
) -> None:
    bundle = tiny_bundle(tmp_path / "bundles")
    lease = Lease(store="test", counter=3, takeover=False)
    fence = Path(worker.spool("desk")) / "fence.json"
    worker.facts("desk")
    fence.write_bytes(content)
    for attempt in (lambda: worker.deploy("desk", bundle, lease=lease), lambda: worker.clean("desk", lease)):
        with pytest.raises(StableError, match=r"fence\.json") as caught:
            attempt()
        assert "stifarm devices take-over --devices desk" in caught.value.remedy
    assert fence.read_bytes() == content
    worker.take_over("desk", lease)
    worker.deploy("desk", bundle, lease=lease)
    worker.clean("desk", lease)


def test_the_end_of_a_long_log_says_why(tmp_path: Path) -> None:
    log = tmp_path / "it's a log"
    assert log_tail(LocalTransport("desk"), str(log)) == "The agent was not started."
    log.write_bytes(b"an old line\n" * 150_000 + b"the cause\n")
    said = log_tail(LocalTransport("desk"), str(log))
    assert said.endswith("\nthe cause")
    assert len(said) < 2000


def test_deploys_through_the_worker(worker: HostWorker, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path / "bundles")
    (tmp_path / "rows").write_bytes(b"rows")
    lease = Lease(store="test", counter=3, takeover=False)

    def deploy() -> tuple[DeployReport, ...]:
        return worker.deploy("desk", bundle, [tmp_path / "rows"], lease)

    assert [report.already for report in deploy()] == [False, False]
    assert [report.already for report in deploy()] == [True, True]
    worker.verify("desk", bundle.name)
    region = Path(worker.spool("desk")) / "bundles" / bundle.name / "k2.bin"
    with region.open("r+b") as stream:
        stream.write(b"\xff" * 16)
    with pytest.raises(StableError, match=r"desk: bundle \w+ was damaged on its storage .*Deploy again"):
        worker.verify("desk", bundle.name)
    assert deploy()[0].chunks_sent == 1
    worker.verify("desk", bundle.name)
    (tmp_path / "rows").write_bytes(b"more rows")
    report = deploy()[1]
    assert (report.digest, report.bytes_sent) == (sha256_hex(b"more rows"), 9)
    assert worker.progress("desk") == Underway(0, 0, "")
    other = tiny_bundle(tmp_path / "bundles", seed=3)
    with pytest.raises(AgentError, match="its controller is stale"):
        worker.deploy("desk", other, lease=Lease(store="test", counter=2, takeover=False))
