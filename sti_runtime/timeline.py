"""The timeline: what the executor will do with a plan, simulated in integer nanoseconds.

One IO thread reads in plan order, one compute thread takes the layers in order (docs/planner.md)::

    IO thread       | embedding rows | reads of layer 0 | reads of layer 1 | …
    compute thread                   | embedding |..stall..| layer 0 | layer 1 | … | head |

* A read starts when the previous one has ended and its bytes are free in the working buffer. While a layer
  is computed it proceeds at 10^6 / beside_ppm of its speed; and a layer's compute takes longer by what
  reading its bytes adds to compute (``profile.Sharing``), though they are read beside earlier layers.
* A layer's streamed bytes are freed when it has been computed; preloaded shards use neither IO nor buffer.
* Layer l computes when its reads have ended and layer l-1 has been computed; in mode "load-exec", when
  all reads have ended.

More working buffer never makes any event later, so a plan that ends in time with W does so with any larger W:
a request that is ahead reads more slowly only while it computes what the other still waits to read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from sti_runtime.plan import LayerTime, PlannedShard, Prediction, merged_reads
from sti_runtime.profile import PPM, DeviceProfile, FixedTime, Sharing

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
    layers: Sequence[LayerWork],
    fixed: FixedTime,
    working_bytes: int,
    mode: Mode = "pipeline",
    *,
    sharing: Sharing = Sharing(),  # noqa: B008 - immutable
) -> Timeline | None:
    """Simulate one request. ``None`` if it can never end: a layer (in mode "load-exec" the whole
    submodel) streams more bytes than the working buffer holds."""
    load_exec = mode == "load-exec"
    if load_exec and sum(layer.streamed_bytes for layer in layers) > working_bytes:
        return None
    io_ns = fixed.embed_io_ns
    compute_ns = fixed.embed_io_ns + fixed.embed_compute_ns
    all_read_ns = io_ns + sum(ns for layer in layers for _, ns in layer.reads) if load_exec else 0
    stall_ns = used = oldest = ahead = 0
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
                io_ns, ahead = _read_end(io_ns, ns, sharing.beside_ppm, events, ahead)
            io_end_ns = io_ns
        ready_ns = all_read_ns if load_exec else io_end_ns
        start_ns = max(compute_ns, ready_ns)
        stall_ns += start_ns - compute_ns
        compute_ns = start_ns + layer.compute_ns
        if not load_exec:
            compute_ns += sharing.layer_ns(layer.streamed_bytes)
        events.append(LayerEvents(io_start_ns, io_end_ns, start_ns, compute_ns))
    return Timeline(tuple(events), compute_ns + fixed.head_ns, stall_ns)


def _read_end(
    now_ns: int, alone_ns: int, beside_ppm: int, computed: Sequence[LayerEvents], ahead: int
) -> tuple[int, int]:
    """When a read that starts at ``now_ns`` ends, rounded up to a ns; ``alone_ns``: what it takes alone.

    ``ahead``: the first layer that may be computed after ``now_ns``; returned anew for the next read.
    """
    if beside_ppm == PPM:
        return now_ns + alone_ns, ahead
    work = alone_ns * beside_ppm  # of which a ns does beside_ppm while nothing is computed, else 10^6
    while ahead < len(computed):
        start_ns, end_ns = computed[ahead].compute_start_ns, computed[ahead].compute_end_ns
        if now_ns < start_ns:
            if work <= (start_ns - now_ns) * beside_ppm:
                break
            work -= (start_ns - now_ns) * beside_ppm
            now_ns = start_ns
        if now_ns < end_ns:
            if work <= (end_ns - now_ns) * PPM:
                return now_ns + -(-work // PPM), ahead
            work -= (end_ns - now_ns) * PPM
            now_ns = end_ns
        ahead += 1
    return now_ns + -(-work // beside_ppm), ahead


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
        layer_works(shards, depth, width, profile, p95=True),
        profile.fixed_p95,
        working_bytes,
        mode,
        sharing=profile.sharing(),
    )
    usual = simulate(
        layer_works(shards, depth, width, profile, p95=False),
        profile.fixed_median,
        working_bytes,
        mode,
        sharing=profile.sharing(p95=False),
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
