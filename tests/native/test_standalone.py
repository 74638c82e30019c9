"""The executable alone: bundle, importance profile, T and |S| become plan, logits and score, without Python.

What it makes is then compared with what the host and the torch engine make of the same. It is built with
sanitizers; the conformance suite runs the executables that devices get.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sti_runtime.embedding_rows import Request
from sti_runtime.importance_profile import ImportanceProfile, Score, ShardScore
from sti_runtime.messages import EvaluateResult
from sti_runtime.metrics import mean_cross_entropy
from sti_runtime.model import Submodel
from sti_runtime.pipeline import Executor
from sti_runtime.plan import Plan
from sti_runtime.policies import plan_policy
from sti_runtime.profile import DeviceProfile
from sti_runtime.torch_engine import TorchEngine
from sti_runtime.units import format_ns_up
from tests.agents import Agent
from tests.bundles import hand_plan
from tests.native.content import LABELS, ROWS, TOKENS, Content
from tests.native.core import sanitized_agent

T_NS, S_BYTES, W_BYTES = 15_000_000_000, 200_000, 1_000_000
"""The target is met by a sanitized executable on a slow, loaded machine too."""

TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=["address,undefined", "thread"])
def agent(request: pytest.FixtureRequest) -> Agent:
    return sanitized_agent(request.param)


@pytest.fixture(scope="module")
def importance(content: Content) -> ImportanceProfile:
    model = content.bundle.manifest.model
    shards = [(layer, index) for layer in range(model.layers) for index in range(model.heads)]
    return ImportanceProfile(
        format="stifarm-importance",
        version=1,
        model_digest=content.bundle.manifest.model_digest,
        task="test",
        split_digest="0" * 64,
        method="exhaustive",
        base_fidelity=2,
        rows=10,
        base=Score(loss_nano=10**9, correct=5),
        reliability_ppm=0,
        layers=model.layers,
        slices=model.heads,
        scores=tuple(
            ShardScore(
                layer=layer, slice=index, score=Score(loss_nano=10**9 - 37 * layer * index % 11, correct=5)
            )
            for layer, index in shards
        ),
    )


@pytest.fixture(scope="module")
def files(agent: Agent, content: Content, importance: ImportanceProfile) -> dict[str, Path]:
    """Everything the verbs read; all but the importance profile made by the verbs themselves."""
    folder = content.folder
    paths = {name: folder / f"{name}.json" for name in ("importance", "profile", "plan")}
    paths["importance"].write_bytes(importance.to_json())
    content_of = ("--bundle", content.bundle.path, "--task", content.task, "--threads", 2)
    code, printed = agent.call("profile", *content_of, "--out", paths["profile"])
    assert code == 0, printed
    assert json.loads(paths["profile"].read_bytes()) == printed
    code, plan = agent.call(
        "plan", "--bundle", content.bundle.path, "--profile", paths["profile"], "--importance",
        paths["importance"], "--target", "15s", "--preload", "200kB", "--working", "1MB",
    )  # fmt: skip
    assert code == 0, plan
    paths["plan"].write_text(json.dumps(plan))
    paths["four-bit"] = folder / "four-bit.json"
    paths["four-bit"].write_bytes(four_bit_plan(content).to_json())
    return paths


def four_bit_plan(content: Content) -> Plan:
    model = content.bundle.manifest.model
    whole = Submodel(kept=tuple(range(model.layers)), width=model.heads)
    held = [(0, index) for index in range(model.heads)]
    return hand_plan(content.bundle.manifest, whole, lambda layer, index: 4, preloaded=held, tokens=TOKENS)


def the_profile(files: dict[str, Path]) -> DeviceProfile:
    return DeviceProfile.read(files["profile"])


def the_plan(files: dict[str, Path]) -> Plan:
    return Plan.read(files["plan"])


def host_plan(
    content: Content, importance: ImportanceProfile, files: dict[str, Path], **changes: int
) -> Plan:
    return plan_policy(
        "sti",
        content.bundle.manifest,
        importance,
        the_profile(files),
        target_ns=changes.get("target_ns", T_NS),
        preload_bytes=changes.get("preload_bytes", S_BYTES),
        working_bytes=changes.get("working_bytes", W_BYTES),
    )


def torch_logits(content: Content, plan: Plan) -> np.ndarray[Any, Any]:
    """Logits of every row by the torch engine. Shape [rows, labels]."""
    data = content.data
    engine = TorchEngine(content.bundle, threads=1)
    with Executor(content.bundle, engine, threads=1, queue_depth=2) as executor:
        rows = [
            executor.run(plan, Request(ids, types, int(length)), "cold", "buffered").logits
            for ids, types, length in zip(data.input_ids, data.token_types, data.lengths, strict=True)
        ]
    engine.close()
    return np.array(rows)


def close(found: Any, wanted: np.ndarray[Any, Any]) -> bool:
    return bool(np.abs(np.array(found) - wanted).max() <= TOLERANCE * np.abs(wanted).max())


# ------------------------------------------------------------------ profile, plan, infer, score


def test_the_profile_is_of_this_bundle_and_fit(content: Content, files: dict[str, Path]) -> None:
    profile, manifest = the_profile(files), content.bundle.manifest
    assert (profile.bundle, profile.engine, profile.sequence_length) == (
        content.bundle.digest,
        "native",
        TOKENS,
    )
    assert (profile.threads, profile.queue_depth, profile.emulated) == (2, 8, False)
    assert [row.width for row in profile.compute] == sorted({s.width for s in manifest.submodels})
    assert tuple(row.fidelity for row in profile.decompress) == manifest.fidelities
    # As many samples as a host asks for: 4 rounds of widths × (fidelities and mixed), 16 layers, 30 requests.
    widths, fidelities = len(profile.compute), len(manifest.fidelities)
    assert profile.io.samples == 4 * widths * (fidelities + 1)
    assert {row.samples for row in profile.compute} == {16 * fidelities}
    assert {row.samples for row in profile.decompress} == {16 * widths}
    assert profile.fixed_median.samples == 30
    assert not [reason for reason in profile.unfit if "residual" not in reason], profile.unfit


def test_the_plan_is_the_host_s(
    content: Content, importance: ImportanceProfile, files: dict[str, Path]
) -> None:
    plan = the_plan(files)
    assert plan == host_plan(content, importance, files)
    assert plan.preloaded()


@pytest.mark.parametrize(
    ("name", "kind", "io_mode"),
    [
        ("plan", "cold", "direct"),
        ("four-bit", "cold", "direct"),
        ("four-bit", "warm", "direct"),
        ("four-bit", "warm", "buffered"),
        ("four-bit", "cached", "buffered"),
    ],
)
def test_logits_are_the_torch_engine_s(
    agent: Agent, content: Content, files: dict[str, Path], name: str, kind: str, io_mode: str
) -> None:
    plan = Plan.read(files[name])
    code, report = agent.call(
        "infer", "--bundle", content.bundle.path, "--plan", files[name], "--task", content.task, "--row", 3,
        "--kind", kind, "--io-mode", io_mode, "--repeat", 3, "--threads", 2, "--queue-depth", 4,
    )  # fmt: skip
    assert code == 0, report
    assert report["plan_digest"] == plan.digest
    assert (report["engine"], report["io_mode"], report["request_kind"]) == ("native", io_mode, kind)
    proven = {"cached": "cached"}.get(kind, "direct" if io_mode == "direct" else "buffered-cold")
    assert report["io_mode_proven"] == proven
    assert report["loaded_ns"] < report["opened_ns"] < report["requests"][0]["started_ns"]
    assert len(report["requests"]) == 3
    assert report["memory"]["preload"] == plan.preloaded_bytes
    wanted = torch_logits(content, plan)[3]
    for request in report["requests"]:
        sample = request["sample"]
        assert sample["verdict"] == {"reasons": [], "valid": True}
        assert close(sample["logits"], wanted)
        assert 0 < request["layers_ns"] < sample["latency_ns"]
        assert (name == "plan") or 0 < request["decompress_ns"] < request["layers_ns"]
        streamed = sum(shard.length for shard in plan.shards if kind == "cold" or not shard.preloaded)
        assert sum(row["bytes"] for row in sample["trace"]) == streamed


@pytest.mark.parametrize("engine", ["native", "native-int8"])
def test_a_score_is_of_all_labelled_rows(
    agent: Agent, content: Content, files: dict[str, Path], engine: str
) -> None:
    plan = the_plan(files)
    code, report = agent.call(
        "score", "--bundle", content.bundle.path, "--plan", files["plan"], "--task", content.task,
        "--batch", 5, "--engine", engine,
    )  # fmt: skip
    assert code == 0, report
    found = EvaluateResult.from_json(json.dumps(report).encode(), source="score")
    logits, labels = torch_logits(content, plan), np.array(LABELS)
    known = labels >= 0
    assert found.content_digest == plan.content_digest
    assert (found.rows, len(found.predictions)) == (int(known.sum()), int(known.sum()))
    assert found.correct == int((np.array(found.predictions) == labels[known]).sum())
    if engine == "native":
        assert found.predictions == tuple(logits[known].argmax(axis=1).tolist())
        assert found.loss == pytest.approx(mean_cross_entropy(logits, labels), rel=1e-4)
    else:
        assert found.loss == pytest.approx(mean_cross_entropy(logits, labels), rel=0.05)


# ------------------------------------------------------------------ session


def converse(
    agent: Agent, content: Content, files: dict[str, Path], lines: list[str]
) -> list[dict[str, Any]]:
    """A session's answers, and its summary as the last one."""
    command = [
        *agent.argv, "session", "--bundle", content.bundle.path, "--profile", files["profile"],
        "--importance", files["importance"], "--task", content.task,
    ]  # fmt: skip
    done = subprocess.run(
        [str(word) for word in command],
        input="".join(f"{line}\n" for line in lines).encode(),
        env=os.environ | dict(agent.environment),
        capture_output=True,
        timeout=300,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def asked(row: int, **changes: int | str) -> str:
    fields: dict[str, int | str] = {"preload_bytes": S_BYTES, "target_ns": T_NS, "working_bytes": W_BYTES}
    return json.dumps(fields | {"row": row} | changes)


def test_a_session_replans_exactly_when_a_budget_changes(
    agent: Agent, content: Content, importance: ImportanceProfile, files: dict[str, Path]
) -> None:
    questions: list[tuple[dict[str, int | str], bool]] = [
        ({}, True),
        ({}, False),
        ({"target_ns": "15s", "preload_bytes": "200kB", "working_bytes": "1MB"}, False),
        ({"target_ns": T_NS + 1}, True),
        ({"target_ns": T_NS + 1}, False),
        ({"preload_bytes": 0}, True),
        ({"preload_bytes": 0, "working_bytes": W_BYTES + 4096}, True),
        ({"preload_bytes": 0, "working_bytes": W_BYTES + 4096}, False),
        ({}, True),
    ]
    lines = [asked(row % ROWS, **changes) for row, (changes, _) in enumerate(questions)]
    *answers, summary = converse(agent, content, files, lines)
    assert [answer["replanned"] for answer in answers] == [replanned for _, replanned in questions]
    assert summary == {"failed": 0, "replans": 5, "requests": len(questions)}
    for row, (answer, (changes, _)) in enumerate(zip(answers, questions, strict=True)):
        numbers = {name: value for name, value in changes.items() if isinstance(value, int)}
        plan = host_plan(content, importance, files, **numbers)
        assert answer["plan_digest"] == plan.digest
        assert answer["predicted_ns"] == plan.predicted.latency_ns
        assert (answer["plan_ns"] > 0) == answer["replanned"]
        assert close(answer["sample"]["logits"], torch_logits(content, plan)[row])
        # The preload buffer is filled before the clock starts: only what is streamed is read.
        assert sum(layer["bytes"] for layer in answer["sample"]["trace"]) == plan.streamed_bytes


def test_a_session_goes_on_after_a_question_it_cannot_answer(
    agent: Agent, content: Content, files: dict[str, Path]
) -> None:
    lines = [asked(0), "nonsense", asked(ROWS), asked(1, target_ns=1), asked(2, target_ns="soon"), asked(3)]
    *answers, summary = converse(agent, content, files, lines)
    kinds = [answer["error"]["type"] if "error" in answer else None for answer in answers]
    assert kinds == [None, "FormatError", "InputError", "InfeasiblePlanError", "InputError", None]
    smallest = answers[3]["error"]["smallest_target_ns"]
    assert answers[3]["error"]["remedy"].endswith(f" is {format_ns_up(smallest)}.")
    assert not answers[5]["replanned"]  # what failed has not replaced the plan
    assert summary == {"failed": 4, "replans": 1, "requests": 6}


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["infer"], "infer needs --bundle"),
        (["infer", "--bundle", "x", "--task", "y"], "infer needs --plan"),
        (["score", "--row", "1"], "score has no option --row"),
        (["infer", "--repeat", "0"], "--repeat: '0'"),
        (["infer", "--kind", "spawn-cold"], "'spawn-cold' is not known"),
        (["infer", "--engine", "torch"], "'torch' is not known"),
        (["profile", "--isa", "sse"], "'sse' is not known"),
        (["profile", "--cpus", "1-0"], "no list of CPUs"),
        (["profile", "--cpus", "0,4096"], "below 4096"),
        (["session", "--threads"], "--threads needs a value"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_exit_code_2(
    agent: Agent, arguments: list[str], words: str
) -> None:
    code, report = agent.call(*arguments)
    assert (code, report["error"]["type"]) == (2, "InputError")
    assert words in report["error"]["what"]


def test_a_plan_of_another_bundle_is_refused(
    agent: Agent, content: Content, files: dict[str, Path], tmp_path: Path
) -> None:
    other = the_plan(files).model_copy(update={"bundle": "a" * 64})
    (tmp_path / "plan.json").write_bytes(other.to_json())
    for verb in ("infer", "score"):
        code, report = agent.call(
            verb, "--bundle", content.bundle.path, "--plan", tmp_path / "plan.json", "--task", content.task
        )
        assert (code, report["error"]["type"]) == (1, "FormatError")
        assert "Plan again for this bundle." in report["error"]["remedy"]


def test_an_instruction_set_can_be_forced(agent: Agent, content: Content, files: dict[str, Path]) -> None:
    common = ("infer", "--bundle", content.bundle.path, "--plan", files["plan"], "--task", content.task)
    _, portable = agent.call(*common, "--isa", "portable")
    assert portable["isa"] == "portable"
    code, absent = agent.call(*common, "--isa", "neon")
    assert (code, absent["error"]["type"]) == (2, "InputError")
    _, environment = agent.in_environment(STIFARM_ISA="portable").call(*common)
    assert environment["isa"] == "portable"
    logits = [report["requests"][0]["sample"]["logits"] for report in (portable, environment)]
    assert logits[0] == logits[1]
