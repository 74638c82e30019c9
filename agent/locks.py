"""File locks between processes (flock): released by the kernel when their holder dies."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.errors import BusyError
from sti_runtime.errors import FormatError

_POLL_S = 0.05


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        # Linux refuses O_CREAT on another user's file in a sticky folder, where the machine's lock lies.
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, flags)
        fd = os.open(path, flags | os.O_CREAT, 0o666)
        if path.parent.stat().st_mode & stat.S_ISVTX:
            os.fchmod(fd, 0o666)  # whatever the umask: every user of the machine takes this lock
        return fd
    except OSError as error:
        raise FormatError(
            f"{path}: the lock file cannot be opened: {error.strerror}.",
            "Its folder must exist and be writable, and it must not be a symbolic link.",
        ) from error


def _is_current(fd: int, path: Path) -> bool:
    """Whether ``path`` still names the locked file (and not one made after its removal)."""
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    held = os.fstat(fd)
    return (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino)


def _try_lock(path: Path) -> int | None:
    """A file descriptor that holds the lock, or None if somebody else does."""
    while True:
        fd = _open(path)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EWOULDBLOCK, errno.EINTR):
                return None
            raise
        if _is_current(fd, path):
            return fd
        os.close(fd)


@contextmanager
def hold(path: Path, *, wait_s: float, what: str, label: str = "") -> Iterator[None]:
    """Hold the lock at ``path``; ``label`` is written into it for whoever finds it held.

    Raises: BusyError naming ``what`` and the holder's label if it is not free within ``wait_s``.
    """
    deadline = time.monotonic() + wait_s
    while (fd := _try_lock(path)) is None:
        if time.monotonic() >= deadline:
            holder = read_label(path)
            raise BusyError(
                f"{what} is in use{f' by {holder}' if holder else ''} ({path} is locked).",
                "Try again when it is done, or stop it.",
            )
        time.sleep(_POLL_S)
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, label.encode(), 0)
        yield
    finally:
        os.close(fd)


def read_label(path: Path) -> str:
    """The label in a lock file; empty if there is none."""
    try:
        return path.read_text(errors="replace")[:200]
    except FileNotFoundError:
        return ""


class _Waiter(threading.Thread):
    """Blocks in flock, so that the kernel queues us fairly while the main thread stays responsive."""

    def __init__(self, path: Path, operation: int) -> None:
        super().__init__(name="machine-lock", daemon=True)
        self._operation = operation
        self.fd = _open(path)
        self.error: OSError | None = None
        self._mutex = threading.Lock()
        self._abandoned = self._finished = False

    def run(self) -> None:
        try:
            fcntl.flock(self.fd, self._operation)
        except OSError as error:
            self.error = error
        with self._mutex:
            self._finished = True
            if self._abandoned:
                os.close(self.fd)

    def abandon(self) -> None:
        """Give up waiting; a lock that is granted later is released at once."""
        with self._mutex:
            self._abandoned = True
            if self._finished:
                os.close(self.fd)


@contextmanager
def hold_machine(path: Path | None, *, timed: bool, stopping: Callable[[], bool]) -> Iterator[bool]:
    """Hold the lock of the physical machine, waiting as long as it takes; yields whether it is held.

    Timed units hold it alone, others together, so that nothing of ours runs beside a timed unit.
    ``None``: the device has its machine to itself. Yields False when ``stopping()`` became true first.
    """
    if path is None:
        yield True
        return
    waiter = _Waiter(path, fcntl.LOCK_EX if timed else fcntl.LOCK_SH)
    waiter.start()
    while waiter.is_alive():
        waiter.join(_POLL_S)
        if waiter.is_alive() and stopping():
            waiter.abandon()
            yield False
            return
    try:
        if waiter.error is not None:
            raise waiter.error
        yield True
    finally:
        os.close(waiter.fd)
