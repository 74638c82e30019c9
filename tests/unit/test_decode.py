"""The fast decoder equals the plain one, at every fidelity, shape, slot and alignment."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from sti_runtime.decode import LayerScratch, decode_shard
from sti_runtime.errors import FormatError
from sti_runtime.model import ModelConfig
from sti_runtime.pack import PackedVersion, pack_version, payload_layout, unpack_version
from sti_runtime.quantize import U8
from sti_runtime.shard import F32, FIDELITIES, MATRICES, matrix_shapes

#                      regular    d = 8, f = 12   nothing is a multiple   in not a multiple of 4
SHAPES = [(64, 128, 4), (64, 96, 8), (30, 35, 5), (18, 27, 3)]


def config_of(hidden: int, ffn: int, heads: int) -> ModelConfig:
    return ModelConfig(
        family="bert", layers=1, heads=heads, hidden=hidden, ffn=ffn, vocab=10, positions=8,
        position_offset=0, token_types=0, layer_norm_eps=1e-12, activation="gelu", pad_id=0, head=None,
    )  # fmt: skip


def packed_shard(config: ModelConfig, bits: int, seed: int) -> PackedVersion:
    rng = np.random.default_rng(seed)
    matrices = {
        name: (rng.standard_t(4, shape) * 0.1).astype(np.float32)
        for name, shape in matrix_shapes(config).items()
    }
    return pack_version(matrices, bits)


def slot_of(scratch: LayerScratch, config: ModelConfig, name: str, slot: int) -> F32:
    """Slice ``slot`` of the view that the encoder gets, by the definition of sharding."""
    size = config.ffn_slice if name.startswith("ffn") else config.head_size
    part = slice(slot * size, (slot + 1) * size)
    view: F32 = scratch.view(name).numpy()
    return view[:, part] if name in ("o", "ffn_out") else view[part]


def assert_decoded(
    scratch: LayerScratch, config: ModelConfig, packed: PackedVersion, bits: int, slot: int
) -> None:
    expected = unpack_version(packed.payload, matrix_shapes(config), bits, packed.outliers)
    for name in MATRICES:
        assert np.array_equal(slot_of(scratch, config, name, slot), expected[name]), (name, bits, slot)


def as_bytes(payload: bytes, misalignment: int = 0, tail: int = 0) -> U8:
    buffer = np.full(misalignment + len(payload) + tail, 0xAB, np.uint8)
    buffer[misalignment : misalignment + len(payload)] = np.frombuffer(payload, np.uint8)
    return buffer[misalignment:]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", FIDELITIES)
def test_equals_the_plain_decoder(shape: tuple[int, int, int], bits: int) -> None:
    config = config_of(*shape)
    width = config.heads - 1
    scratch = LayerScratch.allocate(config, width)
    shards = [packed_shard(config, bits, seed) for seed in range(width)]
    assert sum(map(sum, (s.outliers for s in shards))) > 0 or bits == 32
    for slot, packed in enumerate(shards):
        decode_shard(as_bytes(packed.payload), config, bits, packed.outliers, scratch, slot)
    for slot, packed in enumerate(shards):
        assert_decoded(scratch, config, packed, bits, slot)


@pytest.mark.parametrize("bits", FIDELITIES)
@pytest.mark.parametrize("misalignment", [0, 1, 4])
def test_a_longer_or_misaligned_buffer(bits: int, misalignment: int) -> None:
    config = config_of(64, 96, 8)
    scratch = LayerScratch.allocate(config, 2)
    packed = packed_shard(config, bits, 3)
    buffer = as_bytes(packed.payload, misalignment, tail=4096)
    buffer.flags.writeable = False
    decode_shard(buffer, config, bits, packed.outliers, scratch, 1)
    assert_decoded(scratch, config, packed, bits, 1)


def test_slots_of_different_fidelity_decode_in_parallel_threads() -> None:
    config = config_of(192, 384, 12)
    scratch = LayerScratch.allocate(config, 12)
    fidelities = [FIDELITIES[slot % len(FIDELITIES)] for slot in range(12)]
    shards = [packed_shard(config, bits, slot) for slot, bits in enumerate(fidelities)]
    buffers = [as_bytes(packed.payload) for packed in shards]

    def decode(slot: int) -> None:
        for _ in range(5):
            decode_shard(buffers[slot], config, fidelities[slot], shards[slot].outliers, scratch, slot)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(decode, range(12)))
    for slot, packed in enumerate(shards):
        assert_decoded(scratch, config, packed, fidelities[slot], slot)


def test_views_are_shaped_for_the_encoder_and_follow_later_decodes() -> None:
    config = config_of(64, 128, 4)
    scratch = LayerScratch.allocate(config, 3)
    views = scratch.matrices()
    assert {name: tuple(view.shape) for name, view in views.items()} == {
        "q": (48, 64), "k": (48, 64), "v": (48, 64), "o": (64, 48), "ffn_in": (96, 64), "ffn_out": (64, 96),
    }  # fmt: skip
    assert scratch.nbytes == sum(view.numel() * 4 for view in views.values())
    assert not any(bool(view.any()) for view in views.values())
    packed = packed_shard(config, 4, 0)
    decode_shard(as_bytes(packed.payload), config, 4, packed.outliers, scratch, 2)
    plain = unpack_version(packed.payload, matrix_shapes(config), 4, packed.outliers)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(views["q"][32:], torch.from_numpy(plain["q"]))
    torch.testing.assert_close(
        torch.nn.functional.linear(x, views["ffn_in"])[:, 64:], x @ torch.from_numpy(plain["ffn_in"]).T
    )


@pytest.mark.parametrize("bits", FIDELITIES)
def test_a_short_buffer_is_refused(bits: int) -> None:
    config = config_of(64, 128, 4)
    packed = packed_shard(config, bits, 0)
    with pytest.raises(FormatError, match="truncated"):
        decode_shard(
            as_bytes(packed.payload)[:-1], config, bits, packed.outliers, LayerScratch.allocate(config, 1), 0
        )


@pytest.mark.parametrize("position", [0, 2**31, 2**32 - 1])
def test_an_outlier_outside_its_matrix_is_refused(position: int) -> None:
    config = config_of(64, 128, 4)
    packed = packed_shard(config, 5, 0)
    layout = payload_layout(tuple(matrix_shapes(config).values()), 5, packed.outliers)
    matrix = next(i for i, count in enumerate(packed.outliers) if count >= 2)
    buffer = as_bytes(packed.payload)
    last = layout.outliers[matrix] + 4 * (packed.outliers[matrix] - 1)
    buffer[last : last + 4] = np.frombuffer(position.to_bytes(4, "little"), np.uint8)
    with pytest.raises(FormatError, match="out of order or outside"):
        decode_shard(buffer, config, 5, packed.outliers, LayerScratch.allocate(config, 1), 0)


@pytest.mark.parametrize("slot", [-1, 2])
def test_a_slot_outside_the_scratch_is_refused(slot: int) -> None:
    config = config_of(64, 128, 4)
    packed = packed_shard(config, 2, 0)
    scratch = LayerScratch.allocate(config, 2)
    with pytest.raises(FormatError, match="does not exist"):
        decode_shard(as_bytes(packed.payload), config, 2, packed.outliers, scratch, slot)
