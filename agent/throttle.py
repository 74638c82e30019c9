"""Slowing an emulated device inside the agent: the labelled fallback where cgroups are not allowed.

Reads are paced as by one device of the stated rate that never saves up for a burst. After a section of
compute the caller sleeps until a CPU of the stated share would have done the same work; a share above
1000 is more than one CPU's worth and limits the sum over threads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from sti_runtime.engine import NoThrottle, Throttle
from sti_runtime.messages import Emulation
from sti_runtime.units import NS_PER_S

_SPIN_NS = 100_000
"""The last part of a wait is spun: a sleep may end this late (timer slack is 50 µs)."""


def sleep_until(deadline_ns: int) -> None:
    """Return at ``deadline_ns`` of CLOCK_MONOTONIC, or at once if it has passed."""
    while (left_ns := deadline_ns - time.monotonic_ns()) > 0:
        if left_ns > _SPIN_NS:
            time.sleep((left_ns - _SPIN_NS) / NS_PER_S)


class ReadPacer:
    """One emulated device of ``bytes_per_s``; concurrent reads queue up behind each other."""

    def __init__(self, bytes_per_s: int) -> None:
        self.bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_ns = 0
        self.paced_bytes = 0

    def due_ns(self, started_ns: int, bytes_: int) -> int:
        """When a read issued at ``started_ns`` ends; the device is busy until then.

        It starts when it was issued or when the device gets free, whichever is later: idle time earns
        nothing.
        """
        with self._lock:
            start_ns = max(started_ns, self._free_ns)
            self._free_ns = start_ns + -(-bytes_ * NS_PER_S // self.bytes_per_s)
            self.paced_bytes += bytes_
            return self._free_ns


def owed_sleep_ns(cpu_ns: int, wall_ns: int, share_milli: int) -> int:
    """How much longer a section of ``cpu_ns`` CPU time, all threads, takes at ``share_milli`` than it did."""
    return max(0, cpu_ns * 1000 // share_milli - wall_ns)


class AgentThrottle:
    """Paces reads and compute of this process. ``None``: that resource is not limited."""

    def __init__(self, *, io_bytes_per_s: int | None, cpu_share_milli: int | None) -> None:
        self._pacer = None if io_bytes_per_s is None else ReadPacer(io_bytes_per_s)
        self._share_milli = cpu_share_milli

    def after_read(self, started_ns: int, bytes_: int) -> None:
        """Wait until the emulated device would have delivered the read."""
        if self._pacer is not None:
            sleep_until(self._pacer.due_ns(started_ns, bytes_))

    def compute(self) -> AbstractContextManager[None]:
        """A section of compute that ends when the stated CPU share would have done it."""
        return nullcontext() if self._share_milli is None else self._section(self._share_milli)

    @contextmanager
    def _section(self, share_milli: int) -> Iterator[None]:
        start_ns, start_cpu_ns = time.monotonic_ns(), time.process_time_ns()
        yield
        cpu_ns = time.process_time_ns() - start_cpu_ns
        now_ns = time.monotonic_ns()
        sleep_until(now_ns + owed_sleep_ns(cpu_ns, now_ns - start_ns, share_milli))


def throttle_for(emulation: Emulation | None) -> Throttle:
    """The throttle a job asks for; none where nothing is emulated or the kernel's cgroups do it."""
    if emulation is None:
        return NoThrottle()
    io = emulation.io_bytes_per_s if emulation.io_mechanism == "agent" else None
    cpu = emulation.cpu_share_milli if emulation.cpu_mechanism == "agent" else None
    if io is None and cpu is None:
        return NoThrottle()
    return AgentThrottle(io_bytes_per_s=io, cpu_share_milli=cpu)
