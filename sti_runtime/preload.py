"""The preload buffer: shard versions of the bottom layers that stay in memory between requests."""

from __future__ import annotations

from collections.abc import Collection

from sti_runtime.plan import PlannedShard
from sti_runtime.storage import U8, BufferPool

ShardKey = tuple[int, int, int]
"""(source layer, slice, fidelity): names a version within one bundle."""


def shard_key(shard: PlannedShard) -> ShardKey:
    """The version that a planned shard is."""
    return shard.source_layer, shard.slice, shard.fidelity


class PreloadBuffer:
    """At most ``capacity_bytes`` (|S|) of versions; what does not fit is evicted from the top layer down.

    Not thread-safe. Source: STI (ASPLOS 2023), section 5.5.
    """

    def __init__(self) -> None:
        self.pool = BufferPool(0)
        self._held: dict[ShardKey, U8] = {}

    @property
    def bytes(self) -> int:
        """Bytes of the versions it holds."""
        return sum(buffer.nbytes for buffer in self._held.values())

    def keys(self) -> frozenset[ShardKey]:
        """What it holds."""
        return frozenset(self._held)

    def get(self, key: ShardKey) -> U8 | None:
        """A version, if it is held."""
        return self._held.get(key)

    def put(self, key: ShardKey, buffer: U8) -> None:
        """Hold a version whose buffer came from ``pool``."""
        self._held[key] = buffer

    def resize(self, capacity_bytes: int) -> None:
        """Set |S|; versions are evicted from the top until the rest fits."""
        for key in sorted(self._held, reverse=True):
            if self.pool.in_use_bytes <= capacity_bytes:
                break
            self._evict(key)
        self.pool.resize(capacity_bytes)

    def keep(self, keys: Collection[ShardKey]) -> None:
        """Evict everything else."""
        for key in self.keys() - set(keys):
            self._evict(key)

    def clear(self) -> None:
        """Evict everything."""
        self.keep(())

    def _evict(self, key: ShardKey) -> None:
        self.pool.release([self._held.pop(key)])
