"""What the executable takes of memory: the address space it uses, nothing while a request's clock runs."""

from __future__ import annotations

import json
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.toolchain import Sources, agent_sources, build_agent
from tests.agents import Agent, agent_called
from tests.native.content import Content, make_content
from tests.native.test_standalone import four_bit_plan

MIB = 1 << 20


@pytest.fixture(scope="module")
def agent() -> Agent:
    agent = agent_called("x86_64")
    if agent.emulated:
        pytest.skip("an address-space limit would hit the emulator, not the agent")
    return agent


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Content:
    return make_content(tmp_path_factory.mktemp("content"))


@pytest.fixture(scope="module")
def infer(content: Content) -> tuple[object, ...]:
    """The words of a request."""
    plan = content.folder / "plan.json"
    plan.write_bytes(four_bit_plan(content).to_json())
    named = ("--bundle", content.bundle.path, "--plan", plan, "--task", content.task)
    return ("infer", *named, "--threads", 2)


# ------------------------------------------------------------------ address space


def within(agent: Agent, limit: int, words: tuple[object, ...]) -> tuple[int, dict[str, Any]]:
    """A verb in an address space of so many bytes."""
    return agent.call(*words, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)))


def test_more_address_space_is_never_worse(agent: Agent, infer: tuple[object, ...]) -> None:
    """A request is answered, or its error says that there is not enough memory."""
    answered = []
    for size in (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24):
        code, report = within(agent, size * MIB, infer)
        answered.append(code == 0)
        if code != 0:
            assert (code, report["error"]["type"]) == (1, "ResourceError"), (size, report)
            assert report["error"]["remedy"]
    assert answered == sorted(answered)
    assert answered[0] != answered[-1]


# ------------------------------------------------------------------ while the clock runs


@pytest.fixture(scope="module")
def logged(agent: Agent) -> Agent:
    """The executable as devices get it, but with an allocator that tells when it was called."""
    own = agent_sources()
    sources = Sources((Path(__file__).with_name("allocation_log.c"), *own.files), own.headers)
    return replace(agent, argv=(str(build_agent("x86_64", sources=sources)),))


@pytest.mark.parametrize("engine", ["native", "native-int8"])
@pytest.mark.parametrize(
    ("kind", "io_mode"), [("cold", "direct"), ("warm", "direct"), ("cached", "buffered")]
)
def test_nothing_is_allocated_while_a_request_s_clock_runs(
    logged: Agent, infer: tuple[object, ...], engine: str, kind: str, io_mode: str
) -> None:
    options = ("--engine", engine, "--kind", kind, "--io-mode", io_mode, "--repeat", 3)
    output, errors = logged.start(*infer, *options).communicate(timeout=300)
    samples = [request["sample"] | request for request in json.loads(output)["requests"]]
    times = [int(line) for line in errors.splitlines()]
    clocks = [(sample["started_ns"], sample["started_ns"] + sample["latency_ns"]) for sample in samples]
    assert min(times) < clocks[0][0]  # what is allocated before is seen, and what is given back after
    assert max(times) > clocks[-1][1]
    for begin_ns, end_ns in clocks:
        assert not [time for time in times if begin_ns <= time <= end_ns]
