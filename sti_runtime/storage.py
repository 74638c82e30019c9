"""Reading a bundle's files from storage, and proving that storage is where the bytes came from.

``direct``: O_DIRECT, the page cache is bypassed. A filesystem may accept O_DIRECT and serve the read from
memory all the same, so the mode is used only after a proof: a page that is surely cached is read
directly, and the kernel must count it as read from the device. ``buffered``: ordinary reads without
readahead; ``evict`` drops the files from the page cache.

Source: open(2), posix_fadvise(2), proc_pid_io(5).
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from sti_runtime.errors import StorageReadError
from sti_runtime.manifest import ALIGNMENT, EMBEDDINGS_FILE, Manifest
from sti_runtime.messages import IoMode

U8 = npt.NDArray[np.uint8]

_LOG = logging.getLogger(__name__)
_IO_ACCOUNTING = "/proc/thread-self/io"
_REMEDY = "Verify the bundle and deploy it again; if it happens again, the storage is failing."


class StorageCounter:
    """Bytes the kernel has fetched from storage devices for the threads that ``join``.

    Per thread, so that pages of libraries faulted in elsewhere in the process do not pass for data read.
    Only what lies between two calls of ``read`` means anything.
    """

    def __init__(self) -> None:
        self._fds: list[int] = []
        self._readable = True

    def join(self) -> None:
        """Count the calling thread from now on."""
        try:
            self._fds.append(os.open(_IO_ACCOUNTING, os.O_RDONLY | os.O_CLOEXEC))
        except OSError as error:
            self._readable = False
            _LOG.warning("%s: %s: reads cannot be proven", _IO_ACCOUNTING, error.strerror)

    def read(self) -> int | None:
        """The count now; None where the kernel does not account for IO: nothing can then be proven."""
        return sum(_read_bytes(fd) for fd in self._fds) if self._readable else None

    def close(self) -> None:
        """Release the file descriptors."""
        while self._fds:
            os.close(self._fds.pop())


def _read_bytes(fd: int) -> int:
    fields = dict(line.split(b": ") for line in os.pread(fd, 1024, 0).splitlines())
    return int(fields[b"read_bytes"])


def anonymous_pages(size_bytes: int) -> U8:
    """Page-aligned private memory, zero-filled; returned to the system when the array is dropped."""
    return np.frombuffer(mmap.mmap(-1, size_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)


def direct_io_works(path: Path) -> bool:
    """Whether reads of ``path`` with O_DIRECT bypass the page cache: tried and counted, not assumed.

    Raises: StorageReadError if the file cannot be read at all.
    """
    counter = StorageCounter()
    counter.join()
    try:
        cached = _open(path, os.O_RDONLY)
        try:
            os.fsync(cached)
            os.pread(cached, ALIGNMENT, 0)  # now in the page cache
            try:
                direct = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            except OSError as error:
                _LOG.info("%s: no direct IO: %s", path, error.strerror)
                return False
            try:
                before = counter.read()
                got = os.preadv(direct, [anonymous_pages(ALIGNMENT).data], 0)
                after = counter.read()
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                return False
            finally:
                os.close(direct)
            return got > 0 and before is not None and after is not None and after - before >= got
        finally:
            os.close(cached)
    except OSError as error:
        raise StorageReadError(f"{path}: cannot be read: {error.strerror}.", _REMEDY) from error
    finally:
        counter.close()


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        raise StorageReadError(f"{path}: cannot be opened: {error.strerror}.", _REMEDY) from error


@dataclass(frozen=True)
class StoredFile:
    """One open file: ``fd`` serves the reads, ``size_bytes`` is what its manifest says."""

    path: Path
    fd: int
    size_bytes: int


class Storage:
    """The files of one bundle, open for reads in one mode. Threads may read at the same time.

    ``io_mode`` is the mode in use; ``fallback`` says why it is not the one asked for (None if it is).
    """

    def __init__(self, folder: Path, sizes: dict[str, int], io_mode: IoMode) -> None:
        """Open ``sizes`` (file name → bytes) below ``folder``.

        Raises: StorageReadError if one cannot be opened or is shorter than that.
        """
        self.io_mode: IoMode = io_mode
        self.fallback: str | None = None
        self._lock = threading.Lock()
        self._asked_bytes = 0
        self._files: dict[str, StoredFile] = {}
        if io_mode == "direct" and sizes and not direct_io_works(folder / next(iter(sizes))):
            self.io_mode = "buffered"
            self.fallback = f"{folder}: the filesystem does not bypass the page cache under O_DIRECT"
            _LOG.warning("%s; reading buffered, evicted before each cold request", self.fallback)
        flags = os.O_RDONLY | (os.O_DIRECT if self.io_mode == "direct" else 0)
        try:
            for name, size_bytes in sizes.items():
                self._open_one(folder / name, size_bytes, flags)
        except BaseException:
            self.close()
            raise

    @classmethod
    def of_bundle(cls, folder: Path, manifest: Manifest, io_mode: IoMode) -> Storage:
        """The region files and the embeddings of a bundle. Raises: StorageReadError."""
        sizes = {r.file: r.versions[-1].offset + r.versions[-1].length for r in manifest.regions}
        sizes |= {f.file: f.bytes for f in manifest.files if f.file == EMBEDDINGS_FILE}
        return cls(folder, sizes, io_mode)

    def _open_one(self, path: Path, size_bytes: int, flags: int) -> None:
        fd = _open(path, flags)
        self._files[path.name] = StoredFile(path, fd, size_bytes)
        actual = os.fstat(fd).st_size
        if actual < size_bytes:
            raise StorageReadError(
                f"{path}: {actual} bytes, but its manifest says {size_bytes}: it is truncated.", _REMEDY
            )
        try:
            os.fdatasync(fd)  # a page still dirty would be written back inside a timed read
            if self.io_mode == "buffered":
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        except OSError as error:
            raise StorageReadError(f"{path}: cannot be synced: {error.strerror}.", _REMEDY) from error

    @property
    def asked_bytes(self) -> int:
        """Bytes requested and delivered since the files were opened."""
        return self._asked_bytes

    def size_bytes(self, file: str) -> int:
        """What the manifest says of ``file``."""
        return self._files[file].size_bytes

    def read(self, file: str, offset: int, buffers: Sequence[U8], required_bytes: int | None = None) -> int:
        """Fill ``buffers`` one after the other with the bytes of ``file`` from ``offset``.

        In direct mode offset, sizes and addresses of the buffers are multiples of ALIGNMENT.
        ``required_bytes``: how much must be there; the rest may lie behind the file's end. Default: all.
        Returns: the bytes read. Raises: StorageReadError naming file and offset.
        """
        stored = self._files[file]
        wanted = sum(buffer.nbytes for buffer in buffers)
        required = wanted if required_bytes is None else required_bytes
        done = 0
        rest: Sequence[U8] = buffers
        while True:
            try:
                got = os.preadv(stored.fd, [buffer.data for buffer in rest], offset + done)
            except OSError as error:
                raise StorageReadError(
                    f"{stored.path}: reading {wanted} bytes at {offset} failed: {error.strerror}.", _REMEDY
                ) from error
            done += got
            if done >= required:
                break
            # A direct read that stops inside a block has met the end of the file.
            if got == 0 or (self.io_mode == "direct" and got % ALIGNMENT):
                raise StorageReadError(
                    f"{stored.path}: ends at {offset + done}, but bytes up to {offset + required} were to be "
                    "read: it was truncated.",
                    _REMEDY,
                )
            rest = _after(buffers, done)
        with self._lock:
            self._asked_bytes += required
        return done

    def evict(self) -> None:
        """Drop the files' clean pages from the page cache (those that no process has mapped)."""
        for stored in self._files.values():
            os.posix_fadvise(stored.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close all files."""
        for stored in self._files.values():
            os.close(stored.fd)
        self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _after(buffers: Sequence[U8], skip: int) -> list[U8]:
    """What remains of ``buffers`` behind their first ``skip`` bytes."""
    rest = []
    for buffer in buffers:
        if skip < buffer.nbytes:
            rest.append(buffer[skip:])
        skip = max(0, skip - buffer.nbytes)
    return rest


class BufferPool:
    """Page-aligned buffers of exact sizes within ``capacity_bytes``, reused by size.

    Buffers given back stay allocated for the next one of their size until the room is needed, so the
    bytes held never exceed the capacity. Not thread-safe: callers hold a lock of their own.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.in_use_bytes = 0
        self.held_bytes = 0
        self.peak_bytes = 0
        self._free: dict[int, list[U8]] = {}

    def fits(self, size_bytes: int) -> bool:
        """Whether ``size_bytes`` more can be in use."""
        return self.in_use_bytes + size_bytes <= self.capacity_bytes

    def acquire(self, sizes_bytes: Sequence[int]) -> list[U8] | None:
        """A buffer of each size, or None if they do not fit now. Sizes are multiples of the page size."""
        total = sum(sizes_bytes)
        if not self.fits(total):
            return None
        self.in_use_bytes += total
        buffers: list[U8 | None] = []
        for size in sizes_bytes:
            waiting = self._free.get(size)
            buffers.append(waiting.pop() if waiting else None)
        missing = sum(size for size, buffer in zip(sizes_bytes, buffers, strict=True) if buffer is None)
        self._make_room(missing)
        self.held_bytes += missing
        self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        return [
            anonymous_pages(size) if buffer is None else buffer
            for size, buffer in zip(sizes_bytes, buffers, strict=True)
        ]

    def release(self, buffers: Sequence[U8]) -> None:
        """Give buffers back. The caller must not touch them again."""
        for buffer in buffers:
            self.in_use_bytes -= buffer.nbytes
            self._free.setdefault(buffer.nbytes, []).append(buffer)

    def resize(self, capacity_bytes: int) -> None:
        """Change the capacity; buffers in use stay, free ones go if there is no room for them."""
        self.capacity_bytes = capacity_bytes
        self._make_room(0)

    def trim(self) -> None:
        """Return all free buffers to the system and start a new peak."""
        self._free.clear()
        self.held_bytes = self.peak_bytes = self.in_use_bytes

    def _make_room(self, size_bytes: int) -> None:
        for size in sorted(self._free, reverse=True):
            waiting = self._free[size]
            while waiting and self.held_bytes + size_bytes > self.capacity_bytes:
                waiting.pop()
                self.held_bytes -= size
            if not waiting:
                del self._free[size]
