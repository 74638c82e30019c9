"""What the executor asks of an engine and of a throttle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor as Pool
from concurrent.futures import wait
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol, TypeVar

from sti_runtime.shard import F32
from sti_runtime.storage import U8

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class LoadedShard:
    """One shard version in memory. ``data`` starts with its payload and may be longer."""

    slice: int
    fidelity: int
    outliers: tuple[int, ...]
    data: U8


class Engine(Protocol):
    """Computes one request at a time: ``begin``, then per layer ``decode`` and ``compute``, ``finish``."""

    name: str
    resident_bytes: int

    @property
    def activation_bytes(self) -> int:
        """Peak bytes of decoded weights, temporaries and hidden buffers for what was allocated."""

    def allocate(self, width: int, tokens: int) -> None:
        """Get ready for layers of ``width`` slices and sequences of ``tokens``; free if already so."""

    def begin(self, words: F32, positions: F32, types: F32 | None, length: int) -> None:
        """Sum and normalise the embedding rows. Shapes: [L, H] each."""

    def decode(self, shards: Sequence[LoadedShard]) -> None:
        """Decompress all slices of one layer."""

    def compute(self, source_layer: int) -> None:
        """One layer from what ``decode`` left."""

    def finish(self) -> tuple[F32, F32]:
        """(logits [labels], empty without a head; last hidden [L, H])."""


class Throttle(Protocol):
    """Slows an emulated device from inside the process."""

    def after_read(self, started_ns: int, bytes_: int) -> None:
        """Wait until a device of the stated rate would have delivered the read. Called by IO threads."""

    def compute(self) -> AbstractContextManager[None]:
        """Around a section of compute; leaving it waits until the stated CPU share would have done it."""


class NoThrottle:
    """The device as it is."""

    def after_read(self, started_ns: int, bytes_: int) -> None:
        """Return at once."""

    def compute(self) -> AbstractContextManager[None]:
        """A section that ends when its work does."""
        return nullcontext()


def for_each(pool: Pool, workers: int, items: Sequence[T], work: Callable[[T], None]) -> None:
    """``work`` on every item by up to ``workers`` threads, the caller one of them; items start in order.

    Returns when all threads are done, also after an error. Raises: the first error.
    """
    rest = iter(items)

    def take() -> None:
        for item in rest:  # the next of a sequence's iterator is atomic
            work(item)

    helpers = [pool.submit(take) for _ in range(min(workers, len(items)) - 1)]
    try:
        take()
    finally:
        wait(helpers)
    for helper in helpers:
        helper.result()
