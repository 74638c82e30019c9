"""The C parsers of the stored formats and the records they mirror take and refuse the same documents.

What C refuses and Python lets pass is stated in formats.h: a key twice and U+0000 in a string.
"""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from agent.job_runner import read_job
from sti_runtime import bundle as bundle_module
from sti_runtime.bundle import Bundle
from sti_runtime.bundle_build import build_bundle
from sti_runtime.errors import FormatError, StifarmError
from sti_runtime.importance_profile import METHODS, ImportanceProfile
from sti_runtime.manifest import MANIFEST_CAP_BYTES, MANIFEST_NAME, Manifest
from sti_runtime.messages import (
    AndroidSetting,
    ComputeProfileUnit,
    Emulation,
    EvaluateUnit,
    ExecuteUnit,
    FileSetting,
    FixedProfileUnit,
    Gates,
    IdleSetting,
    IoProfileUnit,
    Job,
    Lease,
    ProbeUnit,
)
from sti_runtime.model import HeadConfig, ModelConfig, Submodel, all_submodels
from sti_runtime.pack import payload_layout
from sti_runtime.plan import Plan, merged_reads
from sti_runtime.plan_check import check_bundle
from sti_runtime.profile import DeviceProfile
from sti_runtime.quantizer import FISHER, GOBO
from sti_runtime.records import Record, canonical_json
from sti_runtime.shard import FIDELITIES, matrix_shapes
from tests.bundles import hand_plan, random_sensitivity, random_tensors
from tests.native.document_mutations import (
    changed_bytes,
    changed_structure,
    refused_by_c_alone,
    spelled_otherwise,
)
from tests.native.formats_probe import Ask, formats_probe
from tests.unit.planning_data import make_importance, make_profile


@pytest.fixture(scope="module")
def ask() -> Ask:
    return formats_probe()


# ------------------------------------------------------------------ real documents


def config(**changes: Any) -> ModelConfig:
    fields: dict[str, Any] = {
        "family": "bert", "layers": 2, "heads": 2, "hidden": 16, "ffn": 32, "vocab": 40, "positions": 16,
        "position_offset": 0, "token_types": 2, "layer_norm_eps": 1e-12, "activation": "gelu", "pad_id": 0,
        "head": HeadConfig(pooling="cls", activation="tanh", labels=("no", "jein \"\\\n é 😀")),
    }  # fmt: skip
    return ModelConfig(**(fields | changes))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    """Bundles of several models and codecs: tables and heads present or absent, heads packed, odd shapes."""
    models = (
        (config(), "gobo6", FIDELITIES, None),
        (config(head=None, token_types=0, layer_norm_eps=1e-05), "f32", (3, 32), None),
        (config(), "gobo6", (2, 6), random_sensitivity(config())),
        (
            config(hidden=36, ffn=20, head=HeadConfig(pooling="mean", activation="none", labels=("a", "b"))),
            "f32",
            (2,),
            None,
        ),
    )
    return [
        Bundle.open(
            build_bundle(
                model,
                random_tensors(model),
                model_digest="a" * 64,
                submodels=all_submodels(model.layers, model.heads),
                untrained=True,
                out_root=tmp_path_factory.mktemp("bundles"),
                fidelities=fidelities,
                head_encoding=encoding,  # type: ignore[arg-type]
                quantizer=GOBO if made is None else FISHER,
                sensitivity=made,
            )
        )
        for model, encoding, fidelities, made in models
    ]


def plans(bundle: Bundle) -> list[Plan]:
    manifest = bundle.manifest
    lowest, highest = manifest.fidelities[0], manifest.fidelities[-1]
    whole = Submodel(kept=(0, 1), width=2)
    mixed = hand_plan(manifest, whole, lambda i, j: highest if i == j else lowest, preloaded={(0, 0), (0, 1)})  # type: ignore[arg-type, return-value]
    even = hand_plan(manifest, whole, lambda i, j: lowest)  # type: ignore[arg-type, return-value]
    one = hand_plan(manifest, Submodel(kept=(1,), width=1), lambda i, j: highest, mode="load-exec")  # type: ignore[arg-type, return-value]
    rich = mixed.model_dump(mode="json") | {
        "importance": "b" * 64,
        "flags": ["untrained-submodels", "é\x7f\u2028"],
        "predicted": {
            "latency_ns": 5, "median_latency_ns": 4, "fixed_ns": 1, "stall_ns": 0,
            "layers": [
                {"io_start_ns": 0, "io_end_ns": 1, "compute_start_ns": 1, "compute_end_ns": 2**63 - 1}
            ],
        },
    }  # fmt: skip
    return [mixed, even, one, Plan.from_json(canonical_json(rich), source="rich")]


def jobs(bundle: Bundle) -> list[Job]:
    plan = plans(bundle)[0]
    none = Gates(
        max_temperature_milli_c=None,
        min_battery_percent=None,
        max_load_milli=None,
        min_free_bytes=None,
        wait_limit_s=0,
    )
    common: dict[str, Any] = {
        "format": "stifarm-job", "version": 1, "id": "job-1", "attempt": 1, "device": "0123456789abcdef",
        "lease": Lease(store="größe", counter=3, takeover=False), "bundle": bundle.digest, "task_data": None,
        "engine": "native", "threads": 2, "queue_depth": 4, "cpus": (), "machine_lock": None,
        "emulation": None, "gates": none, "units": (ProbeUnit(number=0, kind="probe"),),
    }  # fmt: skip
    busy = common | {
        "task_data": "c" * 64,
        "engine": "native-int8",
        "cpus": (0, 3, 4095),
        "machine_lock": "/run/lock/x y",
        "emulation": Emulation(
            io_bytes_per_s=10**7, io_mechanism="agent", cpu_share_milli=None, cpu_mechanism="cgroup-v2"
        ),
        "gates": Gates(
            max_temperature_milli_c=-5,
            min_battery_percent=20,
            max_load_milli=None,
            min_free_bytes=-(2**63),
            wait_limit_s=9,
            governor="performance",
            max_khz=2_400_000,
        ),
        "settings": (
            FileSetting(kind="file", path="/sys/devices/cpu/policy*/a.b", value="a b"),
            IdleSetting(kind="idle", latency_us=10),
            AndroidSetting(kind="android", namespace="global", key="low_power", value="~"),
        ),
        "units": (
            IoProfileUnit(number=0, kind="profile-io", widths=(1, 2), fidelities=(2, 32), repeats=3, seed=7),
            ComputeProfileUnit(
                number=1, kind="profile-compute", width=2, fidelities=(), warmups=0, repeats=1
            ),
            FixedProfileUnit(number=2, kind="profile-fixed", warmups=1, rows=(0, 1, 2**63 - 1)),
            ExecuteUnit(
                number=3, kind="execute", plan=plan, request_kind="spawn-cold", io_mode="direct",
                warmups=1, rows=(4, 5),
            ),
            EvaluateUnit(number=4, kind="evaluate", plan=plans(bundle)[3], batch=8),
        ),
    }  # fmt: skip
    return [Job(**common), Job(**busy)]


def parsed(records: Iterable[Record]) -> list[Any]:
    return [json.loads(record.to_json()) for record in records]


# ------------------------------------------------------------------ agreement


def damaged(documents: Sequence[Any], count: int, *, seed: int) -> list[bytes]:
    """``count`` documents made from these: changed in structure, in bytes, or only spelled otherwise."""
    rng = random.Random(seed)
    made: list[bytes] = [canonical_json(document) for document in documents]
    while len(made) < count:
        document, kind = rng.choice(documents), rng.random()
        if kind < 0.65:
            made.append(changed_structure(rng, document))
        elif kind < 0.95:
            made.append(changed_bytes(rng, canonical_json(document)))
        else:
            made.append(spelled_otherwise(rng, document))
    return made


def agree(
    ask: Ask, kind: str, documents: Sequence[bytes], verdict: Callable[[bytes], str | list[str]]
) -> tuple[int, int]:
    """Both sides on each document; ``verdict``: an error's name or the lines. Returns (taken, refused)."""
    counts = [0, 0]
    for data, answer in zip(documents, ask(kind, documents), strict=True):
        expected = verdict(data)
        if isinstance(expected, list) and refused_by_c_alone(data):
            expected = "FormatError"
        found = answer.error or answer.lines
        assert found == expected, (data[:3000], found, expected)
        counts[bool(answer.error)] += 1
    return counts[0], counts[1]


def verdict_of(make: Callable[[bytes], list[str]]) -> Callable[[bytes], str | list[str]]:
    def verdict(data: bytes) -> str | list[str]:
        try:
            return make(data)
        except StifarmError as error:
            return type(error).__name__

    return verdict


def test_manifests(ask: Ask, bundles: list[Bundle], tmp_path: Path) -> None:
    def make(data: bytes) -> list[str]:
        manifest = Manifest.from_json(data, source="manifest", cap_bytes=MANIFEST_CAP_BYTES)
        if manifest.to_json() != data:
            return ["FormatError"]
        try:
            bundle_module._check_contents(manifest, tmp_path)
        except StifarmError:
            return [manifest.digest, "0"]
        return [manifest.digest, "1"]

    def verdict(data: bytes) -> str | list[str]:
        made = verdict_of(make)(data)
        return "FormatError" if made == ["FormatError"] else made

    documents = damaged(parsed(b.manifest for b in bundles), 4000, seed=1)
    answers = ask("manifest", documents)
    taken, refused = agree(ask, "manifest", documents, verdict)
    assert taken > 100
    assert refused > 1000
    assert {a.lines[1] for a in answers if not a.error} == {"0", "1"}


def test_plans(ask: Ask, bundles: list[Bundle]) -> None:
    def reads(shards: Any) -> str:
        return "".join(
            f"{r.layer} {r.fidelity} {r.offset} {r.length} {len(r.shards)};" for r in merged_reads(shards)
        )

    def make(data: bytes) -> list[str]:
        plan = Plan.from_json(data, source="plan")
        whole = plan.to_json().decode().split("\n")
        return [plan.digest, plan.content_digest, reads(plan.streamed()), reads(plan.preloaded()), *whole]

    documents = damaged(parsed(p for b in bundles for p in plans(b)), 5000, seed=2)
    taken, refused = agree(ask, "plan", documents, verdict_of(make))
    assert taken > 300
    assert refused > 1000


def test_long_reads_are_merged_up_to_the_limit(ask: Ask) -> None:
    """Versions of a few hundred KiB, adjacent and not, in and out of order."""
    rng, made = random.Random(3), []
    for _ in range(200):
        n, m = rng.randint(1, 3), rng.randint(1, 6)
        shards, offset = [], 0
        for index in range(n * m):
            length = rng.choice((4096, 262144, 524288, 1048576, 2097152))
            offset = max(0, offset + rng.choice((0, 0, 0, 4096, -4096)))
            shards.append(
                {
                    "layer": index // m, "source_layer": index // m, "slice": index % m, "order": index,
                    "fidelity": rng.choice((2, 2, 2, 6)), "offset": offset, "length": length,
                    "preloaded": False,
                }
            )  # fmt: skip
            offset += length
        if rng.random() < 0.5:
            for shard, order in zip(shards, rng.sample(range(n * m), n * m), strict=True):
                shard["order"] = order
        made.append(
            canonical_json(
                {
                    "format": "stifarm-plan", "version": 1, "planner": "paper", "policy": "sti",
                    "mode": "pipeline", "slack": True, "bundle": "0" * 64, "importance": None,
                    "device_profile": "1" * 64, "target_ns": 1, "preload_bytes": 0, "working_bytes": 1,
                    "sequence_length": 8,
                    "submodel": {"kept": list(range(n)), "width": m}, "shards": shards,
                    "predicted": {
                        "latency_ns": 0, "median_latency_ns": 0, "fixed_ns": 0, "stall_ns": 0, "layers": [],
                    },
                    "within_target": True, "flags": [],
                }
            )
        )  # fmt: skip
    sizes = set()
    for data, answer in zip(made, ask("plan", made), strict=True):
        plan = Plan.from_json(data, source="plan")
        reads = merged_reads(plan.streamed())
        sizes |= {len(read.shards) for read in reads}
        assert answer.lines[2] == "".join(
            f"{r.layer} {r.fidelity} {r.offset} {r.length} {len(r.shards)};" for r in reads
        )
    assert len(sizes) > 3


def test_plans_and_their_bundle(ask: Ask, bundles: list[Bundle]) -> None:
    manifest = bundles[0].manifest
    text = manifest.to_json() + b"\n"

    def fit(data: bytes) -> str:
        try:
            problems = check_bundle(Plan.from_json(data, source="plan"), manifest)
        except StifarmError as error:
            return type(error).__name__
        return f"The plan does not fit bundle {manifest.digest[:12]}: {problems[0]}." if problems else "fits"

    rng = random.Random(4)
    documents = []
    for plan in parsed(plans(bundles[0]) + plans(bundles[1])):
        documents.append(canonical_json(plan))
        for _ in range(150):
            changed = json.loads(canonical_json(plan))
            shard = rng.choice(changed["shards"])
            field = rng.choice(("offset", "length", "fidelity", "fidelity"))
            shard[field] = (
                rng.choice(FIDELITIES) if field == "fidelity" else shard[field] + rng.choice((-4096, 4096))
            )
            if rng.random() < 0.3:
                layer = rng.randrange(4)
                changed["submodel"]["kept"][0] = layer
                for other in changed["shards"]:
                    other["source_layer"] = layer if other["layer"] == 0 else other["source_layer"]
            documents.append(canonical_json(changed))
    answers = ask("fit", [text + data for data in documents])
    seen = set()
    for data, answer in zip(documents, answers, strict=True):
        expected = fit(data)
        assert (answer.error if expected == "FormatError" else answer.lines[0]) == expected
        seen.add(re.sub(r"[0-9a-f]+", "", expected))
    assert len(seen) == 5, seen


def test_profiles(ask: Ask) -> None:
    made = make_profile(bundle="0" * 64, layer_ns={1: 5, 2: 9, 12: 70}, decompress_ns={2: 1, 32: 0})
    profile = json.loads(made.to_json()) | {"unfit": ["io: é"], "engine": "native"}
    documents = damaged([profile, profile | {"unfit": []}], 2500, seed=5)
    taken, refused = agree(
        ask, "profile", documents, verdict_of(lambda d: [DeviceProfile.from_json(d, source="p").digest])
    )
    assert taken > 200
    assert refused > 500


def test_importance(ask: Ask) -> None:
    def make(data: bytes) -> list[str]:
        profile = ImportanceProfile.from_json(data, source="importance")
        order = "".join(f"{layer * profile.slices + slice_} " for layer, slice_ in profile.ranking())
        return [profile.digest, order]

    rng = random.Random(6)
    records = [make_importance(3, 4, [rng.choice((1, 2, 3, -5)) for _ in range(12)]) for _ in range(3)]
    documents = parsed(records)
    for document in documents:
        for score in document["scores"]:
            score["score"]["correct"] = rng.choice((5, 6))
    documents += [documents[0] | {"method": method} for method in METHODS[1:]]
    levels = [
        {"submodel": {"kept": [0, 2], "width": 3}, "fidelity": k, "score": {"loss_nano": -k, "correct": k}}
        for k in (2, 32)
    ]
    documents += [documents[0] | {"levels": levels}, documents[0] | {"levels": []}]
    taken, refused = agree(ask, "importance", damaged(documents, 2500, seed=7), verdict_of(make))
    assert taken > 200
    assert refused > 500


def test_jobs(ask: Ask, bundles: list[Bundle], tmp_path: Path) -> None:
    path = tmp_path / "job.json"

    def make(data: bytes) -> list[str]:
        path.write_bytes(data)
        return read_job(path).to_json().decode().split("\n")

    documents = damaged(parsed(j for b in bundles for j in jobs(b)), 5000, seed=8)
    taken, refused = agree(ask, "job", documents, verdict_of(make))
    assert taken > 300
    assert refused > 1000


def test_shapes_that_no_list_can_have(ask: Ask, bundles: list[Bundle]) -> None:
    """Refused for what the list holds, without listing what it should hold."""
    plan, importance = parsed([plans(bundles[0])[0], make_importance(2, 2)])
    plan["submodel"]["width"] = importance["slices"] = 2**31 - 1
    for record, kind, document in ((Plan, "plan", plan), (ImportanceProfile, "importance", importance)):
        with pytest.raises(FormatError, match="layer-major"):
            record.from_json(canonical_json(document), source=kind)
        (answer,) = ask(kind, [canonical_json(document)])
        assert answer.error == "FormatError"
        assert "layer-major" in answer.lines[0]


@pytest.mark.parametrize("kind", ["manifest", "plan", "profile", "importance", "job"])
def test_a_newer_version_is_said_before_what_else_is_new(
    ask: Ask, bundles: list[Bundle], tmp_path: Path, kind: str
) -> None:
    """But not where the format is another, or the version is no integer below 2^63."""
    kinds: dict[str, tuple[Record, str]] = {
        "manifest": (bundles[0].manifest, "bundle"),
        "plan": (plans(bundles[0])[0], "plan"),
        "profile": (make_profile(bundle="5" * 64, layer_ns={1: 9}, decompress_ns={2: 1}), "device-profile"),
        "importance": (make_importance(2, 2), "importance"),
        "job": (jobs(bundles[0])[0], "job"),
    }
    record, name = kinds[kind]
    document = parsed([record])[0]
    version_error = "RefusedError" if kind == "job" else "FormatError"
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"version": 2, "new": 1}, version_error, f"{name} version 2, this (agent|stifarm) knows 1"),
        ({"version": 2**63 - 1, "format": document["format"]}, version_error, f"version {2**63 - 1}, this "),
        ({"version": 2, **dict.fromkeys(map(str, range(80)))}, version_error, "version 2, this "),
        ({"version": 10**30}, "FormatError", "not a valid .*version: "),
        ({"version": -1}, "FormatError", "not a valid .*version: "),
        ({"version": 2, "format": "stifarm-other"}, "FormatError", "not a valid .*format: "),
        ({"new": 1}, "FormatError", "not a valid .*new: "),
    ]
    documents = [canonical_json(document | changes) for changes, _, _ in cases]
    path = tmp_path / "record.json"
    for data, answer, (changes, error, words) in zip(documents, ask(kind, documents), cases, strict=True):
        path.write_bytes(data)
        with pytest.raises(StifarmError) as caught:
            read_job(path) if kind == "job" else type(record).read(path)
        assert (type(caught.value).__name__, answer.error) == (error, error), changes
        for what, remedy in ((caught.value.what, caught.value.remedy), answer.lines):
            assert re.search(words, what)
            assert ("Update the agent" in remedy) == ("this" in words)


def test_words(ask: Ask, bundles: list[Bundle]) -> None:
    """A refusal names the source, the place and the cause, and says what to do."""
    manifest, plan, job = (
        parsed([r])[0] for r in (bundles[0].manifest, plans(bundles[0])[0], jobs(bundles[0])[1])
    )
    manifest["regions"][1]["versions"][3]["outliers"][5] = -1
    plan["shards"][2]["fidelity"] = 7
    job["units"][3]["plan"]["shards"][1]["length"] = "x"
    job["units"][3]["plan"]["shards"][0]["more"] = 1
    damaged_ones = {"manifest": manifest, "plan": plan, "job": job}
    places = {
        "manifest": "manifest.json: not a valid Manifest: regions.1.versions.3.outliers.5: it should be from",
        "plan": "plan: not a valid Plan: shards.2.fidelity: it should be one of: 2, 3, 4, 5, 6, 32.",
        "job": "job.json: not a valid Plan: units.3.plan.shards.0.more: there is no such field.",
    }
    for kind, document in damaged_ones.items():
        (answer,) = ask(kind, [canonical_json(document)])
        assert answer.lines[0].startswith(places[kind])
        assert answer.lines[1] == "It is damaged, edited or written by another version; make it again."
    (answer,) = ask("job", [b" " * (16 << 20) + b"{"])
    assert answer.lines[0] == "job.json: 16777217 bytes, more than the 16777216 a Job may have."
    (answer,) = ask("plan", [b'{"a":[1,tru]}'])
    assert answer.lines[0] == "plan: not valid JSON: not a value at byte 8."


def test_opening_a_bundle(ask: Ask, bundles: list[Bundle], tmp_path: Path) -> None:
    source = bundles[0]

    def copy(name: str) -> Path:
        folder = tmp_path / name / source.digest
        shutil.copytree(source.path, folder)
        return folder

    whole, long, link, gone, renamed = (copy(name) for name in ("whole", "long", "link", "gone", "renamed"))
    with (long / "k2.bin").open("ab") as stream:
        stream.write(b"\0")
    (link / "k3.bin").rename(tmp_path / "k3.bin")
    (link / "k3.bin").symlink_to(tmp_path / "k3.bin")
    (gone / MANIFEST_NAME).unlink()
    renamed = renamed.rename(renamed.parent / ("0" * 64))
    plain = whole.rename(tmp_path / "plain")
    cases = [
        ("-", plain, ["", source.digest]),
        (source.digest, plain, ["", source.digest]),
        ("f" * 64, plain, ["DigestError", f"its SHA-256 is {source.digest}, not the {'f' * 64}"]),
        ("-", renamed, ["DigestError", f"its SHA-256 is {source.digest}"]),
        ("-", f"{renamed}/", ["DigestError", f"its SHA-256 is {source.digest}"]),
        ("-", long, ["FormatError", f"{long}/k2.bin: has "]),
        ("-", link, ["FormatError", f"{link}/k3.bin: is not a plain file."]),
        ("-", gone, ["FormatError", f"{gone}/{MANIFEST_NAME}: cannot be read: No such file or directory."]),
    ]
    answers = ask("open", [f"{digest}\n{folder}".encode() for digest, folder, _ in cases])
    for (_, _, (error, words)), answer in zip(cases, answers, strict=True):
        assert answer.error == error
        assert words in answer.lines[0]


def test_layouts(ask: Ask) -> None:
    rng, requests, expected = random.Random(12), [], []
    for _ in range(500):
        heads = rng.randint(1, 16)
        model = config(heads=heads, hidden=heads * rng.randint(1, 80), ffn=heads * rng.randint(1, 300))
        shapes = tuple(matrix_shapes(model).values())
        bits = rng.choice(FIDELITIES)
        outliers = tuple(0 if bits == 32 else rng.randint(0, out * in_) for out, in_ in shapes)
        layout = payload_layout(shapes, bits, outliers)
        starts = layout.outliers or (layout.payload_bytes,) * 6
        planes = "".join(f"{width} {offset};" for width, offset in layout.planes)
        expected.append(
            [str(layout.stream), planes, "".join(f"{s} " for s in starts), str(layout.payload_bytes)]
        )
        words = (model.layers, heads, model.hidden, model.ffn, bits, *outliers)
        requests.append(" ".join(map(str, words)).encode())
    assert [answer.lines for answer in ask("layout", requests)] == expected
