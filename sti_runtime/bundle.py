"""Opening and verifying a bundle folder. Format: docs/bundle.md; what it holds: ``manifest.Manifest``.

Opening reads the manifest only and checks that it agrees with itself, with the model it describes
and with the sizes of the files beside it; ``verify`` also checks every byte against its digest.
"""

from __future__ import annotations

import hashlib
import math
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sti_runtime.errors import DigestError, FormatError, InputError
from sti_runtime.manifest import (
    EMBEDDINGS_FILE,
    MANIFEST_CAP_BYTES,
    MANIFEST_NAME,
    RESIDENT_FILE,
    Chunk,
    Manifest,
    TensorEntry,
)
from sti_runtime.model import ModelConfig, tensor_shapes
from sti_runtime.pack import payload_layout, unpack_matrices
from sti_runtime.records import sha256_hex
from sti_runtime.shard import F32, matrix_shapes

_DIGEST_NAME = re.compile(r"[0-9a-f]{64}")
_READ_BYTES = 1 << 20
_MAKE_AGAIN = "Delete the folder, then build or deploy the bundle again."

_SHARDED = re.compile(r"layers\.\d+\.(attention\.[qkvo]|ffn\.(in|out))\.weight")

GOBO6_BITS = 6
GOBO6_TENSORS = ("head.pooler.weight", "head.classifier.weight")
"""Resident tensors that a bundle may store at six bits."""


def resident_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of what is never sharded and not an embedding table, in file order."""
    return {
        name: shape
        for name, shape in tensor_shapes(config).items()
        if not _SHARDED.fullmatch(name) and not is_embedding_table(name)
    }


def embedding_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Embedding tables as {"word": [vocab, hidden], …}, in file order."""
    return {
        name.split(".")[1]: shape for name, shape in tensor_shapes(config).items() if is_embedding_table(name)
    }


def is_embedding_table(name: str) -> bool:
    """Whether a canonical tensor is an embedding table."""
    return name.startswith("embeddings.") and not name.startswith("embeddings.norm.")


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle on this machine's storage. ``digest`` is that of its manifest."""

    path: Path
    manifest: Manifest
    digest: str

    @classmethod
    def open(cls, path: Path, *, verify: bool = False) -> Bundle:
        """Open the bundle in folder ``path``, whose name is its digest if it looks like one.

        Raises: FormatError if the manifest is malformed or a file is missing or of a wrong size;
        DigestError if the manifest is not the one the folder is named after or, with ``verify``,
        if any chunk is damaged.
        """
        manifest_path = path / MANIFEST_NAME
        data = _read_manifest(manifest_path)
        manifest = Manifest.from_json(data, source=str(manifest_path), cap_bytes=MANIFEST_CAP_BYTES)
        if manifest.to_json() != data:
            raise FormatError(f"{manifest_path}: is not in canonical form.", _MAKE_AGAIN)
        digest = sha256_hex(data)
        if _DIGEST_NAME.fullmatch(path.name) and path.name != digest:
            raise DigestError(
                f"{manifest_path}: its SHA-256 is {digest}, not the folder's name.", _MAKE_AGAIN
            )
        _check_contents(manifest, manifest_path)
        bundle = cls(path, manifest, digest)
        for name, size in bundle.file_sizes().items():
            _check_file(path / name, size)
        if verify:
            bundle.verify()
        return bundle

    def region_path(self, fidelity: int) -> Path:
        """The file that holds every shard at ``fidelity`` bits. Raises: InputError if there is none."""
        try:
            return self.path / self.manifest.region(fidelity).file
        except KeyError:
            raise InputError(
                f"{self.path}: the bundle holds {self.manifest.fidelities}, not {fidelity} bits.",
                "Build it with that fidelity or choose another.",
            ) from None

    def file_sizes(self) -> dict[str, int]:
        """Bytes of every file of the bundle except the manifest, by name."""
        sizes = {r.file: sum(v.length for v in r.versions) for r in self.manifest.regions}
        return sizes | {data.file: data.bytes for data in self.manifest.files}

    def resident(self) -> dict[str, F32]:
        """The resident parameters by canonical name, float32, decoded where they are stored packed.

        Raises: FormatError if the file is shorter than the manifest says.
        """
        path = self.path / RESIDENT_FILE
        try:
            data = np.fromfile(path, np.uint8)
        except OSError as error:
            raise FormatError(f"{path}: cannot be read: {error.strerror}.", _MAKE_AGAIN) from error
        if data.size < max((t.offset + t.length for t in self.manifest.resident), default=0):
            raise FormatError(f"{path}: is truncated at {data.size} bytes.", _MAKE_AGAIN)
        return {
            tensor.name: _decode_resident(tensor, data[tensor.offset : tensor.offset + tensor.length])
            for tensor in self.manifest.resident
        }

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Check every chunk against its digest; ``progress`` gets (bytes done, bytes in all).

        Raises: DigestError naming the file and offset of the first damaged chunk; FormatError if a
        file cannot be read.
        """
        total, done = sum(self.file_sizes().values()), 0
        chunks: dict[str, list[Chunk]] = {}
        for name, chunk in self.manifest.all_chunks():
            chunks.setdefault(name, []).append(chunk)
        for name, of_file in chunks.items():
            path = self.path / name
            try:
                with path.open("rb") as stream:
                    for chunk in of_file:
                        _verify_chunk(stream, chunk, path)
                        done += chunk.length
                        if progress is not None:
                            progress(done, total)
            except OSError as error:
                raise FormatError(f"{path}: cannot be read: {error.strerror}.", _MAKE_AGAIN) from error


def _read_manifest(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(MANIFEST_CAP_BYTES + 1)
    except OSError as error:
        raise FormatError(
            f"{path}: cannot be read: {error.strerror}.",
            "Give the folder of a bundle, as bundle build prints it; if it is one, make it again.",
        ) from error


def _check_file(path: Path, size: int) -> None:
    """A plain file of exactly ``size`` bytes: not a link, which could lead out of the bundle."""
    try:
        found = path.lstat()
    except OSError as error:
        raise FormatError(f"{path}: is missing: {error.strerror}.", _MAKE_AGAIN) from error
    if not stat.S_ISREG(found.st_mode):
        raise FormatError(f"{path}: is not a plain file.", _MAKE_AGAIN)
    if found.st_size != size:
        raise FormatError(f"{path}: has {found.st_size} bytes, its manifest says {size}.", _MAKE_AGAIN)


def _check_contents(manifest: Manifest, path: Path) -> None:
    try:
        problem = next(_problems(manifest), None)
    except FormatError as error:
        raise FormatError(f"{path}: {error.what}", _MAKE_AGAIN) from error
    if problem is not None:
        raise FormatError(f"{path}: {problem}.", _MAKE_AGAIN)


def _problems(manifest: Manifest) -> Iterator[str]:
    """What a manifest gets wrong about the model it describes."""
    config = manifest.model
    shapes = tuple(matrix_shapes(config).values())
    for region in manifest.regions:
        for version in region.versions:
            layout = payload_layout(shapes, region.fidelity, version.outliers)
            if version.payload_bytes != layout.payload_bytes:
                yield (
                    f"{region.file} at {version.offset}: a payload of {version.payload_bytes} bytes, "
                    f"not the {layout.payload_bytes} of this model"
                )
    if {data.file for data in manifest.files} != {RESIDENT_FILE, EMBEDDINGS_FILE}:
        yield f"its data files must be {RESIDENT_FILE} and {EMBEDDINGS_FILE}"
    if {t.name: t.shape for t in manifest.resident} != resident_shapes(config) or len(
        manifest.resident
    ) != len(resident_shapes(config)):
        yield "its resident tensors are not those of this model"
    for tensor in manifest.resident:
        if tensor.encoding == "gobo6" and tensor.name not in GOBO6_TENSORS:
            yield f"{tensor.name} may not be stored at {GOBO6_BITS} bits"
        elif tensor.length != _resident_bytes(tensor) or (tensor.encoding == "f32" and tensor.outliers):
            yield f"{tensor.name} does not have the length of its shape"
    tables = {table.name: table.rows for table in manifest.embeddings}
    if tables != {name: shape[0] for name, shape in embedding_shapes(config).items()} or len(tables) != len(
        manifest.embeddings
    ):
        yield "its embedding tables are not those of this model"


def _resident_bytes(tensor: TensorEntry) -> int:
    if tensor.encoding == "f32":
        return 4 * math.prod(tensor.shape)
    rows, columns = tensor.shape
    return payload_layout(((rows, columns),), GOBO6_BITS, (tensor.outliers,)).payload_bytes


def _decode_resident(tensor: TensorEntry, data: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> F32:
    if tensor.encoding == "f32":
        return data.view("<f4").astype(np.float32).reshape(tensor.shape)
    rows, columns = tensor.shape
    return unpack_matrices(data, ((rows, columns),), GOBO6_BITS, (tensor.outliers,))[0]


def _verify_chunk(stream: BinaryIO, chunk: Chunk, path: Path) -> None:
    digest, left = hashlib.sha256(), chunk.length
    stream.seek(chunk.offset)
    while left and (data := stream.read(min(left, _READ_BYTES))):
        digest.update(data)
        left -= len(data)
    if left or digest.hexdigest() != chunk.sha256:
        raise DigestError(
            f"{path}: the {chunk.length} bytes at offset {chunk.offset} are damaged "
            f"(SHA-256 {digest.hexdigest()}, stated {chunk.sha256}).",
            _MAKE_AGAIN,
        )
