"""Sharding: which rows and columns of a layer belong to shard (l, s), and how to cut them out.

Shard (l, s) holds six matrices, always in the order of ``MATRICES``. With d = hidden/M, f = ffn/M::

    q, k, v   rows    [s·d, (s+1)·d) of Q, K, V      [d, hidden]
    o         columns [s·d, (s+1)·d) of O            [hidden, d]
    ffn_in    rows    [s·f, (s+1)·f) of FFN1         [f, hidden]
    ffn_out   columns [s·f, (s+1)·f) of FFN2         [hidden, f]

Source: STI (ASPLOS 2023), section 4.1.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from sti_runtime.model import ModelConfig

FIDELITIES: tuple[int, ...] = (2, 3, 4, 5, 6, 32)
"""Bits per weight of the stored versions, ascending."""

MATRICES: tuple[str, ...] = ("q", "k", "v", "o", "ffn_in", "ffn_out")

SHARDED_WEIGHTS = {
    "q": "attention.q", "k": "attention.k", "v": "attention.v",
    "o": "attention.o", "ffn_in": "ffn.in", "ffn_out": "ffn.out",
}  # fmt: skip
"""Of each matrix the canonical tensor it is cut from: ``layers.N.{name}.weight``."""

F32 = npt.NDArray[np.float32]
ShardId = tuple[int, int]
"""(layer, slice), both zero-based, in the bundle's (permuted) order."""


def matrix_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """[out, in] of each of a shard's matrices, in the order of ``MATRICES``."""
    h, d, f = config.hidden, config.head_size, config.ffn_slice
    return {"q": (d, h), "k": (d, h), "v": (d, h), "o": (h, d), "ffn_in": (f, h), "ffn_out": (h, f)}


def shard_bytes(config: ModelConfig) -> int:
    """Bytes of all shards of a model at 32 bits."""
    weights = sum(rows * columns for rows, columns in matrix_shapes(config).values())
    return 4 * config.layers * config.heads * weights


def shard_matrices(tensors: Mapping[str, F32], config: ModelConfig, layer: int, index: int) -> dict[str, F32]:
    """Cut shard (layer, index) out of canonical tensors.

    Shapes: as ``matrix_shapes``; views where possible, not copies.
    """
    d, f, prefix = config.head_size, config.ffn_slice, f"layers.{layer}."
    head, neurons = slice(index * d, (index + 1) * d), slice(index * f, (index + 1) * f)
    return {
        "q": tensors[prefix + "attention.q.weight"][head],
        "k": tensors[prefix + "attention.k.weight"][head],
        "v": tensors[prefix + "attention.v.weight"][head],
        "o": tensors[prefix + "attention.o.weight"][:, head],
        "ffn_in": tensors[prefix + "ffn.in.weight"][neurons],
        "ffn_out": tensors[prefix + "ffn.out.weight"][:, neurons],
    }
