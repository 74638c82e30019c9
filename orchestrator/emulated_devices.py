"""How a slowed device is slowed: verified by its own agent on first use, remembered, and undone."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import structlog

from orchestrator.agent_verbs import call_agent, take_over_remedy
from orchestrator.cgroups import CgroupUnavailableError, Hierarchies, system_hierarchies
from orchestrator.emulation import GroupSite, ResolvedEmulation, resolve_emulation
from orchestrator.errors import CommandTimeoutError, StableError, TransientError
from orchestrator.inventory import Device
from orchestrator.listing import listed
from orchestrator.reach import Reach
from orchestrator.settings import Settings
from orchestrator.tailing import PollResult, parse_attempts
from orchestrator.transports.base import Transport
from sti_runtime.messages import (
    Emulation,
    EndRecord,
    FailureRecord,
    Gates,
    Job,
    Lease,
    ProbeResult,
    ProbeUnit,
    ResultRecord,
    VerifiedEmulation,
)

EMULATION_JOB = "emulation"
"""The job that verifies how a device is slowed; its attempts have the numbers of their leases."""

_PROBE_LIMIT_S = 600.0
_EXIT_LIMIT_S = 60.0
_LEAVE_LIMIT_S = 20.0
_LEAVE_PAUSE_S = 0.2

_log = structlog.get_logger(__name__)


class Jobs(Protocol):
    """What runs jobs on the devices: ``worker.HostWorker``."""

    def start_job(self, name: str, job: Job) -> bool: ...
    def poll(self, name: str, job_id: str, attempt: int, offset: int, wait_s: float) -> PollResult: ...


class EmulatedDevices:
    """The limits of the slowed devices of one lab host. Methods raise DeviceError and its kinds."""

    def __init__(self, settings: Settings, reach: Reach, jobs: Jobs) -> None:
        self._settings, self._reach, self._jobs = settings, reach, jobs
        self._entered: dict[str, int] = {}
        """How often a job entered a device's groups."""

        self._leaving: dict[str, tuple[int, threading.Thread]] = {}
        self._hierarchies: Hierarchies = system_hierarchies()

    def close(self) -> None:
        """Finish what goes on in the background."""
        for _, thread in list(self._leaving.values()):
            thread.join(_LEAVE_LIMIT_S)

    def resolve(
        self, name: str, lease: Lease, bundle: str | None, identity: Callable[[], str]
    ) -> ResolvedEmulation | None:
        """How a slowed device is slowed, verified on first use and remembered; None for one at full speed.

        ``bundle``: a deployed one, at whose read size the verification reads. ``identity``: asks for the
        hardware's.
        """
        device, transport = self._reach.device(name)
        if device.emulate is None or not device.emulate.limited:
            return None
        if device.transport == "local":  # its disk is what gets limited
            spool = Path(self._reach.spool(name))
            try:
                spool.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise StableError(
                    f"its work folder {spool} cannot be made: {error.strerror}.",
                    "Set a workdir in the inventory that this user may write to, with free space.",
                    device=name,
                ) from error

        def probe(emulation: Emulation) -> VerifiedEmulation:
            return self._probe(device, transport, identity(), lease, emulation, bundle)

        with self._reach.locks[name]:
            site = self._site(device)
            return resolve_emulation(device, site, probe, self._cache(name, bundle), bundle=bundle)

    def enter(self, device: Device, emulation: Emulation | None) -> tuple[str, ...]:
        """What to put before a command so that it runs under the device's limits."""
        self._entered[device.name] = self._entered.get(device.name, 0) + 1
        try:
            return self._site(device).enter(emulation)
        except CgroupUnavailableError as error:
            raise StableError(
                f"the limits that it was verified with cannot be set: {error}.",
                "Run as the user that verified it, or run stifarm devices clean to verify it anew.",
                device=device.name,
            ) from error

    def leave(self, name: str) -> None:
        """Remove the device's control groups, in the background: its agent may take seconds to be gone.

        Removing is harmless to a next job: a group with a process in it stays, and each try holds the
        device's lock, under which a job enters its groups.
        """
        device = self._reach.devices[name]
        if device.emulate is None or device.transport != "local":
            return
        entered = self._entered.get(name, 0)
        before = self._leaving.get(name)
        if before is not None and before[0] == entered and before[1].is_alive():
            return
        thread = threading.Thread(
            target=self._leave, args=(device, entered), name=f"leave-{name}", daemon=True
        )
        self._leaving[name] = (entered, thread)
        thread.start()

    def _leave(self, device: Device, entered: int) -> None:
        deadline = time.monotonic() + _LEAVE_LIMIT_S
        while time.monotonic() < deadline:
            with self._reach.locks[device.name]:
                if self._entered.get(device.name, 0) != entered:
                    return  # by a next job: its end removes them
                try:
                    if self._site(device).remove():
                        return
                except CgroupUnavailableError as error:
                    _log.warning("control groups stay", device=device.name, cause=str(error))
                    return
            time.sleep(_LEAVE_PAUSE_S)
        _log.warning("control groups stay: a process is still in them", device=device.name)

    def forget(self, name: str) -> None:
        """Verify the device anew at its next use; its control groups are removed."""
        if (decided := self._settings.emulation / name).exists():
            shutil.rmtree(decided)
        self.leave(name)

    def _probe(
        self,
        device: Device,
        transport: Transport,
        identity: str,
        lease: Lease,
        emulation: Emulation,
        bundle: str | None,
    ) -> VerifiedEmulation:
        """Run the agent's probe unit under an emulation, as a job of its own that is then removed; what
        verifications left whose device was lost meanwhile is removed first."""
        self._forget_left(transport, device)
        job = Job(
            format="stifarm-job",
            version=1,
            id=EMULATION_JOB,
            attempt=lease.counter,
            lease=lease,
            device=identity,
            bundle=bundle,
            task_data=None,
            engine=device.engine,
            threads=device.threads or 1,
            queue_depth=1,
            cpus=device.cpus,
            machine_lock=device.shared_machine(self._settings.machine_lock),
            emulation=emulation,
            gates=Gates(
                max_temperature_milli_c=None,
                min_battery_percent=None,
                max_load_milli=None,
                min_free_bytes=None,
                wait_limit_s=0,
            ),
            units=(ProbeUnit(number=0, kind="probe"),),
        )
        self._jobs.start_job(device.name, job)
        offset, deadline = 0, time.monotonic() + _PROBE_LIMIT_S
        verified: VerifiedEmulation | None = None
        cause = ""
        while True:
            polled = self._jobs.poll(device.name, job.id, job.attempt, offset, 10.0)
            offset = polled.next_offset
            for record in polled.records:
                payload = record.payload
                if isinstance(payload, ResultRecord) and isinstance(payload.result, ProbeResult):
                    verified = payload.result.verified
                elif isinstance(payload, FailureRecord):
                    cause = f"{payload.what} {payload.remedy}"
                elif isinstance(payload, EndRecord) and payload.refused:
                    cause = payload.refused
            if polled.state != "running":
                cause = cause or polled.detail
                break
            if time.monotonic() > deadline:
                call_agent(transport, self._reach.spool(device.name), "stop", job.id, str(job.attempt))
                raise CommandTimeoutError(
                    f"its emulation could not be verified within {_PROBE_LIMIT_S:g} s.",
                    "Another job may hold the machine; try again when it is done.",
                    device=device.name,
                )
        if verified is None:
            raise StableError(
                f"its emulation could not be verified: {cause or polled.state}",
                take_over_remedy(device.name, cause)
                or "See what the agent says; then run the command again.",
                device=device.name,
            )
        self._forget_ended(transport, device, job.attempt)
        return verified

    def _forget_left(self, transport: Transport, device: Device) -> None:
        """Stop and remove verifications that nobody waits for any more: the device is ours now."""
        spool = self._reach.spool(device.name)
        script = 'if test -e "$1"; then exec ls "$1"; fi'
        folder = f"{spool}/jobs/{EMULATION_JOB}"
        found = self._reach.retried(device.name, lambda: listed(transport, script, folder))
        for attempt in parse_attempts(found):
            call_agent(transport, spool, "stop", EMULATION_JOB, str(attempt))
            self._forget_ended(transport, device, attempt)

    def _forget_ended(self, transport: Transport, device: Device, attempt: int) -> None:
        """Remove an ended verification's folder; its process may outlive its journal a little, on a slowed
        device by seconds. Raises: DeviceError; TransientError if it still runs after a while."""
        deadline = time.monotonic() + _EXIT_LIMIT_S
        while True:
            try:
                call_agent(transport, self._reach.spool(device.name), "forget", EMULATION_JOB, str(attempt))
                return
            except TransientError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    def _site(self, device: Device) -> GroupSite:
        spool = Path(self._reach.spool(device.name))
        return GroupSite.of(device, spool, self._hierarchies)

    def _cache(self, name: str, bundle: str | None) -> Path:
        return self._settings.emulation / name / f"{bundle or 'any'}.json"
