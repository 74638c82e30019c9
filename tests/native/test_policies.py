"""Every policy that the executable plans, executed by it: the plan's logits are the torch engine's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sti_runtime.embedding_rows import Request
from sti_runtime.pipeline import Executor
from sti_runtime.plan import Plan, Policy
from sti_runtime.torch_engine import TorchEngine
from tests.agents import Agent, agent_called
from tests.native.content import Content
from tests.native.planning_cases import NATIVE_POLICIES
from tests.native.test_standalone import close
from tests.unit.planning_data import make_importance

ROW = 3


@pytest.fixture(scope="module")
def agent() -> Agent:
    return agent_called("x86_64")


@pytest.fixture(scope="module")
def planning(agent: Agent, content: Content) -> tuple[object, ...]:
    """The words of `plan` but for its policy."""
    manifest, folder = content.bundle.manifest, content.folder
    importance = make_importance(manifest.model.layers, manifest.model.heads)
    (folder / "importance.json").write_bytes(
        importance.model_copy(update={"model_digest": manifest.model_digest}).to_json()
    )
    named = ("--bundle", content.bundle.path)
    profile = ("--task", content.task, "--threads", 2, "--out", folder / "profile.json")
    assert agent.call("profile", *named, *profile)[0] == 0
    files = ("--profile", folder / "profile.json", "--importance", folder / "importance.json")
    return ("plan", *named, *files, "--target", "15s", "--preload", "200kB", "--working", "20MB")


@pytest.fixture(scope="module")
def oracle(content: Content) -> Iterator[Executor]:
    engine = TorchEngine(content.bundle, threads=1)
    with Executor(content.bundle, engine, threads=1, queue_depth=2) as executor:
        yield executor
    engine.close()


@pytest.mark.parametrize("policy", NATIVE_POLICIES)
def test_a_policy_s_logits_are_the_torch_engine_s(
    agent: Agent,
    content: Content,
    planning: tuple[object, ...],
    oracle: Executor,
    policy: Policy,
    tmp_path: Path,
) -> None:
    code, report = agent.call(*planning, "--policy", policy)
    assert code == 0, report
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(report))
    plan, data = Plan.read(path), content.data
    assert plan.policy == policy
    row = Request(data.input_ids[ROW], data.token_types[ROW], int(data.lengths[ROW]))
    wanted = np.array(oracle.run(plan, row, "cold", "buffered").logits)
    files = ("--bundle", content.bundle.path, "--task", content.task, "--plan", path)
    for kind in ("cold", "warm"):
        code, report = agent.call("infer", *files, "--row", ROW, "--kind", kind, "--threads", 2)
        assert code == 0, report
        sample = report["requests"][0]["sample"]
        assert close(sample["logits"], wanted)
        assert sample["verdict"]["valid"]
