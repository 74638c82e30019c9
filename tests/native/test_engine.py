"""The native engine's arithmetic against the torch engine's, on every instruction set there is to run."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from orchestrator.agent_push import MACHINES
from orchestrator.toolchain import Sources, build_agent
from sti_runtime.bundle import Bundle
from sti_runtime.bundle_build import build_bundle
from sti_runtime.engine import LoadedShard
from sti_runtime.manifest import EMBEDDINGS_FILE
from sti_runtime.model import HeadConfig, ModelConfig, all_submodels, kept_layers
from sti_runtime.shard import F32, FIDELITIES
from sti_runtime.torch_engine import TorchEngine
from tests.agents import QEMU
from tests.bundles import HEAD, make_bundle, random_tensors
from tests.native.sanitized import ENVIRONMENT, RUNTIME, Sanitizer, build_sanitized

PROBE = Path(__file__).with_name("engine_probe.c")
KERNELS_CHECK = Path(__file__).with_name("kernels_check.c")
TOLERANCE = 1e-4
"""Largest difference of fp32 from torch, relative to the largest value."""

INT8_COSINE = 0.998
"""Least cosine of int8's hidden states to those of fp32 with the same weights."""

NO_SUCH_ISA = 3
FEW_TOKENS = 24


def config(**changes: Any) -> ModelConfig:
    """A small BERT, with changes."""
    fields = {
        "family": "bert", "layers": 3, "heads": 4, "hidden": 64, "ffn": 128, "vocab": 200, "positions": 80,
        "position_offset": 0, "token_types": 2, "layer_norm_eps": 1e-12, "activation": "gelu", "pad_id": 0,
        "head": HEAD,
    }  # fmt: skip
    return ModelConfig.model_validate(fields | changes)


def labels(count: int) -> tuple[str, ...]:
    return tuple(f"label {i}" for i in range(count))


CONFIGS = {
    "bert": config(),
    "distilbert": config(
        family="distilbert", token_types=0,
        head=HeadConfig(pooling="cls", activation="relu", labels=labels(3)),
    ),
    "roberta": config(
        family="roberta", position_offset=2, token_types=1, pad_id=1, layer_norm_eps=1e-5, layers=2
    ),
    "uneven": config(
        hidden=60, heads=3, ffn=75, layers=2, activation="relu",
        head=HeadConfig(pooling="mean", activation="none", labels=labels(37)),
    ),
    "narrow": config(hidden=36, heads=6, ffn=42, layers=2, activation="gelu_tanh", head=None),
    "wide": config(hidden=264, heads=3, ffn=2700, layers=1),
}  # fmt: skip
SHAPES = ("bert", "distilbert", "roberta")


@dataclass(frozen=True)
class Pass:
    """One batch through one submodel. Shapes: ids, types [B, L]; lengths [B]; fidelities [depth][width]."""

    layers: tuple[int, ...]
    fidelities: tuple[tuple[int, ...], ...]
    ids: npt.NDArray[np.int32]
    types: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]

    @property
    def width(self) -> int:
        return len(self.fidelities[0])

    def text(self) -> str:
        """What the probe reads."""
        rows, tokens = self.ids.shape
        head = [len(self.layers), self.width, rows, tokens]
        parts = (
            head,
            self.layers,
            np.ravel(self.fidelities),
            self.lengths,
            self.ids.ravel(),
            self.types.ravel(),
        )
        return "\n".join(" ".join(map(str, part)) for part in parts) + "\n"


@dataclass(frozen=True)
class Result:
    """Shapes: logits [B, labels], hidden [B, L, H]."""

    logits: F32
    hidden: F32


@dataclass(frozen=True)
class Case:
    """A bundle, passes over it and what the torch engine makes of them."""

    bundle: Bundle
    passes: tuple[Pass, ...]
    expected: tuple[Result, ...]

    def short(self) -> Case:
        """Its passes of few tokens, batches among them."""
        chosen = [number for number, each in enumerate(self.passes) if each.ids.size <= FEW_TOKENS]
        assert {len(self.passes[number].ids) for number in chosen} > {1}
        return Case(
            self.bundle,
            tuple(self.passes[number] for number in chosen),
            tuple(self.expected[number] for number in chosen),
        )


# ------------------------------------------------------------------ cases


def make_pass(
    model: ModelConfig, seed: int, layers: tuple[int, ...], fidelities: tuple[tuple[int, ...], ...],
    rows: int, tokens: int,
) -> Pass:  # fmt: skip
    rng = np.random.default_rng(seed)
    return Pass(
        layers=layers,
        fidelities=fidelities,
        ids=rng.integers(0, model.vocab, (rows, tokens), np.int32),
        types=rng.integers(0, max(1, model.token_types), (rows, tokens), np.int32),
        lengths=rng.integers(1, tokens + 1, rows, np.int32),
    )


def all_submodels_at_all_fidelities(bundle: Bundle) -> tuple[Pass, ...]:
    """Every submodel of the bundle at every fidelity, and at a mixture; short sequences."""
    model = bundle.manifest.model
    passes: list[Pass] = []
    for submodel in bundle.manifest.submodels:
        for fidelity in (*FIDELITIES, None):
            rng = np.random.default_rng(len(passes))
            fidelities = tuple(
                tuple(
                    int(rng.choice(FIDELITIES)) if fidelity is None else fidelity
                    for _ in range(submodel.width)
                )
                for _ in submodel.kept
            )
            passes.append(make_pass(model, len(passes), submodel.kept, fidelities, 1, 5 + len(passes) % 9))
    return tuple(passes)


def all_sorts(bundle: Bundle) -> tuple[Pass, ...]:
    """Batches and sequences of all sorts, from one token on; every fidelity, and mixtures."""
    model = bundle.manifest.model
    passes: list[Pass] = []
    for i, fidelity in enumerate((*FIDELITIES, None, None, None)):
        rng = np.random.default_rng(100 + i)
        depth, width = int(rng.integers(1, model.layers + 1)), int(rng.integers(1, model.heads + 1))
        if i == 6:
            depth, width = model.layers, model.heads
        fidelities = tuple(
            tuple(int(rng.choice(FIDELITIES)) if fidelity is None else fidelity for _ in range(width))
            for _ in range(depth)
        )
        tokens = 1 if i == 7 else int(rng.integers(1, 71))
        rows = 1 if i == 7 else int(rng.integers(1, 4))
        passes.append(make_pass(model, i, kept_layers(model.layers, depth), fidelities, rows, tokens))
    return tuple(passes)


def embedding_table(bundle: Bundle, name: str) -> F32 | None:
    for table in bundle.manifest.embeddings:
        if table.name == name:
            count = table.rows * table.row_bytes // 4
            data = np.fromfile(bundle.path / EMBEDDINGS_FILE, "<f4", count, offset=table.offset)
            return data.astype(np.float32).reshape(table.rows, -1)
    return None


def load(bundle: Bundle, layer: int, slice_: int, fidelity: int) -> LoadedShard:
    version = bundle.manifest.shard_version(layer, slice_, fidelity)
    data = np.fromfile(bundle.region_path(fidelity), np.uint8, version.payload_bytes, offset=version.offset)
    return LoadedShard(slice=slice_, fidelity=fidelity, outliers=version.outliers, data=data)


def torch_result(bundle: Bundle, engine: TorchEngine, request: Pass) -> Result:
    model, tokens = bundle.manifest.model, request.ids.shape[1]
    words, positions, types = (embedding_table(bundle, name) for name in ("word", "position", "token_type"))
    assert words is not None
    assert positions is not None
    first = model.position_offset
    engine.allocate(request.width, tokens)
    logits, hidden = [], []
    for ids, type_ids, length in zip(request.ids, request.types, request.lengths, strict=True):
        engine.begin(
            words[ids],
            positions[first : first + tokens],
            None if types is None else types[type_ids],
            int(length),
        )
        for layer, fidelities in zip(request.layers, request.fidelities, strict=True):
            engine.decode([load(bundle, layer, s, fidelity) for s, fidelity in enumerate(fidelities)])
            engine.compute(layer)
        row_logits, row_hidden = engine.finish()
        logits.append(row_logits.copy())
        hidden.append(row_hidden.copy())
    return Result(np.stack(logits), np.stack(hidden))


def many_outliers(folder: Path) -> Bundle:
    """A bundle whose FFN weights are so large that a good part of them are outliers (docs/bundle.md)."""
    model = config(layers=1, heads=2, hidden=208, ffn=416)
    tensors = random_tensors(model)
    for name in ("layers.0.ffn.in.weight", "layers.0.ffn.out.weight"):
        tensors[name] = tensors[name] * np.float32(120)
    path = build_bundle(
        model,
        tensors,
        model_digest="0" * 64,
        submodels=all_submodels(1, 2),
        untrained=True,
        out_root=folder,
    )
    bundle = Bundle.open(path)
    assert sum(bundle.manifest.shard_version(0, 0, 4).outliers) > 10_000
    return bundle


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """A case for each shape: all submodels at all fidelities where the shape is a usual one."""
    made = {}
    for name in (*CONFIGS, "outliers"):
        folder = tmp_path_factory.mktemp(name)
        bundle = many_outliers(folder) if name == "outliers" else make_bundle(CONFIGS[name], folder)[0]
        engine = TorchEngine(bundle, threads=1)
        passes = all_sorts(bundle) + (all_submodels_at_all_fidelities(bundle) if name in SHAPES else ())
        made[name] = Case(bundle, passes, tuple(torch_result(bundle, engine, each) for each in passes))
        engine.close()
    return made


# ------------------------------------------------------------------ the probe


@cache
def executable(architecture: str, program: Path = PROBE) -> Path:
    """The program and the runtime, compiled as the agent is."""
    files = (program, *sorted(RUNTIME.glob("*.c")))
    return build_agent(architecture, sources=Sources(files, tuple(sorted(RUNTIME.glob("*.h")))))


def native_architecture() -> str:
    architecture = MACHINES.get(platform.machine())
    if architecture is None:
        pytest.skip(f"no agent runs on {platform.machine()}")
    return architecture


def emulated(architecture: str, cpu: str, program: Path = PROBE) -> tuple[str, ...]:
    """The command that runs the program on an emulated CPU."""
    emulator = shutil.which(QEMU[architecture])
    if emulator is None:
        pytest.skip(f"{QEMU[architecture]} is not installed (Debian package qemu-user)")
    return (emulator, "-cpu", cpu, str(executable(architecture, program)))


def start_probe(
    command: Sequence[str], bundle: Bundle, isa: str, mode: str, threads: int, text: str, cpus: str = "-"
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*command, str(bundle.path), bundle.digest, isa, mode, str(threads), cpus],
        input=text.encode(),
        capture_output=True,
        env=os.environ | ENVIRONMENT,
        timeout=300,
        check=False,
    )


def run_probe(
    command: Sequence[str],
    case: Case,
    isa: str,
    *,
    mode: str = "fp32",
    threads: int = 2,
    first: int | None = None,
) -> list[Result]:
    """Results of the case's passes (the first few of them). Skips the test where the CPU has no such ISA."""
    passes = case.passes[:first]
    done = start_probe(command, case.bundle, isa, mode, threads, "".join(each.text() for each in passes))
    if done.returncode == NO_SUCH_ISA:
        pytest.skip(f"this CPU has no {isa}")
    assert done.returncode == 0, done.stderr.decode()[-4000:]
    values, at, results = np.frombuffer(done.stdout, "<f4"), 0, []
    for expected in case.expected[:first]:
        parts = []
        for shape in (expected.logits.shape, expected.hidden.shape):
            count = int(np.prod(shape))
            parts.append(values[at : at + count].reshape(shape))
            at += count
        results.append(Result(*parts))
    assert at == values.size
    return results


def worst(found: Sequence[Result], expected: Sequence[Result]) -> float:
    """Largest difference of logits and hidden states, relative to each pass's largest value."""
    differences = [0.0]
    for ours, theirs in zip(found, expected, strict=False):
        for a, b in ((ours.logits, theirs.logits), (ours.hidden, theirs.hidden)):
            if b.size:
                differences.append(float(np.abs(a - b).max() / np.abs(b).max()))
    return max(differences) if np.isfinite(differences).all() else float("inf")


def cosine(a: F32, b: F32) -> float:
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


# ------------------------------------------------------------------ fp32

X86 = ("portable", "avx2", "avx512")
ARM = (("aarch64", "max", "neon-dotprod"), ("aarch64", "max", "neon"), ("aarch64", "max", "portable"),
       ("armv7", "max", "neon"), ("armv7", "max", "portable"))  # fmt: skip


@pytest.mark.parametrize("isa", X86)
@pytest.mark.parametrize("name", [*CONFIGS, "outliers"])
def test_every_submodel_and_fidelity_agrees_with_torch(cases: dict[str, Case], name: str, isa: str) -> None:
    if native_architecture() != "x86_64":
        pytest.skip("runs on x86-64")
    case = cases[name]
    found = run_probe((str(executable("x86_64")),), case, isa)
    assert len(found) == len(case.expected)
    assert worst(found, case.expected) <= TOLERANCE


@pytest.fixture(scope="module")
def bert_wide(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Two layers of BERT-base's width, at some fidelities and at a mixture of them."""
    model = config(layers=2, heads=12, hidden=768, ffn=3072)
    chosen = (2, 6, 32)
    bundle, _ = make_bundle(model, tmp_path_factory.mktemp("bert-wide"), fidelities=chosen)
    mixtures = (*((fidelity,) * 12 for fidelity in chosen), chosen * 4)
    passes = tuple(make_pass(model, seed, (0, 1), (row,) * 2, 1, 29) for seed, row in enumerate(mixtures))
    engine = TorchEngine(bundle, threads=1)
    expected = tuple(torch_result(bundle, engine, each) for each in passes)
    engine.close()
    return Case(bundle, passes, expected)


@pytest.mark.parametrize("isa", X86)
def test_bert_s_width_agrees_with_torch(bert_wide: Case, isa: str) -> None:
    if native_architecture() != "x86_64":
        pytest.skip("runs on x86-64")
    found = run_probe((str(executable("x86_64")),), bert_wide, isa)
    assert worst(found, bert_wide.expected) <= TOLERANCE


@pytest.mark.parametrize(("architecture", "cpu", "isa"), ARM)
def test_arm_agrees_with_torch(cases: dict[str, Case], architecture: str, cpu: str, isa: str) -> None:
    command = emulated(architecture, cpu)
    for name, each in cases.items():
        case = each.short() if name == "wide" else each  # an emulator takes 10 s for the long ones
        first = None if name == "bert" and isa != "portable" else 9
        assert worst(run_probe(command, case, isa, first=first), case.expected) <= TOLERANCE, name


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads_gives_the_same(cases: dict[str, Case], threads: int) -> None:
    command = (str(executable(native_architecture())),)
    for name, case in cases.items():
        two, other = (run_probe(command, case, "auto", threads=count, first=9) for count in (2, threads))
        for a, b in zip(two, other, strict=True):
            assert np.array_equal(a.hidden, b.hidden), name
            assert np.array_equal(a.logits, b.logits), name


def test_kernels_agree_with_scalar_arithmetic() -> None:
    native = (str(executable(native_architecture(), KERNELS_CHECK)),)
    done = subprocess.run(native, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "portable" in done.stdout.split()


@pytest.mark.parametrize(
    ("architecture", "cpu", "expected"),
    [
        ("aarch64", "max", ["portable", "neon", "neon-dotprod"]),
        ("aarch64", "cortex-a53", ["portable", "neon"]),
        ("armv7", "max", ["portable", "neon"]),
        ("armv7", "cortex-a8", ["portable"]),
    ],
)
def test_arm_kernels_agree_with_scalar_arithmetic(architecture: str, cpu: str, expected: list[str]) -> None:
    command = emulated(architecture, cpu, KERNELS_CHECK)
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == expected


# ------------------------------------------------------------------ int8


@pytest.fixture(scope="module")
def bert_like(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A four-layer BERT of 256 hidden, each fidelity once; what is expected is fp32's."""
    model = config(layers=4, heads=4, hidden=256, ffn=1024)
    bundle, _ = make_bundle(model, tmp_path_factory.mktemp("int8"))
    passes = tuple(
        make_pass(model, fidelity, (0, 1, 2, 3), ((fidelity,) * 4,) * 4, 2, 48) for fidelity in FIDELITIES
    )
    engine = TorchEngine(bundle, threads=1)
    expected = tuple(torch_result(bundle, engine, each) for each in passes)
    engine.close()
    return Case(bundle, passes, expected)


@pytest.mark.parametrize("isa", X86)
def test_int8_stays_close_to_fp32(bert_like: Case, cases: dict[str, Case], isa: str) -> None:
    if native_architecture() != "x86_64":
        pytest.skip("runs on x86-64")
    command = (str(executable("x86_64")),)
    for name, case in (cases | {"bert-like": bert_like}).items():
        for ours, fp32 in zip(run_probe(command, case, isa, mode="int8"), case.expected, strict=True):
            assert cosine(ours.hidden, fp32.hidden) >= INT8_COSINE, name
    exact = run_probe(command, bert_like, isa, mode="int8")[-1]
    assert worst([exact], [bert_like.expected[-1]]) <= TOLERANCE, "32-bit shards are computed in fp32"


@pytest.mark.parametrize(("architecture", "cpu", "isa"), ARM)
def test_int8_on_arm_is_as_close(bert_like: Case, architecture: str, cpu: str, isa: str) -> None:
    found = run_probe(emulated(architecture, cpu), bert_like, isa, mode="int8", first=2)
    for ours, fp32 in zip(found, bert_like.expected, strict=False):
        assert cosine(ours.hidden, fp32.hidden) >= INT8_COSINE


# ------------------------------------------------------------------ choice, errors


@pytest.mark.parametrize(
    ("architecture", "cpu", "there", "missing"),
    [
        ("aarch64", "cortex-a53", "neon", "neon-dotprod"),
        ("armv7", "cortex-a8", "portable", "neon"),
        ("armv7", "cortex-a7", "neon", "avx2"),
    ],
)
def test_older_arm_cpus_get_what_they_have(
    cases: dict[str, Case], architecture: str, cpu: str, there: str, missing: str
) -> None:
    command, case = emulated(architecture, cpu), cases["bert"]
    assert start_probe(command, case.bundle, missing, "fp32", 1, "").returncode == NO_SUCH_ISA
    for isa in ("auto", there):
        assert worst(run_probe(command, case, isa, first=3), case.expected) <= TOLERANCE


def test_threads_are_pinned_or_it_is_said_why_not(cases: dict[str, Case]) -> None:
    command, case = (str(executable(native_architecture())),), cases["bert"]
    allowed = ",".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
    text = case.passes[0].text()
    assert start_probe(command, case.bundle, "auto", "fp32", 3, text, allowed).returncode == 0
    for cpus in ("900", "100000"):
        refused = start_probe(command, case.bundle, "auto", "fp32", 2, text, cpus)
        assert (refused.returncode, b"cannot be pinned" in refused.stderr) == (1, True)


def test_damaged_outliers_are_refused_before_they_are_used(tmp_path: Path) -> None:
    bundle, _ = make_bundle(config(), tmp_path)
    version = bundle.manifest.shard_version(0, 0, 4)
    region = bundle.region_path(4)
    data = bytearray(region.read_bytes())
    assert sum(version.outliers) > 0
    start = version.offset + version.payload_bytes - 8 * sum(version.outliers)
    data[start : start + 4] = b"\xff\xff\xff\xff"
    region.chmod(0o644)
    region.write_bytes(data)
    request = make_pass(bundle.manifest.model, 1, (0,), ((4,),), 1, 3)
    done = start_probe((str(executable(native_architecture())),), bundle, "auto", "fp32", 1, request.text())
    assert (done.returncode, b"out of order or outside the matrix" in done.stderr) == (1, True)


# ------------------------------------------------------------------ sanitizers


@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(cases: dict[str, Case], sanitizer: Sanitizer) -> None:
    command = (str(build_sanitized(sanitizer, PROBE)),)
    checked = str(build_sanitized(sanitizer, KERNELS_CHECK))
    done = subprocess.run(
        [checked], capture_output=True, text=True, env=os.environ | ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for isa in done.stdout.split():
        for mode in ("fp32", "int8"):
            for name, case in cases.items():
                found = run_probe(command, case, isa, mode=mode, threads=3, first=9)
                assert mode == "int8" or worst(found, case.expected) <= TOLERANCE, name
