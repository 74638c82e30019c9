"""What every agent must do, once for all of them: job file in, journal out (docs/job-and-journal.md).

Agents: the torch agent, the executable of this machine's architecture, those of the others under qemu.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.identity import device_identity, machine_identity
from agent.spool import Spool
from sti_runtime.device_facts import DeviceFacts
from sti_runtime.journal_format import PROTOCOL_VERSION
from sti_runtime.manifest import MANIFEST_NAME
from sti_runtime.messages import (
    ComputeProfileResult,
    ComputeProfileUnit,
    EvaluateResult,
    EvaluateUnit,
    ExecuteResult,
    FailureRecord,
    FixedProfileResult,
    FixedProfileUnit,
    IoProfileResult,
    IoProfileUnit,
    ProbeResult,
    ProbeUnit,
    StartRecord,
)
from sti_runtime.metrics import mean_cross_entropy
from sti_runtime.records import canonical_json, sha256_hex
from sti_runtime.storage import direct_io_works
from tests.agent_data import make_pack, manifest_of, probes, task_piece
from tests.agents import Agent
from tests.android_root import PIXEL, android_root
from tests.contract.agent_world import (
    ROWS,
    Content,
    a_job,
    execute,
    job_path,
    journal_of,
    result_of,
    run,
    run_units,
)

# ------------------------------------------------------------------ units


def test_every_kind_of_unit(agent: Agent, spool: Spool, content: Content) -> None:
    if not direct_io_works(content.bundle.region_path(2)):
        pytest.skip(f"{content.bundle.path}: no direct IO here, so nothing can be proven to be cold")
    plan = content.plan(preloaded=[(0, 0), (0, 1)])
    rows = tuple(range(ROWS))
    found = run_units(
        agent,
        spool,
        content,
        (
            ProbeUnit(number=0, kind="probe"),
            IoProfileUnit(number=1, kind="profile-io", widths=(1, 3), fidelities=(2, 6), repeats=2, seed=1),
            ComputeProfileUnit(
                number=2, kind="profile-compute", width=2, fidelities=(2, 6), warmups=1, repeats=2
            ),
            FixedProfileUnit(number=3, kind="profile-fixed", warmups=1, rows=rows),
            execute(4, plan, rows=rows, warmups=1),
            execute(5, plan, rows=rows, warmups=1, request_kind="warm"),
            execute(6, plan, rows=rows, request_kind="warm", io_mode="buffered"),
            execute(7, plan, rows=rows, request_kind="cached", io_mode="buffered"),
            EvaluateUnit(number=8, kind="evaluate", plan=plan, batch=4),
        ),
    )
    assert result_of(ProbeResult, found[0]).verified is None

    io = result_of(IoProfileResult, found[1])
    assert io.io_mode == "direct"
    assert [s.versions for s in io.samples].count(3) == len(io.samples) // 2 == (2 + 1) * 2
    assert all(s.valid and s.storage_bytes == s.bytes > 0 and s.duration_ns > 0 for s in io.samples)
    assert {(s.mode_asked, s.mode_proven) for s in io.samples} == {("direct", "direct")}

    compute = result_of(ComputeProfileResult, found[2])
    assert [(s.width, s.fidelity, s.warmup) for s in compute.samples] == [
        (2, bits, repeat == 0) for bits in (2, 6) for repeat in range(5)
    ]
    alone = [s.read_bytes for i, s in enumerate(compute.samples) if i % 5 < 3]
    beside = [s.read_bytes for i, s in enumerate(compute.samples) if i % 5 >= 3]
    assert alone == [0] * 6
    assert any(beside[:2])
    assert any(beside[2:])
    assert all(s.decompress_ns > 0 and s.compute_ns > 0 for s in compute.samples)
    assert compute.io_mode == "direct"
    assert 2 <= len(compute.reads) <= len(compute.samples)  # of either fidelity at least one
    assert {s.versions for s in compute.reads} == {2}
    assert len({s.bytes for s in compute.reads}) == 2
    assert all(s.valid and s.storage_bytes == s.bytes > 0 and s.duration_ns > 0 for s in compute.reads)

    fixed = result_of(FixedProfileResult, found[3])
    assert [s.warmup for s in fixed.samples] == [True] + [False] * (ROWS - 1)
    assert all(s.storage_bytes == s.bytes > 0 and s.embed_io_ns > 0 and s.head_ns > 0 for s in fixed.samples)
    assert {(s.mode_asked, s.mode_proven) for s in fixed.samples} == {("direct", "direct")}

    executed = [result_of(ExecuteResult, item) for item in found[4:8]]
    watched: list[tuple[Any, int]] = [(item, len(item.samples)) for item in (io, compute, fixed)]
    for result, count in watched + [(item, ROWS) for item in executed]:
        places = [reading.after for reading in result.readings]
        assert (places[0], places[-1], places) == (0, count, sorted(places))
    proofs = [(r.request_kind, r.io_mode, r.io_mode_proven) for r in executed]
    assert proofs == [
        ("cold", "direct", "direct"),
        ("warm", "direct", "direct"),
        ("warm", "buffered", "buffered-cold"),
        ("cached", "buffered", "cached"),
    ]
    planned: dict[int, set[int]] = {}
    for number, result in enumerate(executed):
        assert result.plan_digest == plan.digest
        assert [(r.row, r.warmup) for r in result.requests] == [
            (row, row == 0 and number < 2) for row in rows
        ]
        assert (result.memory.preload, result.memory.resident > 0) == (plan.preloaded_bytes, True)
        assert result.memory.working > 0
        assert result.memory.activations > 0
        assert (result.memory.process_peak_bytes is not None) == agent.native
        for sample in result.requests:
            assert sample.verdict.valid, sample.verdict
            assert (sample.mode_asked, sample.mode_proven) == (result.io_mode, result.io_mode_proven)
            assert len(sample.trace) == plan.submodel.depth
            assert 0 <= sample.stall_ns < sample.latency_ns
            assert (sample.storage_bytes == 0) == (result.request_kind == "cached")
            planned.setdefault(number, set()).add(sample.planned_bytes)
            ends = [row.compute_end_ns for row in sample.trace]
            assert ends == sorted(ends)
            assert ends[-1] <= sample.latency_ns
            for row in sample.trace:
                assert row.compute_start_ns <= row.compute_end_ns
                assert row.io_start_ns <= row.io_end_ns <= row.compute_start_ns
        logits = [sample.logits for sample in result.requests]
        assert np.allclose(logits, [sample.logits for sample in executed[0].requests], rtol=1e-5, atol=1e-7)
    assert min(planned[0]) - min(planned[1]) == plan.preloaded_bytes

    scored = result_of(EvaluateResult, found[8])
    labelled = np.array([sample.logits for sample in executed[0].requests])[: ROWS - 1]
    labels = np.array(content.labels[: ROWS - 1])
    assert scored.content_digest == plan.content_digest
    assert scored.predictions == tuple(labelled.argmax(axis=1).tolist())
    assert (scored.rows, scored.correct) == (ROWS - 1, int((labelled.argmax(axis=1) == labels).sum()))
    assert scored.loss == pytest.approx(mean_cross_entropy(labelled, labels), rel=1e-4)


def test_a_request_in_a_process_of_its_own(agent: Agent, spool: Spool, content: Content) -> None:
    plan = content.plan(preloaded=[(0, 0)])
    small = content.plan(working_bytes=100)
    warm, spawned, failed, last = run_units(
        agent,
        spool,
        content,
        (
            execute(0, plan, rows=(3,), request_kind="warm"),
            execute(1, plan, rows=(3, 3), warmups=1, request_kind="spawn-cold"),
            execute(2, small, request_kind="spawn-cold"),
            ProbeUnit(number=3, kind="probe"),
        ),
    )
    alone = result_of(ExecuteResult, spawned).requests
    kept = result_of(ExecuteResult, warm).requests[0]
    assert [sample.warmup for sample in alone] == [True, False]
    for sample in alone:
        assert sample.mode_asked == "direct"
        assert sample.mode_proven == (
            "direct" if result_of(ExecuteResult, spawned).io_mode == "direct" else "buffered-cold"
        )
        assert sample.logits == pytest.approx(kept.logits, rel=1e-5)
        assert sample.planned_bytes == kept.planned_bytes + plan.preloaded_bytes
        # Times count from before the process was there.
        assert 0 < sample.trace[0].compute_start_ns < sample.trace[-1].compute_end_ns <= sample.latency_ns
    assert result_of(FailureRecord, failed).error == "SpawnedRequestError"
    assert "working buffer of at least" in failed.remedy
    assert isinstance(last, ProbeResult)


# ------------------------------------------------------------------ verbs


def test_facts_and_version(agent: Agent, tmp_path: Path) -> None:
    code, version = agent.call("version")
    assert (code, set(version)) == (0, {"agent", "agent_digest", "protocol"})
    assert version["protocol"] == PROTOCOL_VERSION
    spool = Spool.open(tmp_path / "spool")
    code, report = agent.call("facts", "--spool", spool.root)
    assert code == 0
    facts = DeviceFacts.from_json(canonical_json(report), source="facts")
    assert facts.identity == device_identity(spool)[0]
    assert facts.engines == (("native", "native-int8") if agent.native else ("torch",))
    assert (facts.agent, facts.agent_digest) == (version["agent"], version["agent_digest"])
    assert (facts.python is None) == agent.native
    assert not facts.emulated_spool
    if agent.native:
        assert facts.agent_digest == sha256_hex(Path(agent.argv[-1]).read_bytes())
    if not agent.emulated:
        assert facts.architecture == platform.machine()
        assert facts.cpus == tuple(sorted(os.sched_getaffinity(0))) or len(facts.cpus) == os.cpu_count()
    marked = DeviceFacts.from_json(
        canonical_json(agent.call("facts", "--emulated", "--spool", spool.root)[1]), source="facts"
    )
    assert marked.emulated_spool
    assert marked.identity == device_identity(spool)[0]
    assert marked.identity.startswith(facts.identity + "/")
    job = a_job(agent, spool, units=probes(1))
    assert job.device == marked.identity
    assert run(agent, spool, job)[0] == 0
    assert result_of(StartRecord, journal_of(spool, job)[0].payload).emulated


def test_a_phone_s_facts_come_from_its_own_programs(agent: Agent, tmp_path: Path) -> None:
    spool = Spool.open(tmp_path / "spool")
    root = android_root(tmp_path / "phone")
    phone = agent.in_environment(STIFARM_ANDROID=str(root), STIFARM_SYSFS=str(tmp_path / "sys"))
    code, report = phone.call("facts", "--spool", spool.root)
    assert code == 0
    facts = DeviceFacts.from_json(canonical_json(report), source="facts")
    identity, source = machine_identity(android=root)
    assert (facts.identity, facts.identity_source, source) == (identity, source, "android-serial")
    assert (facts.os_build, facts.battery) == (PIXEL, True)
    assert {zone.name: zone.temperature_milli_c for zone in facts.thermal_zones}["BIG"] == 38_000


def test_a_bundle_and_rows_arrive_and_are_verified(agent: Agent, content: Content, tmp_path: Path) -> None:
    spool = Spool.open(tmp_path / "spool")
    bundle = content.bundle.path
    digest = content.bundle.digest
    chunks = manifest_of(bundle).all_chunks()

    def call(*words: object, **options: Any) -> dict[str, Any]:
        code, report = agent.call(*words, "--spool", spool.root, "--lease", "store-a:1", **options)
        assert code == 0, report
        return report

    announced = call("missing", bundle / MANIFEST_NAME)
    assert (announced["digest"], announced["total"], announced["complete"]) == (digest, len(chunks), False)
    damaged = make_pack(spool, bundle, announced["missing"])
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    accepted = call("accept", digest, stdin=damaged)
    assert accepted["rejected"] == [announced["missing"][-1]]
    code, report = agent.call("commit", digest, "--spool", spool.root)
    assert code == 1, report
    rest = call("missing", bundle / MANIFEST_NAME)["missing"]
    assert rest == accepted["rejected"]
    assert call("accept", digest, stdin=make_pack(spool, bundle, rest))["remaining"] == 0
    assert call("commit", digest)["state"] == "committed"
    assert call("commit", digest)["state"] == "already"
    assert call("missing", bundle / MANIFEST_NAME)["complete"]
    for path in bundle.iterdir():
        assert (spool.bundle(digest) / path.name).read_bytes() == path.read_bytes()
    assert agent.call("verify", digest, "--spool", spool.root)[1]["state"] == "intact"
    region = spool.bundle(digest) / content.bundle.region_path(2).name
    region.chmod(0o644)
    with region.open("r+b") as stream:
        stream.write(b"\xff" * 16)
    code, verdict = agent.call("verify", digest, "--spool", spool.root)
    assert (code, verdict["state"], len(verdict["damaged"])) == (0, "damaged", 1)
    assert not spool.bundle(digest).exists()

    rows = content.folder / "tasks" / f"{content.task_digest}.safetensors"
    whole, task = rows.read_bytes(), content.task_digest
    damaged = task_piece(spool, 0, whole[:-1] + bytes([whole[-1] ^ 1]), len(whole))
    assert agent.call("accept-task", task, "--spool", spool.root, stdin=damaged)[0] == 1
    half = task_piece(spool, 0, whole[:500], len(whole))
    assert call("accept-task", task, stdin=half) == {"bytes": 500, "digest": task, "state": "incoming"}
    held = agent.call("has", task, "--spool", spool.root)[1]
    assert (held["partial"], held["tasks"]) == ({task: 500}, [])
    rest = task_piece(spool, 500, whole[500:], len(whole))
    assert call("accept-task", task, stdin=rest)["state"] == "accepted"
    assert call("accept-task", task, stdin=rest)["state"] == "already"
    assert spool.task(task).read_bytes() == whole
    removed = call("collect", "--keep", digest)["removed"]
    assert removed["tasks"] == [content.task_digest]


def test_a_device_is_left_clean(agent: Agent, spool: Spool) -> None:
    (spool.root / "somebody-elses").write_text("stays")
    job = a_job(agent, spool, units=probes(1))
    run(agent, spool, job)
    assert agent.call("forget", job.id, 1, "--spool", spool.root, "--lease", "store-a:1")[1] == {
        "removed": True
    }
    assert not job_path(spool, job).parent.exists()
    agent.call("clean", "--spool", spool.root, "--lease", "store-a:1")
    assert [path.name for path in spool.root.iterdir()] == ["somebody-elses"]


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("dance",),
        ("run",),
        ("status", "UPPER", "1"),
        ("status", "../../etc", "1"),
        ("commit", "../../etc"),
        ("status", "job", "0"),
        ("has", "xyz"),
        ("collect", "--lease", "store"),
        ("version", "more"),
    ],
)
def test_a_wrong_request_changes_nothing(agent: Agent, tmp_path: Path, words: tuple[str, ...]) -> None:
    spool = () if words[:1] == ("version",) else ("--spool", tmp_path / "spool")
    code, report = agent.call(*words, *spool)
    assert (code, set(report), set(report["error"])) == (2, {"error"}, {"type", "what", "remedy"})
    assert report["error"]["type"] == "InputError"
    assert report["error"]["what"]


def test_a_spool_that_cannot_be(agent: Agent, tmp_path: Path) -> None:
    for words in (("facts",), ("clean", "--spool", "/proc/nowhere")):
        code, report = agent.call(*words)
        assert (code, report["error"]["type"]) == (2, "InputError")
    code, report = agent.call("missing", tmp_path / "nothing", "--spool", tmp_path / "spool")
    assert (code, report["error"]["type"] != "internal") == (1, True)
