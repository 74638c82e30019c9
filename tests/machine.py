"""The lock of a physical machine in a test's hands: what stops an agent before its next timed unit."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Callable
from pathlib import Path


class Machine:
    """A machine's lock, held by the test in a ``with`` block: no timed unit of its jobs runs meanwhile.

    An agent waits for its turn with the lock's file open. So a unit is let through by putting another file,
    locked already, in the place of the one that is then let go: the agent goes on, and before its next
    timed unit it waits again, however fast it is.
    """

    def __init__(self, path: Path, mode: int = 0o600) -> None:
        self.path, self._mode = path, mode
        self._held: list[int] = []
        """Descriptors of all files that agents may wait at; that of the file at ``path`` is the last."""
        os.close(self._make(path, os.O_CREAT))

    def __enter__(self) -> Machine:
        self._held.append(os.open(self.path, os.O_RDWR))
        fcntl.flock(self._held[-1], fcntl.LOCK_EX)
        return self

    def __exit__(self, *_: object) -> None:
        while self._held:
            os.close(self._held.pop())

    def is_open_in(self, pid: int) -> bool:
        """Whether a process waits for the lock or holds it: either with its file open."""
        links: list[str] = []
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                links.append(str(fd.readlink()))
        return any(link.removesuffix(" (deleted)") == str(self.path) for link in links)

    def let_one_through(self) -> list[int]:
        """Let go of who waits now, by one timed unit; returns the files that are not held any more."""
        before = list(self._held)
        fresh = self.path.with_name(f"{self.path.name}.next")
        self._held.append(self._make(fresh, os.O_CREAT | os.O_EXCL))
        fcntl.flock(self._held[-1], fcntl.LOCK_EX)
        fresh.rename(self.path)
        for fd in before:
            fcntl.flock(fd, fcntl.LOCK_UN)
        return before

    def let_through(self, enough: Callable[[], bool], what: str, limit_s: float = 120) -> None:
        """Let timed units through, one by one, until ``enough()``; then none runs."""
        deadline, pause_s = time.monotonic() + limit_s, 0.002
        while not enough():
            assert time.monotonic() < deadline, f"waited {limit_s} s for {what}"
            let_go = self.let_one_through()
            time.sleep(pause_s)
            pause_s = min(0.2, 2 * pause_s)
            for fd in let_go:
                fcntl.flock(fd, fcntl.LOCK_EX)  # waits for the end of a unit that went through

    def _make(self, path: Path, flags: int) -> int:
        fd = os.open(path, os.O_RDWR | flags, self._mode)
        os.fchmod(fd, self._mode)
        return fd
