"""Running jobs on devices and bringing their records into the store, exactly once.

One call of ``run_job`` drives one job to its end: find or open its attempt under a lease, start or resume
the agent, tail the journal, ingest every batch in one transaction. It keeps nothing in memory that a
killed controller would miss: the next call with the same request goes on from the store and the device.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import structlog
from sqlalchemy.orm import Session

from db import jobs as job_queries
from db.devices import list_devices
from db.errors import DeviceReservedError, StoreUnreachableError
from db.ingest import ingest
from db.leases import LeaseGrant, acquire_lease, release_lease, renew_lease, require_lease, resume_lease
from db.quarantine import refuse_quarantined
from db.session import Store
from orchestrator.agent_verbs import take_over_remedy
from orchestrator.deploy import DeployReport, Underway
from orchestrator.device_facts.seen import Seen
from orchestrator.emulation import ResolvedEmulation
from orchestrator.errors import CommandTimeoutError, DeviceError, HaltedError, LinkError, StableError
from orchestrator.following import Advance, Shown
from orchestrator.health.failing import note_failure
from orchestrator.health.kinds import HEALTH
from orchestrator.jobs import DeviceTarget, job_key, make_job
from orchestrator.patience import Stop, patiently
from orchestrator.prepare import tell_settings
from orchestrator.pump.watch import Drained, Order
from orchestrator.recovering import Stepped
from orchestrator.stepping import Drive, Event, Heard, Look, Over, Taken, Unheard, step
from orchestrator.tailing import PollResult
from sti_runtime.device_facts import DeviceFacts
from sti_runtime.errors import StifarmError
from sti_runtime.messages import FailureRecord, Job, JournalRecord, Lease, Unit, UnitResult

LEASE_TTL_NS = 120 * 10**9
_POLL_WAIT_S = 2.0


class Worker(Protocol):
    """What drives the devices of one lab host: ``worker.HostWorker``, or the same behind Ray."""

    def architecture(self, name: str) -> str: ...
    def facts(self, name: str) -> DeviceFacts: ...
    def look(self, name: str) -> Seen: ...
    def recover(self, name: str, step: str) -> Stepped: ...
    def take_over(self, name: str, lease: Lease) -> None: ...
    def deploy(
        self,
        name: str,
        bundle_path: Path,
        tasks: Sequence[Path] = (),
        lease: Lease | None = None,
        identity: str | None = None,
    ) -> tuple[DeployReport, ...]: ...
    def progress(self, name: str) -> Underway: ...
    def halt(self, name: str) -> None: ...
    def emulation(self, name: str, lease: Lease, bundle: str | None = None) -> ResolvedEmulation | None: ...
    def start_job(self, name: str, job: Job) -> bool: ...
    def poll(self, name: str, job_id: str, attempt: int, offset: int, wait_s: float) -> PollResult: ...
    def host(self, name: str) -> str: ...
    def exchange(
        self, name: str, orders: Sequence[Order], leave: Sequence[str], wait_s: float
    ) -> Drained: ...
    def journals(self, name: str) -> list[tuple[str, int]]: ...
    def stop_job(self, name: str, job_id: str, attempt: int) -> bool: ...
    def clean(self, name: str, lease: Lease | None = None) -> dict[str, object]: ...
    def collect(self, name: str, keep: tuple[str, ...], lease: Lease) -> dict[str, object]: ...
    def verify(self, name: str, bundle: str) -> None: ...


@dataclass(frozen=True)
class Request:
    """One job wanted on one device. ``again`` > 0 repeats work that is done already."""

    device: str
    device_id: int
    agent_digest: str
    target: DeviceTarget
    kind: str
    bundle: str | None
    task_data: str | None
    units: tuple[Unit, ...]
    again: int = 0

    @cached_property
    def key(self) -> str:
        """The idempotency key."""
        return job_key(
            self.kind,
            self.target,
            bundle=self.bundle,
            task_data=self.task_data,
            agent_digest=self.agent_digest,
            units=self.units,
            again=self.again,
        )

    @property
    def job_id(self) -> str:
        """The id of its job."""
        return _job_id(self, self.key)


@dataclass(frozen=True)
class Outcome:
    """How a job ended. ``ran`` False: it was done before and nothing was measured now.

    ``results`` and ``failures`` by unit; ``rejected``: records that were kept but not believed;
    ``refused``: why the agent would not run the last attempt.
    """

    request: Request
    job_id: str
    ran: bool
    results: Mapping[int, UnitResult]
    failures: Mapping[int, FailureRecord]
    rejected: tuple[str, ...]
    refused: str | None

    @property
    def complete(self) -> bool:
        """Every unit has an accepted result."""
        return len(self.results) == len(self.request.units)

    def require_complete(self) -> None:
        """Raises: StableError naming the first unit without an accepted result."""
        if self.complete:
            return
        if self.failures:
            number, failure = min(self.failures.items())
            raise StableError(
                f"unit {number} of job {self.job_id} failed: {failure.what}",
                failure.remedy,
                device=self.request.device,
            )
        if self.refused is not None:
            raise StableError(
                f"its agent refused job {self.job_id}: {self.refused}",
                take_over_remedy(self.request.device, self.refused)
                or "Run the command again once that is settled; what was measured before is kept.",
                device=self.request.device,
            )
        raise StableError(
            f"job {self.job_id}: {'; '.join(self.rejected) or 'the journal ended before its last unit'}.",
            "Run the command again; if it stays so, see the agent's log in the device's work folder.",
            device=self.request.device,
        )


class Runner(Protocol):
    """Runs a job to its end as ``run_job`` does: on one device in this thread, or in a fleet's loop."""

    def __call__(
        self, request: Request, *, advance: Advance | None = None, stop: threading.Event | None = None
    ) -> Outcome: ...


def run_job(
    store: Store,
    worker: Worker,
    owner: str,
    request: Request,
    *,
    advance: Advance | None = None,
    stop: threading.Event | None = None,
) -> Outcome:
    """Drive one job to its end. A done job is not repeated, an interrupted one goes on; one that ended
    with failures begins a new attempt, of which only the newest result of each unit counts.

    A lost link is waited for up to LINK_LIMIT_S and a store that is away up to STORE_LIMIT_S; the agent goes
    on meanwhile. After KeyboardInterrupt, or when ``stop`` is set (which then raises it), the agent is asked
    to stop behind its present unit; the same request resumes. So it is when a person reserves the device
    meanwhile. A device that lets its job down is noted, and put in quarantine when it does so again and
    again. Raises: DeviceError; StoreError: of it DeviceReservedError, QuarantinedError.
    """
    begun = begin_job(store, owner, request, stop)
    if isinstance(begun, Outcome):
        return begun
    job, grant = begun
    try:
        drain_unheard(store, worker, request, job, grant, stop)
        if was_done(store, job, stop):
            return patiently(lambda: _outcome(store, request, job.id, ran=False), stop=stop)
        _drive(store, worker, request, job, grant, advance, stop)
    except BaseException as error:
        note_end(store, worker, request, job, error)
        raise
    finally:
        give_back_lease(store, grant)
    return patiently(lambda: _outcome(store, request, job.id, ran=True), stop=stop)


def begin_job(
    store: Store, owner: str, request: Request, stop: Stop | None
) -> tuple[Job, LeaseGrant] | Outcome:
    """The attempt of a job that is to be driven, under a lease; what the job came to if it was done before.
    Raises: StoreError: of it LeaseHeldError, DeviceReservedError, QuarantinedError."""
    fresh, key = patiently(lambda: register_job(store, request), stop=stop)
    if not fresh:
        return _outcome(store, request, _job_id(request, key), ran=False)
    return patiently(lambda: _open_attempt(store, owner, request, key), stop=stop)


def note_end(store: Store, worker: Worker, request: Request, job: Job, error: BaseException) -> None:
    """What an attempt's end by an error asks for: by a person, the agent is asked to stop; by the device, its
    failure is noted."""
    if isinstance(error, KeyboardInterrupt | DeviceReservedError | HaltedError):
        _ask_to_stop(worker, request, job)
    elif isinstance(error, DeviceError):
        note_failure(store, request.device_id, error, job_id=job.id)


def next_repetition(store: Store, request: Request) -> Request:
    """The same work once more: the first ``again`` that has no finished job."""
    while True:
        with store.reader() as session:
            row = job_queries.job_by_key(session, request.key)
        if row is None or row.state in ("queued", "running"):
            return request
        request = replace(request, again=request.again + 1)


def take_lease(session: Session, device_id: int, owner: str) -> LeaseGrant:
    """A lease for asking a device something: that of its interrupted job, which can then still go on,
    else a new one. Raises: LeaseHeldError."""
    opened = job_queries.open_attempt(session, device_id)
    if opened is not None:
        resumed = resume_lease(session, device_id, owner, opened.lease_counter, LEASE_TTL_NS)
        if resumed is not None:
            return resumed
    return acquire_lease(session, device_id, owner, LEASE_TTL_NS)


def lose_attempts(store: Store, device: str) -> None:
    """Close the open attempts of a device that was cleaned: their journals are gone."""
    with store.session() as session:
        known = {row.name: row.id for row in list_devices(session)}
        if device in known:
            job_queries.lose_attempts(session, known[device])


# ------------------------------------------------------------------ steps


def _job_id(request: Request, key: str) -> str:
    return f"{request.kind}-{key[:20]}"


def register_job(store: Store, request: Request) -> tuple[bool, str]:
    """(whether there is work left, key) of a job, which the store knows from now on."""
    key, job = request.key, first_job(store, request)
    with store.session() as session:
        row = job_queries.create_job(session, job, key=key, kind=request.kind, device_id=request.device_id)
        return row.state != "done", key


def first_job(store: Store, request: Request) -> Job:
    """A job as it is registered: its first attempt, under no lease yet."""
    return _job(request, request.key, 1, Lease(store=store.store_id, counter=0, takeover=False))


def _job(request: Request, key: str, attempt: int, lease: Lease) -> Job:
    return make_job(
        request.kind,
        key,
        request.target,
        attempt=attempt,
        lease=lease,
        bundle=request.bundle,
        task_data=request.task_data,
        units=request.units,
    )


def _open_attempt(store: Store, owner: str, request: Request, key: str) -> tuple[Job, LeaseGrant]:
    """Our own attempt that is still open, else a new one under a new lease. Raises: LeaseHeldError."""
    job_id = _job_id(request, key)
    with store.session() as session:
        if request.kind != HEALTH:
            refuse_quarantined(session, request.device_id)
        opened = job_queries.latest_attempt(session, job_id)
        if opened is not None and opened.state == "running":
            resumed = resume_lease(session, request.device_id, owner, opened.lease_counter, LEASE_TTL_NS)
            if resumed is not None:
                lease = Lease(store=store.store_id, counter=resumed.counter, takeover=False)
                return _job(request, key, opened.number, lease), resumed
            structlog.get_logger(__name__).info("lease was lost, a new attempt begins", job=job_id)
        grant = acquire_lease(session, request.device_id, owner, LEASE_TTL_NS)
        number = job_queries.begin_attempt(session, job_id, lease_counter=grant.counter)
    lease = Lease(store=store.store_id, counter=grant.counter, takeover=False)
    return _job(request, key, number, lease), grant


def _ask_to_stop(worker: Worker, request: Request, job: Job) -> None:
    try:
        worker.stop_job(request.device, job.id, job.attempt)
    except StifarmError as error:
        structlog.get_logger(__name__).warning(
            "the agent could not be asked to stop", device=request.device, cause=error.what
        )


def give_back_lease(store: Store, grant: LeaseGrant) -> None:
    """Release a lease; one that cannot be, because the store is away, expires by itself."""
    try:
        with store.session() as session:
            release_lease(session, grant)
    except StoreUnreachableError as error:
        structlog.get_logger(__name__).warning(
            "the store is away: a lease is not given back, it will expire",
            lease=grant.counter,
            cause=error.what,
        )


def _renew(store: Store, grant: LeaseGrant) -> LeaseGrant:
    with store.session() as session:
        return renew_lease(session, grant, LEASE_TTL_NS)


def _take_in(
    store: Store,
    request: Request,
    job_id: str,
    attempt: int,
    records: Sequence[JournalRecord],
    grant: LeaseGrant,
) -> Taken:
    """Ingest a batch, which may have come before; what it did, and how far the attempt has come.

    Under a lease that went on to another controller nothing is written. Raises: LeaseHeldError.
    """
    with store.session() as session:
        require_lease(session, grant)
        report = ingest(session, device_id=request.device_id, job_id=job_id, attempt=attempt, records=records)
        done = job_queries.progress(session, job_id, attempt)
        return Taken(done.results + done.failures, report.complete, report.conflicts)


def drain_unheard(
    store: Store,
    worker: Worker,
    request: Request,
    job: Job,
    grant: LeaseGrant,
    stop: Stop | None,
) -> None:
    """Bring in what the device had journalled before this attempt and the store has not heard: of attempts of
    the job that were given up, and of other jobs that were interrupted and never asked for again. The device
    is waited for as in ``run_job``, and the lease is kept."""

    def unheard() -> Sequence[tuple[str, int]]:
        with store.reader() as session:
            return job_queries.unheard_attempts(session, job.id, before=job.attempt)

    renewed = time.monotonic()
    for job_id, number in patiently(unheard, stop=stop):
        drive = Drive(request.device, job_id)
        while True:
            if time.monotonic() - renewed > LEASE_TTL_NS / 4e9:
                patiently(partial(_renew, store, grant), stop=stop)
                renewed = time.monotonic()
            try:
                polled = worker.poll(request.device, job_id, number, drive.offset, 0)
            except (LinkError, CommandTimeoutError) as error:
                drive, then = step(drive, Unheard(error, time.monotonic(), started=True))
                if isinstance(then, Over):
                    assert then.error is not None
                    raise then.error from error
                _pause(then.after_s, stop)
                continue
            if not polled.records:
                break
            take = partial(_take_in, store, request, job_id, number, polled.records, grant)
            patiently(take, stop=stop)
            drive = Drive(request.device, job_id, offset=polled.next_offset)


def was_done(store: Store, job: Job, stop: Stop | None) -> bool:
    """Whether an attempt that was given up turned out, by its late journal, to have done the job; the one
    that was to repeat it is then given up in its stead, before it began."""

    if job.attempt == 1:
        return False

    def look() -> bool:
        with store.session() as session:
            done = job_queries.was_done_before(session, job.id, job.attempt)
            if done:
                job_queries.end_attempt(session, job.id, job.attempt, "lost", job_state="done")
            return done

    return patiently(look, stop=stop)


def _pause(duration_s: float, stop: Stop | None) -> None:
    """Raises: KeyboardInterrupt when ``stop`` is set meanwhile."""
    if stop is None:
        time.sleep(duration_s)
    elif stop.wait(duration_s):
        raise KeyboardInterrupt


def _drive(
    store: Store,
    worker: Worker,
    request: Request,
    job: Job,
    grant: LeaseGrant,
    advance: Advance | None,
    stop: threading.Event | None,
) -> None:
    name, drive = request.device, Drive(request.device, job.id)
    shown = Shown(name, len(job.units), advance)
    renewed = time.monotonic()
    event: Event
    while True:
        if stop is not None and stop.is_set():
            raise KeyboardInterrupt
        if time.monotonic() - renewed > LEASE_TTL_NS / 4e9:
            grant = patiently(partial(_renew, store, grant), stop=stop)
            renewed = time.monotonic()
        started = False
        try:
            if drive.start:
                worker.start_job(name, job)
                started = True
            polled = worker.poll(name, job.id, job.attempt, drive.offset, _POLL_WAIT_S)
        except (LinkError, CommandTimeoutError) as error:
            event = Unheard(error, time.monotonic(), started)
        else:
            taken = None
            if polled.records:
                take = partial(_take_in, store, request, job.id, job.attempt, polled.records, grant)
                taken = patiently(take, stop=stop)
                tell_settings(name, polled.records)
            event = Heard(polled, taken)
        drive, then = step(drive, event)
        shown.stands(drive, news=isinstance(event, Heard) and event.taken is not None)
        if isinstance(then, Over):
            if then.lose:
                patiently(lambda: lose(store, job), stop=stop)
            if then.error is not None:
                raise then.error
            return
        tell_restart(name, job, then)
        time.sleep(then.after_s)


def tell_restart(device: str, job: Job, look: Look) -> None:
    """Log that an agent is started again, where one is."""
    if look.restart is not None:
        log = structlog.get_logger(__name__)
        log.warning("its agent is gone, started again", device=device)
        log.info("what the agent that is gone had said", device=device, job=job.id, detail=look.restart)


def lose(store: Store, job: Job) -> None:
    """Close an attempt whose journal will not be read to its end."""
    with store.session() as session:
        job_queries.end_attempt(session, job.id, job.attempt, "lost", job_state="failed")


def _outcome(store: Store, request: Request, job_id: str, *, ran: bool) -> Outcome:
    with store.reader() as session:
        last = job_queries.latest_attempt(session, job_id)
        return Outcome(
            request=request,
            job_id=job_id,
            ran=ran,
            results=job_queries.results_of(session, job_id),
            failures=job_queries.failures_of(session, job_id),
            rejected=tuple(row.rejected or "" for row in job_queries.rejections_of(session, job_id)),
            refused=None if last is None else last.refused,
        )
