"""Units on the executable beyond what all agents share: facts, throttles, memory, spawned requests.

The executable is built with sanitizers.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from agent.facts import read_facts
from agent.spool import Spool
from sti_runtime.device_facts import DeviceFacts
from sti_runtime.journal_format import parse_lines
from sti_runtime.messages import (
    Emulation,
    ExecuteResult,
    ExecuteUnit,
    FailureRecord,
    Job,
    ProbeResult,
    ProbeUnit,
    ResultRecord,
    Unit,
    VerifiedEmulation,
)
from sti_runtime.model import Submodel
from sti_runtime.plan import Plan, merged_reads
from tests.agent_data import make_job, push_job
from tests.agents import Agent
from tests.bundles import hand_plan
from tests.native.content import TOKENS, Content, make_content
from tests.native.core import sanitized_agent

WHOLE = Submodel(kept=(0, 1, 2), width=4)


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def agent(request: pytest.FixtureRequest) -> Agent:
    return sanitized_agent(request.param)


@pytest.fixture(scope="module")
def content(agent: Agent, tmp_path_factory: pytest.TempPathFactory) -> Content:
    """A spool for each build of the agent: their jobs have the same names."""
    return make_content(tmp_path_factory.mktemp("spool"))


@pytest.fixture(scope="module")
def plan(content: Content) -> Plan:
    return hand_plan(
        content.bundle.manifest, WHOLE, lambda layer, index: 4, preloaded=[(0, 0), (0, 1)], tokens=TOKENS
    )


def execute(plan: Plan, **changes: Any) -> ExecuteUnit:
    unit = ExecuteUnit(
        number=0, kind="execute", plan=plan, request_kind="cold", io_mode="direct", warmups=0, rows=(0,)
    )
    return unit.model_copy(update=changes)


def make(agent: Agent, content: Content, name: str, units: tuple[Unit, ...], **changes: Any) -> Job:
    spool = Spool.open(content.folder)
    named = {"bundle": content.bundle.digest, "task_data": content.task_digest}
    settings = {"id": name, "engine": agent.engine, "threads": 1, "queue_depth": 4, "units": units}
    job = make_job(spool, **(settings | named | changes))
    push_job(spool, job)
    return job


def results(content: Content, job: Job) -> list[Any]:
    """Results and failures in the journal of a job, in the order of its units."""
    path = content.folder / "jobs" / job.id / str(job.attempt) / "journal.log"
    found = parse_lines(path.read_bytes(), offset=0, source=str(path))
    assert found.problem is None
    payloads = [record.payload for record in found.records]
    return [
        payload.result if isinstance(payload, ResultRecord) else payload
        for payload in payloads
        if isinstance(payload, ResultRecord | FailureRecord)
    ]


def run(agent: Agent, content: Content, name: str, units: tuple[Unit, ...], **changes: Any) -> list[Any]:
    job = make(agent, content, name, units, **changes)
    path = content.folder / "jobs" / name / "1" / "job.json"
    code, report = agent.call("run", path, "--spool", content.folder)
    assert (code, report["state"]) == (0, "ended"), report
    return results(content, job)


# ------------------------------------------------------------------ facts


def test_facts_are_those_that_python_finds(agent: Agent, tmp_path: Path) -> None:
    code, report = agent.call("facts", "--spool", tmp_path / "spool")
    assert code == 0
    found = DeviceFacts.from_json(json.dumps(report).encode(), source="facts")
    spool = Spool.open(tmp_path / "spool")
    expected = read_facts(spool)
    own = {"agent", "agent_digest", "engines", "libc", "python", "torch"}  # the agent's, not the device's
    moving = {"wall_ns", "current_khz", "thermal_zones", "storage"}
    assert found.model_dump(exclude=own | moving) == expected.model_dump(exclude=own | moving)
    assert found.storage.model_dump(exclude={"free_bytes"}) == expected.storage.model_dump(
        exclude={"free_bytes"}
    )
    assert len(found.current_khz) == len(expected.current_khz)
    assert (found.engines, found.python, found.torch) == (("native", "native-int8"), None, None)
    assert found.agent.startswith("stifarm-agent-native ")
    assert not [path for path in spool.root.iterdir() if path.name.startswith(".")]


def test_a_spool_is_marked_as_an_emulated_device_s_once(agent: Agent, tmp_path: Path) -> None:
    _, before = agent.call("facts", "--spool", tmp_path)
    _, marked = agent.call("facts", "--emulated", "--spool", tmp_path)
    _, after = agent.call("facts", "--spool", tmp_path)
    assert (before["emulated_spool"], marked["emulated_spool"]) == (False, True)
    assert marked["identity"] == after["identity"] == read_facts(Spool.open(tmp_path)).identity
    assert marked["identity"].startswith(before["identity"] + "/")


# ------------------------------------------------------------------ throttles


def verified(found: list[Any]) -> VerifiedEmulation:
    assert isinstance(found[0], ProbeResult), found
    assert found[0].verified is not None
    return found[0].verified


def test_emulated_rates_hold_at_the_plans_read_size(agent: Agent, content: Content, plan: Plan) -> None:
    emulation = Emulation(
        io_bytes_per_s=4_000_000, io_mechanism="agent", cpu_share_milli=250, cpu_mechanism="agent"
    )
    units: tuple[Unit, ...] = (ProbeUnit(number=0, kind="probe"), execute(plan, number=1))
    for attempt in range(5):  # until no other program has the machine
        found = run(agent, content, f"emulated-{attempt}", units, emulation=emulation)
        rates, request = verified(found), found[1].requests[0]
        require_no_faster(rates, plan, emulation)
        # The request itself went through the same throttle.
        assert request.latency_ns >= request.planned_bytes * 10**9 // 4_000_000
        if (rates.io_bytes_per_s or 0) > 400_000 and (rates.cpu_share_milli or 0) > 20:
            return
    pytest.fail(f"far below the nominal rates, five times: {rates}")


def require_no_faster(rates: VerifiedEmulation, plan: Plan, emulation: Emulation) -> None:
    """The throttle of 4 MB/s and a quarter of a CPU gives nothing away."""
    assert rates.emulation == emulation
    sizes = sorted(read.length for read in merged_reads(plan.streamed()))
    assert rates.read_bytes == sizes[(len(sizes) - 1) // 2]
    assert rates.read_nominal_ns == rates.read_bytes * 10**9 // 4_000_000
    assert rates.io_bytes_per_s is not None
    assert rates.io_bytes_per_s <= 4_000_000
    assert rates.read_p50_ns is not None
    assert rates.read_p50_ns >= rates.read_nominal_ns
    assert rates.cpu_share_milli is not None
    assert rates.cpu_share_milli <= 260
    assert rates.section_cpu_ns is not None
    assert rates.section_nominal_ns == 4 * rates.section_cpu_ns
    assert rates.section_p50_ns is not None
    assert rates.section_p50_ns >= rates.section_nominal_ns


def test_a_device_without_a_bundle_is_verified_too(agent: Agent, content: Content) -> None:
    emulation = Emulation(
        io_bytes_per_s=50_000_000, io_mechanism="agent", cpu_share_milli=None, cpu_mechanism=None
    )
    units: tuple[Unit, ...] = (ProbeUnit(number=0, kind="probe"),)
    found = run(agent, content, "bare", units, emulation=emulation, bundle=None, task_data=None)
    rates = verified(found)
    assert rates.read_bytes == 256 << 10
    assert rates.io_bytes_per_s is not None
    assert rates.io_bytes_per_s <= 50_000_000
    assert (rates.cpu_share_milli, rates.section_p50_ns) == (None, None)
    assert not list(content.folder.glob(".probe*"))


# ------------------------------------------------------------------ memory


def test_the_peak_is_the_unit_s_own(agent: Agent, tmp_path: Path) -> None:
    content = make_content(tmp_path, hidden=256)
    manifest = content.bundle.manifest
    large = hand_plan(manifest, WHOLE, lambda layer, index: 32, tokens=TOKENS)
    small = hand_plan(manifest, WHOLE, lambda layer, index: 2, tokens=TOKENS)
    found = run(agent, content, "peaks", (execute(large), execute(small, number=1)))
    memory = [result.memory for result in found]
    for parts in memory:
        assert parts.process_peak_bytes is not None
        assert parts.process_peak_bytes >= parts.resident + parts.activations
    freed = memory[0].working - memory[1].working
    assert freed > 4 << 20
    assert memory[0].process_peak_bytes - memory[1].process_peak_bytes > freed // 2


# ------------------------------------------------------------------ requests in processes of their own


def its_request(process: subprocess.Popen[bytes], limit_s: float = 120) -> psutil.Process:
    """The process of the agent's request, as soon as it is there; it lasts as long as the request."""
    parent, deadline = psutil.Process(process.pid), time.monotonic() + limit_s
    while True:
        children = parent.children()
        if children:
            return children[0]
        assert process.poll() is None, "the agent ended before"
        assert time.monotonic() < deadline, f"waited {limit_s} s for the request's process"
        time.sleep(0.005)


def test_a_request_s_process_that_dies_is_a_failure_and_the_next_unit_runs(
    agent: Agent, content: Content, plan: Plan
) -> None:
    slow = Emulation(io_bytes_per_s=20_000, io_mechanism="agent", cpu_share_milli=None, cpu_mechanism=None)
    units: tuple[Unit, ...] = (
        execute(plan, request_kind="spawn-cold"),
        execute(plan, number=1, request_kind="cold", rows=(99,)),
    )
    job = make(agent, content, "killed", units, emulation=slow)
    process = agent.start("run", content.folder / "jobs/killed/1/job.json", "--spool", content.folder)
    try:
        its_request(process).kill()
        process.communicate(timeout=120)
    finally:
        process.kill()
    killed, last = results(content, job)
    assert (killed.error, last.error) == ("SpawnedRequestError", "InputError")
    assert "signal 9" in killed.what
    assert "Row 99" in last.what


def test_a_second_signal_ends_a_request_s_process_too(agent: Agent, content: Content, plan: Plan) -> None:
    slow = Emulation(io_bytes_per_s=20_000, io_mechanism="agent", cpu_share_milli=None, cpu_mechanism=None)
    job = make(agent, content, "stopped", (execute(plan, request_kind="spawn-cold"),), emulation=slow)
    process = agent.start("run", content.folder / "jobs/stopped/1/job.json", "--spool", content.folder)
    try:
        child = its_request(process)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    assert json.loads(output)["state"] == "stopped"
    assert not child.is_running()
    assert results(content, job) == []


def test_spawned_refuses_what_is_no_request(agent: Agent, content: Content) -> None:
    job = make(agent, content, "odd", (ProbeUnit(number=0, kind="probe"),))
    for data, words in ((job.to_json(), "A probe unit is not a request."), (b"{}", "standard input")):
        done = subprocess.run(
            [*agent.argv, "spawned", str(content.folder)],
            input=data,
            env=os.environ | dict(agent.environment),
            capture_output=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 1
        assert words in json.loads(done.stdout)["what"]


def test_cold_and_warm_read_what_they_should(agent: Agent, content: Content, plan: Plan) -> None:
    found = run(
        agent,
        content,
        "kinds",
        (execute(plan, rows=(2, 2)), execute(plan, number=1, request_kind="warm", rows=(2, 2), warmups=1)),
    )
    cold, warm = found
    assert isinstance(cold, ExecuteResult)
    assert isinstance(warm, ExecuteResult)
    assert [sample.warmup for sample in warm.requests] == [True, False]
    difference = {
        c.planned_bytes - w.planned_bytes for c, w in zip(cold.requests, warm.requests, strict=True)
    }
    assert difference == {plan.preloaded_bytes}
    assert cold.requests[0].logits == pytest.approx(warm.requests[0].logits, rel=1e-6)
