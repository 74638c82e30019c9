"""Between canonical numpy tensors and torch, and torch's thread count."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from sti_runtime.shard import F32


def as_torch(
    tensors: Mapping[str, F32], *, copy: bool = False, device: str | torch.device = "cpu"
) -> dict[str, Tensor]:
    """Canonical tensors for the encoder on ``device``; on the CPU sharing memory unless ``copy`` or
    read-only."""
    return {
        name: torch.from_numpy(np.array(t, np.float32, order="C") if copy or not t.flags.writeable else t).to(
            device
        )
        for name, t in tensors.items()
    }


def as_numpy(tensors: Mapping[str, Tensor]) -> dict[str, F32]:
    """The opposite of ``as_torch``; copies."""
    return {name: np.array(t.detach().cpu().numpy(), np.float32, order="C") for name, t in tensors.items()}


@contextlib.contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Run with ``threads`` intra-op threads (0: as they are) and restore the number after."""
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
