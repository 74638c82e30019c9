"""The torch engine: the reference that executes plans with PyTorch.

It keeps the resident parameters and one decoded layer (``LayerScratch``), which every layer reuses.
The executor drives it: ``begin`` (embedding), then per layer ``decode`` and ``compute``, then ``finish``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sti_runtime import encoder
from sti_runtime.bundle import Bundle
from sti_runtime.decode import LayerScratch, decode_shard
from sti_runtime.engine import LoadedShard, for_each
from sti_runtime.errors import InputError, ResourceError, StorageReadError
from sti_runtime.manifest import EMBEDDINGS_FILE
from sti_runtime.model import ModelConfig
from sti_runtime.plan import Plan
from sti_runtime.shard import F32, matrix_shapes
from sti_runtime.storage import U8

PARALLEL_WEIGHTS = 50_000
"""Shards of fewer weights are decoded by one thread: handing the interpreter lock over costs more than a
second thread gains (shards of 25 thousand: 1.06 against 1.00 ms a layer)."""


def best_device() -> str:
    """ "cuda" where this PyTorch finds a CUDA device that it can use, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def gpu_memory_errors() -> Iterator[None]:
    """What is done in this context raises ResourceError where the GPU's memory is too small for it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(f"{error}", "Give the unit a smaller plan or batch.") from error


class TorchEngine:
    """Computes one request at a time. ``threads`` is torch's and the decoder's.

    ``device``: where layers are computed, "cpu" or "cuda". Shards are decoded on the CPU in any case; a
    layer's weights are copied to the device when it is computed, and a call returns when that is done.
    """

    name = "torch"

    def __init__(self, bundle: Bundle, *, threads: int, device: str = "cpu") -> None:
        """Load the resident parameters. Raises: FormatError."""
        self.config: ModelConfig = bundle.manifest.model
        self.threads = threads
        self.device = torch.device(device)
        torch.set_num_threads(threads)
        self._resident = {name: self._there(torch.from_numpy(a)) for name, a in bundle.resident().items()}
        self.resident_bytes = sum(t.nbytes for t in self._resident.values())
        self._scratch: LayerScratch | None = None
        self._weights: dict[int, encoder.LayerWeights] = {}
        shard_weights = sum(rows * columns for rows, columns in matrix_shapes(self.config).values())
        self._decoders = threads if shard_weights >= PARALLEL_WEIGHTS else 1
        self._helpers = ThreadPoolExecutor(max(1, threads - 1), "decode")
        self._tokens = 0
        self._x = torch.empty(0)
        self._mask = torch.empty(0)
        self._lengths = torch.empty(0)

    def allocate(self, width: int, tokens: int) -> None:
        """Make the layer scratch for ``width`` slices and note L = ``tokens``; nothing if it is there."""
        if self._scratch is None or self._scratch.width != width:
            self._scratch = None  # its memory goes first
            self._weights.clear()
            self._scratch = LayerScratch.allocate(self.config, width)
        self._tokens = tokens

    @property
    def activation_bytes(self) -> int:
        """Layer scratch, decoders' workspaces and the hidden buffers of one layer at their peak.

        Hidden buffers from shapes, float32: x, its residual sum and q, k, v, context; or FFN before and
        after the activation.
        """
        if self._scratch is None:
            return 0
        m, h = self._scratch.width, self.config.hidden
        d, f = m * self.config.head_size, m * self.config.ffn_slice
        hidden = 4 * self._tokens * (2 * h + max(4 * d + h, 2 * f + h))
        return self._scratch.nbytes + self._decoders * self._scratch.workspace_bytes + hidden

    def begin(self, words: F32, positions: F32, types: F32 | None, length: int) -> None:
        """Sum and normalise the embedding rows. Shapes: [L, H] each."""
        with torch.inference_mode():
            self._lengths = torch.tensor([length], device=self.device)
            self._mask = encoder.attention_mask(self._lengths, words.shape[0])
            self._x = encoder.embed(
                self._there(torch.from_numpy(words)[None]),
                self._there(torch.from_numpy(positions)),
                None if types is None else self._there(torch.from_numpy(types)[None]),
                self._norm("embeddings.norm"),
                self.config.layer_norm_eps,
            )
            self._finished()

    def decode(self, shards: Sequence[LoadedShard]) -> None:
        """Decode all slices of a layer into the scratch, in parallel. Raises: FormatError."""
        for_each(self._helpers, self._decoders, shards, self._decode_one)

    def compute(self, source_layer: int) -> None:
        """One layer from the decoded scratch."""
        with torch.inference_mode():
            self._x = encoder.layer_forward(self._x, self._mask, self._layer(source_layer), self.config)
            self._finished()

    def finish(self) -> tuple[F32, F32]:
        """(logits [labels], empty for a model without a head; last hidden [L, H])."""
        with torch.inference_mode():
            logits = np.empty(0, np.float32)
            if self.config.head is not None:
                found = encoder.head_forward(self._x, self._lengths, self._resident, self.config.head)
                logits = found.cpu().numpy()[0]
            return logits, self._x.cpu().numpy()[0]

    def evaluate(
        self,
        bundle: Bundle,
        plan: Plan,
        input_ids: npt.NDArray[np.int32],
        token_types: npt.NDArray[np.int32],
        lengths: npt.NDArray[np.int32],
        batch: int,
    ) -> F32:
        """Logits of many rows with the plan's weights, decoded once; untimed, ordinary reads.

        Batches hold rows of similar length, cut to their longest: padding does not change a row.
        Shapes: ids, types [R, L]; lengths [R] → [R, labels].
        Raises: InputError without a head, StorageReadError, FormatError.
        """
        if self.config.head is None:
            raise InputError("A model without a head has no accuracy.", "Train one: stifarm model train.")
        layers = [
            self._layer_of(weights, layer)
            for weights, layer in zip(self._decoded_layers(bundle, plan), plan.submodel.kept, strict=True)
        ]
        tables = {name: self._there(table) for name, table in _embedding_tables(bundle).items()}
        tensors = self._resident | tables
        logits = np.empty((len(lengths), len(self.config.head.labels)), np.float32)
        order = np.argsort(lengths, kind="stable")
        with torch.inference_mode():
            for start in range(0, len(order), batch):
                rows = order[start : start + batch]
                tokens = int(lengths[rows].max())
                real = self._there(torch.from_numpy(lengths[rows]))
                x = encoder.embed_tokens(
                    tensors,
                    self.config,
                    self._there(torch.from_numpy(input_ids[rows, :tokens])),
                    self._there(torch.from_numpy(token_types[rows, :tokens])),
                )
                mask = encoder.attention_mask(real, tokens)
                for layer in layers:
                    x = encoder.layer_forward(x, mask, layer, self.config)
                logits[rows] = encoder.head_forward(x, real, tensors, self.config.head).cpu().numpy()
        return logits

    def close(self) -> None:
        """Stop the decoding threads."""
        self._helpers.shutdown()

    def _decode_one(self, shard: LoadedShard) -> None:
        assert self._scratch is not None, "allocate comes first"
        decode_shard(shard.data, self.config, shard.fidelity, shard.outliers, self._scratch, shard.slice)

    def _there(self, tensor: Tensor) -> Tensor:
        """The tensor on the engine's device; the same one where that is the CPU."""
        return tensor.to(self.device)

    def _finished(self) -> None:
        """Wait for what was queued, so that times are those of the work. Source: torch.cuda.synchronize."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _layer(self, source_layer: int) -> encoder.LayerWeights:
        """The scratch with a layer's biases and norms; on the CPU they are views, so made once per layer."""
        if self.device.type != "cpu":
            assert self._scratch is not None, "allocate comes first"
            return self._layer_of(self._scratch, source_layer)
        found = self._weights.get(source_layer)
        if found is None:
            assert self._scratch is not None, "allocate comes first"
            found = self._weights[source_layer] = self._layer_of(self._scratch, source_layer)
        return found

    def _layer_of(self, scratch: LayerScratch, source_layer: int) -> encoder.LayerWeights:
        d, f = scratch.width * self.config.head_size, scratch.width * self.config.ffn_slice
        p, resident = f"layers.{source_layer}.", self._resident
        return encoder.LayerWeights(
            **{name: self._there(matrix) for name, matrix in scratch.matrices().items()},
            q_bias=resident[p + "attention.q.bias"][:d],
            k_bias=resident[p + "attention.k.bias"][:d],
            v_bias=resident[p + "attention.v.bias"][:d],
            o_bias=resident[p + "attention.o.bias"],
            ffn_in_bias=resident[p + "ffn.in.bias"][:f],
            ffn_out_bias=resident[p + "ffn.out.bias"],
            attention_norm=self._norm(p + "attention.norm"),
            ffn_norm=self._norm(p + "ffn.norm"),
        )

    def _norm(self, prefix: str) -> tuple[Tensor, Tensor]:
        return self._resident[prefix + ".weight"], self._resident[prefix + ".bias"]

    def _decoded_layers(self, bundle: Bundle, plan: Plan) -> Iterator[LayerScratch]:
        width = plan.submodel.width
        for layer in range(plan.submodel.depth):
            scratch = LayerScratch.allocate(self.config, width)
            for shard in plan.shards[layer * width : (layer + 1) * width]:
                version = bundle.manifest.shard_version(shard.source_layer, shard.slice, shard.fidelity)
                data = _read(bundle, shard.fidelity, version.offset, version.payload_bytes)
                decode_shard(data, self.config, shard.fidelity, version.outliers, scratch, shard.slice)
            yield scratch


def _read(bundle: Bundle, fidelity: int, offset: int, length: int) -> U8:
    path = bundle.region_path(fidelity)
    try:
        data = np.fromfile(path, np.uint8, length, offset=offset)
    except OSError as error:
        raise StorageReadError(f"{path}: cannot be read at {offset}: {error}.") from error
    if data.size < length:
        raise StorageReadError(
            f"{path}: ends before {offset + length}: it was truncated.", "Deploy the bundle again."
        )
    return data


def _embedding_tables(bundle: Bundle) -> dict[str, Tensor]:
    path = bundle.path / EMBEDDINGS_FILE
    tables: dict[str, Tensor] = {}
    for table in bundle.manifest.embeddings:
        count = table.rows * table.row_bytes // 4
        try:
            data: npt.NDArray[Any] = np.fromfile(path, "<f4", count, offset=table.offset)
        except OSError as error:
            raise StorageReadError(f"{path}: cannot be read: {error}.") from error
        if data.size < count:
            raise StorageReadError(f"{path}: table {table.name} is truncated.", "Deploy the bundle again.")
        tables[f"embeddings.{table.name}.weight"] = torch.from_numpy(data.reshape(table.rows, -1))
    return tables
