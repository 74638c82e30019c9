"""Logits of every agent are the torch engine's, with every set of kernels."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from agent.spool import Spool
from sti_runtime.messages import (
    ExecuteResult,
    ResultRecord,
)
from sti_runtime.model import Submodel
from sti_runtime.pipeline import Executor
from sti_runtime.plan import Plan
from sti_runtime.plan_build import Fidelity
from sti_runtime.shard import F32
from sti_runtime.torch_engine import TorchEngine
from tests.agents import Agent, agent_called
from tests.bundles import hand_plan
from tests.contract.agent_world import (
    FAMILIES,
    ROWS,
    TOKENS,
    TOLERANCE,
    Content,
    a_job,
    execute,
    journal_of,
    journal_path,
    result_of,
    run,
    spool_with,
)

# ------------------------------------------------------------------ logits


@dataclass(frozen=True)
class Expected:
    """Plans of a family and the torch engine's logits of one row."""

    plans: tuple[Plan, ...]
    logits: tuple[tuple[float, ...], ...]


@pytest.fixture(scope="session")
def oracle(contents: Callable[[str], Content]) -> Callable[[str], Expected]:
    """Every trained submodel at every fidelity, and plans that mix fidelities."""

    @cache
    def expected(family: str) -> Expected:
        content = contents(family)
        manifest = content.bundle.manifest
        plans = [
            content.plan(bits, submodel) for submodel in manifest.submodels for bits in get_args(Fidelity)
        ]
        whole = Submodel(kept=tuple(range(manifest.model.layers)), width=manifest.model.heads)
        plans += [
            hand_plan(manifest, whole, mixed(seed), tokens=TOKENS, preloaded=[(0, 0), (0, 1)][:seed])
            for seed in range(3)
        ]
        engine = TorchEngine(content.bundle, threads=1)
        with Executor(content.bundle, engine, threads=1, queue_depth=2) as executor:
            logits = tuple(
                executor.run(plan, content.rows[row_of(number)], "cold", "buffered").logits
                for number, plan in enumerate(plans)
            )
        engine.close()
        return Expected(tuple(plans), logits)

    return expected


def mixed(seed: int) -> Callable[[int, int], Fidelity]:
    """Fidelities at random, the same for one seed."""
    choices = random.Random(seed)
    drawn = {(layer, index): choices.choice(get_args(Fidelity)) for layer in range(8) for index in range(8)}
    return lambda layer, index: drawn[layer, index]


def row_of(number: int) -> int:
    return number % ROWS


def deviation(values: F32, wanted: F32) -> float:
    return float(np.abs(values - wanted).max() / np.abs(wanted).max())


def deviations(agent: Agent, content: Content, expected: Expected, folder: Path, engine: str) -> list[float]:
    """Of each plan's logits from the torch engine's, relative."""
    spool = spool_with(content, folder)
    units = tuple(execute(number, plan, rows=(row_of(number),)) for number, plan in enumerate(expected.plans))
    job = a_job(agent, spool, content, units=units, engine=engine)
    assert run(agent, spool, job)[1] == {"state": "ended", "done": len(units), "failed": 0}
    found = [record.payload for record in journal_of(spool, job)[1:-1]]
    logits = [
        np.array(result_of(ExecuteResult, result_of(ResultRecord, item).result).requests[0].logits)
        for item in found
    ]
    return [deviation(a, np.array(b)) for a, b in zip(logits, expected.logits, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_the_torch_engines(
    agent: Agent,
    family: str,
    contents: Callable[[str], Content],
    oracle: Callable[[str], Expected],
    tmp_path: Path,
) -> None:
    found = deviations(agent, contents(family), oracle(family), tmp_path / "spool", agent.engine)
    assert max(found) <= TOLERANCE


def cpu_flags() -> set[str]:
    """Features of this machine's first CPU."""
    text = Path("/proc/cpuinfo").read_text()
    lines = [line for line in text.splitlines() if line.split(":")[0].strip() in ("flags", "Features")]
    return set(lines[0].split(":")[1].split()) if lines else set()


@dataclass(frozen=True)
class Kernels:
    """One set of kernels: how to have it, and the features that it takes of this machine's CPU."""

    agent: str
    isa: str
    variables: dict[str, str]
    needs: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "-".join((self.agent, *self.variables.values()))


PATHS = (
    Kernels("x86_64", "portable", {"STIFARM_ISA": "portable"}),
    Kernels("x86_64", "avx2", {"STIFARM_ISA": "avx2"}, ("avx2", "fma", "f16c")),
    Kernels(
        "x86_64",
        "avx512",
        {"STIFARM_ISA": "avx512"},
        ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512vbmi"),
    ),
    # qemu's CPUs with and without dot product, with and without fused multiply-add
    Kernels("aarch64", "neon", {"QEMU_CPU": "cortex-a53"}),
    Kernels("aarch64", "neon-dotprod", {"QEMU_CPU": "cortex-a76"}),
    Kernels("aarch64", "portable", {"STIFARM_ISA": "portable"}),
    Kernels("armv7", "neon", {"QEMU_CPU": "cortex-a7"}),
    Kernels("armv7", "portable", {"QEMU_CPU": "cortex-a9"}),
    Kernels("armv7", "portable", {"STIFARM_ISA": "portable"}),
)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("engine", ["native", "native-int8"])
def test_every_set_of_kernels_gives_the_same_logits(
    path: Kernels,
    engine: str,
    contents: Callable[[str], Content],
    oracle: Callable[[str], Expected],
    tmp_path: Path,
) -> None:
    agent = agent_called(path.agent).in_environment(**path.variables)
    if "QEMU_CPU" in path.variables and not agent.emulated:
        pytest.skip("a CPU can be chosen under an emulator only")
    missing = set(path.needs) - (set() if agent.emulated else cpu_flags())
    if missing:
        pytest.skip(f"this CPU has no {', '.join(sorted(missing))}")
    assert agent.call("version")[1]["agent"].endswith(f" {path.isa}")
    found = deviations(agent, contents("roberta"), oracle("roberta"), tmp_path / "spool", engine)
    assert max(found) <= (TOLERANCE if engine == "native" else INT8_TOLERANCE)


def test_an_instruction_set_that_the_cpu_lacks_is_refused(spool: Spool, content: Content) -> None:
    agent = agent_called("x86_64").in_environment(STIFARM_ISA="neon")
    job = a_job(agent, spool, content, units=(execute(0, content.plan()),))
    code, report = run(agent, spool, job)
    assert (code, report["error"]["type"]) == (2, "InputError")
    assert "neon" in report["error"]["what"]
    assert not journal_path(spool, job).exists()


INT8_TOLERANCE = 0.05
"""Activations rounded to 255 steps per token, through two layers."""
