"""Every kind of unit, run as the agent runs it, over a real spool."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agent.measure import Context, run_unit
from agent.probe import typical_read_bytes
from agent.spawning import SpawnedRequestError
from agent.spool import Spool
from sti_runtime.bundle import Bundle
from sti_runtime.errors import DatasetError, FormatError, InputError, ResourceError
from sti_runtime.messages import (
    ComputeProfileResult,
    ComputeProfileUnit,
    Emulation,
    EvaluateResult,
    EvaluateUnit,
    ExecuteResult,
    ExecuteUnit,
    FixedProfileResult,
    FixedProfileUnit,
    Gates,
    IoProfileResult,
    IoProfileUnit,
    Job,
    Lease,
    ProbeResult,
    ProbeUnit,
    Unit,
    parse_unit_result,
)
from sti_runtime.metrics import mean_cross_entropy
from sti_runtime.model import Submodel
from sti_runtime.plan import Plan, merged_reads
from sti_runtime.profile_fit import fit_profile
from sti_runtime.storage import direct_io_works
from sti_runtime.task_data import TaskData, TaskDataInfo, save_task_data
from sti_runtime.torch_engine import TorchEngine
from tests.bundles import hand_plan, make_bundle, make_request, small_config

pytestmark = pytest.mark.timeout(600)

CONFIG = small_config()
WHOLE = Submodel(kept=(0, 1, 2), width=4)
ROWS = 9


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("spool")
    Spool.open(root)
    return root


@pytest.fixture(scope="module")
def bundle(spool: Path) -> Bundle:
    bundle, _ = make_bundle(CONFIG, spool / "bundles")
    return bundle


@pytest.fixture(scope="module")
def task_digest(spool: Path) -> str:
    digest = save_task_data(task_data([i % 2 for i in range(ROWS - 1)] + [-1]), spool / "tasks" / "new")
    (spool / "tasks" / "new").rename(spool / "tasks" / f"{digest}.safetensors")
    return digest


def task_data(labels: list[int]) -> TaskData:
    rows = [make_request(CONFIG, seed=i, length=6 + 2 * i) for i in range(len(labels))]
    info = TaskDataInfo(
        format="stifarm-task-data",
        version=1,
        task="test",
        split="dev",
        labels=("negative", "positive"),
        tokenizer=None,
    )
    return TaskData(
        info=info,
        input_ids=np.stack([r.input_ids for r in rows]),
        token_types=np.stack([r.token_types for r in rows]),
        lengths=np.array([r.length for r in rows], np.int32),
        labels=np.array(labels, np.int32),
    )


class Runner:
    """Runs units of jobs over the module's spool; results pass through the journal's validation."""

    def __init__(self, spool: Path, bundle: str | None, task_data: str | None) -> None:
        self.spool, self.bundle, self.task_data = spool, bundle, task_data
        self.contexts: list[Context] = []

    def context(self, unit: Unit, emulation: Emulation | None = None) -> Context:
        gates = Gates(
            max_temperature_milli_c=None,
            min_battery_percent=None,
            max_load_milli=None,
            min_free_bytes=None,
            wait_limit_s=0,
        )
        job = Job(
            format="stifarm-job",
            version=1,
            id="test",
            attempt=1,
            lease=Lease(store="test", counter=1, takeover=False),
            device="test",
            bundle=self.bundle,
            task_data=self.task_data,
            engine="torch",
            threads=2,
            queue_depth=4,
            cpus=(),
            machine_lock=None,
            emulation=emulation,
            gates=gates,
            units=(unit,),
        )
        self.contexts.append(Context(job=job, spool=self.spool))
        return self.contexts[-1]

    def run(self, unit: Unit, emulation: Emulation | None = None) -> Any:
        result = run_unit(unit, self.context(unit, emulation))
        assert parse_unit_result(result.to_json(), source="the result") == result
        return result


@pytest.fixture
def runner(spool: Path, bundle: Bundle, task_digest: str) -> Iterator[Runner]:
    runner = Runner(spool, bundle.digest, task_digest)
    yield runner
    for context in runner.contexts:
        context.close()


@pytest.fixture
def proven(bundle: Bundle) -> None:
    """Skips where reads cannot be proven to come from storage."""
    if not direct_io_works(bundle.region_path(2)):
        pytest.skip(f"{bundle.path}: this filesystem has no direct IO, so nothing can be proven")


def execute_unit(plan: Plan, **changes: Any) -> ExecuteUnit:
    unit = ExecuteUnit(
        number=0,
        kind="execute",
        plan=plan,
        request_kind="warm",
        io_mode="direct",
        warmups=1,
        rows=(0, 3, 4),
    )
    return unit.model_copy(update=changes)


def four_bit_plan(bundle: Bundle) -> Plan:
    return hand_plan(bundle.manifest, WHOLE, lambda layer, index: 4, preloaded=[(0, 0), (0, 1)])


# ------------------------------------------------------------------ profiles


def test_profile_units_give_what_a_device_profile_is_fitted_from(
    runner: Runner, bundle: Bundle, proven: None
) -> None:
    io = runner.run(
        IoProfileUnit(number=0, kind="profile-io", widths=(2, 4), fidelities=(2, 6), repeats=3, seed=1)
    )
    assert isinstance(io, IoProfileResult)
    assert io.io_mode == "direct"
    assert len(io.samples) == 2 * (2 + 1) * 3  # widths × (fidelities and mixed) × repeats
    assert all(s.valid and s.storage_bytes == s.bytes and s.duration_ns > 0 for s in io.samples)
    assert {s.versions for s in io.samples} == {2, 4}

    compute = [
        runner.run(
            ComputeProfileUnit(
                number=0, kind="profile-compute", width=width, fidelities=(2, 6), warmups=1, repeats=5
            )
        )
        for width in (2, 4)
    ]
    assert all(isinstance(result, ComputeProfileResult) for result in compute)
    samples = [s for result in compute for s in result.samples]
    reads = [s for result in compute for s in result.reads]
    assert {(s.versions, s.valid) for s in reads} == {(2, True), (4, True)}
    assert [(s.width, s.fidelity, s.warmup) for s in samples[:11]] == [(2, 2, i == 0) for i in range(11)]
    assert [s.read_bytes for s in samples[:6]] == [0] * 6
    assert any(s.read_bytes for s in samples[6:11])
    assert all(s.decompress_ns > 0 and s.compute_ns > 0 for s in samples)

    fixed = runner.run(FixedProfileUnit(number=0, kind="profile-fixed", warmups=1, rows=(0, 1, 2, 3, 4, 5)))
    assert isinstance(fixed, FixedProfileResult)
    assert [s.warmup for s in fixed.samples] == [True] + 5 * [False]
    assert all(s.storage_bytes == s.bytes > 0 and s.head_ns > 0 for s in fixed.samples)

    profile = fit_profile(
        bundle=bundle.digest,
        engine="torch",
        sequence_length=24,
        threads=2,
        queue_depth=4,
        emulated=False,
        widths=(2, 4),
        fidelities=(2, 6),
        io=io.samples,
        beside=reads,
        compute=samples,
        fixed=fixed.samples,
    )
    assert [row.width for row in profile.compute] == [2, 4]
    assert profile.fixed_p95.total_ns > 0


def test_a_gpu_without_room_is_a_resource_error(runner: Runner, bundle: Bundle) -> None:
    class FullGpu(Context):
        @cached_property
        def engine(self) -> TorchEngine:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    unit = EvaluateUnit(number=0, kind="evaluate", plan=four_bit_plan(bundle), batch=2)
    context = FullGpu(job=runner.context(unit).job, spool=runner.spool)
    with pytest.raises(ResourceError, match="CUDA out of memory") as caught:
        run_unit(unit, context)
    assert "smaller plan or batch" in caught.value.remedy


def test_a_fidelity_or_width_the_bundle_lacks_is_refused(runner: Runner) -> None:
    for width, fidelity in ((2, 7), (5, 2)):
        with pytest.raises(InputError, match=r"The bundle has no slice \d at"):
            runner.run(
                IoProfileUnit(
                    number=0, kind="profile-io", widths=(width,), fidelities=(fidelity,), repeats=1, seed=1
                )
            )


# ------------------------------------------------------------------ execute


@pytest.mark.parametrize(
    ("kind", "mode", "proof"),
    [
        ("warm", "direct", "direct"),
        ("cold", "direct", "direct"),
        ("warm", "buffered", "buffered-cold"),
        ("cached", "buffered", "cached"),
    ],
)
def test_execute_keeps_every_request(
    runner: Runner, bundle: Bundle, proven: None, kind: str, mode: str, proof: str
) -> None:
    plan = four_bit_plan(bundle)
    result = runner.run(execute_unit(plan, request_kind=kind, io_mode=mode))
    assert isinstance(result, ExecuteResult)
    assert (result.io_mode, result.io_mode_proven) == (mode, proof)
    assert result.plan_digest == plan.digest
    assert [(r.row, r.warmup) for r in result.requests] == [(0, True), (3, False), (4, False)]
    for request in result.requests:
        assert request.verdict.valid
        assert request.latency_ns > 0
        assert len(request.trace) == 3
        assert len(request.logits) == 2
        assert (request.storage_bytes == 0) == (kind == "cached")
    assert len({request.logits for request in result.requests}) == 3
    assert result.memory.preload == plan.preloaded_bytes
    assert result.memory.working > 0
    assert result.after.wall_ns >= result.before.wall_ns > 0


def test_spawned_requests_count_from_the_start_of_their_process(
    runner: Runner, bundle: Bundle, proven: None
) -> None:
    plan = four_bit_plan(bundle)
    warm = runner.run(execute_unit(plan, rows=(3,), warmups=0))
    result = runner.run(execute_unit(plan, request_kind="spawn-cold", rows=(3,), warmups=0))
    (sample,) = result.requests
    assert sample.verdict.valid
    assert sample.logits == pytest.approx(warm.requests[0].logits, rel=1e-5)
    assert sample.planned_bytes == warm.requests[0].planned_bytes + plan.preloaded_bytes
    # To import the engine takes longer than this on any machine; the trace lies at the end of the latency.
    assert 10_000_000 < sample.trace[0].compute_start_ns < sample.trace[-1].compute_end_ns < sample.latency_ns
    assert result.io_mode_proven == "direct"


def test_an_error_in_a_spawned_request_arrives_in_words(runner: Runner, bundle: Bundle) -> None:
    plan = four_bit_plan(bundle).model_copy(update={"working_bytes": 4096})
    with pytest.raises(SpawnedRequestError, match="working buffer of at least"):
        runner.run(execute_unit(plan, request_kind="spawn-cold"))


def test_rows_and_content_that_are_not_there_are_named(runner: Runner, bundle: Bundle, spool: Path) -> None:
    with pytest.raises(InputError, match="Row 9 of task data that has 9 rows"):
        runner.run(execute_unit(four_bit_plan(bundle), rows=(0, ROWS)))
    unit = execute_unit(four_bit_plan(bundle))
    with pytest.raises(InputError, match="names no bundle"):
        run_unit(unit, Runner(spool, None, None).context(unit))
    with pytest.raises(FormatError, match="cannot be read"):
        run_unit(unit, Runner(spool, "f" * 64, None).context(unit))


# ------------------------------------------------------------------ evaluate


def test_evaluate_agrees_with_execute(runner: Runner, bundle: Bundle) -> None:
    plan = four_bit_plan(bundle)
    result = runner.run(EvaluateUnit(number=0, kind="evaluate", plan=plan, batch=3))
    assert isinstance(result, EvaluateResult)
    rows = tuple(range(ROWS - 1))  # the last row has no label
    requests = runner.run(execute_unit(plan, rows=rows)).requests
    logits = np.array([r.logits for r in requests])
    labels = np.array([i % 2 for i in rows])
    assert result.rows == len(rows)
    assert result.predictions == tuple(logits.argmax(axis=1).tolist())
    assert result.correct == int((logits.argmax(axis=1) == labels).sum())
    assert result.loss == pytest.approx(mean_cross_entropy(logits, labels), rel=1e-5)
    assert result.content_digest == plan.content_digest


def test_evaluate_without_labels_is_refused(runner: Runner, bundle: Bundle) -> None:
    folder = runner.spool / "tasks"
    digest = save_task_data(task_data([-1, -1]), folder / "unlabelled")
    (folder / "unlabelled").rename(folder / f"{digest}.safetensors")
    runner.task_data = digest
    with pytest.raises(DatasetError, match="label"):
        runner.run(EvaluateUnit(number=0, kind="evaluate", plan=four_bit_plan(bundle), batch=3))


# ------------------------------------------------------------------ probe


def agent_emulation(rate: int | None, share_milli: int | None) -> Emulation:
    return Emulation(
        io_bytes_per_s=rate,
        io_mechanism=None if rate is None else "agent",
        cpu_share_milli=share_milli,
        cpu_mechanism=None if share_milli is None else "agent",
    )


def test_probe_of_a_real_device_reports_sensors_only(runner: Runner) -> None:
    result = runner.run(ProbeUnit(number=0, kind="probe"))
    assert isinstance(result, ProbeResult)
    assert result.verified is None
    assert result.sensors.wall_ns > 0


def test_probe_measures_an_emulated_device_through_its_throttle(runner: Runner) -> None:
    rate, share_milli = 4_000_000, 300
    result = runner.run(ProbeUnit(number=0, kind="probe"), agent_emulation(rate, share_milli))
    verified = result.verified
    assert verified.emulation.io_bytes_per_s == rate
    # Never faster than stated; how much slower depends on who else uses the machine.
    assert 0 < verified.io_bytes_per_s <= rate
    assert verified.read_p50_ns >= verified.read_nominal_ns == verified.read_bytes * 10**9 // rate
    assert 0 < verified.cpu_share_milli <= share_milli + 100


def test_probe_without_a_bundle_uses_and_removes_a_file_of_its_own(spool: Path) -> None:
    before = sorted(spool.iterdir())
    result = Runner(spool, None, None).run(
        ProbeUnit(number=0, kind="probe"), agent_emulation(20_000_000, None)
    )
    assert result.verified.read_bytes == 256 << 10
    assert result.verified.cpu_share_milli is None
    assert sorted(spool.iterdir()) == before


def test_probe_reads_at_the_size_of_the_jobs_plans(runner: Runner, bundle: Bundle) -> None:
    unit = execute_unit(four_bit_plan(bundle))
    sizes = sorted(read.length for read in merged_reads(unit.plan.streamed()))
    assert typical_read_bytes(runner.context(unit)) == sizes[len(sizes) // 2]
