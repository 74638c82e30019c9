"""The executable's plans are the host's, digest for digest, over random devices and bundles; the verb."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from sti_runtime.errors import InputError
from sti_runtime.manifest import Manifest
from sti_runtime.plan import Plan
from sti_runtime.profile import DeviceProfile
from sti_runtime.records import canonical_json
from tests.agents import agent_called
from tests.bundles import make_bundle, small_config
from tests.native.planning_cases import (
    LARGEST,
    NATIVE_POLICIES,
    POLICY_NAMES,
    PlanCase,
    World,
    agent_with_sanitizers,
    ask,
    error_line,
    plan_case,
    world,
)
from tests.unit.planning_data import PAGE, make_importance, make_manifest, make_profile, proportional
from tests.unit.test_planner import UNBOUNDED, example, grid

CASES = 10_000
SOME_CASES = 400
QUESTIONS = 40
"""Per bundle, and so per process."""


@dataclass
class Tally:
    """What the compared answers were."""

    plans: list[dict[str, Any]]
    errors: list[dict[str, Any]]


def compare(agent: Sequence[str], count: int, seed: int, folder: Path) -> Tally:
    """Plan ``count`` random questions on both sides; all answers agree.

    Where a T is infeasible the next questions are the smallest that works, which must, and one ns less.
    """
    rng = random.Random(seed)
    tally = Tally([], [])
    while count > 0:
        where = world(rng, folder)
        cases: list[PlanCase] = []
        lines: list[bytes] = []
        while len(cases) < min(QUESTIONS, count):
            cases.append(plan_case(rng, where))
            line, smallest_ns = cases[-1].expected(where)
            lines.append(line)
            for target_ns in (smallest_ns, smallest_ns - 1) if smallest_ns else ():
                cases.append(replace(cases[-1], target_ns=target_ns))
                lines.append(cases[-1].expected(where)[0])
        answers = ask(where.command(agent), (case.document() for case in cases))
        assert len(answers) == len(lines)
        for case, line, answer in zip(cases, lines, answers, strict=True):
            assert answer == line, (where.manifest.to_json(), case)
            document = json.loads(answer)
            (tally.errors if "error" in document else tally.plans).append(document)
        count -= len(cases)
    return tally


@pytest.mark.slow
def test_ten_thousand_random_plans_are_the_hosts(tmp_path: Path) -> None:
    tally = compare(agent_called("x86_64").argv, CASES, 20, tmp_path)
    total = len(tally.plans) + len(tally.errors)
    assert total >= CASES
    assert len(tally.plans) > 0.45 * total
    types = Counter(row["error"]["type"] for row in tally.errors)
    assert types["InfeasiblePlanError"] > 0.05 * total
    assert types["ResourceError"] > 0.02 * total
    said = Counter(row["error"]["what"][:30] for row in tally.errors)
    assert len([what for what in said if said[what] >= 5]) >= 12, said

    paper = [plan for plan in tally.plans if plan["planner"] == "paper"]
    assert {plan["policy"] for plan in tally.plans} == set(NATIVE_POLICIES)
    assert {flag.split("-")[0] for plan in tally.plans for flag in plan["flags"]} == {
        "borrowed", "seed", "unfit", "untrained",
    }  # fmt: skip
    streamed = [sum(s["length"] for s in p["shards"] if not s["preloaded"]) for p in paper]
    tight = [bytes_ > plan["working_bytes"] for plan, bytes_ in zip(paper, streamed, strict=True)]
    assert sum(tight) > 0.05 * total  # valid by simulation alone
    assert sum(not plan["slack"] for plan in paper) > 0.04 * total
    mixed = [len({s["fidelity"] for s in p["shards"] if not s["preloaded"]}) > 1 for p in paper]
    assert sum(mixed) > 0.05 * total  # pass 2 raised some
    held = [[s["preloaded"] for s in plan["shards"]] for plan in paper]
    assert sum(any(row) and not all(row) for row in held) > 0.08 * total
    bottom = [row[: plan["submodel"]["width"]] for plan, row in zip(paper, held, strict=True)]
    assert sum(any(row) and not all(row) for row in bottom) > 0.015 * total  # part of layer 0 alone


@pytest.mark.parametrize("architecture", ["aarch64", "armv7"])
def test_plans_are_the_same_on_every_architecture(architecture: str, tmp_path: Path) -> None:
    tally = compare(agent_called(architecture).argv, SOME_CASES, 21, tmp_path)
    assert len(tally.plans) > 0.4 * SOME_CASES


def test_random_plans_with_sanitizers(tmp_path: Path) -> None:
    compare(agent_with_sanitizers(), SOME_CASES, 22, tmp_path)


# ------------------------------------------------------------------ at the size of BERT-base


def test_a_whole_bert_is_planned_as_on_the_host(tmp_path: Path) -> None:
    """12 × 12 shards, six fidelities, all 144 submodels."""
    rng = random.Random(3)

    def length(layer: int, slice_: int, fidelity: int) -> int:
        payload = 589_824 * fidelity // 8 + (layer * 37 + slice_ * 11) % 900 * 8
        return -(-payload // PAGE) * PAGE

    manifest = make_manifest(12, 12, length)
    where = World(manifest, make_importance(12, 12, rng.sample(range(144), 144)), tmp_path)
    profile = make_profile(
        bundle=manifest.digest,
        layer_ns={m: 500_000 + 300_000 * m for m in range(1, 13)},
        decompress_ns={2: 30_000, 3: 35_000, 4: 40_000, 5: 45_000, 6: 50_000, 32: 60_000},
        alpha_ns=5_000,
        ps_per_byte=10_000,
        p95_ppm=1_150_000,
        embed_io_ns=2_000_000,
        embed_compute_ns=100_000,
        head_ns=100_000,
        median_percent=80,
    )
    cases = [
        PlanCase(profile, target_ms * 10**6, preload, working, "sti", slack, 0)
        for target_ms in (3, 150, 400, 1000)
        for preload in (0, 2_000_000)
        for working in (1 << 30, 2_500_000)
        for slack in (True, False)
    ]
    answers = ask(where.command(agent_called("x86_64").argv), (case.document() for case in cases))
    assert answers == [case.expected(where)[0] for case in cases]
    assert sum(not answer.startswith(b'{"error"') for answer in answers) >= 12


@pytest.mark.parametrize(("pages", "merged"), [(128, True), (129, False)])
def test_neighbours_are_one_read_up_to_a_mebibyte(tmp_path: Path, pages: int, merged: bool) -> None:
    """W holds a layer and a half: two reads of layer 1 start with room for the first, one waits for both."""
    manifest = make_manifest(
        2,
        2,
        lambda layer, slice_, k: (pages if slice_ else 128) * PAGE,
        fidelities=(2,),
        submodels=grid((2, 2), layers=2),
    )
    profile = make_profile(
        bundle=manifest.digest, layer_ns={2: 10**9}, decompress_ns={2: 0}, ps_per_byte=1000
    )
    where = World(manifest, make_importance(2, 2), tmp_path)
    case = PlanCase(profile, 10**10, 0, 3 * 129 * PAGE, "sti", True, 0)
    (answer,) = ask(where.command(agent_called("x86_64").argv), [case.document()])
    assert answer == case.expected(where)[0]
    first, second = json.loads(answer)["predicted"]["layers"]
    assert second["io_start_ns"] == first["compute_end_ns" if merged else "io_end_ns"]


# ------------------------------------------------------------------ figures at the ends of their ranges


def extreme(tmp_path: Path, **figures: Any) -> bytes:
    """The answer to a question with these figures in its profile; the host's is the same."""
    manifest = make_manifest(1, 1, proportional(PAGE))
    profile = make_profile(
        bundle=manifest.digest,
        layer_ns={1: figures.pop("layer_ns", 10)},
        decompress_ns=dict.fromkeys((2, 3, 4, 5, 6, 32), 0),
        **figures,
    )
    where = World(manifest, make_importance(1, 1), tmp_path)
    case = PlanCase(profile, LARGEST, 0, UNBOUNDED, "sti", True, 0)
    (answer,) = ask(where.command(agent_called("x86_64").argv), [case.document()])
    assert answer == case.expected(where)[0]
    return answer


def test_figures_just_below_2_63_are_planned_with_and_just_above_refused(tmp_path: Path) -> None:
    refused = error_line(
        InputError(
            "By the device profile, reading and computing all of the bundle takes 2^63 ns or more.",
            "Profile the device again.",
        )
    )
    room = LARGEST - 12  # six versions are counted as 1 ns each, alone and beside compute
    plan = json.loads(extreme(tmp_path, layer_ns=room))
    assert plan["predicted"]["latency_ns"] == room
    assert extreme(tmp_path, layer_ns=room + 1) == refused
    assert extreme(tmp_path, layer_ns=LARGEST, embed_io_ns=LARGEST, head_ns=LARGEST) == refused
    assert extreme(tmp_path, alpha_ns=LARGEST, ps_per_byte=LARGEST, p95_ppm=LARGEST) == refused
    # A product of 2^83 that comes down again: 32 pages of 2^62/10^6 ps each, at 10^6 times.
    plan = json.loads(extreme(tmp_path, ps_per_byte=2**62 // 10**6, p95_ppm=1_000_000))
    assert plan["shards"][0]["fidelity"] == 32
    plan = json.loads(extreme(tmp_path, alpha_ns=1, p95_ppm=2**60))
    assert plan["predicted"]["layers"][0]["io_end_ns"] == -(-(2**60) // 10**6)


# ------------------------------------------------------------------ the verb, by docs/planner.md's examples


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    """The worked example's bundle, profile and importance."""
    manifest, profile = example()
    return write(tmp_path, manifest, profile)


def write(folder: Path, manifest: Manifest, profile: DeviceProfile) -> dict[str, Path]:
    importance = make_importance(manifest.model.layers, manifest.model.heads)
    records = {"bundle": manifest, "profile": profile, "importance": importance}
    for name, record in records.items():
        (folder / f"{name}.json").write_bytes(record.to_json())
    return {name: folder / f"{name}.json" for name in records}


def plan(files: dict[str, Path], *options: str, without: Sequence[str] = ()) -> tuple[int, Any]:
    named = [word for name, path in files.items() if name not in without for word in (f"--{name}", str(path))]
    return agent_called("x86_64").call("plan", *named, *options)


def fidelities(answer: Any) -> tuple[tuple[int, ...], ...]:
    made = Plan.from_json(canonical_json(answer), source="test")
    row, width = [shard.fidelity for shard in made.shards], made.submodel.width
    return tuple(tuple(row[i : i + width]) for i in range(0, len(row), width))


def test_worked_example(files: dict[str, Path]) -> None:
    held = str(6 * PAGE)
    code, answer = plan(files, "--target", "2s", "--preload", held, "--working", str(UNBOUNDED))
    assert code == 0
    assert fidelities(answer) == ((2, 2, 2), (4, 3, 3))
    assert [shard["preloaded"] for shard in answer["shards"]] == [True] * 3 + [False] * 3
    assert (answer["predicted"]["latency_ns"], answer["predicted"]["stall_ns"]) == (2 * 10**9, 0)


def test_worked_example_with_slack(files: dict[str, Path]) -> None:
    wide = ("--preload", "0", "--working", "1000GB")
    for target in ("2.6s", "2600ms", "2600000000"):
        code, answer = plan(files, "--target", target, *wide)
        assert (code, fidelities(answer)) == (0, ((2, 2, 2), (6, 2, 2)))
        assert answer["target_ns"] == 2_600_000_000
    code, answer = plan(files, "--target", "2599.999999ms", *wide)
    assert (code, answer["error"]["type"]) == (1, "InfeasiblePlanError")
    assert answer["error"]["remedy"] == "The smallest target latency that works is 2.6 s."
    code, answer = plan(files, "--target", "100s", *wide, "--no-slack")
    assert (code, answer["error"]["type"]) == (1, "ResourceError")
    assert answer["error"]["what"].startswith("Without slack no target latency works")


def test_the_buffers_the_host_takes_when_none_are_named(files: dict[str, Path]) -> None:
    code, answer = plan(files, "--target", "3s")
    assert (code, answer["preload_bytes"], answer["working_bytes"]) == (0, 1_000_000, 4_000_000)
    assert (answer["policy"], answer["slack"]) == ("sti", True)


def test_policies_and_seeds(files: dict[str, Path]) -> None:
    code, answer = plan(files, "--target", "9s", "--policy", "random", "--seed", "7")
    assert (code, answer["flags"]) == (0, ["seed-7"])
    code, answer = plan(files, "--target", "9s", "--policy", "std-pipeline-2", without=("importance",))
    assert (code, answer["planner"], answer["importance"]) == (0, "baseline", None)
    for policy in ("exact", "exact-io"):
        code, answer = plan(files, "--target", "9s", "--policy", policy)
        assert (code, answer["error"]["type"]) == (2, "InputError")
        assert answer["error"]["what"] == f"Policy {policy} is planned by a solver on the host."
    code, answer = plan(files, "--target", "9s", without=("importance",))
    assert (code, answer["error"]["what"]) == (2, "Policy sti needs an importance profile.")
    code, answer = plan(files, "--target", "9s", "--policy", "magic")
    assert (code, answer["error"]["what"]) == (2, "Unknown policy 'magic'.")
    assert answer["error"]["remedy"] == f"There is: {', '.join(POLICY_NAMES)}."


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "plan: no target latency was given."),
        (("--target",), "plan: --target needs a value."),
        (("--target", "fast"), "--target: 'fast' is not a duration."),
        (("--target", "1.s"), "--target: '1.s' is not a duration."),
        (("--target", "1h"), "--target: '1h' is not a duration."),
        (("--target", "9999999999999s"), "--target: '9999999999999s' is larger than anything here can be."),
        (("--target", "0"), "A target latency of 0 cannot be planned for."),
        (("--target", "1s", "--preload", "-1"), "--preload: '-1' is not a size."),
        (("--target", "1s", "--preload", "1 parsec"), "--preload: '1 parsec' is not a size."),
        (("--target", "1s", "--working", "0 MB"), "A working buffer of 0 cannot be planned for."),
        (("--target", "1s", "--seed", "1k"), "--seed: '1k' is not a seed."),
        (("--speed", "1s"), "plan has no option --speed."),
    ],
)
def test_usage(files: dict[str, Path], options: tuple[str, ...], words: str) -> None:
    code, answer = plan(files, *options)
    assert (code, answer["error"]["type"], answer["error"]["what"]) == (2, "InputError", words)


def test_what_must_be_named(files: dict[str, Path]) -> None:
    code, answer = plan(files, "--target", "1s", without=("bundle",))
    assert (code, answer["error"]["what"]) == (2, "plan: no bundle is named.")
    code, answer = plan(files, "--target", "1s", without=("profile",))
    assert (code, answer["error"]["what"]) == (2, "plan: no device profile is named.")
    files["bundle"] = files["bundle"].with_name("absent.json")
    code, answer = plan(files, "--target", "1s")
    assert (code, answer["error"]["type"]) == (1, "FormatError")
    assert "absent.json" in answer["error"]["what"]


def test_sizes_are_read_as_on_the_host(files: dict[str, Path]) -> None:
    for text, bytes_ in (
        ("1.5kB", 1500),
        (" 2 KiB ", 2048),
        ("0.0001gb", 100_000),
        ("7b", 7),
        ("1MiB", 1 << 20),
    ):
        code, answer = plan(files, "--target", "9s", "--preload", text)
        assert (code, answer["preload_bytes"]) == (0, bytes_)
    for text, ns in (("2.6000000019 s", 2_600_000_001), ("0.05m", 3 * 10**9), ("3000000us", 3 * 10**9)):
        code, answer = plan(files, "--target", text, "--preload", "0", "--working", "1GB")
        assert (code, answer["target_ns"]) == (0, ns)


def test_a_bundles_folder(tmp_path: Path) -> None:
    """The folder and its manifest give the same plan; one of another name, or cut short, is refused."""
    bundle, _ = make_bundle(small_config(), tmp_path)
    manifest = bundle.manifest
    folder = tmp_path / manifest.digest
    profile = make_profile(
        bundle=manifest.digest,
        layer_ns={submodel.width: 1000 for submodel in manifest.submodels},
        decompress_ns=dict.fromkeys(manifest.fidelities, 10),
        ps_per_byte=10,
    )
    importance = make_importance(manifest.model.layers, manifest.model.heads)
    importance = importance.model_copy(update={"model_digest": manifest.model_digest})
    files = write(tmp_path, manifest, profile)
    files["importance"].write_bytes(importance.to_json())
    expected = plan(files, "--target", "1ms")
    assert expected[0] == 0
    assert plan(files | {"bundle": folder}, "--target", "1ms") == expected
    assert plan(files | {"bundle": Path(f"{folder}/")}, "--target", "1ms") == expected
    other = folder.rename(tmp_path / ("0" * 64))
    code, answer = plan(files | {"bundle": other}, "--target", "1ms")
    assert (code, answer["error"]["type"]) == (1, "DigestError")
    region = other.rename(folder) / manifest.regions[0].file
    region.write_bytes(region.read_bytes()[:-1])
    code, answer = plan(files | {"bundle": folder}, "--target", "1ms")
    assert (code, answer["error"]["type"]) == (1, "FormatError")
    assert manifest.regions[0].file in answer["error"]["what"]


def test_a_submodel_of_kept_layers(tmp_path: Path) -> None:
    """Versions and importance are looked up by the bundle's layers, here 0 and 2 of 4."""
    manifest = make_manifest(4, 2, proportional(PAGE), submodels=grid((2, 2), layers=4))
    profile = make_profile(
        bundle=manifest.digest,
        layer_ns={2: 10_000},
        decompress_ns=dict.fromkeys((2, 3, 4, 5, 6, 32), 0),
        ps_per_byte=1000,
    )
    target = str(20_000 + 9 * PAGE)
    code, answer = plan(write(tmp_path, manifest, profile), "--target", target, "--preload", "0")
    assert code == 0
    assert [shard["source_layer"] for shard in answer["shards"]] == [0, 0, 2, 2]
