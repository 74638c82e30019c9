"""The executor with its real IO thread over real files, against a plain forward pass."""

from __future__ import annotations

import mmap
import random
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
import torch

from agent.throttle import AgentThrottle
from sti_runtime import encoder
from sti_runtime.bundle import Bundle
from sti_runtime.embedding_rows import Request
from sti_runtime.engine import Throttle
from sti_runtime.errors import FormatError, InputError, ResourceError, StorageReadError
from sti_runtime.messages import RequestKind
from sti_runtime.model import ModelConfig, Submodel
from sti_runtime.pack import unpack_version
from sti_runtime.pipeline import Executor, smallest_working_bytes
from sti_runtime.plan import Plan
from sti_runtime.plan_build import Fidelity
from sti_runtime.shard import F32, FIDELITIES, matrix_shapes
from sti_runtime.storage import direct_io_works
from sti_runtime.torch_engine import TorchEngine, best_device
from tests.bundles import HEAD, hand_plan, make_bundle, make_request, small_config

pytestmark = pytest.mark.timeout(300)

CONFIG = small_config()
WHOLE = Submodel(kept=(0, 1, 2), width=4)
GAPPED = Submodel(kept=(0, 2), width=3)
MIDDLE = Submodel(kept=(1,), width=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, dict[str, F32]]:
    return make_bundle(CONFIG, tmp_path_factory.mktemp("bundles"), submodels=(GAPPED, MIDDLE))


@pytest.fixture(scope="module")
def bundle(made: tuple[Bundle, dict[str, F32]]) -> Bundle:
    return made[0]


@contextmanager
def executor_of(
    bundle: Bundle, *, threads: int = 2, queue_depth: int = 4, throttle: Throttle | None = None
) -> Iterator[Executor]:
    engine = TorchEngine(bundle, threads=threads)
    with Executor(bundle, engine, threads=threads, queue_depth=queue_depth, throttle=throttle) as executor:
        yield executor
    engine.close()


@pytest.fixture
def executor(bundle: Bundle) -> Iterator[Executor]:
    with executor_of(bundle) as executor:
        yield executor


def mixed_fidelity(seed: int) -> dict[tuple[int, int], Fidelity]:
    generator = random.Random(seed)
    choices: tuple[Fidelity, ...] = (2, 3, 4, 5, 6, 32)
    return {(layer, index): generator.choice(choices) for layer in range(12) for index in range(12)}


def oracle(bundle: Bundle, tensors: dict[str, F32], plan: Plan, request: Request) -> tuple[F32, F32]:
    """(logits, hidden) by a plain forward pass over tensors with the plan's versions put in."""
    config = bundle.manifest.model
    d, f = config.head_size, config.ffn_slice
    changed = {name: array.copy() for name, array in tensors.items()}
    for shard in plan.shards:
        version = bundle.manifest.shard_version(shard.source_layer, shard.slice, shard.fidelity)
        data = bundle.region_path(shard.fidelity).read_bytes()[version.offset :][: version.payload_bytes]
        matrices = unpack_version(data, matrix_shapes(config), shard.fidelity, version.outliers)
        head = slice(shard.slice * d, (shard.slice + 1) * d)
        neurons = slice(shard.slice * f, (shard.slice + 1) * f)
        p = f"layers.{shard.source_layer}."
        for name in "qkv":
            changed[f"{p}attention.{name}.weight"][head] = matrices[name]
        changed[p + "attention.o.weight"][:, head] = matrices["o"]
        changed[p + "ffn.in.weight"][neurons] = matrices["ffn_in"]
        changed[p + "ffn.out.weight"][:, neurons] = matrices["ffn_out"]
    return reference(config, changed, plan.submodel, request)


def reference(
    config: ModelConfig, tensors: dict[str, F32], submodel: Submodel, request: Request
) -> tuple[F32, F32]:
    with torch.inference_mode():
        logits, hidden = encoder.model_forward(
            {name: torch.from_numpy(array) for name, array in tensors.items()},
            config,
            submodel,
            torch.from_numpy(request.input_ids)[None],
            torch.from_numpy(request.token_types)[None],
            torch.tensor([request.length]),
        )
    return np.empty(0, np.float32) if logits is None else logits[0].numpy(), hidden[0].numpy()


def relative(values: F32, wanted: F32) -> float:
    return float(np.abs(values - wanted).max() / np.abs(wanted).max())


# ------------------------------------------------------------------ logits


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_logits_are_those_of_the_planned_versions(
    made: tuple[Bundle, dict[str, F32]], executor: Executor, fidelity: Fidelity
) -> None:
    bundle, tensors = made
    plan = hand_plan(bundle.manifest, WHOLE, lambda layer, index: fidelity)
    request = make_request(CONFIG)
    outcome = executor.run(plan, request, "warm", "direct")
    logits, hidden = oracle(bundle, tensors, plan, request)
    assert relative(np.array(outcome.logits, np.float32), logits) <= 1e-5
    assert relative(outcome.hidden, hidden) <= 1e-5


@pytest.mark.parametrize(
    ("submodel", "seed"),
    [(WHOLE, 1), (GAPPED, 2), (MIDDLE, 3), (WHOLE, 4)],
)
@pytest.mark.parametrize("kind", ["cold", "warm"])
def test_mixed_fidelities_at_any_depth_and_width(
    made: tuple[Bundle, dict[str, F32]],
    executor: Executor,
    submodel: Submodel,
    seed: int,
    kind: RequestKind,
) -> None:
    bundle, tensors = made
    fidelity = mixed_fidelity(seed)
    preloaded = [(0, index) for index in range(submodel.width)] + ([(1, 0)] if submodel.depth > 1 else [])
    plan = hand_plan(
        bundle.manifest, submodel, lambda layer, index: fidelity[layer, index], preloaded=preloaded
    )
    request = make_request(CONFIG, seed=seed)
    outcome = executor.run(plan, request, kind, "direct")
    logits, _ = oracle(bundle, tensors, plan, request)
    assert relative(np.array(outcome.logits, np.float32), logits) <= 1e-5


def test_all_slices_at_32_bits_are_the_original_model(
    made: tuple[Bundle, dict[str, F32]], executor: Executor
) -> None:
    bundle, tensors = made
    plan = hand_plan(bundle.manifest, WHOLE, lambda layer, index: 32)
    for seed in range(3):
        request = make_request(CONFIG, seed=seed, length=24 - 7 * seed)
        outcome = executor.run(plan, request, "warm", "direct")
        assert relative(
            np.array(outcome.logits, np.float32), reference(CONFIG, tensors, WHOLE, request)[0]
        ) <= (1e-4)


def test_roberta_positions_no_token_types_and_no_head(tmp_path: Path) -> None:
    config = small_config(head=None).model_copy(
        update={"family": "roberta", "position_offset": 2, "token_types": 0, "pad_id": 1}
    )
    bundle, tensors = make_bundle(config, tmp_path)
    plan = hand_plan(bundle.manifest, WHOLE, lambda layer, index: 32)
    request = make_request(config)
    with executor_of(bundle) as executor:
        outcome = executor.run(plan, request, "cold", "direct")
    assert outcome.logits == ()
    assert relative(outcome.hidden, reference(config, tensors, WHOLE, request)[1]) <= 1e-4


def test_pipelined_equals_sequential_equals_load_exec(bundle: Bundle) -> None:
    fidelity = mixed_fidelity(5)
    request, logits = make_request(CONFIG), set()
    for mode in ("pipeline", "load-exec"):
        plan = hand_plan(
            bundle.manifest,
            WHOLE,
            lambda layer, index: fidelity[layer, index],
            mode="load-exec" if mode == "load-exec" else "pipeline",
        )
        for threads, depth in ((1, 1), (2, 8)):
            with executor_of(bundle, threads=threads, queue_depth=depth) as executor:
                logits.add(executor.run(plan, request, "cold", "direct").logits)
                logits.add(executor.run(plan, request, "warm", "direct").logits)
    values = np.array(sorted(logits), np.float32)
    assert relative(values, np.broadcast_to(values[0], values.shape)) <= 1e-5


def test_evaluate_scores_as_single_requests_do(bundle: Bundle, executor: Executor) -> None:
    plan = hand_plan(bundle.manifest, GAPPED, lambda layer, index: 3)
    requests = [make_request(CONFIG, seed=i, length=5 + 3 * i) for i in range(7)]
    single = np.array([executor.run(plan, r, "warm", "direct").logits for r in requests], np.float32)
    assert isinstance(executor.engine, TorchEngine)
    batched = executor.engine.evaluate(
        bundle,
        plan,
        np.stack([r.input_ids for r in requests]),
        np.stack([r.token_types for r in requests]),
        np.array([r.length for r in requests], np.int32),
        batch=3,
    )
    assert relative(batched, single) <= 1e-5


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_device_of_torch_computes_the_same(bundle: Bundle, executor: Executor, device: str) -> None:
    """Of a request and of a batch; the agent takes the best device there is."""
    assert best_device() == ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("this PyTorch finds no CUDA device")
    plan = hand_plan(bundle.manifest, GAPPED, lambda layer, index: 4)
    row = make_request(CONFIG)
    wanted = executor.run(plan, row, "cold", "direct")
    engine = TorchEngine(bundle, threads=1, device=device)
    with Executor(bundle, engine, threads=1, queue_depth=2) as there:
        outcome = there.run(plan, row, "cold", "direct")
        batch = engine.evaluate(
            bundle, plan, row.input_ids[None], row.token_types[None], np.array([row.length], np.int32), 1
        )
    engine.close()
    assert relative(outcome.hidden, wanted.hidden) <= 1e-4
    logits = np.array(wanted.logits, np.float32)
    assert relative(np.array(outcome.logits, np.float32), logits) <= 1e-4
    assert relative(batch[0], logits) <= 1e-4


# ------------------------------------------------------------------ trace and verdict


def test_trace_is_consistent_and_counts_the_planned_bytes(bundle: Bundle, executor: Executor) -> None:
    preloaded = [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)]
    plan = hand_plan(bundle.manifest, WHOLE, lambda layer, index: 4, preloaded=preloaded)
    request = make_request(CONFIG)
    for kind, shard_bytes in (
        ("warm", plan.streamed_bytes),
        ("cold", plan.streamed_bytes + plan.preloaded_bytes),
    ):
        outcome = executor.run(plan, request, "warm" if kind == "warm" else "cold", "direct")
        assert sum(row.bytes for row in outcome.trace) == shard_bytes
        assert outcome.planned_bytes == shard_bytes + outcome.embed_bytes
        assert outcome.stall_ns == sum(row.stall_ns for row in outcome.trace) < outcome.latency_ns
        end_ns = outcome.embed_io_ns + outcome.embed_compute_ns
        for row in outcome.trace:
            if row.bytes:
                assert 0 < row.io_start_ns < row.io_end_ns <= row.compute_start_ns
            else:
                assert (row.io_start_ns, row.io_end_ns, row.stall_ns) == (0, 0, 0)
            assert end_ns <= row.compute_start_ns < row.compute_end_ns
            assert 0 < row.decompress_ns < row.compute_end_ns - row.compute_start_ns
            end_ns = row.compute_end_ns
        assert end_ns + outcome.head_ns <= outcome.latency_ns
        assert (outcome.trace[0].bytes == 0) == (kind == "warm")


def warm_page_cache(bundle: Bundle) -> None:
    for path in bundle.path.iterdir():
        path.read_bytes()


def test_a_warm_page_cache_is_found_out(bundle: Bundle, executor: Executor) -> None:
    plan = hand_plan(bundle.manifest, WHOLE, lambda layer, index: 4, preloaded=[(0, 0)])
    request = make_request(CONFIG)
    warm_page_cache(bundle)
    for kind in ("warm", "cold"):
        outcome = executor.run(plan, request, "warm" if kind == "warm" else "cold", "buffered")
        assert not outcome.verdict.valid
        assert outcome.verdict.reasons == ("not-from-storage",)
        assert outcome.storage_bytes < outcome.planned_bytes


def require_storage(bundle: Bundle) -> None:
    if not direct_io_works(bundle.region_path(2)):
        pytest.skip(f"{bundle.path}: this filesystem has no direct IO, so nothing can be proven")


def test_direct_reads_are_valid_over_a_warm_page_cache(bundle: Bundle, executor: Executor) -> None:
    require_storage(bundle)
    plan = hand_plan(bundle.manifest, WHOLE, lambda layer, index: 4, preloaded=[(0, 0)])
    warm_page_cache(bundle)
    for kind in ("cold", "warm", "warm"):
        outcome = executor.run(plan, make_request(CONFIG), "cold" if kind == "cold" else "warm", "direct")
        assert outcome.io_mode == "direct"
        assert outcome.verdict.valid
        assert outcome.storage_bytes == outcome.planned_bytes


def test_buffered_reads_are_valid_after_eviction_unless_another_process_maps_the_file(
    bundle: Bundle, executor: Executor
) -> None:
    require_storage(bundle)
    plan = hand_plan(bundle.manifest, WHOLE, lambda layer, index: 4)
    warm_page_cache(bundle)
    executor.storage("buffered").evict()
    assert executor.run(plan, make_request(CONFIG), "warm", "buffered").verdict.valid
    with bundle.region_path(4).open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
        assert any(mapped[::4096])
        executor.storage("buffered").evict()
        outcome = executor.run(plan, make_request(CONFIG), "warm", "buffered")
        mapped.close()
    assert outcome.verdict.reasons == ("not-from-storage",)


def test_cached_requests_read_nothing_and_need_buffered_mode(bundle: Bundle, executor: Executor) -> None:
    plan = hand_plan(bundle.manifest, WHOLE, lambda layer, index: 4, preloaded=[(0, 0)])
    executor.storage("buffered").evict()
    outcome = executor.run(plan, make_request(CONFIG), "cached", "buffered")
    assert outcome.verdict.valid
    assert outcome.storage_bytes == 0
    with pytest.raises(InputError, match="page cache"):
        executor.run(plan, make_request(CONFIG), "cached", "direct")


# ------------------------------------------------------------------ buffers


def layer_bytes(plan: Plan, layer: int) -> int:
    return sum(s.length for s in plan.streamed() if s.layer == layer)


@pytest.mark.parametrize("depth", [1, 4])
def test_the_working_buffer_is_never_exceeded(bundle: Bundle, depth: int) -> None:
    fidelity = mixed_fidelity(6)

    def plan_with(working_bytes: int | None) -> Plan:
        return hand_plan(
            bundle.manifest, WHOLE, lambda layer, index: fidelity[layer, index], working_bytes=working_bytes
        )

    whole = plan_with(None)
    largest = max(layer_bytes(whole, layer) for layer in range(3))
    assert smallest_working_bytes(whole) == largest
    request, logits = make_request(CONFIG), set()
    with executor_of(bundle, queue_depth=depth) as executor:
        for working_bytes in (largest, largest + 4096, whole.streamed_bytes):
            executor.reset()
            for _ in range(3):
                logits.add(executor.run(plan_with(working_bytes), request, "warm", "direct").logits)
            assert 0 < executor.working.peak_bytes <= working_bytes
            assert executor.working.in_use_bytes == 0
    values = np.array(sorted(logits), np.float32)
    assert relative(values, np.broadcast_to(values[0], values.shape)) <= 1e-5


def test_reads_wait_for_the_layer_whose_bytes_they_need(bundle: Bundle) -> None:
    plan = hand_plan(bundle.manifest, WHOLE, lambda layer, index: 32)
    tight = plan.model_copy(update={"working_bytes": smallest_working_bytes(plan)})
    with executor_of(bundle) as executor:
        trace = executor.run(tight, make_request(CONFIG), "warm", "direct").trace
    for below, above in pairwise(trace):
        assert above.io_start_ns >= below.compute_end_ns, "one layer fills the buffer"


def test_too_small_a_working_buffer_is_a_clear_error(bundle: Bundle, executor: Executor) -> None:
    plan = hand_plan(bundle.manifest, WHOLE, lambda layer, index: 4)
    needed = smallest_working_bytes(plan)
    small = plan.model_copy(update={"working_bytes": needed - 1})
    with pytest.raises(ResourceError, match=f"at least {needed} bytes"):
        executor.run(small, make_request(CONFIG), "warm", "direct")
    load_exec = hand_plan(
        bundle.manifest, WHOLE, lambda layer, index: 4, mode="load-exec", working_bytes=2 * needed
    )
    with pytest.raises(ResourceError, match=f"at least {load_exec.streamed_bytes} bytes"):
        executor.run(load_exec, make_request(CONFIG), "warm", "direct")


def test_preload_buffer_persists_shrinks_from_the_top_and_is_refilled(
    bundle: Bundle, executor: Executor
) -> None:
    def plan_of(preloaded: list[tuple[int, int]]) -> Plan:
        return hand_plan(bundle.manifest, WHOLE, lambda layer, index: 4, preloaded=preloaded)

    request = make_request(CONFIG)
    large = plan_of([(0, i) for i in range(4)] + [(1, 0), (1, 1)])
    assert executor.run(large, request, "cold", "direct").trace[1].bytes == layer_bytes(large, 0) + sum(
        s.length for s in large.shards if s.layer == 1
    )
    assert executor.preload.bytes == large.preloaded_bytes <= large.preload_bytes
    asked = executor.storage("direct").asked_bytes
    outcome = executor.run(large, request, "warm", "direct")
    assert executor.storage("direct").asked_bytes - asked == outcome.planned_bytes, "nothing is refilled"

    small = plan_of([(0, 0), (0, 1)])
    executor.fill(small)
    assert executor.preload.keys() == {(0, 0, 4), (0, 1, 4)}
    assert executor.preload.pool.held_bytes <= small.preload_bytes
    before = executor.storage("direct").asked_bytes
    executor.fill(large)
    missing = large.preloaded_bytes - small.preloaded_bytes
    assert executor.storage("direct").asked_bytes - before == missing, "only what is missing is read"
    assert executor.memory().preload == large.preloaded_bytes


def test_memory_is_counted_by_part(bundle: Bundle, executor: Executor) -> None:
    plan = hand_plan(bundle.manifest, WHOLE, lambda layer, index: 32, preloaded=[(0, 0)])
    outcome = executor.run(plan, make_request(CONFIG), "warm", "direct")
    memory = executor.memory()
    assert memory.resident == sum(array.nbytes for array in bundle.resident().values())
    assert memory.preload == plan.preloaded_bytes
    assert plan.streamed_bytes // 3 < memory.working - outcome.embed_bytes <= plan.working_bytes + 4096
    weights = 4 * (4 * 64 * 64 + 2 * 64 * 128)
    assert memory.activations > weights
    executor.reset()
    assert (executor.memory().preload, executor.memory().working) == (0, 0)


# ------------------------------------------------------------------ what goes wrong


def test_an_io_error_reaches_the_caller_and_the_next_request_works(tmp_path: Path) -> None:
    bundle, _ = make_bundle(CONFIG, tmp_path)
    plan = hand_plan(bundle.manifest, WHOLE, lambda layer, index: 4, preloaded=[(0, 0)])
    request, path = make_request(CONFIG), bundle.region_path(4)
    content = path.read_bytes()
    with executor_of(bundle) as executor:
        whole = executor.run(plan, request, "warm", "direct").logits
        second = next(s for s in plan.streamed() if s.layer == 2)
        for cut, kind in ((second.offset + 100, "warm"), (0, "cold")):
            with path.open("r+b") as stream:
                stream.truncate(cut)
            with pytest.raises(StorageReadError, match=rf"{path.name}: ends at"):
                executor.run(plan, request, "warm" if kind == "warm" else "cold", "direct")
            assert executor.working.in_use_bytes == 0
            assert executor.preload.pool.in_use_bytes == executor.preload.bytes
            path.write_bytes(content)
            assert executor.run(plan, request, "warm", "direct").logits == pytest.approx(whole, rel=1e-5)


def test_a_damaged_shard_is_an_error_and_the_next_request_works(tmp_path: Path) -> None:
    bundle, _ = make_bundle(CONFIG, tmp_path)
    plan = hand_plan(bundle.manifest, WHOLE, lambda layer, index: 4)
    # The last outlier's position: outliers end the payload, positions before values.
    shard, version = next(
        (s, v)
        for s in plan.shards
        if (v := bundle.manifest.shard_version(s.source_layer, s.slice, 4)).outliers[5] > 0
    )
    position = shard.offset + version.payload_bytes - 4 * version.outliers[5] - 4
    path = bundle.region_path(4)
    content = bytearray(path.read_bytes())
    original = bytes(content[position : position + 4])
    with executor_of(bundle) as executor:
        whole = executor.run(plan, make_request(CONFIG), "warm", "direct").logits
        for data in (b"\xff\xff\xff\xff", original):
            with path.open("r+b") as stream:
                stream.seek(position)
                stream.write(data)
            if data != original:
                with pytest.raises(FormatError, match="outside the matrix"):
                    executor.run(plan, make_request(CONFIG), "warm", "direct")
                assert executor.working.in_use_bytes == 0
        assert executor.run(plan, make_request(CONFIG), "warm", "direct").logits == pytest.approx(
            whole, rel=1e-5
        )


def test_ctrl_c_in_the_middle_of_a_request_leaves_the_executor_usable(bundle: Bundle) -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    plan = hand_plan(bundle.manifest, WHOLE, lambda layer, index: 4)
    slow = AgentThrottle(io_bytes_per_s=300_000, cpu_share_milli=None)  # the whole takes most of a second
    previous = signal.signal(signal.SIGALRM, interrupt)
    try:
        with executor_of(bundle, throttle=slow) as executor:
            executor.storage("direct")
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(KeyboardInterrupt):
                executor.run(plan, make_request(CONFIG), "warm", "direct")
            assert executor.working.in_use_bytes == 0
            outcome = executor.run(plan, make_request(CONFIG), "warm", "direct")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    with executor_of(bundle) as executor:
        assert executor.run(plan, make_request(CONFIG), "warm", "direct").logits == pytest.approx(
            outcome.logits, rel=1e-5
        )


def test_a_throttled_request_takes_at_least_its_bytes_at_the_rate(bundle: Bundle) -> None:
    plan = hand_plan(bundle.manifest, WHOLE, lambda layer, index: 2)
    rate = 2_000_000
    with executor_of(bundle, throttle=AgentThrottle(io_bytes_per_s=rate, cpu_share_milli=None)) as executor:
        outcome = executor.run(plan, make_request(CONFIG), "warm", "direct")
    assert outcome.latency_ns >= outcome.planned_bytes * 10**9 // rate
    assert outcome.stall_ns > 0


def test_plans_and_rows_that_do_not_fit_are_refused(
    bundle: Bundle, executor: Executor, tmp_path: Path
) -> None:
    plan = hand_plan(bundle.manifest, WHOLE, lambda layer, index: 4)
    with pytest.raises(InputError, match="for 24 tokens, the row has 20"):
        executor.run(plan, make_request(CONFIG, tokens=20), "warm", "direct")
    other, _ = make_bundle(small_config(head=HEAD.model_copy(update={"activation": "relu"})), tmp_path)
    with pytest.raises(FormatError, match="Plan again"):
        executor.run(
            hand_plan(other.manifest, WHOLE, lambda layer, index: 4), make_request(CONFIG), "warm", "direct"
        )
    moved = plan.shards[0].model_copy(update={"offset": plan.shards[0].offset + 4096})
    wrong = plan.model_copy(update={"shards": (moved, *plan.shards[1:])})
    with pytest.raises(FormatError, match="lies at"):
        executor.run(wrong, make_request(CONFIG), "warm", "direct")
