"""The device profile: how fast one device reads and computes one bundle with one engine.

Fitted from raw samples by ``profile_fit``. All integers (ns, bytes, ppm): two implementations of the
fit agree digest for digest. A profile whose fit is worse than its bound is ``unfit``, and plans say so.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import Field

from sti_runtime.records import Digest, NonNegative, Positive, Record

PPM = 1_000_000


class IoFit(Record):
    """T_io(bytes) of one version = alpha + bytes/beta, its marginal cost inside a merged layer read.

    ``ps_per_byte`` is 1/beta in picoseconds. ``p95_ppm``: 95th percentile of measured ÷ fitted.
    ``error_ppm``: median |measured - fitted| ÷ fitted. All of these while nothing computes.
    ``beside_ppm``: median measured ÷ fitted of the ``beside_samples`` reads while a layer was computed.
    """

    alpha_ns: NonNegative
    ps_per_byte: NonNegative
    p95_ppm: Positive
    error_ppm: NonNegative
    samples: Positive
    beside_ppm: int = Field(ge=PPM, lt=1 << 63)
    beside_samples: NonNegative

    def median_ns(self, bytes_: int) -> int:
        """Fitted time of one version of ``bytes_`` bytes."""
        return self.alpha_ns + bytes_ * self.ps_per_byte // 1000

    def p95_ns(self, bytes_: int) -> int:
        """The same at p95, rounded up."""
        return -(-self.median_ns(bytes_) * self.p95_ppm // PPM)

    def budget_ns(self, bytes_: int) -> int:
        """What a version takes of the IO budgets: p95 while layers are computed, rounded up."""
        return -(-self.p95_ns(bytes_) * self.beside_ppm // PPM)


class WidthTime(Record):
    """Time of one layer of ``width`` slices without decompression, nothing being read meanwhile."""

    width: Positive
    median_ns: NonNegative
    p95_ns: NonNegative
    samples: Positive


class FidelityTime(Record):
    """Time to decompress one shard at ``fidelity``."""

    fidelity: Literal[2, 3, 4, 5, 6, 32]
    median_ns: NonNegative
    p95_ns: NonNegative
    samples: Positive


class ReadCost(Record):
    """What reading a layer adds to the compute beside it, once and per byte (ps): they share processors and
    memory."""

    median_layer_ns: NonNegative
    p95_layer_ns: NonNegative
    median_ps_per_byte: NonNegative
    p95_ps_per_byte: NonNegative
    samples: NonNegative


class Sharing(NamedTuple):
    """What IO and compute take from each other. ``beside_ppm``: how much longer a read takes while a layer
    is computed, at least 10^6; reading a layer prolongs compute by ``each_ns`` and ``ps_per_byte``."""

    beside_ppm: int = PPM
    each_ns: int = 0
    ps_per_byte: int = 0

    def layer_ns(self, streamed_bytes: int) -> int:
        """What reading a layer's bytes adds to compute; counted with that layer."""
        return self.each_ns + streamed_bytes * self.ps_per_byte // 1000 if streamed_bytes else 0


class FixedTime(Record):
    """What every request costs besides its layers: embedding reads, their sum and norm, the head."""

    embed_io_ns: NonNegative
    embed_compute_ns: NonNegative
    head_ns: NonNegative
    samples: Positive

    @property
    def total_ns(self) -> int:
        """The fixed cost that T must cover besides n layers."""
        return self.embed_io_ns + self.embed_compute_ns + self.head_ns


class DeviceProfile(Record):
    """Everything the planner knows of a device. ``fixed_median`` and ``fixed_p95`` as in FixedTime.

    ``unfit``: reasons why the profile misses its stated bounds; empty for a good one.
    """

    format: Literal["stifarm-device-profile"]
    version: Literal[1]
    bundle: Digest
    engine: str
    sequence_length: Positive
    threads: Positive
    queue_depth: Positive
    emulated: bool
    io: IoFit
    compute: tuple[WidthTime, ...] = Field(min_length=1)
    decompress: tuple[FidelityTime, ...] = Field(min_length=1)
    read_cost: ReadCost
    fixed_median: FixedTime
    fixed_p95: FixedTime
    unfit: tuple[str, ...]

    def decompress_ns(self, fidelity: int, *, p95: bool = True) -> int:
        """Time to decompress one shard at ``fidelity``. Raises: KeyError when not profiled."""
        for row in self.decompress:
            if row.fidelity == fidelity:
                return row.p95_ns if p95 else row.median_ns
        raise KeyError(fidelity)

    def sharing(self, *, p95: bool = True) -> Sharing:
        """What IO and compute take from each other."""
        cost = self.read_cost
        if p95:
            return Sharing(self.io.beside_ppm, cost.p95_layer_ns, cost.p95_ps_per_byte)
        return Sharing(self.io.beside_ppm, cost.median_layer_ns, cost.median_ps_per_byte)

    def layer_ns(self, width: int, *, p95: bool = True) -> int:
        """Time of one layer of ``width`` slices without decompression. Raises: KeyError."""
        for row in self.compute:
            if row.width == width:
                return row.p95_ns if p95 else row.median_ns
        raise KeyError(width)

    def t_comp_ns(self, width: int) -> int:
        """T_comp(m), what compute planning uses: p95 layer time plus the dearest decompression."""
        return self.layer_ns(width) + width * max(row.p95_ns for row in self.decompress)
