"""The profile units: raw samples of reads, of layer compute and of a request's fixed parts.

All of them go through the executor's own code, so that what is profiled is what will run.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, cast

from agent.context import Context
from agent.watch import Watch
from sti_runtime.errors import InputError
from sti_runtime.manifest import Manifest
from sti_runtime.messages import (
    ComputeProfileResult,
    ComputeProfileUnit,
    ComputeSample,
    FixedProfileResult,
    FixedProfileUnit,
    FixedSample,
    IoMode,
    IoProfileResult,
    IoProfileUnit,
    IoSample,
    ProvenMode,
)
from sti_runtime.pipeline import Executor, LayerLoad
from sti_runtime.plan import PlannedShard
from sti_runtime.plan_build import Fidelity

IO_MODE: IoMode = "direct"
"""What profiles ask for; where storage refuses it, buffered reads after eviction."""


def layer_shards(
    manifest: Manifest, source_layer: int, fidelities: Sequence[int]
) -> tuple[PlannedShard, ...]:
    """The first slices of one layer as a plan would stream them, one fidelity each.

    Raises: InputError if the bundle has no such version.
    """
    shards = []
    for slice_, fidelity in enumerate(fidelities):
        if fidelity not in manifest.fidelities or slice_ >= manifest.model.heads:
            raise InputError(
                f"The bundle has no slice {slice_} at {fidelity} bits.", "Profile what the bundle holds."
            )
        version = manifest.shard_version(source_layer, slice_, fidelity)
        shards.append(
            PlannedShard(
                layer=0,
                source_layer=source_layer,
                slice=slice_,
                fidelity=cast(Fidelity, fidelity),
                offset=version.offset,
                length=version.length,
                preloaded=False,
                order=slice_,
            )
        )
    return tuple(shards)


def _io_sample(load: LayerLoad, io_mode: IoMode, *, throttled: bool) -> IoSample:
    stored = load.storage_bytes is not None and load.storage_bytes >= load.bytes
    return IoSample(
        versions=load.versions,
        bytes=load.bytes,
        storage_bytes=load.storage_bytes or 0,
        duration_ns=load.duration_ns,
        mode_asked=IO_MODE,
        mode_proven=proven_mode(load.bytes, load.storage_bytes, io_mode),
        throttled=throttled,
        valid=stored and not throttled,
    )


def evict_if_buffered(executor: Executor, io_mode: IoMode) -> IoMode:
    """Make the next read miss the page cache; returns the mode in use."""
    storage = executor.storage(io_mode)
    if storage.io_mode == "buffered":
        storage.evict()
    return storage.io_mode


def proven_mode(planned_bytes: int, storage_bytes: int | None, io_mode: IoMode) -> ProvenMode:
    """Where the bytes of one sample came from, by the kernel's count (None: it does not count).

    ``io_mode`` is the one in use."""
    if storage_bytes is None:
        return "unknown"
    if storage_bytes >= planned_bytes:
        return "direct" if io_mode == "direct" else "buffered-cold"
    return "mixed" if storage_bytes else "cached"


def profile_io(unit: IoProfileUnit, context: Context) -> IoProfileResult:
    """Cold layer reads, the kinds interleaved so that drift of the storage falls on all alike."""
    executor, manifest = context.executor, context.bundle.manifest
    choose = random.Random(unit.seed)
    kinds: list[tuple[int, int | None]] = [
        (width, fidelity) for width in unit.widths for fidelity in (*unit.fidelities, None)
    ]
    io_mode = executor.storage(IO_MODE).io_mode
    watch = Watch.of_job(context.job)
    samples: list[IoSample] = []
    for repeat in range(-1, unit.repeats):  # the first round only touches memory and code
        for width, fidelity in kinds:
            source_layer = choose.randrange(manifest.model.layers)
            mixed = [choose.choice(unit.fidelities) for _ in range(width)]
            shards = layer_shards(manifest, source_layer, mixed if fidelity is None else [fidelity] * width)
            evict_if_buffered(executor, IO_MODE)
            loaded, load = executor.load_layer(shards, IO_MODE)
            executor.drop_layer(loaded)
            throttled = watch.sampled(len(samples) + (repeat >= 0))
            if repeat >= 0:
                samples.append(_io_sample(load, io_mode, throttled=throttled))
    executor.reset()
    return IoProfileResult(
        kind="profile-io", io_mode=io_mode, readings=watch.readings, samples=tuple(samples)
    )


def profile_compute(unit: ComputeProfileUnit, context: Context) -> ComputeProfileResult:
    """One layer decompressed and computed again and again, at first alone, then reads going on beside as in
    a request: while a layer is computed at most the next one is being read, and a slow read spans several
    layers. It goes on until one read has ended, so that all reads are beside compute.
    """
    executor, manifest = context.executor, context.bundle.manifest
    request = context.request(0)
    executor.engine.allocate(unit.width, request.tokens)
    executor.run_fixed(request, IO_MODE)  # gives the engine a real hidden state to work on
    io_mode = executor.storage(IO_MODE).io_mode
    watch = Watch.of_job(context.job)
    samples: list[ComputeSample] = []
    reads: list[IoSample] = []
    for i, fidelity in enumerate(unit.fidelities):
        shards = layer_shards(manifest, i % manifest.model.layers, [fidelity] * unit.width)
        loaded, _ = executor.load_layer(shards, IO_MODE)
        try:
            # Touches the memory that the reads beside go to: that is not their cost.
            executor.drop_layer(
                executor.load_layer(_largest_layer(manifest, len(shards), fidelity), IO_MODE)[0]
            )
            with _ReadBeside(executor, manifest, [fidelity] * unit.width) as beside:
                alone = unit.warmups + unit.repeats
                read_before = beside.read_bytes()
                for repeat in range(alone + unit.repeats):
                    if repeat >= alone:
                        beside.next_layer()
                    decompress_ns, compute_ns = executor.compute_layer(shards[0].source_layer, loaded)
                    samples.append(
                        ComputeSample(
                            width=unit.width,
                            fidelity=fidelity,
                            read_bytes=0,
                            decompress_ns=decompress_ns,
                            compute_ns=compute_ns,
                            throttled=watch.sampled(len(samples) + 1),
                            warmup=repeat < unit.warmups,
                        )
                    )
                # Shared out evenly: the kernel counts bytes when they are asked of storage, and a read may
                # span several layers.
                read_bytes = (beside.read_bytes() - read_before) // unit.repeats
                while not beside.has_read():
                    executor.compute_layer(shards[0].source_layer, loaded)
                late = watch.sampled(len(samples))
        finally:
            executor.drop_layer(loaded)
        with_reads = samples[-unit.repeats :]
        samples[-unit.repeats :] = [s.model_copy(update={"read_bytes": read_bytes}) for s in with_reads]
        # Which of the reads a throttled layer was beside cannot be told: then none counts.
        throttled = late or any(sample.throttled for sample in with_reads)
        reads += (_io_sample(load, io_mode, throttled=throttled) for load in beside.loads)
    executor.reset()
    return ComputeProfileResult(
        kind="profile-compute",
        io_mode=io_mode,
        readings=watch.readings,
        samples=tuple(samples),
        reads=tuple(reads),
    )


def _largest_layer(manifest: Manifest, width: int, fidelity: int) -> tuple[PlannedShard, ...]:
    """The layer with the most bytes: memory for its reads is enough for those of any other."""
    layers = (layer_shards(manifest, layer, [fidelity] * width) for layer in range(manifest.model.layers))
    return max(layers, key=lambda shards: sum(shard.length for shard in shards))


class _ReadBeside:
    """Another thread that reads one layer from storage for each ``next_layer``, unless it is still at
    the one before. Leaving the block waits for it; what it reads from then on is no sample.
    Raises: a read's error, on any call.
    """

    def __init__(self, executor: Executor, manifest: Manifest, fidelities: Sequence[int]) -> None:
        self._executor, self._manifest, self._fidelities = executor, manifest, fidelities
        self._pool = ThreadPoolExecutor(1, "beside")
        self._reading: Future[None] | None = None
        self._layer = 0
        self._leaving = False
        self._asked_bytes = 0
        self.loads: list[LayerLoad] = []

    def __enter__(self) -> Self:
        return self

    def next_layer(self) -> None:
        """Start reading a layer; returns when the first of it has reached the kernel: a layer may be computed
        in less time than that takes."""
        read_bytes = self.read_bytes()
        if self._reading is not None:
            if not self._reading.done():
                return
            self._reading.result()
        shards = layer_shards(self._manifest, self._layer, self._fidelities)
        self._asked_bytes += sum(shard.length for shard in shards)
        self._reading = self._pool.submit(self._read, shards)
        self._layer = (self._layer + 1) % self._manifest.model.layers
        while not self._reading.done() and self.read_bytes() == read_bytes:
            time.sleep(0)

    def read_bytes(self) -> int:
        """Bytes read from storage so far, by the kernel's count, else those of the reads begun."""
        counted = self._executor.storage_bytes()
        return self._asked_bytes if counted is None else counted

    def has_read(self) -> bool:
        """Whether a read has ended."""
        if self._reading is not None and self._reading.done():
            self._reading.result()
        return bool(self.loads)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving = True
        self._pool.shutdown(wait=True)
        if self._reading is not None and error is None:
            self._reading.result()

    def _read(self, shards: Sequence[PlannedShard]) -> None:
        evict_if_buffered(self._executor, IO_MODE)
        loaded, load = self._executor.load_layer(shards, IO_MODE)
        if not self._leaving:
            self.loads.append(load)
        self._executor.drop_layer(loaded)


def profile_fixed(unit: FixedProfileUnit, context: Context) -> FixedProfileResult:
    """Requests without layers."""
    executor = context.executor
    watch = Watch.of_job(context.job)
    samples = []
    for i, row in enumerate(unit.rows):
        request = context.request(row)
        evict_if_buffered(executor, IO_MODE)
        outcome = executor.run_fixed(request, IO_MODE)
        counted = "io-not-accounted" not in outcome.verdict.reasons
        samples.append(
            FixedSample(
                embed_io_ns=outcome.embed_io_ns,
                embed_compute_ns=outcome.embed_compute_ns,
                head_ns=outcome.head_ns,
                bytes=outcome.planned_bytes,
                storage_bytes=outcome.storage_bytes,
                mode_asked=IO_MODE,
                mode_proven=proven_mode(
                    outcome.planned_bytes, outcome.storage_bytes if counted else None, outcome.io_mode
                ),
                throttled=watch.sampled(i + 1),
                warmup=i < unit.warmups,
            )
        )
    return FixedProfileResult(kind="profile-fixed", readings=watch.readings, samples=tuple(samples))
