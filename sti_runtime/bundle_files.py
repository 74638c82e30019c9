"""Writing the files of a bundle: regions, resident.bin, embeddings.bin. Format: docs/bundle.md.

Shards are packed by a few threads (sorting and searching release the interpreter lock) and written
in order as they are done, so that memory holds the model and a handful of shards.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, cast

import numpy as np

from sti_runtime.bundle import GOBO6_BITS, GOBO6_TENSORS, embedding_shapes, resident_shapes
from sti_runtime.manifest import (
    ALIGNMENT,
    EMBEDDINGS_FILE,
    RESIDENT_FILE,
    Chunk,
    DataFile,
    EmbeddingTable,
    Region,
    TensorEntry,
    Version,
)
from sti_runtime.model import ModelConfig
from sti_runtime.pack import PackedVersion, pack_matrices
from sti_runtime.quantizer import Quantizer
from sti_runtime.shard import F32, shard_matrices
from sti_runtime.staging import flush

HeadEncoding = Literal["f32", "gobo6"]

CHUNK_BYTES = 1 << 20
_TENSOR_ALIGNMENT = 64
_MAX_THREADS = 8


def resident_encoding(name: str, head_encoding: HeadEncoding) -> HeadEncoding:
    """How the resident tensor ``name`` is stored."""
    return head_encoding if name in GOBO6_TENSORS else "f32"


@dataclass(frozen=True, slots=True)
class _StoredVersion:
    data: bytes
    payload_bytes: int
    outliers: tuple[int, ...]
    sha256: str


def write_regions(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, F32],
    fidelities: tuple[int, ...],
    *,
    quantizer: Quantizer,
    sensitivities: Mapping[str, F32] | None,
    progress: Callable[[int, int], None] | None,
) -> tuple[Region, ...]:
    """Write every shard at every fidelity; ``progress`` gets (shards done, shards in all).

    ``sensitivities``: of the sharded weights, by canonical name, for a codec that asks for them.
    """
    shards = [(layer, index) for layer in range(config.layers) for index in range(config.heads)]
    versions: dict[int, list[Version]] = {bits: [] for bits in fidelities}
    ends = dict.fromkeys(fidelities, 0)

    def pack(layer: int, index: int) -> dict[int, _StoredVersion]:
        matrices = list(shard_matrices(tensors, config, layer, index).values())
        sensitive = None
        if sensitivities is not None:
            sensitive = list(shard_matrices(sensitivities, config, layer, index).values())
        packed = pack_matrices(matrices, fidelities, quantizer, sensitive)
        return {bits: _padded_version(version) for bits, version in packed.items()}

    threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
    with contextlib.ExitStack() as stack:
        streams = {bits: stack.enter_context((folder / f"k{bits}.bin").open("wb")) for bits in fidelities}
        pool = ThreadPoolExecutor(threads, thread_name_prefix="pack")
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        todo, pending = iter(shards), deque[Future[dict[int, _StoredVersion]]]()
        for shard in _take(todo, 2 * threads):
            pending.append(pool.submit(pack, *shard))
        done = 0
        while pending:
            for bits, version in pending.popleft().result().items():
                streams[bits].write(version.data)
                versions[bits].append(_version(version, ends[bits]))
                ends[bits] += len(version.data)
            for shard in _take(todo, 1):
                pending.append(pool.submit(pack, *shard))
            done += 1
            if progress is not None:
                progress(done, len(shards))
        for stream in streams.values():
            flush(stream)
    return tuple(
        Region(fidelity=cast(Literal[2, 3, 4, 5, 6, 32], bits), file=f"k{bits}.bin", versions=tuple(of_bits))
        for bits, of_bits in versions.items()
    )


def _take(items: Iterator[tuple[int, int]], count: int) -> Iterator[tuple[int, int]]:
    for _, item in zip(range(count), items, strict=False):
        yield item


def _padded_version(packed: PackedVersion) -> _StoredVersion:
    data = packed.payload + bytes(-len(packed.payload) % ALIGNMENT)
    return _StoredVersion(data, len(packed.payload), packed.outliers, hashlib.sha256(data).hexdigest())


def _version(stored: _StoredVersion, offset: int) -> Version:
    q, k, v, o, ffn_in, ffn_out = stored.outliers
    return Version(
        offset=offset,
        length=len(stored.data),
        payload_bytes=stored.payload_bytes,
        outliers=(q, k, v, o, ffn_in, ffn_out),
        sha256=stored.sha256,
    )


class _ChunkedFile:
    """A file written front to back and digested in chunks of CHUNK_BYTES."""

    def __init__(self, stream: BinaryIO) -> None:
        self.offset = 0
        self._stream = stream
        self._chunks: list[Chunk] = []
        self._digest = hashlib.sha256()

    def write(self, data: memoryview) -> None:
        start = 0
        while start < len(data):
            room = CHUNK_BYTES - self.offset % CHUNK_BYTES
            part = data[start : start + room]
            self._stream.write(part)
            self._digest.update(part)
            self.offset += len(part)
            start += len(part)
            if self.offset % CHUNK_BYTES == 0:
                self._end_chunk(CHUNK_BYTES)

    def pad_to(self, alignment: int) -> None:
        self.write(memoryview(bytes(-self.offset % alignment)))

    def finish(self, name: str) -> DataFile:
        """Pad to whole direct-IO blocks, flush to storage and describe."""
        self.pad_to(ALIGNMENT)
        if self.offset % CHUNK_BYTES:
            self._end_chunk(self.offset % CHUNK_BYTES)
        flush(self._stream)
        return DataFile(file=name, bytes=self.offset, chunks=tuple(self._chunks))

    def _end_chunk(self, length: int) -> None:
        sha256 = self._digest.hexdigest()
        self._chunks.append(Chunk(offset=self.offset - length, length=length, sha256=sha256))
        self._digest = hashlib.sha256()


def write_resident(
    folder: Path,
    config: ModelConfig,
    tensors: Mapping[str, F32],
    *,
    quantizer: Quantizer,
    head_encoding: HeadEncoding,
) -> tuple[tuple[TensorEntry, ...], DataFile]:
    """Write what is never sharded."""
    entries = []
    with (folder / RESIDENT_FILE).open("wb") as stream:
        out = _ChunkedFile(stream)
        for name, shape in resident_shapes(config).items():
            encoding, outliers = resident_encoding(name, head_encoding), 0
            if encoding == "gobo6":
                packed = pack_matrices([tensors[name]], (GOBO6_BITS,), quantizer)
                data = memoryview(packed[GOBO6_BITS].payload)
                outliers = packed[GOBO6_BITS].outliers[0]
            else:
                data = _little_endian(tensors[name])
            out.pad_to(_TENSOR_ALIGNMENT)
            entries.append(
                TensorEntry(
                    name=name,
                    shape=shape,
                    encoding=encoding,
                    offset=out.offset,
                    length=len(data),
                    outliers=outliers,
                )
            )
            out.write(data)
        return tuple(entries), out.finish(RESIDENT_FILE)


def write_embeddings(
    folder: Path, config: ModelConfig, tensors: Mapping[str, F32]
) -> tuple[tuple[EmbeddingTable, ...], DataFile]:
    """Write the embedding tables."""
    tables = []
    with (folder / EMBEDDINGS_FILE).open("wb") as stream:
        out = _ChunkedFile(stream)
        for name, (rows, columns) in embedding_shapes(config).items():
            out.pad_to(ALIGNMENT)
            tables.append(
                EmbeddingTable(
                    name=cast(Literal["word", "position", "token_type"], name),
                    rows=rows,
                    row_bytes=4 * columns,
                    offset=out.offset,
                )
            )
            out.write(_little_endian(tensors[f"embeddings.{name}.weight"]))
        return tuple(tables), out.finish(EMBEDDINGS_FILE)


def _little_endian(tensor: F32) -> memoryview:
    return np.ascontiguousarray(tensor, "<f4").reshape(-1).view(np.uint8).data
