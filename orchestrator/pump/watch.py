"""A lab host's side of a fleet's jobs: it watches its devices' journals and answers for all of them at once.

The controller orders attempts to be watched from an offset on, and drains what has come of them. Of each
device there is one stretch at most; it stays here, and is given again, until the next order for the device,
which the controller gives when the stretch is in its store. So nothing is lost when either side dies: the
journal on the device is the buffer. A pump that was begun anew has another epoch, and gets its orders again.
"""

from __future__ import annotations

import heapq
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import structlog

from orchestrator.tailing import PollResult
from sti_runtime.errors import StifarmError
from sti_runtime.messages import Job, JournalRecord

HOLD_S = 10.0
"""So long are the records of a job that goes on held back: fewer, larger transactions for the store."""

DRAIN_RECORDS, DRAIN_BYTES = 2000, 32 << 20
"""Where one drain ends; it holds one stretch at least."""

HELD_BYTES = 128 << 20
"""With so much waiting for the controller no further journal is read."""

AGAIN_S = 15.0
"""A stretch that no order has answered is given again after so long: its drain was lost on the way."""

_THREADS = 160
"""Devices looked at once: one that hangs must not hold up the others."""

_PACE_S = 0.5
"""At least so long is between two looks at a journal."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Order:
    """Watch an attempt on a device from an offset on, ``after_s`` from now. ``start``: the job, where its
    agent is to be started before. ``number``: no other order has it, of whichever controller."""

    number: int
    device: str
    job_id: str
    attempt: int
    offset: int
    start: Job | None = None
    after_s: float = 0.0


@dataclass(frozen=True)
class Stretch:
    """What came of the order of a number. ``polled``: of the journal from the order's offset on; None: the
    device could not be asked, or refused (``error``). ``started``: the agent that was to be started has
    been."""

    device: str
    number: int
    polled: PollResult | None
    error: BaseException | None = None
    started: bool = False


@dataclass(frozen=True)
class Drained:
    """Stretches of a host's devices, from the pump of an epoch."""

    epoch: str
    stretches: tuple[Stretch, ...]


class Jobs(Protocol):
    """What runs jobs on the devices: ``worker.HostWorker``."""

    def start_job(self, name: str, job: Job) -> bool: ...
    def poll(self, name: str, job_id: str, attempt: int, offset: int, wait_s: float) -> PollResult: ...


@dataclass
class _Watch:
    """An order and what has come of it. ``given_s``: when its stretch was last drained."""

    order: Order
    offset: int
    records: list[JournalRecord] = field(default_factory=list)
    since_s: float = 0.0
    started: bool = False
    told: str = ""
    stretch: Stretch | None = None
    given_s: float | None = None

    @property
    def bytes(self) -> int:
        """Of the journal, waiting here."""
        return max(0, self.offset - self.order.offset)


class HostPump:
    """Watches the devices of one host. ``pause_s``: how long to wait between two looks at a device's job."""

    def __init__(self, jobs: Jobs, pause_s: Callable[[str], float]) -> None:
        self._jobs, self._pause_s = jobs, pause_s
        self.epoch = uuid.uuid4().hex
        self._watches: dict[str, _Watch] = {}
        self._due: list[tuple[float, int, _Watch]] = []
        self._counted = 0
        self._held_bytes = 0
        lock = threading.Lock()
        self._changed, self._come = threading.Condition(lock), threading.Condition(lock)
        self._closed = False
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="look")
        self._scheduler = threading.Thread(target=self._schedule, name="pump", daemon=True)
        self._scheduler.start()

    def close(self) -> None:
        """Watch nothing any more; agents go on."""
        with self._changed:
            self._closed = True
            self._watches.clear()
            self._changed.notify_all()
            self._come.notify_all()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def exchange(self, orders: Sequence[Order], leave: Sequence[str], wait_s: float) -> Drained:
        """Take orders, stop watching the devices ``leave``, and give what has come: at once if there is
        something, else within ``wait_s``. Calling again with the same orders changes nothing."""
        with self._changed:
            for device in leave:
                self._drop(device)
            for order in orders:
                self._take(order)
            deadline = time.monotonic() + wait_s
            while not (ready := self._ready()) and (left := deadline - time.monotonic()) > 0:
                self._come.wait(left)
            return Drained(self.epoch, tuple(self._given(ready)))

    # -------------------------------------------------------------- inner

    def _take(self, order: Order) -> None:
        before = self._watches.get(order.device)
        if before is not None and before.order.number == order.number:
            return
        watch = _Watch(order, order.offset)
        if before is not None:
            watch.told = before.told
            self._drop(order.device)
        self._watches[order.device] = watch
        self._at(watch, time.monotonic() + order.after_s)

    def _drop(self, device: str) -> None:
        watch = self._watches.pop(device, None)
        if watch is not None and watch.stretch is not None:
            self._held_bytes -= watch.bytes

    def _at(self, watch: _Watch, moment_s: float) -> None:
        self._counted += 1
        heapq.heappush(self._due, (moment_s, self._counted, watch))
        if self._due[0][2] is watch:
            self._changed.notify_all()

    def _ready(self) -> list[_Watch]:
        now = time.monotonic()
        return [
            watch
            for watch in self._watches.values()
            if watch.stretch is not None and (watch.given_s is None or now - watch.given_s > AGAIN_S)
        ]

    def _given(self, ready: Sequence[_Watch]) -> list[Stretch]:
        """As many as go into one drain."""
        given: list[Stretch] = []
        records = size = 0
        for watch in ready:
            assert watch.stretch is not None
            records, size = records + len(watch.records), size + watch.bytes
            if given and (records > DRAIN_RECORDS or size > DRAIN_BYTES):
                break
            watch.given_s = time.monotonic()
            given.append(watch.stretch)
        return given

    def _schedule(self) -> None:
        """In a thread: have devices looked at when they are due."""
        while True:
            with self._changed:
                while not self._closed and (not self._due or self._due[0][0] > time.monotonic()):
                    self._changed.wait(self._due[0][0] - time.monotonic() if self._due else None)
                if self._closed:
                    return
                watch = heapq.heappop(self._due)[2]
                if self._watches.get(watch.order.device) is not watch:
                    continue
                if self._held_bytes > HELD_BYTES:
                    self._at(watch, time.monotonic() + _PACE_S)
                    continue
                self._pool.submit(self._look, watch)

    def _look(self, watch: _Watch) -> None:
        """In a thread: look at a device once."""
        order, stretch = watch.order, None
        try:
            if order.start is not None and not watch.started:
                self._jobs.start_job(order.device, order.start)
                watch.started = True
            polled = self._jobs.poll(order.device, order.job_id, order.attempt, watch.offset, 0.0)
            stretch = self._grown(watch, polled)
        except BaseException as error:  # noqa: BLE001 - the controller judges it
            if not isinstance(error, StifarmError):
                _log.error("a look failed unexpectedly", device=order.device, exc_info=error)
            stretch = Stretch(order.device, order.number, None, error, watch.started)
            if watch.records:  # first what came before; the next order meets the error again, if it stays
                stretch = self._of(watch, "running", "")
        with self._changed:
            if self._watches.get(order.device) is not watch:
                return
            watch.stretch = stretch
            if stretch is not None:
                self._held_bytes += watch.bytes
                self._come.notify_all()
            else:
                self._at(watch, time.monotonic() + max(_PACE_S, self._pause_s(order.device)))

    def _grown(self, watch: _Watch, polled: PollResult) -> Stretch | None:
        """The stretch with what a look has brought, if it is time to tell it."""
        if polled.records and not watch.records:
            watch.since_s = time.monotonic()
        watch.records += polled.records
        watch.offset = polled.next_offset
        news = polled.state != "running" or (not watch.records and polled.detail != watch.told)
        if not news and not (watch.records and time.monotonic() - watch.since_s > HOLD_S):
            return None
        watch.told = polled.detail if polled.state == "running" else ""
        return self._of(watch, polled.state, polled.detail)

    def _of(self, watch: _Watch, state: str, detail: str) -> Stretch:
        polled = PollResult(tuple(watch.records), watch.offset, state, detail)  # type: ignore[arg-type]
        return Stretch(watch.order.device, watch.order.number, polled, None, watch.started)
