"""Driving the jobs of a fleet in one loop: few calls of each host, few transactions, no thread a device.

``Pump.run_job`` does what ``dispatch.run_job`` does, by the same rules (``stepping``), with the same errors,
for as many callers at once as there are devices. Hosts watch their devices' journals (``watch``); what
they drain is taken into the store together, and only then ordered on. What is not plain to begin (an attempt
that goes on, a device that somebody holds) goes the way of a single job.
"""

from __future__ import annotations

import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import structlog

from db.arrivals import TakenIn
from db.leases import LeaseGrant
from db.session import Store
from orchestrator.dispatch import LEASE_TTL_NS, Outcome, Request, Worker, first_job, tell_restart
from orchestrator.errors import CommandTimeoutError, LinkError
from orchestrator.following import Advance, Shown
from orchestrator.prepare import tell_settings
from orchestrator.pump.book import Book
from orchestrator.pump.exchange import PACE_S, HostExchange
from orchestrator.pump.run import Run, begin_alone, end_alone
from orchestrator.pump.watch import Order, Stretch
from orchestrator.stepping import Drive, Event, Heard, Over, Taken, Unheard, step
from sti_runtime.messages import Job

_NEXT_S = 0.03
"""So soon behind a job's end its device's next one is asked for, if it is there."""

_ALONE = 16
"""Jobs that are begun or ended each alone, at once."""

_log = structlog.get_logger(__name__)

_News = Callable[[], None]


class Pump:
    """Drives jobs on all devices of a worker, from any thread. To be closed; jobs under way are then left as
    by Ctrl-C."""

    def __init__(self, store: Store, worker: Worker, owner: str) -> None:
        self._store, self._worker, self._owner = store, worker, owner
        self._news: queue.SimpleQueue[Run | tuple[Stretch, ...] | _News] = queue.SimpleQueue()
        self._runs: dict[str, Run] = {}
        self._asked: list[Run] = []
        self._kept: list[Stretch] = []
        self._hosts: dict[str, HostExchange] = {}
        self._numbers = itertools.count(time.time_ns())
        self._closed = threading.Event()
        self._book = Book(store, owner, self._runs, self._closed)
        self._alone = ThreadPoolExecutor(_ALONE, thread_name_prefix="job")
        self._thread = threading.Thread(target=self._work, name="fleet", daemon=True)
        self._thread.start()

    def run_job(
        self, request: Request, *, advance: Advance | None = None, stop: threading.Event | None = None
    ) -> Outcome:
        """As ``dispatch.run_job``; of one device one job at a time."""
        shown = Shown(request.device, len(request.units), advance)
        first, host = first_job(self._store, request), self._worker.host(request.device)
        run = Run(request, first, host, shown, stop)
        self._news.put(run)
        try:
            return run.future.result()
        except KeyboardInterrupt:
            run.left.set()
            run.future.exception()  # waits until it is left
            raise

    def close(self) -> None:
        """Leave what is under way and end."""
        self._closed.set()
        self._news.put(lambda: None)
        self._thread.join()
        self._alone.shutdown()
        for host in self._hosts.values():
            host.close()

    def __enter__(self) -> Pump:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -------------------------------------------------------------- the loop

    def _work(self) -> None:
        while not (self._closed.is_set() and not self._runs):
            try:
                self._once()
            except KeyboardInterrupt as error:  # every job was stopped while the store was away
                self._fail_all(error)
            except Exception as error:  # noqa: BLE001 - handed to every caller: nobody may wait for ever
                _log.error("the fleet's loop failed", exc_info=error)
                self._fail_all(error)

    def _once(self) -> None:
        stretches = self._kept + self._gather(PACE_S)
        self._kept = []
        self._leave_stopped()
        self._renew()
        if self._advance(stretches):  # whoever waited for these asks for the next jobs now
            self._kept = self._gather(_NEXT_S)
        self._begin()

    def _gather(self, limit_s: float) -> list[Stretch]:
        """What comes within so long; jobs asked for are kept in ``_asked``."""
        stretches: list[Stretch] = []
        until = time.monotonic() + limit_s
        while (left := until - time.monotonic()) > 0:
            try:
                news = self._news.get(timeout=left)
            except queue.Empty:
                break
            if isinstance(news, Run):
                self._asked.append(news)
            elif isinstance(news, tuple):
                stretches += news
            else:
                news()
        return stretches

    def _fail_all(self, error: BaseException) -> None:
        for run in self._asked:
            run.tell(error)
        self._asked.clear()
        for run in list(self._runs.values()):
            self._end_by(run, error)

    # -------------------------------------------------------------- beginning

    def _begin(self) -> None:
        """Open what was asked for: what is plain together, the rest alone."""
        fresh: list[Run] = []
        asked, self._asked = self._asked, []
        for run in asked:
            if self._closed.is_set() or run.stopped:
                run.tell(KeyboardInterrupt())
            elif run.request.device in self._runs:
                self._later(run)
            else:
                self._runs[run.request.device] = run
                fresh.append(run)
        for run, grant in zip(fresh, self._book.open(fresh), strict=True):
            if grant is None:
                self._alone.submit(self._begin_alone, run)
            else:
                lease = run.first.lease.model_copy(update={"counter": grant.counter})
                self._drive(run, run.first.model_copy(update={"lease": lease}), grant)

    def _later(self, run: Run) -> None:
        """A device whose job before has not been given up yet."""
        timer = threading.Timer(PACE_S, self._news.put, (run,))
        timer.daemon = True
        timer.start()

    def _begin_alone(self, run: Run) -> None:
        """In a thread."""
        begun = begin_alone(self._store, self._worker, self._owner, run)
        if isinstance(begun, Outcome):
            self._news.put(partial(self._end, run, begun))
        elif isinstance(begun, BaseException):
            self._news.put(partial(self._end_by, run, begun))
        else:
            self._news.put(partial(self._drive, run, *begun))

    def _drive(self, run: Run, job: Job, grant: LeaseGrant) -> None:
        """Have the attempt of a job driven; one that was ended meanwhile is left."""
        run.job, run.grant, run.renewed_s = job, grant, time.monotonic()
        if self._runs.get(run.request.device) is not run:
            self._end_by(run, KeyboardInterrupt())
            return
        run.drive = Drive(run.request.device, job.id)
        self._order(run)

    def _order(self, run: Run, after_s: float = 0.0) -> None:
        """Have a run's host look at its device from where it stands."""
        drive, job = run.drive, run.attempt
        assert drive is not None
        start = job if drive.start else None
        order = Order(next(self._numbers), drive.device, job.id, job.attempt, drive.offset, start, after_s)
        run.order = order.number
        if run.host not in self._hosts:
            self._hosts[run.host] = HostExchange(run.host, self._worker, self._news.put, self._host_lost)
        self._hosts[run.host].order(order)

    # -------------------------------------------------------------- going on

    def _advance(self, stretches: Sequence[Stretch]) -> bool:
        """Take in what has come, and let each job go on or end; whether any was done."""
        heard = []
        for stretch in stretches:
            run = self._runs.get(stretch.device)
            if run is not None and run.order == stretch.number:
                run.order = None  # a second copy of it is dropped
                heard.append((run, stretch))
        with_records = [(run, stretch) for run, stretch in heard if stretch.polled and stretch.polled.records]
        answers = self._book.take_in(with_records)
        taken = {run.request.device: answer for (run, _), answer in zip(with_records, answers, strict=True)}
        complete: list[Run] = []
        for run, stretch in heard:
            self._step(run, stretch, taken.get(run.request.device), complete)
        for run, end in zip(complete, self._book.complete(complete), strict=True):
            if isinstance(end, Outcome):
                self._end(run, end)
            else:
                self._end_by(run, end)
        return bool(complete)

    def _step(
        self, run: Run, stretch: Stretch, taken: TakenIn | Exception | None, complete: list[Run]
    ) -> None:
        error = stretch.error
        event: Event | None = None
        if isinstance(taken, Exception):
            error = taken
        elif isinstance(error, LinkError | CommandTimeoutError):
            event = Unheard(error, time.monotonic(), stretch.started)
        elif stretch.polled is not None:
            known = None
            if taken is not None:
                tell_settings(run.request.device, stretch.polled.records)
                known = Taken(taken.finished, taken.complete, taken.conflicts)
            event = Heard(stretch.polled, known)
        if event is None:
            self._end_by(run, error or AssertionError("a stretch of nothing"))
        else:
            self._went_on(run, event, complete)

    def _went_on(self, run: Run, event: Event, complete: list[Run]) -> None:
        assert run.drive is not None
        run.drive, then = step(run.drive, event)
        run.shown.stands(run.drive, news=isinstance(event, Heard) and event.taken is not None)
        if not isinstance(then, Over):
            tell_restart(run.request.device, run.attempt, then)
            self._order(run, then.after_s)
        elif then.error is None:
            complete.append(run)
        else:
            self._end_by(run, then.error, lost=then.lose)

    def _host_lost(self, host: str, error: BaseException) -> None:
        """From a host's thread: a call of it failed."""
        self._news.put(lambda: self._without(host, error))

    def _without(self, host: str, error: BaseException) -> None:
        """What the jobs of a host make of its being away; it gets their orders again when it is back."""
        for run in [run for run in self._runs.values() if run.host == host and run.drive is not None]:
            if not isinstance(error, LinkError):
                self._end_by(run, error)
                continue
            what = error.what.removeprefix(f"{error.device}: ")
            unheard = type(error)(what, error.remedy, device=run.request.device)
            assert run.drive is not None
            run.drive, then = step(run.drive, Unheard(unheard, time.monotonic(), started=False))
            run.shown.stands(run.drive, news=False)
            if isinstance(then, Over) and then.error is not None:
                self._end_by(run, then.error)

    def _leave_stopped(self) -> None:
        for run in list(self._runs.values()):
            if self._closed.is_set():
                run.left.set()
            if run.drive is not None and run.stopped:
                self._end_by(run, KeyboardInterrupt())

    def _renew(self) -> None:
        now = time.monotonic()
        due = [
            run
            for run in self._runs.values()
            if run.drive is not None and now - run.renewed_s > LEASE_TTL_NS / 4e9
        ]
        for run, answer in zip(due, self._book.renew(due), strict=True):
            if isinstance(answer, Exception):
                self._end_by(run, answer)
            else:
                run.grant, run.renewed_s = answer, now

    # -------------------------------------------------------------- ending

    def _end(self, run: Run, outcome: Outcome) -> None:
        self._forget(run)
        run.tell(outcome)

    def _end_by(self, run: Run, error: BaseException, *, lost: bool = False) -> None:
        """End a job by an error; what that asks of device and store may take long, and has a thread."""
        self._forget(run)
        self._alone.submit(end_alone, self._store, self._worker, run, error, lost=lost)

    def _forget(self, run: Run) -> None:
        run.drive = run.order = None
        if self._runs.get(run.request.device) is run:
            del self._runs[run.request.device]
            if run.host in self._hosts:
                self._hosts[run.host].leave(run.request.device)
