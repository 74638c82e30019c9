"""Runs one job: admits it, resumes at the first unit that is not in the journal, journals every result."""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from agent import fence, identity, waiting
from agent.errors import BusyError, EngineImportError, RefusedError
from agent.gated import GatedUnits
from agent.journal import Journal
from agent.locks import hold
from agent.open_unit import NoteError, UnitNote, noting_units
from agent.process import PID_FILE, write_pid
from agent.sensors import read_sensors
from agent.settings import apply_settings, restore_at_end
from agent.signals import AbandonUnitError, StopRequest
from agent.spool import Spool, storage_error
from sti_runtime.errors import FormatError, InputError, StifarmError
from sti_runtime.journal_format import PROTOCOL_VERSION
from sti_runtime.messages import (
    AGENT_LOG_FILE,
    JOB_CAP_BYTES,
    JOB_FILE,
    JOURNAL_FILE,
    EndRecord,
    FailureRecord,
    Job,
    Lease,
    Payload,
    ResultRecord,
    SettingReport,
    StartRecord,
    Unit,
)

if TYPE_CHECKING:
    from agent.measure import Context

log = logging.getLogger(__name__)

_RUN_LOCK_WAIT_S = 5.0
"""Longer than `collect` holds the lock; a running job is not waited for."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TEXT_CAP = 2000


@dataclass(frozen=True)
class Outcome:
    """How a run of the agent ended: "ended" (all units journalled), "refused" or "stopped"."""

    state: str
    done: int
    failed: int
    exit_code: int


def run_job(job_path: Path, spool: Spool) -> Outcome:
    """Run the job at ``<spool>/jobs/<id>/<attempt>/job.json`` to its end, a refusal or a signal.

    Raises: RefusedError, BusyError, StorageFullError, FormatError, InputError; all are logged first.
    """
    folder = _job_folder(job_path, spool)
    _log_to(folder / AGENT_LOG_FILE)
    stop = StopRequest()
    stop.install()
    try:
        return _admit_and_run(folder, spool, stop)
    except StifarmError as error:
        log.log(logging.ERROR, "%s", error)
        raise
    except Exception:
        log.exception("The agent failed")
        raise


def _job_folder(job_path: Path, spool: Spool) -> Path:
    """Raises: InputError unless the path has the one form a job file of this spool can have."""
    resolved = job_path.resolve()
    folder = spool.job(resolved.parent.parent.name, resolved.parent.name)
    if resolved != folder.resolve() / JOB_FILE or not resolved.is_file():
        raise InputError(
            f"{job_path}: not a job file of this spool.",
            f"Jobs lie at {spool.jobs}/<id>/<attempt>/{JOB_FILE}.",
        )
    return folder


def _log_to(path: Path) -> None:
    """Send the log to ``path`` and, should storage be full, to standard error as well."""
    try:
        handlers: list[logging.Handler] = [logging.FileHandler(path), logging.StreamHandler()]
    except OSError as error:
        raise storage_error(error, path) from error
    logging.basicConfig(
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        handlers=handlers,
        force=True,
    )


def _admit_and_run(folder: Path, spool: Spool, stop: StopRequest) -> Outcome:
    try:
        job = read_job(folder / JOB_FILE)
    except RefusedError as error:
        _record_refusal(folder, spool, None, error)
        raise
    try:
        if (job.id, str(job.attempt)) != (folder.parent.name, folder.name):
            raise RefusedError(
                f"{folder / JOB_FILE}: holds job {job.id}/{job.attempt}.", "Push it to its own folder."
            )
        _check_device(job, spool)
        fence.admit(spool, job.lease)
    except RefusedError as error:
        _record_refusal(folder, spool, job.lease, error)
        raise
    label = f"{job.id}/{job.attempt}"
    with hold(spool.run_lock, wait_s=_RUN_LOCK_WAIT_S, what="The device", label=label):
        journal = Journal(folder / JOURNAL_FILE, identity.boot_id())
        try:
            return _run_held(job, folder, spool, journal, stop)
        finally:
            journal.close()


def read_job(path: Path) -> Job:
    """The job file. Raises: RefusedError if its version is newer than this agent's; FormatError."""
    try:
        with path.open("rb") as stream:
            data = stream.read(JOB_CAP_BYTES + 1)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}.") from error
    return Job.from_json(data, source=str(path), cap_bytes=JOB_CAP_BYTES, newer=RefusedError)


def _check_device(job: Job, spool: Spool) -> None:
    """Raises: RefusedError unless this is the job's device, with its engine and CPUs."""
    here, _ = identity.device_identity(spool)
    if job.device != here:
        raise RefusedError(
            f"The job is for device {job.device}, this is {here}.",
            "Probe the device again: its address may have passed to another one.",
        )
    if job.engine != "torch":
        raise RefusedError(
            f"The job wants engine {job.engine!r}, this agent has 'torch'.", "Deploy the engine's own agent."
        )
    if job.cpus:
        try:
            os.sched_setaffinity(0, job.cpus)
        except OSError as error:
            raise RefusedError(
                f"The agent cannot be pinned to CPUs {list(job.cpus)}: {error.strerror}.",
                "Correct the device's cpus in the inventory.",
            ) from error


def _record_refusal(folder: Path, spool: Spool, lease: Lease | None, error: RefusedError) -> None:
    """Journal the refusal, if this journal is the lease's to write and nobody is writing it."""
    try:
        with hold(spool.run_lock, wait_s=0, what="The device"):
            journal = Journal(folder / JOURNAL_FILE, identity.boot_id())
            try:
                state = journal.state
                if state.end is None and all(known == lease for known in state.leases):
                    journal.append(_end(journal, str(error)))
            finally:
                journal.close()
    except BusyError:
        log.warning("Another job runs; the refusal is not journalled")


def _end(journal: Journal, refused: str | None, settings: tuple[SettingReport, ...] = ()) -> EndRecord:
    done, failed = len(journal.state.done), len(journal.state.failed)
    return EndRecord(type="end", done=done, failed=failed, refused=refused, settings=settings)


def _run_held(job: Job, folder: Path, spool: Spool, journal: Journal, stop: StopRequest) -> Outcome:
    """The part under the spool's run lock."""
    state = journal.state
    if state.end is None and any(lease != job.lease for lease in state.leases):
        raise RefusedError(
            f"{journal.path}: was begun under another lease.", "A new lease needs a new attempt number."
        )
    if state.end is None:
        write_pid(folder)
        try:
            with noting_units(folder) as note:
                try:
                    refused = _run_units(job, spool, journal, note, stop)
                finally:
                    restored = restore_at_end(spool)
                if refused is not None or len(state.finished) >= len(job.units):
                    journal.append(_end(journal, refused, restored))
        finally:
            waiting.over(folder)
            (folder / PID_FILE).unlink(missing_ok=True)
    done, failed = len(state.done), len(state.failed)
    if state.end is None:
        log.info("Stopped by signal %s after %d of %d units", stop.signal, done + failed, len(job.units))
        return Outcome("stopped", done, failed, stop.exit_code)
    if state.end.refused is not None:
        return Outcome("refused", done, failed, RefusedError.exit_code)
    log.info("Ended: %d units done, %d failed", done, failed)
    return Outcome("ended", done, failed, 0)


def _run_units(job: Job, spool: Spool, journal: Journal, note: UnitNote, stop: StopRequest) -> str | None:
    """Run what is not in the journal; returns why the job must end early, None if it need not."""
    finished = journal.state.finished
    remaining = [unit for unit in job.units if unit.number not in finished]
    settings = apply_settings(job.settings, spool, f"{job.id}/{job.attempt}") if remaining else ()
    journal.append(
        StartRecord(
            type="start",
            job=job.id,
            attempt=job.attempt,
            lease=job.lease,
            first_unit=remaining[0].number if remaining else len(job.units),
            agent=identity.agent_version(),
            agent_digest=identity.agent_digest(),
            protocol=PROTOCOL_VERSION,
            emulated=job.emulation is not None or identity.emulated_id(spool) is not None,
            sensors=read_sensors(spool.root),
            settings=settings,
        )
    )
    if not remaining:
        return None
    try:
        context = _context(job, spool)
    except ImportError as error:
        log.exception("The engine's libraries cannot be imported")
        return f"the engine cannot be imported: {error}"
    try:
        return _run_remaining(remaining, job, spool, context, journal, note, stop)
    except EngineImportError as error:
        return error.what
    finally:
        # After a signal the process ends at once: an abandoned unit's thread may still be reading.
        if not stop():
            context.close()


def _run_remaining(
    remaining: list[Unit],
    job: Job,
    spool: Spool,
    context: Context,
    journal: Journal,
    note: UnitNote,
    stop: StopRequest,
) -> str | None:
    units = GatedUnits(job, spool, context, note, stop)
    for unit in remaining:
        reason = fence.still_admitted(spool, job.lease)
        if reason is not None:
            log.warning("Superseded before unit %d: %s", unit.number, reason)
            return f"superseded: {reason}"
        if stop():
            return None
        payload = _attempt_unit(unit, units, note)
        if payload is None:
            return None
        _append(journal, unit, payload)
    return None


def _append(journal: Journal, unit: Unit, payload: Payload) -> None:
    """Journal a unit's payload; a result that cannot be written as a record becomes a failure."""
    try:
        journal.append(payload)
    except FormatError as error:
        journal.append(_failure(unit, type(error).__name__, error.what, error.remedy))


def _failure(unit: Unit, error: str, what: str, remedy: str) -> FailureRecord:
    log.error("Unit %d (%s) failed: %s: %s %s", unit.number, unit.kind, error, what, remedy)
    return FailureRecord(
        type="failure", unit=unit.number, error=error, what=what[:_TEXT_CAP], remedy=remedy[:_TEXT_CAP]
    )


def _attempt_unit(unit: Unit, units: GatedUnits, note: UnitNote) -> ResultRecord | FailureRecord | None:
    """One unit's record; None when a signal came first.

    Raises: what the note's storage refuses; EngineImportError.
    """
    try:
        killed = note.verdict(unit)
        if killed is not None:
            raise killed
        result = units.run(unit)
    except NoteError as error:
        raise error.cause from error
    except EngineImportError:
        raise
    except AbandonUnitError:
        log.warning("Unit %d abandoned at the second signal; it runs again on resume", unit.number)
        return None
    except StifarmError as error:
        return _failure(unit, type(error).__name__, error.what, error.remedy)
    except MemoryError:
        log.exception("Unit %d", unit.number)
        return _failure(unit, "ResourceError", "Out of memory.", "Give the unit a smaller plan or batch.")
    except OSError as error:
        log.exception("Unit %d", unit.number)
        name = "ResourceError" if error.errno in _FULL else "internal"
        return _failure(unit, name, f"{type(error).__name__}: {error}.", "See agent.log.")
    except Exception as error:
        log.exception("Unit %d", unit.number)
        return _failure(unit, "internal", f"{type(error).__name__}: {error}.", "See agent.log; report it.")
    return None if result is None else ResultRecord(type="result", unit=unit.number, result=result)


def _context(job: Job, spool: Spool) -> Context:
    """What units run in; imports all but the engine itself."""
    from agent.measure import Context

    return Context(job=job, spool=spool.root)
