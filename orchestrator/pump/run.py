"""One job in the fleet's loop, and what is done for it outside of it: what may take long, or is not plain."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass, field

import structlog

from db.arrivals import Arrived
from db.leases import LeaseGrant
from db.session import Store
from orchestrator.dispatch import (
    Outcome,
    Request,
    Worker,
    begin_job,
    drain_unheard,
    give_back_lease,
    lose,
    note_end,
    was_done,
)
from orchestrator.following import Shown
from orchestrator.patience import patiently
from orchestrator.pump.watch import Stretch
from orchestrator.stepping import Drive
from sti_runtime.errors import StifarmError
from sti_runtime.messages import Job

_log = structlog.get_logger(__name__)


@dataclass(eq=False)
class Run:
    """One job under way. ``first``: as it is registered. ``order``: the number of what its host was told
    last; None: that is answered."""

    request: Request
    first: Job
    host: str
    shown: Shown
    stop: threading.Event | None
    left: threading.Event = field(default_factory=threading.Event)
    future: Future[Outcome] = field(default_factory=Future)
    job: Job | None = None
    grant: LeaseGrant | None = None
    drive: Drive | None = None
    order: int | None = None
    renewed_s: float = 0.0

    @property
    def stopped(self) -> bool:
        """Whether whoever asked for it wants it no more."""
        return self.left.is_set() or (self.stop is not None and self.stop.is_set())

    def wait(self, timeout: float) -> bool:
        """As ``threading.Event.wait``: whether it is stopped by then, or soon after."""
        return (self.stop or self.left).wait(timeout) or self.stopped

    def tell(self, end: Outcome | BaseException) -> None:
        """Tell whoever asked for the job how it ended; the first end counts."""
        if self.future.done():
            return
        if isinstance(end, Outcome):
            self.future.set_result(end)
        else:
            self.future.set_exception(end)

    @property
    def attempt(self) -> Job:
        """The job of the attempt that is open."""
        assert self.job is not None
        return self.job

    @property
    def lease(self) -> LeaseGrant:
        """The lease that the attempt is under."""
        assert self.grant is not None
        return self.grant

    def arrived(self, stretch: Stretch) -> Arrived:
        """A stretch of its journal, for the store."""
        assert stretch.polled is not None
        job = self.attempt
        return Arrived(self.request.device_id, job, job.attempt, self.lease, stretch.polled.records)


def begin_alone(
    store: Store, worker: Worker, owner: str, run: Run
) -> tuple[Job, LeaseGrant] | Outcome | BaseException:
    """Begin a job as a single one is; what it came to if it was done before, or the error that ended it."""
    try:
        begun = begin_job(store, owner, run.request, run)
        if not isinstance(begun, Outcome):
            run.job, run.grant = begun
            drain_unheard(store, worker, run.request, run.job, run.grant, run)
            if was_done(store, run.job, run):
                give_back_lease(store, run.grant)
                run.job = run.grant = None
                return begin_job(store, owner, run.request, run)
        return begun
    except BaseException as error:  # noqa: BLE001 - handed to the caller of the job
        return error


def end_alone(store: Store, worker: Worker, run: Run, error: BaseException, *, lost: bool) -> None:
    """What a job's end by an error asks for; then its caller is told. ``lost``: the attempt is."""
    try:
        if run.job is not None and run.grant is not None:
            if lost:
                job = run.job
                patiently(lambda: lose(store, job), stop=run.left)
            note_end(store, worker, run.request, run.job, error)
            give_back_lease(store, run.grant)
    except StifarmError as failed:
        _log.warning("a job's end was not kept", device=run.request.device, cause=failed.what)
    finally:
        run.tell(error)
