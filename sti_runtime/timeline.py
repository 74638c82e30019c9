"""The timeline: what the executor will do with a plan, simulated in integer nanoseconds.

One IO thread reads in plan order, one compute thread takes the layers in order (docs/planner.md)::

    IO thread       | embedding rows | reads of layer 0 | reads of layer 1 | …
    compute thread                   | embedding |..stall..| layer 0 | layer 1 | … | head |

* A read starts when the previous one has ended and its bytes are free in the working buffer.
* A layer's streamed bytes are freed when it has been computed; preloaded shards use neither IO nor buffer.
* Layer l computes when its reads have ended and layer l-1 has been computed; in mode "load-exec", when
  all reads have ended.

More working buffer never makes any event later, so a plan that ends in time with W does so with any larger W.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from sti_runtime.plan import LayerTime, PlannedShard, Prediction, merged_reads
from sti_runtime.profile import DeviceProfile, FixedTime

Mode = Literal["pipeline", "load-exec"]


class LayerWork(NamedTuple):
    """One layer: its merged reads as (bytes, ns) in order, their bytes, its compute time."""

    reads: Sequence[tuple[int, int]]
    streamed_bytes: int
    compute_ns: int


class LayerEvents(NamedTuple):
    """When a layer's reads and its compute start and end, ns from the request; no reads: both IO times 0."""

    io_start_ns: int
    io_end_ns: int
    compute_start_ns: int
    compute_end_ns: int


class Timeline(NamedTuple):
    """A simulated request: events per layer, the logits' time, the compute thread's waiting."""

    layers: tuple[LayerEvents, ...]
    end_ns: int
    stall_ns: int


def simulate(
    layers: Sequence[LayerWork], fixed: FixedTime, working_bytes: int, mode: Mode = "pipeline"
) -> Timeline | None:
    """Simulate one request. ``None`` if it can never end: a layer (in mode "load-exec" the whole
    submodel) streams more bytes than the working buffer holds."""
    load_exec = mode == "load-exec"
    if load_exec and sum(layer.streamed_bytes for layer in layers) > working_bytes:
        return None
    io_ns = fixed.embed_io_ns
    compute_ns = fixed.embed_io_ns + fixed.embed_compute_ns
    all_read_ns = io_ns + sum(ns for layer in layers for _, ns in layer.reads) if load_exec else 0
    stall_ns = used = oldest = 0
    events: list[LayerEvents] = []
    for index, layer in enumerate(layers):
        io_start_ns = io_end_ns = 0
        if layer.reads:
            if layer.streamed_bytes > working_bytes:
                return None
            io_start_ns = -1
            for length, ns in layer.reads:
                # Layers are freed in order, so the read waits for the first whose end makes room.
                while used + length > working_bytes and oldest < index:
                    if layers[oldest].reads:
                        used -= layers[oldest].streamed_bytes
                        io_ns = max(io_ns, events[oldest][3])
                    oldest += 1
                if io_start_ns < 0:
                    io_start_ns = io_ns
                used += length
                io_ns += ns
            io_end_ns = io_ns
        ready_ns = all_read_ns if load_exec else io_end_ns
        start_ns = max(compute_ns, ready_ns)
        stall_ns += start_ns - compute_ns
        compute_ns = start_ns + layer.compute_ns
        events.append(LayerEvents(io_start_ns, io_end_ns, start_ns, compute_ns))
    return Timeline(tuple(events), compute_ns + fixed.head_ns, stall_ns)


def layer_works(
    shards: Sequence[PlannedShard], depth: int, width: int, profile: DeviceProfile, *, p95: bool
) -> tuple[LayerWork, ...]:
    """Cost every layer of a plan at the profile's p95 or median figures.

    Raises: KeyError when the profile lacks the width or a fidelity.
    """
    io_ns: Callable[[int], int] = profile.io.p95_ns if p95 else profile.io.median_ns
    streamed = sorted((s for s in shards if not s.preloaded), key=lambda s: s.order)
    reads: list[list[tuple[int, int]]] = [[] for _ in range(depth)]
    for read in merged_reads(tuple(streamed)):
        reads[read.layer].append((read.length, sum(io_ns(s.length) for s in read.shards)))
    compute = [profile.layer_ns(width, p95=p95)] * depth
    for shard in shards:
        compute[shard.layer] += profile.decompress_ns(shard.fidelity, p95=p95)
    return tuple(
        LayerWork(tuple(rows), sum(length for length, _ in rows), ns)
        for rows, ns in zip(reads, compute, strict=True)
    )


def predict(
    shards: Sequence[PlannedShard],
    depth: int,
    width: int,
    profile: DeviceProfile,
    *,
    working_bytes: int,
    mode: Mode = "pipeline",
) -> Prediction | None:
    """The prediction that a plan carries; ``None`` if the working buffer can never hold a layer.

    Raises: KeyError when the profile lacks the width or a fidelity.
    """
    worst = simulate(
        layer_works(shards, depth, width, profile, p95=True), profile.fixed_p95, working_bytes, mode
    )
    usual = simulate(
        layer_works(shards, depth, width, profile, p95=False), profile.fixed_median, working_bytes, mode
    )
    if worst is None or usual is None:
        return None
    return Prediction(
        latency_ns=worst.end_ns,
        median_latency_ns=usual.end_ns,
        fixed_ns=profile.fixed_p95.total_ns,
        stall_ns=worst.stall_ns,
        layers=tuple(
            LayerTime(
                io_start_ns=e.io_start_ns,
                io_end_ns=e.io_end_ns,
                compute_start_ns=e.compute_start_ns,
                compute_end_ns=e.compute_end_ns,
            )
            for e in worst.layers
        ),
    )
