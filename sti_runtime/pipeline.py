"""The executor: runs plans with a real IO thread beside the compute thread.

::

    IO thread       | embedding rows | reads of layer 0 | reads of layer 1 | …
    compute thread                   | embedding |..stall..| layer 0 | layer 1 | … | head |

The IO thread reads in plan order; the merged reads of one layer go out ``queue_depth`` at a time. A read
starts when its bytes are free in the working buffer; a layer's bytes are freed when it has been computed.
The compute thread is the caller's. An error on either side ends the request on both, with all buffers
returned. Every time is taken here; nothing is logged or allocated needlessly while a request runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from sti_runtime.bundle import Bundle
from sti_runtime.embedding_rows import Request, check_request, gather_rows, plan_row_reads
from sti_runtime.engine import Engine, LoadedShard, NoThrottle, Throttle
from sti_runtime.errors import FormatError, InputError, ResourceError
from sti_runtime.manifest import EMBEDDINGS_FILE
from sti_runtime.messages import IoMode, LayerTrace, MemoryParts, RequestKind, Verdict
from sti_runtime.pipeline_io import IoSide, Layer, LayerIo, Session, Work, batches, smallest_working_bytes
from sti_runtime.plan import Plan, PlannedShard
from sti_runtime.plan_check import check_bundle
from sti_runtime.preload import PreloadBuffer
from sti_runtime.shard import F32
from sti_runtime.storage import BufferPool, Storage, anonymous_pages

__all__ = ["Executor", "LayerLoad", "Request", "RequestOutcome", "require_bundle", "smallest_working_bytes"]


@dataclass(frozen=True, slots=True)
class RequestOutcome:
    """What one request gave. Times in ns; ``planned_bytes``: shards and embedding pages it had to read.

    ``io_mode`` is the mode in use, which is not the one asked for where storage refused it.
    Shapes: logits [labels] (empty without a head), hidden [L, H].
    """

    logits: tuple[float, ...]
    hidden: F32
    trace: tuple[LayerTrace, ...]
    latency_ns: int
    stall_ns: int
    planned_bytes: int
    storage_bytes: int
    verdict: Verdict
    io_mode: IoMode
    embed_io_ns: int
    embed_compute_ns: int
    head_ns: int
    embed_bytes: int


@dataclass(frozen=True, slots=True)
class LayerLoad:
    """One layer read as the executor reads it, apart from any request."""

    versions: int
    bytes: int
    storage_bytes: int | None
    duration_ns: int


class Executor:
    """Executes plans over one bundle with one engine. One request at a time, from one thread."""

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        *,
        threads: int,
        queue_depth: int,
        throttle: Throttle | None = None,
    ) -> None:
        """``threads`` is what the engine computes with (kept for the record)."""
        self.bundle = bundle
        self.engine = engine
        self.threads = threads
        self.queue_depth = queue_depth
        self._throttle: Throttle = throttle or NoThrottle()
        self._io = IoSide(bundle, queue_depth, self._throttle)
        self._last: tuple[Plan, Work] | None = None

    # ------------------------------------------------------------ public

    @property
    def preload(self) -> PreloadBuffer:
        """The preload buffer."""
        return self._io.preload

    @property
    def working(self) -> BufferPool:
        """The working buffer."""
        return self._io.working

    def storage(self, io_mode: IoMode) -> Storage:
        """The bundle's files opened in ``io_mode``, or in the mode it falls back to."""
        return self._io.storage(io_mode)

    def fill(self, plan: Plan, io_mode: IoMode = "direct") -> None:
        """Bring the preload buffer to what ``plan`` preloads: evict from the top, read what is missing.

        Raises: FormatError if the plan is of another bundle, StorageReadError.
        """
        self._io.fill(plan, self._prepare(plan), self.storage(io_mode))

    def run(self, plan: Plan, request: Request, kind: RequestKind, io_mode: IoMode) -> RequestOutcome:
        """Execute one request; ``spawn-cold`` and ``cold`` start with empty buffers, ``warm`` and
        ``cached`` with the preload buffer filled (untimed).

        The page cache is left as it is: before a cold or warm request with buffered reads the caller
        evicts (``storage(mode).evict()``), else the verdict is "not-from-storage".
        Raises: FormatError, InputError, ResourceError, StorageReadError.
        """
        work = self._prepare(plan)
        check_request(self.bundle.manifest, request)
        if request.tokens != plan.sequence_length:
            raise InputError(
                f"The plan is for {plan.sequence_length} tokens, the row has {request.tokens}.",
                "Profile and plan for the task's sequence length.",
            )
        if kind == "cached" and io_mode != "buffered":
            raise InputError("A cached request reads through the page cache.", "Ask for buffered reads.")
        storage = self.storage(io_mode)
        self.engine.allocate(plan.submodel.width, request.tokens)
        cold = kind in ("spawn-cold", "cold")
        self._io.size_buffers(plan.working_bytes, plan.preload_bytes, emptied=cold)
        if not cold:
            self._io.fill(plan, work, storage)
        if kind == "cached":
            self._warm_page_cache(work, request, storage)
        return self._request(work, request, storage, kind, cold)

    def run_fixed(self, request: Request, io_mode: IoMode) -> RequestOutcome:
        """The request path without layers: embedding reads, their sum and norm, the head."""
        check_request(self.bundle.manifest, request)
        return self._request(Work(), request, self.storage(io_mode), "cold", cold=True)

    def load_layer(
        self, shards: Sequence[PlannedShard], io_mode: IoMode
    ) -> tuple[list[LoadedShard], LayerLoad]:
        """Read the shards of one layer as a request would, into a working buffer of their size.

        The buffers belong to the executor until ``drop_layer``. Raises: StorageReadError.
        """
        io, layer = self._io, self._layer(shards)
        session = Session(Work(layers=(layer,)), cold=True)
        size_bytes = sum(shard.length for shard in shards)
        io.make_room(size_bytes)
        storage, before = self.storage(io_mode), io.counter.read()
        try:
            duration_ns = io.read_apart(session, batches(tuple(shards)), storage, preload=False)
        except BaseException:
            io.release(session.layers)
            raise
        after = io.counter.read()
        load = LayerLoad(len(shards), size_bytes, _difference(before, after), duration_ns)
        return io.loaded(layer, session.layers[0]), load

    def storage_bytes(self) -> int | None:
        """Bytes the kernel has read from storage for the reading threads so far; None: it does not count."""
        return self._io.counter.read()

    def drop_layer(self, loaded: Iterable[LoadedShard]) -> None:
        """Give back what ``load_layer`` returned."""
        with self._io.changed:
            self._io.working.release([shard.data for shard in loaded])

    def compute_layer(self, source_layer: int, shards: Sequence[LoadedShard]) -> tuple[int, int]:
        """Decompress and compute one layer: (decompression, compute) in ns, the throttle's waits included."""
        start_ns = time.monotonic_ns()
        with self._throttle.compute():
            self.engine.decode(shards)
        middle_ns = time.monotonic_ns()
        with self._throttle.compute():
            self.engine.compute(source_layer)
        return middle_ns - start_ns, time.monotonic_ns() - middle_ns

    def memory(self) -> MemoryParts:
        """Peak bytes by part since ``reset``; working includes the embedding pages."""
        return MemoryParts(
            resident=self.engine.resident_bytes,
            preload=self._io.preload.pool.peak_bytes,
            working=self._io.working.peak_bytes + self._io.rows_peak_bytes,
            activations=self.engine.activation_bytes,
            process_peak_bytes=None,
        )

    def reset(self) -> None:
        """Empty the buffers, return their memory to the system and count peaks anew."""
        self._io.reset()

    def close(self) -> None:
        """Stop the threads, close the files."""
        self._io.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------ preparation

    def _prepare(self, plan: Plan) -> Work:
        if self._last is not None and (self._last[0] is plan or self._last[0] == plan):
            return self._last[1]
        require_bundle(plan, self.bundle)
        needed = smallest_working_bytes(plan)
        if needed > plan.working_bytes:
            raise ResourceError(
                f"The plan streams {needed} bytes at once into a working buffer of {plan.working_bytes}.",
                f"Plan with a working buffer of at least {needed} bytes.",
            )
        width = plan.submodel.width
        work = Work(
            layers=tuple(
                self._layer(plan.shards[start : start + width]) for start in range(0, len(plan.shards), width)
            ),
            preloaded=batches(plan.preloaded()),
            streamed=batches(plan.streamed()),
            load_exec=plan.mode == "load-exec",
        )
        self._last = plan, work
        return work

    def _layer(self, shards: Sequence[PlannedShard]) -> Layer:
        manifest = self.bundle.manifest
        return Layer(
            source_layer=shards[0].source_layer,
            shards=tuple(
                (s, manifest.shard_version(s.source_layer, s.slice, s.fidelity).outliers) for s in shards
            ),
            streamed=sum(not s.preloaded for s in shards),
        )

    def _warm_page_cache(self, work: Work, request: Request, storage: Storage) -> None:
        rows = plan_row_reads(self.bundle.manifest, storage.size_bytes(EMBEDDINGS_FILE), request)
        ranges = [(EMBEDDINGS_FILE, run.offset, run.length, run.required_bytes) for run in rows.runs]
        for batch in work.streamed:
            ranges += [(self._io.files[r.fidelity], r.offset, r.length, r.length) for r in batch]
        for file, offset, length, required in ranges:
            storage.read(file, offset, [anonymous_pages(length)], required)

    # ------------------------------------------------------------ one request, compute side

    def _request(
        self, work: Work, request: Request, storage: Storage, kind: RequestKind, cold: bool
    ) -> RequestOutcome:
        side, manifest, session = self._io, self.bundle.manifest, Session(work, cold)
        before = side.counter.read()
        start_ns = time.monotonic_ns()
        io: Future[None] | None = None
        try:
            rows = plan_row_reads(manifest, storage.size_bytes(EMBEDDINGS_FILE), request)
            io = side.begin(session, work, rows, storage, cold=cold)
            side.wait_for(session, io, lambda: session.embedded)
            embed_start_ns = time.monotonic_ns()
            with self._throttle.compute():
                self.engine.begin(*gather_rows(side.rows_buffer, rows, manifest.model.hidden), request.length)
            embed_end_ns = time.monotonic_ns()
            trace = [
                self._run_layer(layer, state, session, io, work.load_exec, start_ns)
                for layer, state in zip(work.layers, session.layers, strict=True)
            ]
            head_start_ns = time.monotonic_ns()
            with self._throttle.compute():
                logits, hidden = self.engine.finish()
            end_ns = time.monotonic_ns()
        finally:
            side.stop(session)
            if io is not None:
                wait([io])
            side.release(session.layers)
        io.result()
        storage_bytes = _difference(before, side.counter.read())
        planned = sum(state.bytes for state in session.layers) + rows.required_bytes
        return RequestOutcome(
            logits=tuple(logits.tolist()),
            hidden=hidden,
            trace=tuple(trace),
            latency_ns=end_ns - start_ns,
            stall_ns=sum(row.stall_ns for row in trace),
            planned_bytes=planned,
            storage_bytes=storage_bytes or 0,
            verdict=_verdict(kind, planned, storage_bytes),
            io_mode=storage.io_mode,
            embed_io_ns=embed_start_ns - start_ns,
            embed_compute_ns=embed_end_ns - embed_start_ns,
            head_ns=end_ns - head_start_ns,
            embed_bytes=rows.required_bytes,
        )

    def _run_layer(
        self,
        layer: Layer,
        state: LayerIo,
        session: Session,
        io: Future[None],
        load_exec: bool,
        start_ns: int,
    ) -> LayerTrace:
        wait_ns = time.monotonic_ns()
        if load_exec:
            self._io.wait_for(session, io, lambda: session.unread == 0)
        else:
            self._io.wait_for(session, io, lambda: state.missing == 0)
        ready_ns = time.monotonic_ns()
        decompress_ns, _ = self.compute_layer(layer.source_layer, self._io.loaded(layer, state))
        end_ns = time.monotonic_ns()
        self._io.release([state])
        return LayerTrace(
            io_start_ns=max(0, state.start_ns - start_ns),
            io_end_ns=max(0, state.end_ns - start_ns),
            bytes=state.bytes,
            compute_start_ns=ready_ns - start_ns,
            compute_end_ns=end_ns - start_ns,
            decompress_ns=decompress_ns,
            stall_ns=ready_ns - wait_ns if state.bytes else 0,
        )


def require_bundle(plan: Plan, bundle: Bundle) -> None:
    """Raises: FormatError unless the plan was made for this bundle."""
    problems = check_bundle(plan, bundle.manifest)
    if problems:
        raise FormatError(
            f"The plan does not fit bundle {bundle.digest[:12]}: {problems[0]}.",
            "Plan again for this bundle.",
        )


def _difference(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before


def _verdict(kind: RequestKind, planned_bytes: int, storage_bytes: int | None) -> Verdict:
    """Whether the bytes came from where the kind of request says."""
    if storage_bytes is None:
        reasons: tuple[str, ...] = ("io-not-accounted",)
    elif kind == "cached":
        reasons = ("not-cached",) if storage_bytes else ()
    else:
        reasons = ("not-from-storage",) if storage_bytes < planned_bytes else ()
    return Verdict(valid=not reasons, reasons=reasons)
