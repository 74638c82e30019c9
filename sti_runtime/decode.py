"""Fast decoding of packed shard versions into a layer-wide float32 scratch, for the torch engine.

The scratch holds one layer, m slices wide, and is reused for every layer: there is never a decoded
model. Matrices lie [in, out] in memory, as panels are input-major, so that decoding is table look-up
plus copies of whole 64-byte rows; the engine sees them as transposed [out, in] views.

The work is a fixed number of numpy calls per shard, all of which release the interpreter lock:
bit planes → one byte per code → index of a *pair* of codes → pair look-up (eight bytes at a time)
→ rows of the scratch. Must equal ``pack.unpack_version`` bit for bit.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sti_runtime.errors import FormatError
from sti_runtime.model import ModelConfig
from sti_runtime.pack import (
    BLOCK,
    PANEL,
    STEP,
    PayloadLayout,
    Shape,
    padded_shape,
    payload_bytes_of,
    payload_layout,
    read_outliers,
)
from sti_runtime.quantize import U8
from sti_runtime.shard import F32, MATRICES, matrix_shapes

_ROW = np.dtype("V64")
"""Sixteen float32: the unit in which decoded values are moved."""

_SLICED_BY_OUTPUT = frozenset(("q", "k", "v", "ffn_in"))


class _Workspace:
    """Temporaries of one thread, sized for one shard."""

    def __init__(self, shapes: tuple[Shape, ...]) -> None:
        counts = payload_layout(shapes, 32, (0,) * len(shapes)).counts
        self.codes: U8 = np.empty(sum(counts), np.uint8)
        self.shifted: U8 = np.empty(sum(counts), np.uint8)
        self.index: npt.NDArray[np.intp] = np.empty(max(counts) // 2, np.intp)
        self.values: F32 = np.empty(max(counts), np.float32)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.shifted.nbytes + self.index.nbytes + self.values.nbytes


@dataclass(frozen=True)
class LayerScratch:
    """The decoded weights of one layer, ``width`` slices wide.

    Threads may decode different slots at once; each has its own workspace (``workspace_bytes``).
    """

    config: ModelConfig
    width: int
    arrays: dict[str, F32]
    _local: threading.local

    @classmethod
    def allocate(cls, config: ModelConfig, width: int) -> LayerScratch:
        """Memory for a layer of ``width`` slices. Shapes: arrays are [in, out]."""
        h, d, f = config.hidden, width * config.head_size, width * config.ffn_slice
        shapes = {"q": (h, d), "k": (h, d), "v": (h, d), "o": (d, h), "ffn_in": (h, f), "ffn_out": (f, h)}
        arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
        return cls(config, width, arrays, threading.local())

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded weights."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def workspace_bytes(self) -> int:
        """Bytes of temporaries that each decoding thread adds."""
        return _Workspace(tuple(matrix_shapes(self.config).values())).nbytes

    def view(self, name: str) -> Tensor:
        """One matrix as [out, in], a view that follows later decodes.

        Shapes: q, k, v [m·d, H]; o [H, m·d]; ffn_in [m·f, H]; ffn_out [H, m·f].
        """
        return torch.from_numpy(self.arrays[name]).T

    def matrices(self) -> dict[str, Tensor]:
        """All six views by name, for ``encoder.LayerWeights(**scratch.matrices(), …)``."""
        return {name: self.view(name) for name in MATRICES}

    def slot(self, name: str, index: int) -> F32:
        """The [in, out] part of matrix ``name`` that slice ``index`` of the layer fills."""
        array = self.arrays[name]
        if name in _SLICED_BY_OUTPUT:
            size = array.shape[1] // self.width
            return array[:, index * size : (index + 1) * size]
        size = array.shape[0] // self.width
        return array[index * size : (index + 1) * size]

    def workspace(self) -> _Workspace:
        """This thread's temporaries, made on first use."""
        found: _Workspace | None = getattr(self._local, "workspace", None)
        if found is None:
            found = _Workspace(tuple(matrix_shapes(self.config).values()))
            self._local.workspace = found
        return found


def decode_shard(
    buffer: U8,
    config: ModelConfig,
    bits: int,
    outliers: tuple[int, ...],
    scratch: LayerScratch,
    slot: int,
) -> None:
    """Decode one shard version into slice ``slot`` of the scratch.

    Shapes: buffer [≥ payload bytes], the payload first, start 4-byte aligned or not.
    Raises: FormatError if the buffer is too short or an outlier lies outside its matrix.
    """
    if not 0 <= slot < scratch.width:
        raise FormatError(f"Slot {slot} of a scratch that is {scratch.width} slices wide does not exist.")
    shapes = tuple(matrix_shapes(config).values())
    layout = payload_layout(shapes, bits, outliers)
    data = payload_bytes_of(buffer, layout)
    if bits == 32:
        _copy_floats(data.view("<f4"), layout, shapes, scratch, slot)
        return
    workspace = scratch.workspace()
    groups = 2 if layout.planes[0][0] == 4 else 4
    run = BLOCK // groups
    pairs_of_codes = _pair_indices(data, layout, bits, workspace).reshape(groups, -1, run // 2)
    tables = _pair_tables(data[: 4 * len(shapes) << bits].view("<f4").reshape(len(shapes), -1))
    first = 0
    for i, name in enumerate(MATRICES):
        count = layout.counts[i]
        blocks = count // BLOCK
        index = workspace.index[: count // 2]
        np.copyto(index.reshape(groups, blocks, -1), pairs_of_codes[:, first : first + blocks])
        values = workspace.values[:count]
        # Codes are masked to `bits`, so every index is inside; "clip" spares numpy a checking pass.
        np.take(tables[i], index, out=values.view(np.uint64), mode="clip")
        positions, exact = read_outliers(data, layout, i, outliers[i])
        values[_grouped(positions, blocks, run)] = exact
        _copy_rows(values.reshape(groups, blocks, run), scratch.slot(name, slot), shapes[i])
        first += blocks


def _pair_indices(
    data: U8, layout: PayloadLayout, bits: int, workspace: _Workspace
) -> npt.NDArray[np.uint16]:
    """Bit planes → for every two neighbouring codes, low | high << bits.

    Order: groups of a block first, then blocks, then the group's codes, so that each plane unpacks
    by whole-array shifts. A group is 16 codes (one input) if the first plane is two bits wide, and
    32 codes (two inputs) if it is four.
    """
    codes, shifted = workspace.codes.view(np.uint64), workspace.shifted.view(np.uint64)
    width, start = layout.planes[0]
    plane = data[start : start + layout.stream * width // 8].view(np.uint64)
    for group, part in enumerate(codes.reshape(8 // width, -1)):
        np.right_shift(plane, np.uint64(group * width), out=part)
    np.bitwise_and(codes, _in_each_byte((1 << width) - 1), out=codes)
    if len(layout.planes) == 2:
        width, start = layout.planes[1]
        _ADD_PLANE[bits](data[start : start + layout.stream * width // 8], codes, workspace)
    # Each 16-bit lane is low | high << 8; the high code moves down to bit `bits`.
    np.right_shift(codes, np.uint64(8 - bits), out=shifted)
    np.bitwise_and(shifted, _in_each_lane(((1 << bits) - 1) << bits), out=shifted)
    np.bitwise_and(codes, _in_each_lane(0xFF), out=codes)
    np.bitwise_or(codes, shifted, out=codes)
    return codes.view(np.uint16)


def _add_1_to_2(plane: U8, codes: npt.NDArray[np.uint64], workspace: _Workspace) -> None:
    """3 bits: the block's four 16-bit words, one per group of 16 codes, become bit 2."""
    _add_bit(np.ascontiguousarray(plane.view("<u2").reshape(-1, 4).T), 2, codes)


def _add_1_to_4(plane: U8, codes: npt.NDArray[np.uint64], workspace: _Workspace) -> None:
    """5 bits: the block's two 32-bit words, one per group of 32 codes, become bit 4."""
    _add_bit(np.ascontiguousarray(plane.view("<u4").reshape(-1, 2).T), 4, codes)


def _add_bit(words: npt.NDArray[Any], shift: int, codes: npt.NDArray[np.uint64]) -> None:
    bits = np.unpackbits(words.reshape(-1).view(np.uint8), bitorder="little").view(np.uint64)
    np.left_shift(bits, np.uint64(shift), out=bits)
    np.bitwise_or(codes, bits, out=codes)


def _add_2_to_4(plane: U8, codes: npt.NDArray[np.uint64], workspace: _Workspace) -> None:
    """6 bits: bits 4 and 5 from bytes that hold one output's codes of the block's four inputs."""
    sixteen_codes = plane.view(np.complex128)  # as opaque 16-byte words
    half = workspace.shifted[: plane.size * 2]
    words = half.view(np.complex128).reshape(-1, 2)
    words[:, 0] = sixteen_codes
    np.right_shift(
        plane.view(np.uint64), np.uint64(2), out=workspace.shifted.view(np.uint64)[-plane.size // 8 :]
    )
    words[:, 1] = workspace.shifted[-plane.size :].view(np.complex128)
    inputs = half.view(np.uint64)
    first, second = codes.reshape(2, -1)
    scaled = workspace.shifted[plane.size * 2 :].view(np.uint64)
    np.left_shift(inputs, np.uint64(4), out=scaled)
    np.bitwise_and(scaled, _in_each_byte(0x30), out=scaled)
    np.bitwise_or(first, scaled, out=first)
    np.bitwise_and(inputs, _in_each_byte(0x30), out=scaled)
    np.bitwise_or(second, scaled, out=second)


_ADD_PLANE = {3: _add_1_to_2, 5: _add_1_to_4, 6: _add_2_to_4}


def _in_each_byte(value: int) -> np.uint64:
    return np.uint64(value * 0x0101_0101_0101_0101)


def _in_each_lane(value: int) -> np.uint64:
    return np.uint64(value * 0x0001_0001_0001_0001)


def _pair_tables(tables: F32) -> npt.NDArray[np.uint64]:
    """[matrices, n] centroids → [matrices, n²] pairs of them as eight opaque bytes, low code first."""
    matrices, n = tables.shape
    pairs = np.empty((matrices, n, n, 2), np.float32)
    pairs[..., 0] = tables[:, None, :]
    pairs[..., 1] = tables[:, :, None]
    return pairs.reshape(matrices, -1).view(np.uint64)


def _grouped(positions: npt.NDArray[np.uint32], blocks: int, run: int) -> npt.NDArray[np.int64]:
    """Positions in a matrix's stream → positions in the group-first order of its decoded values."""
    block, inside = np.divmod(positions.astype(np.int64), BLOCK)
    group, code = np.divmod(inside, run)
    return (group * blocks + block) * run + code


def _copy_rows(values: F32, target: F32, shape: Shape) -> None:
    """[groups, blocks, run] decoded values → the [in, out] target, padding dropped."""
    outputs, inputs = padded_shape(shape)
    groups, _, run = values.shape
    if (outputs, inputs) != shape:
        whole = np.empty((inputs, outputs), np.float32)
        _copy_rows(values, whole, (outputs, inputs))
        target[...] = whole[: shape[1], : shape[0]]
        return
    rows = values.view(_ROW).reshape(groups, outputs // PANEL, inputs // STEP, run // PANEL)
    into = target.view(_ROW).reshape(inputs // STEP, groups, run // PANEL, outputs // PANEL)
    into[...] = rows.transpose(2, 0, 3, 1)


def _copy_floats(
    stream: F32, layout: PayloadLayout, shapes: tuple[Shape, ...], scratch: LayerScratch, slot: int
) -> None:
    start = 0
    for i, name in enumerate(MATRICES):
        outputs, inputs = padded_shape(shapes[i])
        panels = stream[start : start + layout.counts[i]].reshape(-1, inputs, PANEL)
        target = scratch.slot(name, slot)
        if (outputs, inputs) == shapes[i]:
            target.view(_ROW)[...] = panels.view(_ROW)[..., 0].T
        else:
            whole = panels.transpose(1, 0, 2).reshape(inputs, outputs)
            target[...] = whole[: shapes[i][1], : shapes[i][0]]
        start += layout.counts[i]
