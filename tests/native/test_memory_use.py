"""What the executable takes of memory: the address space that it uses."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest

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
