"""The bytes of one stored shard version. Format: docs/bundle.md, "A version".

A matrix [out, in] is stored as panels of 16 output rows; inside a panel the order is input-major
(for each input k, its 16 outputs), which is the order a GEMM micro-kernel with 16-wide output tiles
consumes. The matrices of a shard follow one another: the shard's *stream*. At 32 bits the payload is
the stream; below, it is centroid tables, bit planes over the whole stream, and the outliers.

``unpack_matrices`` is the plain statement of the format; ``decode`` is its fast equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sti_runtime.codecs import prepare
from sti_runtime.errors import FormatError, InputError
from sti_runtime.quantize import U8, U32, Dictionary, assign_codes
from sti_runtime.quantizer import GOBO, Quantizer
from sti_runtime.shard import F32, FIDELITIES

Shape = tuple[int, int]

PANEL = 16
"""Output rows per panel."""

STEP = 4
"""Inputs are padded to a multiple of this, so that a stream is whole blocks."""

BLOCK = PANEL * STEP
"""Codes per block of a bit plane: four inputs by sixteen outputs."""

PLANE_ALIGNMENT = 64

PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2)}
"""Widths of the bit planes of each fidelity, low bits first."""


@dataclass(frozen=True, slots=True)
class PackedVersion:
    """The payload of one version and the number of outliers of each matrix."""

    payload: bytes
    outliers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PayloadLayout:
    """Where the parts of a payload lie, in bytes from its start.

    counts: elements of each matrix's padded stream; planes: (width, offset) of each bit plane;
    outliers: offset of each matrix's outliers (positions, then values). At 32 bits no planes.
    """

    counts: tuple[int, ...]
    planes: tuple[tuple[int, int], ...]
    outliers: tuple[int, ...]
    payload_bytes: int

    @property
    def stream(self) -> int:
        """Elements of the whole stream, padding included."""
        return sum(self.counts)


def padded_shape(shape: Shape) -> Shape:
    """[out, in] rounded up to whole panels and steps."""
    return -(-shape[0] // PANEL) * PANEL, -(-shape[1] // STEP) * STEP


@lru_cache(maxsize=8192)
def payload_layout(shapes: tuple[Shape, ...], bits: int, outliers: tuple[int, ...]) -> PayloadLayout:
    """Lay out a payload. Raises: FormatError if ``bits`` or the outlier counts make no sense."""
    counts = tuple(int(np.prod(padded_shape(shape))) for shape in shapes)
    if bits not in FIDELITIES or len(outliers) != len(shapes):
        raise FormatError(f"A version of {len(outliers)} matrices at {bits} bits is none of ours.")
    if any(n < 0 or n > shape[0] * shape[1] for n, shape in zip(outliers, shapes, strict=True)):
        raise FormatError(f"Outlier counts {outliers} do not fit matrices of shapes {shapes}.")
    if bits == 32:
        if any(outliers):
            raise FormatError("A version at 32 bits has no outliers.")
        return PayloadLayout(counts, (), (), 4 * sum(counts))
    end = 4 * len(shapes) << bits
    planes = []
    for width in PLANES[bits]:
        start = -(-end // PLANE_ALIGNMENT) * PLANE_ALIGNMENT
        planes.append((width, start))
        end = start + sum(counts) * width // 8
    end = -(-end // PLANE_ALIGNMENT) * PLANE_ALIGNMENT
    starts = []
    for count in outliers:
        starts.append(end)
        end += 8 * count
    return PayloadLayout(counts, tuple(planes), tuple(starts), end)


def pack_matrices(
    matrices: Sequence[F32],
    fidelities: Sequence[int],
    quantizer: Quantizer = GOBO,
    sensitivities: Sequence[F32] | None = None,
) -> dict[int, PackedVersion]:
    """Pack the same matrices at several fidelities; the weights are sorted once for all of them.

    Shapes: each matrix [out, in], and so each one's sensitivities, which the codec ``fisher`` needs.
    Raises: InputError if a weight is not finite or the codec lacks what it needs.
    """
    shapes = tuple((int(m.shape[0]), int(m.shape[1])) for m in matrices)
    streams = [_to_stream(matrix) for matrix in matrices]
    none = (0,) * len(shapes)
    packed: dict[int, PackedVersion] = {}
    for bits in fidelities:
        if bits not in FIDELITIES:
            raise InputError(f"{bits} bits is not a fidelity.", f"Choose among {FIDELITIES}.")
    if 32 in fidelities:
        packed[32] = PackedVersion(np.concatenate(streams).astype("<f4", copy=False).tobytes(), none)
    low = [bits for bits in fidelities if bits != 32]
    if not low:
        return packed
    of_each = [None] * len(matrices) if sensitivities is None else sensitivities
    prepared = [
        prepare(matrix, quantizer, sensitivity) for matrix, sensitivity in zip(matrices, of_each, strict=True)
    ]
    outliers = tuple(p.outlier_index.size for p in prepared)
    exceptions = b"".join(
        _outlier_bytes(p.outlier_index, p.outlier_values, shape)
        for p, shape in zip(prepared, shapes, strict=True)
    )
    for bits in low:
        layout = payload_layout(shapes, bits, outliers)
        dictionaries = [p.dictionary(bits) for p in prepared]
        codes = np.concatenate(
            [
                _stream_codes(stream, dictionary, shape)
                for stream, dictionary, shape in zip(streams, dictionaries, shapes, strict=True)
            ]
        ).reshape(-1, BLOCK)
        payload = np.zeros(layout.payload_bytes, np.uint8)
        _put(
            payload,
            0,
            np.concatenate([d.centroids for d in dictionaries]).astype("<f4", copy=False).tobytes(),
        )
        shift = 0
        for width, start in layout.planes:
            plane = _PACKERS[width]((codes >> np.uint8(shift)) & np.uint8((1 << width) - 1))
            payload[start : start + plane.size] = plane.reshape(-1)
            shift += width
        _put(payload, layout.payload_bytes - len(exceptions), exceptions)
        packed[bits] = PackedVersion(payload.tobytes(), outliers)
    return {bits: packed[bits] for bits in fidelities}


def pack_version(matrices: Mapping[str, F32], bits: int, quantizer: Quantizer = GOBO) -> PackedVersion:
    """Pack one shard at one fidelity, matrices in the mapping's order (that of shard.MATRICES)."""
    return pack_matrices(list(matrices.values()), (bits,), quantizer)[bits]


def unpack_version(
    payload: bytes | bytearray | memoryview | U8,
    shapes: Mapping[str, Shape],
    bits: int,
    outliers: tuple[int, ...],
) -> dict[str, F32]:
    """The matrices of one shard version by name, [out, in]. Raises: FormatError."""
    matrices = unpack_matrices(payload, tuple(shapes.values()), bits, outliers)
    return dict(zip(shapes, matrices, strict=True))


def unpack_matrices(
    payload: bytes | bytearray | memoryview | U8,
    shapes: tuple[Shape, ...],
    bits: int,
    outliers: tuple[int, ...],
) -> list[F32]:
    """Decode a payload step by step: the oracle every decoder is tested against. Raises: FormatError."""
    layout = payload_layout(shapes, bits, outliers)
    data = payload_bytes_of(payload, layout)
    if bits == 32:
        values = data.view("<f4").astype(np.float32)
        return _from_streams(values, layout, shapes)
    codes = np.zeros((layout.stream // BLOCK, BLOCK), np.uint8)
    shift = 0
    for width, start in layout.planes:
        plane = data[start : start + layout.stream * width // 8]
        codes |= _UNPACKERS[width](plane) << np.uint8(shift)
        shift += width
    tables = data[: 4 * len(shapes) << bits].view("<f4").reshape(len(shapes), 1 << bits)
    flat, values, start = codes.reshape(-1), np.empty(layout.stream, np.float32), 0
    for i, count in enumerate(layout.counts):
        part = values[start : start + count]
        part[:] = tables[i][flat[start : start + count]]
        positions, exact = read_outliers(data, layout, i, outliers[i])
        part[positions] = exact
        start += count
    return _from_streams(values, layout, shapes)


def payload_bytes_of(payload: bytes | bytearray | memoryview | U8, layout: PayloadLayout) -> U8:
    """The payload as bytes, cut to its length. Raises: FormatError if it is too short."""
    data = payload if isinstance(payload, np.ndarray) else np.frombuffer(payload, np.uint8)
    if data.size < layout.payload_bytes:
        raise FormatError(
            f"A shard version of {layout.payload_bytes} bytes was read as {data.size}.",
            "Its region file is truncated; verify the bundle and deploy it again.",
        )
    return data[: layout.payload_bytes]


def read_outliers(data: U8, layout: PayloadLayout, index: int, count: int) -> tuple[U32, F32]:
    """Positions in the padded stream of matrix ``index``, and values. Raises: FormatError if outside."""
    start = layout.outliers[index]
    positions: U32 = data[start : start + 4 * count].view("<u4")
    values: F32 = data[start + 4 * count : start + 8 * count].view("<f4")
    if count and (positions[-1] >= layout.counts[index] or bool(np.any(positions[1:] <= positions[:-1]))):
        raise FormatError(
            f"Outliers of matrix {index} of a shard version are out of order or outside the matrix.",
            "The region file is damaged; verify the bundle and deploy it again.",
        )
    return positions, values


def _put(payload: U8, start: int, data: bytes) -> None:
    payload[start : start + len(data)] = np.frombuffer(data, np.uint8)


def _to_stream(matrix: F32) -> F32:
    """[out, in] → padded, panel-major then input then output, flat."""
    rows, columns = padded_shape((matrix.shape[0], matrix.shape[1]))
    if matrix.shape != (rows, columns):
        padded = np.zeros((rows, columns), np.float32)
        padded[: matrix.shape[0], : matrix.shape[1]] = matrix
        matrix = padded
    panels = matrix.reshape(rows // PANEL, PANEL, columns).transpose(0, 2, 1)
    return np.ascontiguousarray(panels, np.float32).reshape(-1)


def _from_streams(values: F32, layout: PayloadLayout, shapes: tuple[Shape, ...]) -> list[F32]:
    matrices, start = [], 0
    for count, shape in zip(layout.counts, shapes, strict=True):
        rows, columns = padded_shape(shape)
        panels = values[start : start + count].reshape(rows // PANEL, columns, PANEL)
        whole = panels.transpose(0, 2, 1).reshape(rows, columns)
        matrices.append(np.ascontiguousarray(whole[: shape[0], : shape[1]]))
        start += count
    return matrices


def _stream_codes(stream: F32, dictionary: Dictionary, shape: Shape) -> U8:
    codes = assign_codes(stream, dictionary)
    rows, columns = padded_shape(shape)
    if (rows, columns) != shape:
        panels = codes.reshape(rows // PANEL, columns, PANEL)
        panels[:, shape[1] :, :] = 0
        if shape[0] % PANEL:
            panels[-1, :, shape[0] % PANEL :] = 0
    return codes


def _outlier_bytes(index: U32, values: F32, shape: Shape) -> bytes:
    """Row-major positions → positions in the padded stream, ascending, then the values."""
    row, column = np.divmod(index.astype(np.int64), shape[1])
    position = ((row // PANEL) * padded_shape(shape)[1] + column) * PANEL + row % PANEL
    order = np.argsort(position)
    return bytes(position[order].astype("<u4").tobytes() + values[order].astype("<f4", copy=False).tobytes())


# Bit planes: [blocks, 64] codes ↔ bytes.

_SHIFTS2: U8 = np.array([[[0], [2], [4], [6]]], np.uint8)


def _pack4(codes: U8) -> U8:
    return codes[:, :32] | (codes[:, 32:] << np.uint8(4))


def _unpack4(plane: U8) -> U8:
    pairs = plane.reshape(-1, 32)
    return np.concatenate((pairs & np.uint8(15), pairs >> np.uint8(4)), axis=1)


def _pack2(codes: U8) -> U8:
    rows = codes.reshape(-1, STEP, PANEL)
    plane: U8 = np.bitwise_or.reduce(rows << _SHIFTS2, axis=1)
    return plane


def _unpack2(plane: U8) -> U8:
    quads = plane.reshape(-1, 1, PANEL)
    return ((quads >> _SHIFTS2) & np.uint8(3)).reshape(-1, BLOCK)


def _pack1(codes: U8) -> U8:
    return np.packbits(codes, axis=1, bitorder="little")


def _unpack1(plane: U8) -> U8:
    return np.unpackbits(plane.reshape(-1, 8), axis=1, bitorder="little")


_PACKERS = {4: _pack4, 2: _pack2, 1: _pack1}
_UNPACKERS = {4: _unpack4, 2: _unpack2, 1: _unpack1}
