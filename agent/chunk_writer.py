"""Writing chunks to their places: noted at once, then flushed and listed as done beside whoever brings them.

A thread does the flushing, so that a link never waits for storage; it takes all that was written so far at
once, so that slow flushing makes fewer of them. The caller holds the spool's deploy lock.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from agent.incoming import Layout, append_done, is_stored, open_arrived
from agent.spool import Spool, fsync_folder, storage_error
from sti_runtime.errors import StifarmError

BATCH_BYTES = 8 << 20
"""Chunks are flushed when as much was written, or after FLUSH_S."""

FLUSH_S = 1.0


class ChunkWriter:
    """Writes chunks and lists those that are whole once they are on storage; leaving the block waits for all.

    ``read_back``: read them from storage again; ``stored`` then holds those whose bytes are right there.
    Leaving raises StifarmError if storage failed; then what was not listed comes again.
    """

    def __init__(self, spool: Spool, layout: Layout, *, read_back: bool = False) -> None:
        self._spool, self._layout, self._read_back = spool, layout, read_back
        self._folder = spool.incoming_bundle(layout.digest)
        self._files: dict[str, int] = {}
        self._arrived = -1
        self._waiting: list[int] = []
        self._waiting_bytes = 0
        self._closing = False
        self._error: StifarmError | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._flush_all, name="flush", daemon=True)
        self.stored: set[int] = set()

    def __enter__(self) -> Self:
        self._arrived = open_arrived(self._spool, self._layout.digest)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        for fd in (self._arrived, *self._files.values()):
            os.close(fd)
        if self._error is not None and kind is None:
            raise self._error

    def write(self, place: int, data: bytes | memoryview, done: int = 0) -> None:
        """Write bytes of a chunk from its byte ``done`` on. Raises: StifarmError."""
        file, chunk = self._layout.chunks[place]
        try:
            written = 0
            while written < len(data):
                written += os.pwrite(self._file(file), data[written:], chunk.offset + done + written)
        except OSError as error:
            raise storage_error(error, self._folder / file) from error

    def read(self, place: int, done: int, size: int) -> bytes:
        """Bytes of a chunk that were written before. Raises: StifarmError."""
        file, chunk = self._layout.chunks[place]
        try:
            return os.pread(self._file(file), size, chunk.offset + done)
        except OSError as error:
            raise storage_error(error, self._folder / file) from error

    def add(self, places: Sequence[int]) -> None:
        """These chunks are whole: note, flush and list them. Raises: StifarmError, also of the flushing."""
        try:
            os.write(self._arrived, b"".join(b"%d\n" % place for place in places))
        except OSError as error:
            raise storage_error(error, self._spool.arrived_list(self._layout.digest)) from error
        with self._changed:
            if self._error is not None:
                raise self._error
            for place in places:
                self._waiting.append(place)
                self._waiting_bytes += self._layout.chunks[place][1].length
            if self._waiting_bytes >= BATCH_BYTES:
                self._changed.notify()

    def _file(self, file: str) -> int:
        if file not in self._files:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._files[file] = os.open(self._folder / file, flags, 0o644)
        return self._files[file]

    # -------------------------------------------------------------- the thread

    def _flush_all(self) -> None:
        closing = False
        while not closing:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or self._waiting_bytes >= BATCH_BYTES, FLUSH_S)
                batch, self._waiting, self._waiting_bytes = self._waiting, [], 0
                closing = self._closing
            try:
                if batch and self._error is None:
                    self._flush(batch)
            except StifarmError as error:
                with self._changed:
                    self._error = error

    def _flush(self, batch: list[int]) -> None:
        try:
            for file in sorted({self._layout.chunks[place][0] for place in batch}):
                os.fsync(self._files[file])
            fsync_folder(self._folder)
        except OSError as error:
            raise storage_error(error, self._folder) from error
        append_done(self._spool, self._layout.digest, batch)
        if self._read_back:
            self.stored.update(place for place in batch if self._is_stored(place))

    def _is_stored(self, place: int) -> bool:
        file, chunk = self._layout.chunks[place]
        try:
            return is_stored(self._files[file], chunk)
        except OSError:
            return False  # commit reads it again and says what storage says
