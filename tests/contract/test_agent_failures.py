"""What an agent must refuse, and units that fail: said in the journal, and the next unit runs."""

from __future__ import annotations

import json
import os
import re
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.sensors import read_sensors
from agent.spool import Spool
from sti_runtime.manifest import MANIFEST_NAME
from sti_runtime.messages import (
    ComputeProfileUnit,
    EvaluateUnit,
    ExecuteResult,
    FailureRecord,
    FixedProfileUnit,
    IoProfileUnit,
    Job,
    Lease,
    ProbeUnit,
    ResultRecord,
    Unit,
)
from sti_runtime.model import Submodel
from sti_runtime.records import canonical_json, sha256_hex
from sti_runtime.task_data import TaskData, TaskDataInfo, save_task_data
from tests.agent_data import OPEN_GATES, probes
from tests.agents import Agent
from tests.bundles import hand_plan, make_bundle
from tests.contract.agent_world import (
    LABELS,
    ROWS,
    TOKENS,
    Content,
    a_job,
    config,
    execute,
    job_path,
    journal_of,
    journal_path,
    lines_in,
    numbered,
    refusal,
    result_of,
    run,
    run_units,
    wait_for,
)
from tests.machine import Machine

# ------------------------------------------------------------------ jobs that must not run


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"device": "0123456789abcdef"}, "is for device 0123456789abcdef"),
        ({"cpus": (4095,)}, "pinned to CPUs"),
        ({"engine": None}, "wants engine"),
    ],
)
def test_a_job_that_is_not_for_this_agent_is_refused(
    agent: Agent, spool: Spool, changes: dict[str, Any], cause: str
) -> None:
    if "engine" in changes:
        changes = {"engine": "torch" if agent.native else "native"}
    job = a_job(agent, spool, **changes)
    code, report = run(agent, spool, job)
    assert (code, report["error"]["type"]) == (3, "RefusedError")
    assert cause in report["error"]["what"]
    assert report["error"]["remedy"]
    assert cause in refusal(spool, job)
    assert agent.call("status", job.id, 1, "--spool", spool.root)[1]["state"] == "ended"


def test_a_newer_job_is_refused_with_both_versions(agent: Agent, spool: Spool) -> None:
    job = a_job(agent, spool)
    job_path(spool, job).write_bytes(canonical_json(json.loads(job.to_json()) | {"version": 2, "new": 1}))
    code, report = run(agent, spool, job)
    assert (code, report["error"]["type"]) == (3, "RefusedError")
    assert re.search(r"job\.json: job version 2, this (agent|stifarm) knows 1\.", report["error"]["what"])
    assert "Update the agent" in refusal(spool, job)


def test_a_newer_plan_in_a_job_is_an_error_with_both_versions(
    agent: Agent, spool: Spool, content: Content
) -> None:
    job = a_job(agent, spool, content, units=(execute(0, content.plan()),))
    changed = json.loads(job.to_json())
    changed["units"][0]["plan"] |= {"version": 2, "added": 1, "bundle": None}
    job_path(spool, job).write_bytes(canonical_json(changed))
    code, report = run(agent, spool, job)
    assert (code, report["error"]["type"]) == (1, "FormatError")
    assert re.search(r"plan version 2, this (agent|stifarm) knows 1\.", report["error"]["what"])
    assert "Update the agent" in report["error"]["remedy"]


def test_a_number_that_no_cpu_has_is_an_error(agent: Agent, spool: Spool) -> None:
    job = a_job(agent, spool)
    job_path(spool, job).write_bytes(canonical_json(json.loads(job.to_json()) | {"cpus": [0, 4096]}))
    code, report = run(agent, spool, job)
    assert (code, report["error"]["type"]) == (1, "FormatError")
    assert "not a valid Job: cpus.1: " in report["error"]["what"]


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b'{"version":1}', b"\xff\xfe", b"[" * 100_000])
def test_a_malformed_job_is_an_error(agent: Agent, spool: Spool, text: bytes) -> None:
    job = a_job(agent, spool)
    job_path(spool, job).write_bytes(text)
    code, report = run(agent, spool, job)
    assert (code, report["error"]["type"]) == (1, "FormatError")
    assert not journal_path(spool, job).exists()


def test_a_job_file_in_another_place_does_not_run(agent: Agent, spool: Spool, tmp_path: Path) -> None:
    job = a_job(agent, spool)
    outside = tmp_path / "job.json"
    outside.write_bytes(job_path(spool, job).read_bytes())
    assert agent.call("run", outside, "--spool", spool.root)[0] == 2
    other = a_job(agent, spool, id="other")
    job_path(spool, other).write_bytes(job_path(spool, job).read_bytes())
    assert run(agent, spool, other)[0] == 3


def test_stale_and_strange_controllers_are_kept_off(agent: Agent, spool: Spool) -> None:
    def leased(store: str, counter: int, *, takeover: bool = False, attempt: int = 1) -> Job:
        lease = Lease(store=store, counter=counter, takeover=takeover)
        return a_job(agent, spool, units=probes(1), lease=lease, attempt=attempt)

    assert run(agent, spool, leased("store-a", 7))[0] == 0
    stale = leased("store-a", 6, attempt=2)
    code, report = run(agent, spool, stale)
    assert (code, report["error"]["type"]) == (3, "RefusedError")
    assert "stale" in refusal(spool, stale)
    stranger = leased("store-b", 1, attempt=3)
    assert run(agent, spool, stranger)[0] == 3
    assert "store-a" in refusal(spool, stranger)
    for verb in (("clean",), ("collect",), ("forget", "probe", 1)):
        code, report = agent.call(*verb, "--spool", spool.root, "--lease", "store-a:6")
        assert (code, report["error"]["type"]) == (3, "RefusedError")
    before = journal_path(spool, leased("store-a", 7)).read_bytes()
    assert run(agent, spool, leased("store-a", 6))[0] == 3, "the attempt of a younger lease"
    assert journal_path(spool, leased("store-a", 7)).read_bytes() == before
    assert run(agent, spool, leased("store-b", 1, takeover=True, attempt=4))[0] == 0
    fence = json.loads(spool.fence.read_bytes())
    assert (fence["owner"], fence["counters"]) == ("store-b", {"store-a": 7, "store-b": 1})


@pytest.mark.parametrize(
    "damaged",
    [b"", b"garbage", b'{"counters": {"s": 1e999}, "format": "stifarm-fence", "owner": "s", "version": 1}'],
)
def test_a_damaged_fence_admits_a_take_over_only_which_mends_it(
    agent: Agent, spool: Spool, damaged: bytes
) -> None:
    verb = ("forget", "probe", 1, "--spool", spool.root)
    spool.fence.write_bytes(damaged)
    code, report = agent.call(*verb, "--lease", "store-a:7")
    assert (code, report["error"]["type"]) == (1, "FormatError")
    assert "fence.json" in report["error"]["what"]
    assert "Take it over" in report["error"]["remedy"]
    assert spool.fence.read_bytes() == damaged
    assert agent.call(*verb, "--lease", "store-a:7:takeover")[0] == 0
    fence = json.loads(spool.fence.read_bytes())
    assert (fence["owner"], fence["counters"]) == ("store-a", {"store-a": 7})
    assert agent.call(*verb, "--lease", "store-a:7")[0] == 0


# ------------------------------------------------------------------ units that fail, and the next one


def failures(found: list[Any]) -> list[str | None]:
    return [item.error if isinstance(item, FailureRecord) else None for item in found]


def test_what_cannot_be_done_is_said_in_the_journal_and_the_next_unit_runs(
    agent: Agent, spool: Spool, content: Content
) -> None:
    good = execute(0, content.plan())

    def io(width: int, fidelity: int) -> IoProfileUnit:
        return IoProfileUnit(
            number=0, kind="profile-io", widths=(width,), fidelities=(fidelity,), repeats=1, seed=0
        )

    stranger = content.plan().model_copy(update={"bundle": "5" * 64})
    shifted = content.plan().shards[0].model_copy(update={"offset": 4096 * 999})
    moved = content.plan().model_copy(update={"shards": (shifted, *content.plan().shards[1:])})
    unfit = "does not fit bundle"
    cases: list[tuple[Unit, str, str]] = [
        (
            execute(0, content.plan(), rows=(0, ROWS)),
            "InputError",
            f"Row {ROWS} of task data that has {ROWS}",
        ),
        (execute(0, stranger), "FormatError", unfit),
        (execute(0, moved), "FormatError", unfit),
        (
            EvaluateUnit(number=0, kind="evaluate", plan=stranger, batch=2),
            "FormatError",
            "does not fit bundle",
        ),
        (execute(0, content.plan(working_bytes=100)), "ResourceError", "into a working buffer of 100"),
        (
            execute(0, content.plan().model_copy(update={"sequence_length": TOKENS + 1})),
            "InputError",
            f"is for {TOKENS + 1} tokens, the row has {TOKENS}",
        ),
        (execute(0, content.plan(), request_kind="cached"), "InputError", "cached request"),
        (io(1, 7), "InputError", "The bundle has no "),
        (io(9, 2), "InputError", "The bundle has no "),
        (
            ComputeProfileUnit(
                number=0, kind="profile-compute", width=9, fidelities=(2,), warmups=0, repeats=1
            ),
            "InputError",
            "The bundle has no ",
        ),
        (
            FixedProfileUnit(number=0, kind="profile-fixed", warmups=0, rows=(99,)),
            "InputError",
            "Row 99 of task data",
        ),
    ]
    units: list[Unit] = [good]
    for unit, _, _ in cases:
        units += [unit, good]
    found = run_units(agent, spool, content, numbered(units))
    wanted: list[str | None] = [None]
    for _, error, _ in cases:
        wanted += [error, None]
    assert failures(found) == wanted
    for failure, (_, _, words) in zip(found[1::2], cases, strict=True):
        assert words in failure.what
    first = result_of(ExecuteResult, found[0]).requests[0].logits
    assert all(result_of(ExecuteResult, item).requests[0].logits == first for item in found[0::2])


def test_a_job_without_content_or_with_content_that_is_not_there(
    agent: Agent, spool: Spool, content: Content
) -> None:
    units = numbered([execute(0, content.plan()), ProbeUnit(number=0, kind="probe")])
    for named, error, words in (
        ({"bundle": None, "task_data": None}, "InputError", "names no bundle"),
        ({"bundle": "0" * 64}, "FormatError", "0" * 64),
        ({"task_data": None}, "InputError", "names no task data"),
        ({"task_data": "0" * 64}, ("DatasetError", "FormatError"), "0" * 64),
    ):
        job = a_job(agent, spool, content, units=units, id=f"job-{len(list(spool.jobs.iterdir()))}", **named)
        assert run(agent, spool, job)[1] == {"state": "ended", "done": 1, "failed": 1}
        failure = result_of(FailureRecord, journal_of(spool, job)[1].payload)
        assert failure.error in error
        assert words in failure.what
        assert failure.remedy or named == {"bundle": None, "task_data": None} or "task_data" in named


def test_rows_without_labels_have_no_score(agent: Agent, spool: Spool, content: Content) -> None:
    info = TaskDataInfo(
        format="stifarm-task-data", version=1, task="test", split="dev", labels=LABELS, tokenizer=None
    )
    row = content.rows[0]
    data = TaskData(
        info=info,
        input_ids=row.input_ids[None],
        token_types=row.token_types[None],
        lengths=np.array([row.length], np.int32),
        labels=np.array([-1], np.int32),
    )
    digest = save_task_data(data, spool.tasks / "new")
    (spool.tasks / "new").rename(spool.task(digest))
    job = a_job(
        agent,
        spool,
        content,
        task_data=digest,
        units=(EvaluateUnit(number=0, kind="evaluate", plan=content.plan(), batch=2),),
    )
    assert run(agent, spool, job)[1]["failed"] == 1
    failure = result_of(FailureRecord, journal_of(spool, job)[1].payload)
    assert (failure.error, "label" in failure.what) == ("DatasetError", True)


def replace_manifest(folder: Path, **changes: Any) -> str:
    """Write another manifest, under its own digest; the folder is renamed."""
    manifest = json.loads((folder / MANIFEST_NAME).read_bytes()) | changes
    data = canonical_json(manifest)
    (folder / MANIFEST_NAME).write_bytes(data)
    digest = sha256_hex(data)
    folder.rename(folder.with_name(digest))
    return digest


DAMAGES = {
    "resident-cut": "FormatError",
    "region-cut": "FormatError",
    "file-gone": "FormatError",
    "manifest-bit": "DigestError",
    "newer": "FormatError",
}
"""What is wrong with a bundle, and the error of a unit that opens it."""


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bundle_that_is_damaged_or_newer(agent: Agent, spool: Spool, content: Content, damage: str) -> None:
    folder = spool.bundle(content.bundle.digest)
    region, resident = folder / content.bundle.region_path(4).name, folder / "resident.bin"
    plan, digest = content.plan(), content.bundle.digest
    if damage == "resident-cut":
        resident.write_bytes(resident.read_bytes()[:-100])
    elif damage == "region-cut":
        region.write_bytes(region.read_bytes()[:-4096])
    elif damage == "file-gone":
        region.unlink()
    elif damage == "manifest-bit":
        data = bytearray((folder / MANIFEST_NAME).read_bytes())
        at = data.index(b'"model_digest":"') + 20
        data[at] = ord("1") if data[at] != ord("1") else ord("2")
        (folder / MANIFEST_NAME).write_bytes(data)
    else:
        digest = replace_manifest(folder, version=2, added={"of": ["a later version"]}, quantizer="other")
        plan = plan.model_copy(update={"bundle": digest})
    units = numbered([execute(0, plan), ProbeUnit(number=0, kind="probe")])
    job = a_job(agent, spool, content, units=units, bundle=digest)
    assert run(agent, spool, job)[1] == {"state": "ended", "done": 1, "failed": 1}
    failure = result_of(FailureRecord, journal_of(spool, job)[1].payload)
    assert failure.error == DAMAGES[damage]
    assert str(folder.parent) in failure.what
    assert failure.remedy
    if damage == "newer":
        assert re.search(r"manifest\.json: bundle version 2, this (agent|stifarm) knows 1\.", failure.what)
        assert "Update the agent" in failure.remedy


def test_storage_that_fails_in_the_middle_of_a_run(
    agent: Agent, spool: Spool, content: Content, tmp_path: Path
) -> None:
    """The region ends early while the agent has it open; then it is whole again."""
    machine = Machine(tmp_path / "machine.lock")
    units = numbered([execute(0, content.plan())] * 40)
    job = a_job(agent, spool, content, units=units, machine_lock=str(machine.path))
    region = spool.bundle(content.bundle.digest) / content.bundle.region_path(4).name
    whole, journal = region.read_bytes(), journal_path(spool, job)
    with machine:
        process = agent.start("run", job_path(spool, job), "--spool", spool.root)
        wait_for(lambda: lines_in(journal) == 1, "the start record")
        machine.let_through(lambda: lines_in(journal) > 2, "some results")
        os.truncate(region, 4096)
        before = lines_in(journal)
        machine.let_through(lambda: lines_in(journal) > before + 2, "some failures")
        with region.open("r+b") as stream:
            stream.write(whole)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()
    found = [record.payload for record in journal_of(spool, job)[1:-1]]
    report = json.loads(output)
    assert report["done"] + report["failed"] == len(units)
    failed = [item for item in found if isinstance(item, FailureRecord)]
    assert 0 < len(failed) < len(units) - 1
    assert {item.error for item in failed} == {"StorageReadError"}
    assert all("truncated" in item.what and item.remedy for item in failed)
    assert isinstance(found[0], ResultRecord)
    assert isinstance(found[-1], ResultRecord), "reads do not recover"


def test_a_memory_limit_is_a_failure_of_the_unit(agent: Agent, spool: Spool, content: Content) -> None:
    if agent.emulated or not agent.native:
        pytest.skip("an address-space limit would hit the emulator or PyTorch's libraries, not the agent")
    big = config("bert", "cls", "tanh", vocab=200, hidden=768, ffn=3072, heads=12, layers=1)
    bundle, _ = make_bundle(big, spool.bundles, fidelities=(32,))
    plan = hand_plan(
        bundle.manifest, Submodel(kept=(0,), width=12), lambda _l, _s: 32, tokens=TOKENS, preloaded=[(0, 0)]
    )
    units = numbered([execute(0, plan), ProbeUnit(number=0, kind="probe")])
    job = a_job(agent, spool, content, units=units, bundle=bundle.digest)
    limit = 20 << 20

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    assert run(agent, spool, job, preexec_fn=limited)[1] == {"state": "ended", "done": 1, "failed": 1}
    failure = result_of(FailureRecord, journal_of(spool, job)[1].payload)
    assert failure.error == "ResourceError"
    assert "memory" in failure.what.lower()


def test_a_gate_that_stays_shut(agent: Agent, spool: Spool, content: Content) -> None:
    gates = OPEN_GATES.model_copy(update={"min_free_bytes": 2**62, "max_load_milli": -1, "wait_limit_s": 1})
    units = numbered(
        [
            ProbeUnit(number=0, kind="probe"),
            EvaluateUnit(number=0, kind="evaluate", plan=content.plan(), batch=2),
        ]
    )
    job = a_job(agent, spool, content, gates=gates, units=units)
    assert run(agent, spool, job)[1] == {"state": "ended", "done": 1, "failed": 1}
    failure = result_of(FailureRecord, journal_of(spool, job)[1].payload)
    assert failure.error == "GateError"
    for part in ("free-space", "load", "limit 1 s"):
        assert part in failure.what


def test_verdicts_of_the_gates_go_with_the_runs(agent: Agent, spool: Spool, content: Content) -> None:
    gates = OPEN_GATES.model_copy(update={"min_free_bytes": 1, "min_battery_percent": 1})
    job = a_job(agent, spool, content, gates=gates, units=(execute(0, content.plan()),))
    run(agent, spool, job)
    record = result_of(ResultRecord, journal_of(spool, job)[1].payload)
    verdicts = {v.gate: v.verdict for v in result_of(ExecuteResult, record.result).gates}
    assert verdicts["free-space"] == "pass"
    assert verdicts["battery"] == ("ungated" if read_sensors(spool.root).battery_percent is None else "pass")


@pytest.mark.parametrize(
    ("files", "verdict", "detail"),
    [
        ({"scaling_governor": "performance", "scaling_max_freq": "2000000"}, "pass", ""),
        ({"scaling_governor": "performance"}, "ungated", "its ceiling cannot be read"),
        ({"scaling_governor": "powersave"}, "fail", "governor powersave, wanted performance"),
    ],
)
def test_clocks_that_are_not_as_stated_shut_a_gate(
    agent: Agent, spool: Spool, tmp_path: Path, files: dict[str, str], verdict: str, detail: str
) -> None:
    cpu = min(os.sched_getaffinity(0))
    folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/cpufreq"
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")
    gates = OPEN_GATES.model_copy(update={"governor": "performance", "min_khz": 1_800_000})
    job = a_job(agent, spool, gates=gates, units=probes(1), cpus=(cpu,), threads=1)
    run(agent.in_environment(STIFARM_SYSFS=str(tmp_path / "sys")), spool, job)
    payload = journal_of(spool, job)[1].payload
    if verdict == "fail":
        failure = result_of(FailureRecord, payload)
        assert failure.error == "GateError"
        assert f"clocks: cpu{cpu}: {detail}" in failure.what
    else:
        log = (spool.job(job.id, 1) / "agent.log").read_text()
        assert ("gate clocks is" in log) == (verdict == "ungated")
        assert detail in log


def test_sensors_that_cannot_be_read_are_ungated_and_the_unit_runs(
    agent: Agent, spool: Spool, content: Content, tmp_path: Path
) -> None:
    gates = OPEN_GATES.model_copy(update={"max_temperature_milli_c": 40_000, "min_battery_percent": 1})
    job = a_job(agent, spool, content, gates=gates, units=(execute(0, content.plan()),))
    (tmp_path / "no-sensors").mkdir()
    run(agent.in_environment(STIFARM_SYSFS=str(tmp_path / "no-sensors")), spool, job)
    record = result_of(ResultRecord, journal_of(spool, job)[1].payload)
    verdicts = {v.gate: v.verdict for v in result_of(ExecuteResult, record.result).gates}
    assert verdicts == {"temperature": "ungated", "battery": "ungated"}
