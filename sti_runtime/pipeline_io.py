"""The IO side of the executor: the IO thread, its readers, the working and the preload buffer.

One request's reads are a ``Session``. Its state and both buffers are guarded by one condition, on which
the IO thread waits for room and the compute thread for shards.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import groupby

from sti_runtime.bundle import Bundle
from sti_runtime.embedding_rows import PageRun, RowReads
from sti_runtime.engine import LoadedShard, Throttle, for_each
from sti_runtime.manifest import EMBEDDINGS_FILE
from sti_runtime.messages import IoMode
from sti_runtime.plan import MergedRead, Plan, PlannedShard, merged_reads
from sti_runtime.preload import PreloadBuffer, shard_key
from sti_runtime.storage import U8, BufferPool, Storage, StorageCounter, anonymous_pages

Batch = tuple[MergedRead, ...]
"""Reads of one layer, issued together."""


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a submodel. ``streamed``: how many of its shards are not preloaded."""

    source_layer: int
    shards: tuple[tuple[PlannedShard, tuple[int, ...]], ...]  # with their outlier counts
    streamed: int


@dataclass(frozen=True, slots=True)
class Work:
    """A plan made ready, once; no layers: only the fixed parts of a request."""

    layers: tuple[Layer, ...] = ()
    preloaded: tuple[Batch, ...] = ()
    streamed: tuple[Batch, ...] = ()
    load_exec: bool = False


@dataclass(slots=True)
class LayerIo:
    """How far the reads of one layer are. Times of CLOCK_MONOTONIC, 0 before the first read."""

    missing: int
    start_ns: int = 0
    end_ns: int = 0
    bytes: int = 0
    loaded: dict[int, U8] = field(default_factory=dict)  # slice → buffer of the working pool


class Session:
    """What the threads of one request share. Guarded by ``IoSide.changed``."""

    def __init__(self, work: Work, cold: bool) -> None:
        self.layers = [LayerIo(len(layer.shards) if cold else layer.streamed) for layer in work.layers]
        self.unread = sum(layer.missing for layer in self.layers)
        self.stopped = False
        self.io_ended = False
        self.embedded = False


class IoSide:
    """Everything that reads. Public methods are called by the executor's thread only."""

    def __init__(self, bundle: Bundle, queue_depth: int, throttle: Throttle) -> None:
        self.changed = threading.Condition()
        self.preload = PreloadBuffer()
        self.working = BufferPool(0)
        self.counter = StorageCounter()
        self.rows_buffer: U8 = anonymous_pages(1 << 20)
        self.rows_peak_bytes = 0
        self._bundle = bundle
        self._queue_depth = queue_depth
        self._throttle = throttle
        self._io = ThreadPoolExecutor(1, "io", self.counter.join)
        self._readers = ThreadPoolExecutor(max(1, queue_depth - 1), "read", self.counter.join)
        self._storages: dict[IoMode, Storage] = {}
        self.files: dict[int, str] = {r.fidelity: r.file for r in bundle.manifest.regions}

    def storage(self, io_mode: IoMode) -> Storage:
        """The bundle's files opened in ``io_mode``, or in the mode it falls back to."""
        found = self._storages.get(io_mode)
        if found is None:
            found = Storage.of_bundle(self._bundle.path, self._bundle.manifest, io_mode)
            self._storages[io_mode] = found
        return found

    def begin(
        self, session: Session, work: Work, rows: RowReads, storage: Storage, *, cold: bool
    ) -> Future[None]:
        """Start the reads of a request; ``cold``: those of preloaded shards too."""
        io = self._io.submit(self._main, session, work, rows, storage, cold)
        io.add_done_callback(lambda _: self._ended(session))
        return io

    def wait_for(self, session: Session, io: Future[None], ready: Callable[[], bool]) -> None:
        """Wait for the IO thread. Raises: its error, if it ends without having made it ready."""
        with self.changed:
            while not ready():
                if session.io_ended:
                    io.result()
                    raise AssertionError("the IO thread ended before its last read")
                self.changed.wait()

    def stop(self, session: Session) -> None:
        """Let no further read of the session start."""
        with self.changed:
            session.stopped = True
            self.changed.notify_all()

    def release(self, states: Sequence[LayerIo]) -> None:
        """Give the working buffer back what these layers hold of it."""
        with self.changed:
            for state in states:
                self.working.release(list(state.loaded.values()))
                state.loaded.clear()
            self.changed.notify_all()

    def read_apart(self, session: Session, reads: Sequence[Batch], storage: Storage, *, preload: bool) -> int:
        """Read batches apart from a request; returns the ns it took. Raises: StorageReadError."""
        io = self._io.submit(self._read_timed, session, reads, storage, preload)
        try:
            return io.result()
        finally:
            if not io.done():  # interrupted
                self.stop(session)
                wait([io])

    def size_buffers(self, working_bytes: int, preload_bytes: int, *, emptied: bool) -> None:
        """Set W and |S| between requests; ``emptied``: forget what is preloaded."""
        with self.changed:
            self.working.resize(working_bytes)
            if emptied:
                self.preload.clear()
            self.preload.resize(preload_bytes)

    def make_room(self, size_bytes: int) -> None:
        """Let the working buffer take ``size_bytes`` more."""
        with self.changed:
            needed = self.working.in_use_bytes + size_bytes
            self.working.resize(max(self.working.capacity_bytes, needed))

    def fill(self, plan: Plan, work: Work, storage: Storage) -> None:
        """Bring the preload buffer to what ``plan`` preloads: evict from the top, read what is missing."""
        with self.changed:
            self.preload.resize(plan.preload_bytes)
            self.preload.keep({shard_key(s) for s in plan.preloaded()})
            held = self.preload.keys()
        missing = tuple(s for s in plan.preloaded() if shard_key(s) not in held)
        if missing:
            self.read_apart(Session(work, cold=True), batches(missing), storage, preload=True)

    def loaded(self, layer: Layer, state: LayerIo) -> list[LoadedShard]:
        """The shards of a layer that is all in, from either buffer."""
        shards = []
        for shard, outliers in layer.shards:
            data = state.loaded.get(shard.slice)
            if data is None:
                data = self.preload.get(shard_key(shard))
            assert data is not None, "a layer is computed only when its shards are in"
            shards.append(LoadedShard(shard.slice, shard.fidelity, outliers, data))
        return shards

    def reset(self) -> None:
        """Empty the buffers, return their memory to the system and count peaks anew."""
        with self.changed:
            self.preload.clear()
            self.preload.pool.trim()
            self.working.trim()
            self.rows_peak_bytes = 0

    def close(self) -> None:
        """Stop the threads, close the files."""
        self._io.shutdown()
        self._readers.shutdown()
        for storage in self._storages.values():
            storage.close()
        self._storages.clear()
        self.counter.close()

    # ------------------------------------------------------------ on the IO thread

    def _ended(self, session: Session) -> None:
        with self.changed:
            session.io_ended = True
            self.changed.notify_all()

    def _main(self, session: Session, work: Work, rows: RowReads, storage: Storage, cold: bool) -> None:
        """A request: embedding rows, then (cold) preloaded shards, then streamed ones."""
        self._read_rows(session, rows, storage)
        for batch in work.preloaded if cold else ():
            self._read_batch(session, batch, storage, preload=True)
        for batch in work.streamed:
            self._read_batch(session, batch, storage, preload=False)

    def _read_timed(self, session: Session, reads: Sequence[Batch], storage: Storage, preload: bool) -> int:
        start_ns = time.monotonic_ns()
        for batch in reads:
            self._read_batch(session, batch, storage, preload=preload)
        return time.monotonic_ns() - start_ns

    def _read_rows(self, session: Session, rows: RowReads, storage: Storage) -> None:
        if rows.buffer_bytes > self.rows_buffer.nbytes:
            self.rows_buffer = anonymous_pages(rows.buffer_bytes)
        self.rows_peak_bytes = max(self.rows_peak_bytes, rows.buffer_bytes)
        buffer = self.rows_buffer

        def read(run: PageRun) -> None:
            if not session.stopped:
                into = buffer[run.start : run.start + run.length]
                self._paced_read(storage, EMBEDDINGS_FILE, run.offset, [into], run.required_bytes)

        for_each(self._readers, self._queue_depth, rows.runs, read)
        with self.changed:
            session.embedded = True
            self.changed.notify_all()

    def _read_batch(self, session: Session, batch: Batch, storage: Storage, *, preload: bool) -> None:
        for_each(
            self._readers,
            self._queue_depth,
            batch,
            lambda read: self._read_merged(session, read, storage, preload),
        )

    def _read_merged(self, session: Session, read: MergedRead, storage: Storage, preload: bool) -> None:
        """One merged read, each shard into a buffer of its own; nothing once the session is stopped."""
        pool = self.preload.pool if preload else self.working
        sizes = [shard.length for shard in read.shards]
        with self.changed:
            while True:
                if session.stopped:
                    return
                buffers = pool.acquire(sizes)
                if buffers is not None:
                    break
                assert not preload, "a plan never preloads more than its buffer"
                self.changed.wait()
        start_ns = time.monotonic_ns()
        try:
            self._paced_read(storage, self.files[read.fidelity], read.offset, buffers, read.length)
        except BaseException:
            with self.changed:
                pool.release(buffers)
            self.stop(session)
            raise
        end_ns = time.monotonic_ns()
        state = session.layers[read.layer]
        with self.changed:
            state.start_ns = min(state.start_ns or start_ns, start_ns)
            state.end_ns = max(state.end_ns, end_ns)
            state.bytes += read.length
            state.missing -= len(buffers)
            session.unread -= len(buffers)
            for shard, buffer in zip(read.shards, buffers, strict=True):
                if preload:
                    self.preload.put(shard_key(shard), buffer)
                else:
                    state.loaded[shard.slice] = buffer
            self.changed.notify_all()

    def _paced_read(
        self, storage: Storage, file: str, offset: int, buffers: Sequence[U8], required: int
    ) -> None:
        start_ns = time.monotonic_ns()
        storage.read(file, offset, buffers, required)
        self._throttle.after_read(start_ns, required)


def smallest_working_bytes(plan: Plan) -> int:
    """The smallest working buffer with which the plan's reads can all be made.

    A layer's bytes are freed only when it has been computed, and layers are computed in order; so
    while layer l is incomplete, everything read for layers ≥ l is held.
    """
    reads = plan.streamed()
    if plan.mode == "load-exec":
        return plan.streamed_bytes
    last_read = {shard.layer: i for i, shard in enumerate(reads)}
    needed = held = 0
    done = 0
    for i, shard in enumerate(reads):
        # Layers below `done` can have been computed before this read: all their reads are over.
        while done < plan.submodel.depth and last_read.get(done, -1) < i:
            held -= sum(s.length for s in reads[:i] if s.layer == done)
            done += 1
        held += shard.length
        needed = max(needed, held)
    return needed


def batches(shards: tuple[PlannedShard, ...]) -> tuple[Batch, ...]:
    """Shards in read order → merged reads, grouped while the layer stays the same."""
    return tuple(tuple(group) for _, group in groupby(merged_reads(shards), key=lambda read: read.layer))
