"""The native executor with its real IO threads over real files, against the Python one."""

from __future__ import annotations

import json
import mmap
import os
import platform
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.agent_push import MACHINES
from orchestrator.toolchain import Sources, build_agent
from sti_runtime.bundle import Bundle
from sti_runtime.embedding_rows import Request
from sti_runtime.model import Submodel
from sti_runtime.pipeline import Executor, RequestOutcome, smallest_working_bytes
from sti_runtime.plan import Plan, merged_reads
from sti_runtime.plan_build import Fidelity
from sti_runtime.shard import FIDELITIES
from sti_runtime.storage import direct_io_works
from sti_runtime.torch_engine import TorchEngine
from tests.bundles import hand_plan, make_bundle, make_request, small_config
from tests.native.sanitized import ENVIRONMENT, RUNTIME, build_sanitized

PROBE = Path(__file__).with_name("pipeline_probe.c")
CONFIG = small_config()
WHOLE = Submodel(kept=(0, 1, 2), width=4)
GAPPED = Submodel(kept=(0, 2), width=3)
MIDDLE = Submodel(kept=(1,), width=1)
TOLERANCE = 1e-4

Answer = dict[str, Any]


@dataclass
class Probe:
    """One process of the probe: a line in, a line out."""

    process: subprocess.Popen[str]
    folder: Path
    files: int = field(default=0)

    def __call__(self, *words: object) -> Answer:
        """The answer to one command. Plans and requests are handed over as files."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(" ".join(self._word(word) for word in words) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the probe ended with {self.process.wait()}"
        answer: Answer = json.loads(line)
        return answer

    def _word(self, word: object) -> str:
        if isinstance(word, Request):
            word = [word]
        if not isinstance(word, Plan | list):
            return str(word)
        self.files += 1
        path = self.folder / f"{self.files}"
        path.write_bytes(word.to_json() if isinstance(word, Plan) else _rows(word))
        return str(path)


def _rows(requests: list[Request]) -> bytes:
    parts = [np.array([len(requests), requests[0].tokens])]
    parts += [r.input_ids for r in requests] + [r.token_types for r in requests]
    return np.concatenate([*parts, [r.length for r in requests]]).astype("<i4").tobytes()


@pytest.fixture(scope="module")
def program() -> Path:
    architecture = MACHINES.get(platform.machine())
    if architecture is None:
        pytest.skip(f"there is no native agent for {platform.machine()}")
    sources = Sources((PROBE, *sorted(RUNTIME.glob("*.c"))), tuple(sorted(RUNTIME.glob("*.h"))))
    return build_agent(architecture, sources=sources)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(CONFIG, tmp_path_factory.mktemp("bundles"), submodels=(GAPPED, MIDDLE))[0]


@contextmanager
def probe_of(
    program: Path, bundle: Bundle, folder: Path, *, depth: int = 4, threads: int = 2, rate: int = 0
) -> Iterator[Probe]:
    """A probe over a bundle; it must end well."""
    files = folder / f"probe-{len(list(folder.iterdir()))}"
    files.mkdir()
    command = [str(program), str(bundle.path), bundle.digest, str(threads), str(depth), str(rate)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | ENVIRONMENT
    )
    try:
        yield Probe(process, files)
    except BaseException:
        process.kill()
        raise
    finally:
        assert process.stdin is not None
        process.stdin.close()
        code = process.wait()
        assert process.stdout is not None
        process.stdout.close()
    assert code == 0


@pytest.fixture
def probe(program: Path, made: Bundle, tmp_path: Path) -> Iterator[Probe]:
    with probe_of(program, made, tmp_path) as probe:
        yield probe


@contextmanager
def oracle_of(bundle: Bundle) -> Iterator[Executor]:
    engine = TorchEngine(bundle, threads=2)
    with Executor(bundle, engine, threads=2, queue_depth=4) as executor:
        yield executor
    engine.close()


@pytest.fixture(scope="module")
def oracle(made: Bundle) -> Iterator[Executor]:
    with oracle_of(made) as executor:
        yield executor


def mixed(seed: int) -> dict[tuple[int, int], Fidelity]:
    generator = random.Random(seed)
    choices: tuple[Fidelity, ...] = (2, 3, 4, 5, 6, 32)
    return {(layer, index): generator.choice(choices) for layer in range(12) for index in range(12)}


def plan_of(bundle: Bundle, submodel: Submodel = WHOLE, seed: int | None = None, **options: Any) -> Plan:
    """4 bits everywhere, or any mixture."""
    chosen = mixed(seed or 0)
    return hand_plan(
        bundle.manifest, submodel, lambda layer, index: 4 if seed is None else chosen[layer, index], **options
    )


def relative(values: Any, wanted: Any) -> float:
    got, right = np.array(values, np.float64).ravel(), np.array(wanted, np.float64).ravel()
    assert got.shape == right.shape
    return float(np.abs(got - right).max() / np.abs(right).max())


def require_same(answer: Answer, wanted: RequestOutcome) -> None:
    """Everything of two requests that is not a time."""
    assert "error" not in answer, answer
    assert relative(answer["hidden"], wanted.hidden) <= TOLERANCE
    if wanted.logits:
        assert relative(answer["logits"], wanted.logits) <= TOLERANCE
    assert answer["planned_bytes"] == wanted.planned_bytes
    assert answer["embed_bytes"] == wanted.embed_bytes
    assert [row["bytes"] for row in answer["trace"]] == [row.bytes for row in wanted.trace]


def require_sane(answer: Answer) -> None:
    """What holds of the times of any request."""
    assert answer["stall_ns"] == sum(row["stall_ns"] for row in answer["trace"]) < answer["latency_ns"]
    end_ns = answer["embed_io_ns"] + answer["embed_compute_ns"]
    for row in answer["trace"]:
        if row["bytes"]:
            assert 0 < row["io_start_ns"] < row["io_end_ns"] <= row["compute_start_ns"]
        else:
            assert (row["io_start_ns"], row["io_end_ns"], row["stall_ns"]) == (0, 0, 0)
        assert end_ns <= row["compute_start_ns"] < row["compute_end_ns"]
        assert 0 <= row["decompress_ns"] < row["compute_end_ns"] - row["compute_start_ns"]
        end_ns = row["compute_end_ns"]
    assert end_ns + answer["head_ns"] <= answer["latency_ns"]


# ------------------------------------------------------------------ as the Python executor


@pytest.mark.parametrize("fidelity", FIDELITIES)
def test_every_fidelity_cold_and_warm(
    probe: Probe, oracle: Executor, made: Bundle, fidelity: Fidelity
) -> None:
    plan = hand_plan(made.manifest, WHOLE, lambda layer, index: fidelity, preloaded=[(0, 0), (0, 1), (1, 0)])
    request = make_request(CONFIG, seed=fidelity)
    for kind in ("cold", "warm", "warm"):
        answer = probe("run", plan, request, kind, "direct")
        wanted = oracle.run(plan, request, "cold" if kind == "cold" else "warm", "direct")
        require_same(answer, wanted)
        require_sane(answer)
        assert answer["io_mode"] == wanted.io_mode


@pytest.mark.parametrize("depth", [1, 4, 8])
@pytest.mark.parametrize("submodel", [WHOLE, GAPPED, MIDDLE])
def test_mixtures_at_any_depth_width_and_queue(
    program: Path, made: Bundle, oracle: Executor, tmp_path: Path, submodel: Submodel, depth: int
) -> None:
    preloaded = [(0, 0)] if submodel.width == 1 else [(0, 0), (0, 2), (1, 1)]
    with probe_of(program, made, tmp_path, depth=depth) as probe:
        for seed in range(1, 4):
            plan = plan_of(made, submodel, seed, preloaded=preloaded)
            tight = plan.model_copy(update={"working_bytes": max(1, smallest_working_bytes(plan))})
            request = make_request(CONFIG, seed=seed)
            wanted = oracle.run(plan, request, "warm", "direct")
            for chosen in (plan, tight):
                answer = probe("run", chosen, request, "warm", "direct")
                require_same(answer, wanted)
                require_sane(answer)


@pytest.mark.parametrize("hidden", [64, 96])
def test_roberta_positions_no_token_types_no_head(program: Path, tmp_path: Path, hidden: int) -> None:
    config = small_config(head=None, hidden=hidden).model_copy(
        update={"family": "roberta", "position_offset": 2, "token_types": 0, "pad_id": 1}
    )
    bundle, _ = make_bundle(config, tmp_path)
    plan = plan_of(bundle)
    with probe_of(program, bundle, tmp_path) as probe, oracle_of(bundle) as oracle:
        for seed in range(3):
            request = make_request(config, seed=seed, length=24 - 7 * seed)
            answer = probe("run", plan, request, "cold", "direct")
            require_same(answer, oracle.run(plan, request, "cold", "direct"))
            assert answer["logits"] == []
        refused = probe("evaluate", plan, [request], 2, -1)
        assert (refused["error"], refused["what"]) == (
            "InputError",
            "A model without a head has no accuracy.",
        )


def test_a_large_vocabulary_reads_only_the_pages_of_its_tokens(program: Path, tmp_path: Path) -> None:
    config = small_config(hidden=96).model_copy(update={"vocab": 20_000})
    bundle, _ = make_bundle(config, tmp_path)
    plan = plan_of(bundle)
    with probe_of(program, bundle, tmp_path, depth=8) as probe, oracle_of(bundle) as oracle:
        for seed in range(4):
            request = make_request(config, tokens=24, length=24, seed=seed)
            answer = probe("run", plan, request, "cold", "direct")
            require_same(answer, oracle.run(plan, request, "cold", "direct"))
            assert answer["embed_bytes"] <= (2 * 24 + 4 + 2) * 4096


def test_load_exec_computes_after_the_last_read(probe: Probe, oracle: Executor, made: Bundle) -> None:
    plan = plan_of(made, seed=5, mode="load-exec")
    request = make_request(CONFIG)
    answer = probe("run", plan, request, "cold", "direct")
    require_same(answer, oracle.run(plan, request, "cold", "direct"))
    require_sane(answer)
    last_ns = max(row["io_end_ns"] for row in answer["trace"])
    assert all(row["compute_start_ns"] >= last_ns for row in answer["trace"])


def test_the_fixed_parts_alone(probe: Probe, oracle: Executor) -> None:
    request = make_request(CONFIG)
    answer, wanted = probe("fixed", request, "direct"), oracle.run_fixed(request, "direct")
    require_same(answer, wanted)
    assert (answer["planned_bytes"], answer["trace"]) == (wanted.embed_bytes, [])


def test_evaluation_scores_as_single_requests_do(probe: Probe, made: Bundle) -> None:
    plan = plan_of(made, GAPPED, seed=3, preloaded=[(0, 0), (1, 2)])
    requests = [make_request(CONFIG, seed=i, length=5 + 3 * (i * 5 % 7)) for i in range(7)]
    single = [probe("run", plan, request, "warm", "direct")["logits"] for request in requests]
    for batch in (1, 3, 100):
        assert relative(probe("evaluate", plan, requests, batch, -1)["logits"], single) <= 1e-5
    assert probe("run", plan, requests[0], "warm", "direct")["logits"] == single[0]
    assert probe("evaluate", plan, requests, 3, 2)["error"] == "stopped"
    assert probe("run", plan, requests[0], "warm", "direct")["logits"] == single[0]


def test_a_plan_whose_reads_are_not_in_layer_order(probe: Probe, oracle: Executor, made: Bundle) -> None:
    plan = plan_of(made, seed=9)
    orders = list(range(len(plan.shards)))
    random.Random(1).shuffle(orders)
    shards = tuple(s.model_copy(update={"order": o}) for s, o in zip(plan.shards, orders, strict=True))
    shuffled = plan.model_copy(update={"shards": shards})
    tight = shuffled.model_copy(update={"working_bytes": smallest_working_bytes(shuffled)})
    request = make_request(CONFIG)
    for chosen in (tight, plan, shuffled):
        answer = probe("run", chosen, request, "warm", "direct")
        require_same(answer, oracle.run(chosen, request, "warm", "direct"))
        state = probe("state")
        assert (state["ring_in_use"], state["ring_held"] <= chosen.working_bytes) == (0, True)


# ------------------------------------------------------------------ where the bytes came from


def require_storage(bundle: Bundle) -> None:
    if not direct_io_works(bundle.region_path(2)):
        pytest.skip(f"{bundle.path}: this filesystem has no direct IO, so nothing can be proven")


def warm_page_cache(bundle: Bundle) -> None:
    for path in bundle.path.iterdir():
        path.read_bytes()


def reasons(answer: Answer) -> list[str]:
    return [name for name in ("io_not_accounted", "not_from_storage", "not_cached") if answer[name]]


def test_direct_reads_are_valid_over_a_warm_page_cache(probe: Probe, made: Bundle) -> None:
    require_storage(made)
    plan = plan_of(made, preloaded=[(0, 0)])
    warm_page_cache(made)
    for kind in ("cold", "warm", "warm"):
        answer = probe("run", plan, make_request(CONFIG), kind, "direct")
        assert (answer["io_mode"], reasons(answer)) == ("direct", [])
        assert answer["storage_bytes"] == answer["planned_bytes"]
        assert answer["planned_bytes"] - answer["embed_bytes"] == plan.streamed_bytes + (
            plan.preloaded_bytes if kind == "cold" else 0
        )


def test_a_warm_page_cache_is_found_out(probe: Probe, made: Bundle) -> None:
    plan = plan_of(made, preloaded=[(0, 0)])
    warm_page_cache(made)
    for kind in ("warm", "cold"):
        answer = probe("run", plan, make_request(CONFIG), kind, "buffered")
        assert reasons(answer) == ["not_from_storage"]
        assert answer["storage_bytes"] < answer["planned_bytes"]


def test_buffered_reads_are_valid_after_eviction_unless_a_process_maps_the_file(
    probe: Probe, made: Bundle
) -> None:
    require_storage(made)
    plan = plan_of(made)
    warm_page_cache(made)
    probe("evict", "buffered")
    assert reasons(probe("run", plan, make_request(CONFIG), "warm", "buffered")) == []
    with made.region_path(4).open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
        assert any(mapped[::4096])
        probe("evict", "buffered")
        answer = probe("run", plan, make_request(CONFIG), "warm", "buffered")
        mapped.close()
    assert reasons(answer) == ["not_from_storage"]


def test_cached_requests_read_nothing_and_need_buffered_mode(probe: Probe, made: Bundle) -> None:
    plan = plan_of(made, preloaded=[(0, 0)])
    probe("evict", "buffered")
    answer = probe("run", plan, make_request(CONFIG), "cached", "buffered")
    assert (reasons(answer), answer["storage_bytes"]) == ([], 0)
    refused = probe("run", plan, make_request(CONFIG), "cached", "direct")
    assert (refused["error"], refused["remedy"]) == ("InputError", "Ask for buffered reads.")


def test_direct_io_that_is_served_from_memory_is_not_believed(program: Path, tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        pytest.skip("needs a tmpfs at /dev/shm")
    folder = shm / f"stifarm-test-{os.getpid()}-{os.urandom(4).hex()}"
    folder.mkdir()
    try:
        bundle, _ = make_bundle(CONFIG, folder)
        with probe_of(program, bundle, tmp_path) as probe:
            assert probe("mode", "direct")["io_mode"] == "buffered"
            answer = probe("run", plan_of(bundle), make_request(CONFIG), "cold", "direct")
            assert (answer["io_mode"], reasons(answer)) == ("buffered", ["not_from_storage"])
    finally:
        subprocess.run(["rm", "-r", str(folder)], check=True)


# ------------------------------------------------------------------ buffers


@pytest.mark.parametrize("depth", [1, 8])
def test_the_working_buffer_is_never_exceeded(
    program: Path, made: Bundle, oracle: Executor, tmp_path: Path, depth: int
) -> None:
    whole = plan_of(made, seed=6)
    least = smallest_working_bytes(whole)
    request = make_request(CONFIG)
    wanted = oracle.run(whole, request, "warm", "direct")
    with probe_of(program, made, tmp_path, depth=depth) as probe:
        for working_bytes in (least, least + 4096, least + 3 * 4096, whole.streamed_bytes, 1 << 62, least):
            plan = whole.model_copy(update={"working_bytes": working_bytes})
            for _ in range(3):
                require_same(probe("run", plan, request, "warm", "direct"), wanted)
            state = probe("state")
            assert (
                0 < state["ring_held"] <= state["ring_capacity"] <= min(working_bytes, whole.streamed_bytes)
            )
            assert state["ring_in_use"] == 0


def test_reads_wait_for_the_layer_whose_bytes_they_need(probe: Probe, made: Bundle) -> None:
    plan = hand_plan(made.manifest, WHOLE, lambda layer, index: 32)
    tight = plan.model_copy(update={"working_bytes": smallest_working_bytes(plan)})
    trace = probe("run", tight, make_request(CONFIG), "warm", "direct")["trace"]
    for below, above in pairwise(trace):
        assert above["io_start_ns"] >= below["compute_end_ns"], "one layer fills the buffer"


def test_storage_does_not_wait_at_the_border_of_two_layers(
    program: Path, made: Bundle, tmp_path: Path
) -> None:
    """At a rate at which a read takes much longer than a thread may have to wait for its CPU."""
    plan = hand_plan(made.manifest, WHOLE, lambda layer, index: (2, 3, 4, 5)[index])
    assert len(merged_reads(plan.streamed())) == len(plan.shards)
    with probe_of(program, made, tmp_path, depth=3, rate=200_000) as probe:
        trace = probe("run", plan, make_request(CONFIG), "warm", "direct")["trace"]
    for below, above in pairwise(trace):
        assert below["io_start_ns"] < above["io_start_ns"] < below["io_end_ns"] <= above["io_end_ns"]


def test_too_small_a_working_buffer_is_a_clear_error(probe: Probe, made: Bundle) -> None:
    plan = plan_of(made)
    needed = smallest_working_bytes(plan)
    load_exec = plan_of(made, mode="load-exec", working_bytes=2 * needed)
    for refused, least in (
        (plan.model_copy(update={"working_bytes": needed - 1}), needed),
        (load_exec, load_exec.streamed_bytes),
    ):
        answer = probe("run", refused, make_request(CONFIG), "warm", "direct")
        assert answer["error"] == "ResourceError"
        assert answer["remedy"] == f"Plan with a working buffer of at least {least} bytes."


def test_preload_buffer_persists_shrinks_from_the_top_and_is_refilled(probe: Probe, made: Bundle) -> None:
    def held(answer: Answer) -> list[list[int]]:
        listed: list[list[int]] = answer["preloaded"]
        return listed

    request = make_request(CONFIG)
    large = plan_of(made, preloaded=[(0, i) for i in range(4)] + [(1, 0), (1, 1)])
    probe("run", large, request, "cold", "direct")
    state = probe("state")
    assert held(state) == [[0, i, 4] for i in range(4)] + [[1, 0, 4], [1, 1, 4]]
    assert state["preload_held"] == state["preload"] == large.preloaded_bytes

    small = plan_of(made, preloaded=[(0, 0), (0, 1)])
    probe("fill", small, "direct")
    assert held(probe("state")) == [[0, 0, 4], [0, 1, 4]]
    before = probe("state")["fetched"]
    probe("fill", large, "direct")
    if direct_io_works(made.region_path(4)):
        missing = large.preloaded_bytes - small.preloaded_bytes
        assert probe("state")["fetched"] - before == missing, "only what is missing is read"
    other = plan_of(made, preloaded=[(2, 3)], preload_bytes=large.preloaded_bytes)
    probe("fill", other, "direct")
    assert held(probe("state")) == [[2, 3, 4]]
    finer = hand_plan(made.manifest, WHOLE, lambda layer, index: 6, preloaded=[(2, 3)])
    answer = probe("run", finer, request, "warm", "direct")
    assert answer["planned_bytes"] == finer.streamed_bytes + answer["embed_bytes"]
    assert held(probe("state")) == [[2, 3, 6]]
    assert probe("reset")["preloaded"] == []
    assert (probe("state")["preload"], probe("state")["working"]) == (0, 0)
    assert reasons(probe("run", large, request, "warm", "direct")) == []


def test_memory_is_counted_by_part(probe: Probe, made: Bundle) -> None:
    plan = hand_plan(made.manifest, WHOLE, lambda layer, index: 32, preloaded=[(0, 0)])
    answer = probe("run", plan, make_request(CONFIG), "warm", "direct")
    state = probe("state")
    assert state["preload"] == plan.preloaded_bytes
    assert plan.streamed_bytes // 3 < state["working"] - answer["embed_bytes"] <= plan.working_bytes + 4096
    assert state["resident"] > 0
    assert state["activations"] > 0


# ------------------------------------------------------------------ layers apart


def test_a_layer_is_read_and_computed_apart(probe: Probe, made: Bundle) -> None:
    require_storage(made)
    probe("fixed", make_request(CONFIG), "direct")
    for fidelity in FIDELITIES:
        for width in (1, 4):
            length = sum(made.manifest.shard_version(2, i, fidelity).length for i in range(width))
            answer = probe("load", "direct", fidelity, width, 2)
            assert answer["bytes"] == answer["storage_bytes"] == length
            assert answer["duration_ns"] > 0
            assert (answer["decompress_ns"] > 0) == (fidelity != 32), "floats are used as they are"
            assert answer["compute_ns"] > 0


def test_layers_are_read_beside_compute(probe: Probe) -> None:
    probe("fixed", make_request(CONFIG), "direct")
    for fidelity in (3, 32):
        assert probe("beside", "direct", fidelity, 4, 20)["compute_ns"] > 0


# ------------------------------------------------------------------ what goes wrong


@pytest.mark.parametrize("depth", [1, 8])
def test_a_truncated_file_is_an_error_and_the_next_request_works(
    program: Path, tmp_path: Path, depth: int
) -> None:
    bundle, _ = make_bundle(CONFIG, tmp_path)
    plan = plan_of(bundle, preloaded=[(0, 0)])
    request, path = make_request(CONFIG), bundle.region_path(4)
    content = path.read_bytes()
    embeddings = bundle.path / "embeddings.bin"
    rows = embeddings.read_bytes()
    second = next(s for s in plan.streamed() if s.layer == 2)
    with probe_of(program, bundle, tmp_path, depth=depth) as probe:
        whole = probe("run", plan, request, "warm", "direct")["logits"]
        for cut, kind in ((second.offset + 100, "warm"), (0, "cold"), (second.offset, "cold")):
            os.truncate(path, cut)
            answer = probe("run", plan, request, kind, "direct")
            assert answer["error"] == "StorageReadError"
            assert f"{path.name}: ends at {cut}" in answer["what"]
            assert probe("state")["ring_in_use"] == 0
            path.write_bytes(content)
            assert probe("run", plan, request, "warm", "direct")["logits"] == whole
        os.truncate(embeddings, 0)
        assert "embeddings.bin: ends at 0" in probe("run", plan, request, "warm", "direct")["what"]
        assert "embeddings.bin: ends at 0" in probe("fixed", request, "direct")["what"]
        embeddings.write_bytes(rows)
        os.truncate(path, 0)
        assert probe("load", "direct", 4, 4, 0)["error"] == "StorageReadError"
        path.write_bytes(content)
        assert probe("run", plan, request, "warm", "direct")["logits"] == whole


def test_a_file_missing_or_short_at_opening_is_a_clear_error(program: Path, tmp_path: Path) -> None:
    bundle, _ = make_bundle(CONFIG, tmp_path)
    plan, path = plan_of(bundle), bundle.region_path(6)
    content = path.read_bytes()
    with probe_of(program, bundle, tmp_path) as probe:
        assert probe("state")["preloaded"] == []  # so the bundle was whole when it was opened
        path.unlink()
        answer = probe("run", plan, make_request(CONFIG), "warm", "direct")
        assert answer["error"] == "StorageReadError"
        assert answer["what"] == f"{path}: cannot be opened: No such file or directory."
        path.write_bytes(content[:-4096])
        answer = probe("mode", "buffered")
        assert answer["error"] == "StorageReadError"
        assert "it is truncated" in answer["what"]
        path.write_bytes(content)
        assert "logits" in probe("run", plan, make_request(CONFIG), "warm", "direct")


def test_a_damaged_shard_is_an_error_and_the_next_request_works(program: Path, tmp_path: Path) -> None:
    bundle, _ = make_bundle(CONFIG, tmp_path)
    for preloaded in ([], [(layer, index) for layer in range(3) for index in range(4)]):
        plan = plan_of(bundle, preloaded=preloaded)
        # The last outlier's position: outliers end the payload, positions before values.
        shard, version = next(
            (s, v)
            for s in plan.shards
            if (v := bundle.manifest.shard_version(s.source_layer, s.slice, 4)).outliers[5] > 0
        )
        position = shard.offset + version.payload_bytes - 4 * version.outliers[5] - 4
        path = bundle.region_path(4)
        content = path.read_bytes()
        with probe_of(program, bundle, tmp_path) as probe:
            whole = probe("run", plan, make_request(CONFIG), "warm", "direct")["logits"]
            probe("reset")
            path.write_bytes(content[:position] + b"\xff\xff\xff\xff" + content[position + 4 :])
            for kind in ("warm", "cold"):
                answer = probe("run", plan, make_request(CONFIG), kind, "direct")
                assert answer["error"] == "FormatError"
            state = probe("state")
            assert state["ring_in_use"] == 0
            assert [shard.source_layer, shard.slice, 4] not in state["preloaded"]
            path.write_bytes(content)
            assert probe("run", plan, make_request(CONFIG), "warm", "direct")["logits"] == whole


def test_plans_and_rows_that_do_not_fit_are_refused(probe: Probe, made: Bundle, tmp_path: Path) -> None:
    plan = plan_of(made)
    request = make_request(CONFIG)
    answer = probe("run", plan, make_request(CONFIG, tokens=20), "warm", "direct")
    assert (answer["error"], answer["what"]) == (
        "InputError",
        "The plan is for 24 tokens, the row has 20.",
    )
    other, _ = make_bundle(CONFIG, tmp_path, seed=2)
    answer = probe("run", plan_of(other), request, "warm", "direct")
    assert answer["error"] == "FormatError"
    moved = plan.shards[0].model_copy(update={"offset": plan.shards[0].offset + 4096})
    wrong = plan.model_copy(update={"shards": (moved, *plan.shards[1:])})
    answer = probe("run", wrong, request, "warm", "direct")
    assert (answer["error"], "lies at" in answer["what"]) == ("FormatError", True)
    for position, token, words in ((3, 200, "Token id 200 "), (3, -1, "Token id -1 ")):
        row = make_request(CONFIG)
        row.input_ids[position] = token
        assert words in probe("run", plan, row, "warm", "direct")["what"]
        assert words in probe("evaluate", plan, [request, row], 2, -1)["what"]
    row = make_request(CONFIG)
    row.token_types[0] = 2
    assert "token type" in probe("run", plan, row, "warm", "direct")["what"]
    row = make_request(CONFIG, tokens=49)
    assert "49 tokens do not fit a model of 48" in probe("fixed", row, "direct")["what"]
    assert "logits" in probe("run", plan, request, "warm", "direct")


def test_a_paced_request_takes_at_least_its_bytes_at_the_rate(
    program: Path, made: Bundle, tmp_path: Path
) -> None:
    plan, rate = hand_plan(made.manifest, WHOLE, lambda layer, index: 2), 4_000_000
    with probe_of(program, made, tmp_path, rate=rate) as probe:
        answer = probe("run", plan, make_request(CONFIG), "warm", "direct")
    assert answer["latency_ns"] >= answer["planned_bytes"] * 10**9 // rate
    assert answer["stall_ns"] > 0


# ------------------------------------------------------------------ under sanitizers


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(sanitizer: Any, oracle: Executor, tmp_path: Path) -> None:
    program = build_sanitized(sanitizer, PROBE)
    bundle, _ = make_bundle(CONFIG, tmp_path, submodels=(GAPPED, MIDDLE))
    requests = [make_request(CONFIG, seed=i, length=5 + 3 * i) for i in range(5)]
    path = bundle.region_path(4)
    content = path.read_bytes()
    for depth in (1, 8):
        with probe_of(program, bundle, tmp_path, depth=depth) as probe:
            for seed in range(3):
                plan = plan_of(bundle, seed=seed, preloaded=[(0, 0), (1, 1)])
                tight = plan.model_copy(update={"working_bytes": smallest_working_bytes(plan)})
                wanted = oracle.run(plan, requests[seed], "warm", "direct")
                for chosen, kind in ((plan, "cold"), (plan, "warm"), (tight, "warm"), (tight, "cold")):
                    answer = probe("run", chosen, requests[seed], kind, "direct")
                    assert relative(answer["logits"], wanted.logits) <= TOLERANCE
                    require_sane(answer)
            assert reasons(probe("run", plan, requests[0], "cached", "buffered")) == []
            assert len(probe("evaluate", plan, requests, 2, -1)["logits"]) == 2 * len(requests)
            probe("fixed", requests[0], "buffered")
            assert probe("beside", "direct", 3, 4, 10)["compute_ns"] > 0
            four = plan_of(bundle)
            for kind in ("warm", "cold"):
                os.truncate(path, 3 * 4096 + 5)
                assert probe("run", four, requests[0], kind, "direct")["error"] == "StorageReadError"
                path.write_bytes(content)
                assert "logits" in probe("run", four, requests[0], kind, "direct")
            probe("reset")
