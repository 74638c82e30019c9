"""The bytes of a shard version: round trips, the order of elements and bits, damaged payloads."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sti_runtime.errors import FormatError, InputError
from sti_runtime.pack import (
    PANEL,
    PLANE_ALIGNMENT,
    PLANES,
    pack_matrices,
    pack_version,
    padded_shape,
    payload_layout,
    unpack_matrices,
    unpack_version,
)
from sti_runtime.quantize import fit_gobo
from sti_runtime.quantizer import GOBO, Quantizer
from sti_runtime.shard import F32, FIDELITIES

LOW = tuple(bits for bits in FIDELITIES if bits != 32)
SHAPES = {"q": (6, 30), "k": (6, 30), "v": (6, 30), "o": (30, 6), "ffn_in": (17, 30), "ffn_out": (30, 17)}


def random_matrices(seed: int = 0, std: float = 0.1) -> dict[str, F32]:
    rng = np.random.default_rng(seed)
    return {name: (rng.standard_t(4, shape) * std).astype(np.float32) for name, shape in SHAPES.items()}


def read_bit(payload: bytes, byte: int, bit: int) -> int:
    return (payload[byte] >> bit) & 1


def code_at(payload: bytes, layout_planes: tuple[tuple[int, int], ...], element: int) -> int:
    """Read one code of the stream, bit by bit, as docs/bundle.md words it."""
    block, j = divmod(element, 64)
    code, shift = 0, 0
    for width, start in layout_planes:
        base = start + block * 8 * width
        for bit in range(width):
            if width == 4:
                value = read_bit(payload, base + j % 32, 4 * (j // 32) + bit)
            elif width == 2:
                value = read_bit(payload, base + j % 16, 2 * (j // 16) + bit)
            else:
                value = read_bit(payload, base + j // 8, j % 8)
            code |= value << (shift + bit)
        shift += width
    return code


@pytest.mark.parametrize("bits", LOW)
@pytest.mark.parametrize("quantizer", [GOBO, Quantizer("none"), Quantizer("converged", 0)])
def test_unpacking_gives_the_quantized_matrices(bits: int, quantizer: Quantizer) -> None:
    matrices = random_matrices()
    packed = pack_version(matrices, bits, quantizer)
    unpacked = unpack_version(packed.payload, SHAPES, bits, packed.outliers)
    for name, matrix in matrices.items():
        expected = fit_gobo(matrix, bits, quantizer)
        assert np.array_equal(unpacked[name], expected.dequantized())
    assert packed.outliers == tuple(
        fit_gobo(m, bits, quantizer).outlier_index.size for m in matrices.values()
    )
    assert sum(packed.outliers) > 0


def test_32_bits_are_the_floats() -> None:
    matrices = random_matrices()
    packed = pack_version(matrices, 32)
    unpacked = unpack_version(packed.payload, SHAPES, 32, packed.outliers)
    assert all(np.array_equal(unpacked[name], matrix) for name, matrix in matrices.items())
    # The second value of the file is the second output of the first input of q, not the reverse.
    assert struct.unpack_from("<2f", packed.payload) == (matrices["q"][0, 0], matrices["q"][1, 0])


@pytest.mark.parametrize("bits", LOW)
def test_every_code_lies_where_the_format_says(bits: int) -> None:
    matrices = random_matrices()
    packed = pack_version(matrices, bits)
    layout = payload_layout(tuple(SHAPES.values()), bits, packed.outliers)
    assert len(packed.payload) == layout.payload_bytes
    assert [width for width, _ in layout.planes] == list(PLANES[bits])
    assert all(start % PLANE_ALIGNMENT == 0 for _, start in layout.planes)
    start = 0
    for i, (name, matrix) in enumerate(matrices.items()):
        gobo = fit_gobo(matrix, bits)
        table = struct.unpack_from(f"<{2**bits}f", packed.payload, 4 * i << bits)
        assert list(table) == gobo.centroids.tolist(), name
        outputs, inputs = padded_shape(SHAPES[name])
        for element in range(outputs * inputs):
            panel, rest = divmod(element, inputs * PANEL)
            k, n = divmod(rest, PANEL)
            row, inside = panel * PANEL + n, panel * PANEL + n < matrix.shape[0] and k < matrix.shape[1]
            expected = int(gobo.codes[row, k]) if inside else 0
            assert code_at(packed.payload, layout.planes, start + element) == expected
        at, count = layout.outliers[i], packed.outliers[i]
        positions = struct.unpack_from(f"<{count}I", packed.payload, at)
        values = struct.unpack_from(f"<{count}f", packed.payload, at + 4 * count)
        assert list(positions) == sorted(positions)
        flat = matrix.reshape(-1)
        by_position = {}
        for index in gobo.outlier_index.tolist():
            row, k = divmod(index, matrix.shape[1])
            by_position[(row // PANEL * inputs + k) * PANEL + row % PANEL] = float(flat[index])
        assert dict(zip(positions, values, strict=True)) == by_position
        start += layout.counts[i]


def test_packing_all_fidelities_at_once_equals_one_by_one() -> None:
    matrices = random_matrices(5)
    together = pack_matrices(list(matrices.values()), FIDELITIES)
    assert list(together) == list(FIDELITIES)
    for bits in FIDELITIES:
        assert together[bits] == pack_version(matrices, bits)


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 20)), min_size=1, max_size=3),
    bits=st.sampled_from(FIDELITIES),
    seed=st.integers(0, 2**32 - 1),
    std=st.sampled_from((1e-3, 0.05, 1.0, 100.0)),
)
def test_round_trip_of_any_shapes(shapes: list[tuple[int, int]], bits: int, seed: int, std: float) -> None:
    rng = np.random.default_rng(seed)
    matrices = [(rng.standard_normal(shape) * std).astype(np.float32) for shape in shapes]
    packed = pack_matrices(matrices, (bits,))[bits]
    for matrix, found in zip(
        matrices, unpack_matrices(packed.payload, tuple(shapes), bits, packed.outliers), strict=True
    ):
        expected = matrix if bits == 32 else fit_gobo(matrix, bits).dequantized()
        assert np.array_equal(found, expected)


@pytest.mark.parametrize("bits", FIDELITIES)
def test_a_short_payload_is_refused(bits: int) -> None:
    packed = pack_version(random_matrices(), bits)
    with pytest.raises(FormatError, match="truncated"):
        unpack_version(packed.payload[:-1], SHAPES, bits, packed.outliers)


@pytest.mark.parametrize("damage", ["outside", "order"])
def test_outliers_outside_or_out_of_order_are_refused(damage: str) -> None:
    packed = pack_version(random_matrices(), 4)
    layout = payload_layout(tuple(SHAPES.values()), 4, packed.outliers)
    matrix = next(i for i, count in enumerate(packed.outliers) if count >= 2)
    payload, at = bytearray(packed.payload), layout.outliers[matrix]
    last = at + 4 * (packed.outliers[matrix] - 1)
    struct.pack_into("<I", payload, last, layout.counts[matrix] if damage == "outside" else 0)
    with pytest.raises(FormatError, match="out of order or outside"):
        unpack_version(payload, SHAPES, 4, packed.outliers)


@pytest.mark.parametrize(
    ("bits", "outliers"), [(7, (0,) * 6), (4, (0,) * 5), (4, (181, 0, 0, 0, 0, 0)), (32, (1, 0, 0, 0, 0, 0))]
)
def test_senseless_layouts_are_refused(bits: int, outliers: tuple[int, ...]) -> None:
    with pytest.raises(FormatError):
        payload_layout(tuple(SHAPES.values()), bits, outliers)


def test_an_unknown_fidelity_is_refused() -> None:
    with pytest.raises(InputError, match="7 bits"):
        pack_version(random_matrices(), 7)
