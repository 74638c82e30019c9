"""Building, opening and verifying bundles: contents, determinism, every kind of damage, interruption."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sti_runtime.bundle import Bundle
from sti_runtime.bundle_build import build_bundle, estimated_bytes, require_space
from sti_runtime.errors import CheckpointError, DigestError, FormatError, InputError, ResourceError
from sti_runtime.manifest import ALIGNMENT, MANIFEST_CAP_BYTES, MANIFEST_NAME
from sti_runtime.model import HeadConfig, ModelConfig, all_submodels, tensor_shapes
from sti_runtime.pack import pack_version, unpack_version
from sti_runtime.quantize import fit_gobo
from sti_runtime.quantizer import Quantizer
from sti_runtime.records import canonical_json, sha256_hex
from sti_runtime.shard import F32, FIDELITIES, matrix_shapes, shard_matrices

CONFIG = ModelConfig(
    family="bert", layers=2, heads=3, hidden=48, ffn=96, vocab=6000, positions=20, position_offset=0,
    token_types=2, layer_norm_eps=1e-12, activation="gelu", pad_id=0,
    head=HeadConfig(pooling="cls", activation="tanh", labels=("negative", "positive")),
)  # fmt: skip
MODEL_DIGEST = "ab" * 32


def random_tensors(config: ModelConfig = CONFIG) -> dict[str, F32]:
    rng = np.random.default_rng(11)
    return {
        name: (rng.standard_t(4, shape) * 0.1).astype(np.float32)
        for name, shape in tensor_shapes(config).items()
    }


def build(root: Path, config: ModelConfig = CONFIG, **options: Any) -> Path:
    given: dict[str, Any] = {
        "model_digest": MODEL_DIGEST,
        "submodels": all_submodels(config.layers, config.heads),
        "untrained": True,
        "out_root": root,
    }
    return build_bundle(config, random_tensors(config), **(given | options))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """A bundle that a test may damage."""
    return Path(shutil.copytree(built, tmp_path / built.name))


def edit_manifest(path: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Change the manifest's JSON and name the folder after the result, as a liar would."""
    manifest = path / MANIFEST_NAME
    value = json.loads(manifest.read_bytes())
    change(value)
    data = canonical_json(value)
    manifest.write_bytes(data)
    return path.rename(path.parent / sha256_hex(data))


def test_holds_every_version_where_the_manifest_says(built: Path) -> None:
    bundle, tensors = Bundle.open(built, verify=True), random_tensors()
    assert bundle.digest == built.name == bundle.manifest.digest
    assert bundle.manifest.fidelities == FIDELITIES
    for bits in FIDELITIES:
        data = bundle.region_path(bits).read_bytes()
        assert len(data) % ALIGNMENT == 0
        for layer in range(CONFIG.layers):
            for index in range(CONFIG.heads):
                version = bundle.manifest.shard_version(layer, index, bits)
                payload = data[version.offset : version.offset + version.payload_bytes]
                matrices = shard_matrices(tensors, CONFIG, layer, index)
                assert payload == pack_version(matrices, bits).payload
                padding = data[version.offset + version.payload_bytes : version.offset + version.length]
                assert not any(padding)
                found = unpack_version(payload, matrix_shapes(CONFIG), bits, version.outliers)
                if bits == 32:
                    assert all(np.array_equal(found[name], matrices[name]) for name in matrices)


def test_resident_parameters_and_embeddings(built: Path) -> None:
    bundle, tensors = Bundle.open(built), random_tensors()
    resident = bundle.resident()
    expected = {
        name
        for name in tensors
        if name.startswith(("head.", "embeddings.norm.")) or ".norm." in name or name.endswith(".bias")
    }
    assert set(resident) == expected
    assert all(np.array_equal(resident[name], tensors[name]) for name in resident)
    data = (built / "embeddings.bin").read_bytes()
    assert len(data) % ALIGNMENT == 0
    assert [table.name for table in bundle.manifest.embeddings] == ["word", "position", "token_type"]
    for table in bundle.manifest.embeddings:
        weights = tensors[f"embeddings.{table.name}.weight"]
        assert table.offset % ALIGNMENT == 0
        for row in (0, table.rows - 1):
            start = table.offset + row * table.row_bytes
            assert data[start : start + table.row_bytes] == weights[row].tobytes()


def test_data_files_are_in_chunks_of_a_mebibyte(built: Path) -> None:
    files = {data.file: data for data in Bundle.open(built).manifest.files}
    lengths = [chunk.length for chunk in files["embeddings.bin"].chunks]
    assert lengths[:-1] == [1 << 20]
    assert 0 < lengths[-1] <= 1 << 20


def test_head_at_six_bits(tmp_path: Path) -> None:
    bundle, tensors = Bundle.open(build(tmp_path, head_encoding="gobo6"), verify=True), random_tensors()
    resident = bundle.resident()
    for name in ("head.pooler.weight", "head.classifier.weight"):
        assert np.array_equal(resident[name], fit_gobo(tensors[name], 6).dequantized())
    assert np.array_equal(resident["head.pooler.bias"], tensors["head.pooler.bias"])


@pytest.mark.parametrize(
    "changes",
    [
        {"head": None},
        {"token_types": 0, "head": HeadConfig(pooling="cls", activation="relu", labels=("a", "b"))},
        {"head": HeadConfig(pooling="mean", activation="none", labels=("a", "b", "c"))},
        {"hidden": 30, "ffn": 33},
    ],
)  # fmt: skip
def test_other_shapes_of_model(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = ModelConfig(**{**dict(CONFIG), "vocab": 50, **changes})
    path = build(tmp_path, config, fidelities=(4, 32), head_encoding="gobo6")
    bundle = Bundle.open(path, verify=True)
    assert bundle.manifest.fidelities == (4, 32)
    assert len(bundle.manifest.embeddings) == (3 if config.token_types else 2)
    assert sum(bundle.file_sizes().values()) <= estimated_bytes(config, (4, 32))


def test_same_input_same_digest(built: Path, tmp_path: Path) -> None:
    again = build(tmp_path)
    assert again.name == built.name
    for file in built.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes()


def test_an_existing_bundle_is_returned_without_building(built: Path) -> None:
    reported: list[int] = []
    assert build(built.parent, progress=lambda done, total: reported.append(done)) == built
    assert reported == []
    other = build(
        built.parent, quantizer=Quantizer("none"), progress=lambda done, total: reported.append(done)
    )
    assert other != built
    assert reported == list(range(1, CONFIG.layers * CONFIG.heads + 1))


def test_the_manifest_records_how_the_bundle_was_quantized(tmp_path: Path) -> None:
    quantizers = [Quantizer(), Quantizer("none"), Quantizer("converged"), Quantizer("converged", -500)]
    bundles = [Bundle.open(build(tmp_path, quantizer=q, fidelities=(6,)), verify=True) for q in quantizers]
    assert [b.manifest.quantizer.label for b in bundles] == [
        "gobo-refined", "gobo-unrefined", "gobo-converged", "gobo-converged:-500",
    ]  # fmt: skip
    outliers = [sum(sum(v.outliers) for v in b.manifest.region(6).versions) for b in bundles]
    assert outliers[0] == outliers[1] == outliers[2] < outliers[3]


def test_an_existing_but_truncated_bundle_is_built_anew(copy: Path) -> None:
    region = copy / "k2.bin"
    region.write_bytes(region.read_bytes()[:-ALIGNMENT])
    assert build(copy.parent) == copy
    Bundle.open(copy, verify=True)
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_verify_reports_progress(built: Path) -> None:
    bundle, seen = Bundle.open(built), []
    bundle.verify(lambda done, total: seen.append((done, total)))
    total = sum(bundle.file_sizes().values())
    assert seen[-1] == (total, total)


@pytest.mark.parametrize("name", ["k3.bin", "k32.bin", "embeddings.bin", "resident.bin"])
def test_a_flipped_byte_is_found_and_located(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    at = len(data) - 5000
    data[at] ^= 1
    (copy / name).write_bytes(data)
    bundle = Bundle.open(copy)
    with pytest.raises(DigestError) as caught:
        bundle.verify()
    chunk = next(
        c for file, c in bundle.manifest.all_chunks() if file == name and c.offset <= at < c.offset + c.length
    )
    assert str(copy / name) in str(caught.value)
    assert f"offset {chunk.offset} are damaged" in str(caught.value)
    assert "build or deploy" in caught.value.remedy
    with pytest.raises(DigestError):
        Bundle.open(copy, verify=True)


@pytest.mark.parametrize("name", ["k4.bin", "embeddings.bin", "resident.bin"])
@pytest.mark.parametrize("by", [-1, -ALIGNMENT, 1])
def test_a_file_of_a_wrong_size_is_refused(copy: Path, name: str, by: int) -> None:
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:by] if by < 0 else data + bytes(by))
    with pytest.raises(FormatError, match=rf"{name}: has {len(data) + by} bytes"):
        Bundle.open(copy)


@pytest.mark.parametrize("name", ["k6.bin", "resident.bin", "embeddings.bin", MANIFEST_NAME])
def test_a_missing_file_is_refused(copy: Path, name: str) -> None:
    (copy / name).unlink()
    with pytest.raises(FormatError, match=name):
        Bundle.open(copy)


def test_a_link_is_refused(copy: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (copy / "k6.bin").rename(elsewhere)
    (copy / "k6.bin").symlink_to(elsewhere)
    with pytest.raises(FormatError, match="not a plain file"):
        Bundle.open(copy)


@pytest.mark.parametrize("keep", [0, 1, 1000, -1])
def test_a_truncated_manifest_is_refused(copy: Path, keep: int) -> None:
    manifest = copy / MANIFEST_NAME
    manifest.write_bytes(manifest.read_bytes()[:keep])
    with pytest.raises(FormatError, match=MANIFEST_NAME):
        Bundle.open(copy)


@pytest.mark.parametrize("tail", [b" ", b"\n", b"{}", b"\x00"])
def test_bytes_after_the_manifest_are_refused(copy: Path, tail: bytes) -> None:
    manifest = copy / MANIFEST_NAME
    manifest.write_bytes(manifest.read_bytes() + tail)
    with pytest.raises(FormatError, match=MANIFEST_NAME):
        Bundle.open(copy)


def test_an_over_long_manifest_is_refused(copy: Path) -> None:
    with (copy / MANIFEST_NAME).open("ab") as stream:
        stream.truncate(MANIFEST_CAP_BYTES + 1)
    with pytest.raises(FormatError, match="more than the"):
        Bundle.open(copy)


def test_an_edited_manifest_is_refused(copy: Path) -> None:
    manifest = copy / MANIFEST_NAME
    manifest.write_bytes(manifest.read_bytes().replace(b'"untrained":true', b'"untrained":false'))
    with pytest.raises(DigestError, match="not the folder's name"):
        Bundle.open(copy)


@pytest.mark.parametrize(
    "name", ["../k2.bin", "/etc/passwd", "a/b.bin", "..", ".hidden", "", "k2.bin\x00", "K2.bin"]
)
@pytest.mark.parametrize("part", ["regions", "files"])
def test_a_file_name_that_escapes_is_refused(copy: Path, name: str, part: str) -> None:
    def escape(manifest: dict[str, Any]) -> None:
        manifest[part][0]["file"] = name

    with pytest.raises(FormatError, match=rf"{part}\.0\.file: "):
        Bundle.open(edit_manifest(copy, escape))


LIES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "version": (lambda m: m.update(version=2, extra=1), "bundle version 2, this stifarm knows 1"),
    "older version": (lambda m: m.update(version=0), "version: Input should be 1"),
    "format": (lambda m: m.update(format="other"), "format"),
    "unknown field": (lambda m: m.update(extra=1), "extra"),
    "payload": (lambda m: m["regions"][0]["versions"][0].update(payload_bytes=4095), "payload of 4095"),
    "outlier count": (
        lambda m: m["regions"][0]["versions"][0].update(outliers=[10**9] * 6), "Outlier counts"),
    "overlap": (lambda m: m["regions"][0]["versions"][1].update(offset=0), "hole, overlap"),
    "missing version": (lambda m: m["regions"][0]["versions"].pop(), "versions for"),
    "resident missing": (lambda m: m["resident"].pop(), "resident tensors"),
    "resident twice": (lambda m: m["resident"].append(m["resident"][0]), "resident tensors"),
    "resident outside": (lambda m: m["resident"][0].update(offset=1 << 40), "outside"),
    "resident short": (lambda m: m["resident"][0].update(length=4), "length of its shape"),
    "resident packed": (lambda m: m["resident"][0].update(encoding="gobo6"), "6 bits"),
    "table missing": (lambda m: m["embeddings"].pop(), "embedding tables"),
    "table short": (lambda m: m["embeddings"][0].update(rows=5), "embedding tables"),
    "table outside": (lambda m: m["embeddings"][0].update(offset=1 << 40), "outside"),
    "data file renamed": (lambda m: m["files"][1].update(file="other.bin"), "outside"),
    "many layers": (lambda m: m["model"].update(layers=2**30), "versions for"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_contradicts_itself_is_refused(copy: Path, lie: str) -> None:
    change, message = LIES[lie]
    with pytest.raises(FormatError, match=message) as caught:
        Bundle.open(edit_manifest(copy, change))
    assert MANIFEST_NAME in str(caught.value)


def test_a_fidelity_that_the_bundle_lacks(tmp_path: Path) -> None:
    bundle = Bundle.open(build(tmp_path, fidelities=(2,)))
    with pytest.raises(InputError, match="not 4 bits"):
        bundle.region_path(4)


@pytest.mark.parametrize("fidelities", [(), (4, 7)])
def test_unknown_fidelities_are_refused(tmp_path: Path, fidelities: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="Choose among"):
        build(tmp_path, fidelities=fidelities)


@pytest.mark.parametrize("damage", ["missing", "shape", "type", "nan", "infinite"])
def test_unsound_tensors_are_refused_by_name(tmp_path: Path, damage: str) -> None:
    name, tensors = "layers.1.ffn.in.weight", random_tensors()
    if damage == "missing":
        del tensors[name]
    elif damage == "shape":
        tensors[name] = tensors[name][:-1]
    elif damage == "type":
        tensors[name] = tensors[name].astype(np.float64)
    else:
        tensors[name][3, 5] = np.nan if damage == "nan" else -np.inf
    with pytest.raises(CheckpointError, match=name):
        build_bundle(
            CONFIG, tensors, model_digest=MODEL_DIGEST, submodels=all_submodels(2, 3), untrained=True,
            out_root=tmp_path,
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_said_before_writing(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="free, the bundle needs"):
        require_space(tmp_path, 2**62)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written there"):
        build(tmp_path / "file")


def test_an_interrupted_build_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


# Builds in another process: argv is the root; a line is printed per shard and one is awaited.
_CHILD = """
import resource, sys
from pathlib import Path
from tests.unit.test_bundle import build
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
def progress(done, total):
    print(done, flush=True)
    if len(sys.argv) == 2:
        sys.stdin.readline()
print(build(Path(sys.argv[1]), progress=progress))
"""
_REPOSITORY = Path(__file__).parents[2]


def start_build(root: Path) -> subprocess.Popen[str]:
    """A build in another process, stopped after its first shard until told to go on."""
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(root)],
        cwd=_REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "1\n"
    return child


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    # The kernel refuses to let any file grow past the limit: the write fails as on a full disk.
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, str(tmp_path), "50000"],
        cwd=_REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert child.returncode == 1
    assert "ResourceError" in child.stderr
    assert f"{tmp_path}: storage ran out" in child.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_killed_build_does_not_confuse_the_next(built: Path, tmp_path: Path) -> None:
    child = start_build(tmp_path)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert [path.name.startswith(".build-") for path in tmp_path.iterdir()] == [True]
    path = build(tmp_path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.name == built.name
    Bundle.open(path, verify=True)


def test_two_builds_of_the_same_bundle_at_once(built: Path, tmp_path: Path) -> None:
    child = start_build(tmp_path)
    path = build(tmp_path)
    out, _ = child.communicate("\n" * 10)
    assert child.returncode == 0
    assert out.split()[-1] == str(path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.name == built.name
