"""What one lab host does with the devices that hang on it. Knows nothing of Ray or the store.

``HostWorker`` keeps nothing that a restart would miss: every method finds out where the device stands
and goes on from there, so calling it again after any crash is the way to resume. Methods that change a
device are serialised per device; ``poll`` only reads and may run beside them.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import structlog

from orchestrator.agent_push import AgentFile, PushedAgent, agent_file, bring_agent, device_architecture
from orchestrator.agent_verbs import call_agent, lease_arguments, take_over_remedy
from orchestrator.cgroups import CgroupUnavailableError, Hierarchies, system_hierarchies
from orchestrator.counterpart import refuse_replaced
from orchestrator.deploy import (
    COMMIT_TIMEOUT_S,
    DeployReport,
    Held,
    Underway,
    ask_held,
    bundle_digest,
    deploy_bundle,
    file_digest,
)
from orchestrator.device_facts.seen import Seen, look
from orchestrator.emulation import GroupSite, ResolvedEmulation, resolve_emulation
from orchestrator.errors import (
    CommandTimeoutError,
    DeviceFullError,
    LinkError,
    StableError,
    TransientError,
)
from orchestrator.facts import read_facts
from orchestrator.full_disk import agents_there, remove_content, remove_everything
from orchestrator.inventory import Device
from orchestrator.job_push import push_job
from orchestrator.settings import Settings
from orchestrator.tailing import (
    PollResult,
    agent_runs,
    await_boot,
    await_start,
    checked_state,
    log_tail,
    parse_attempts,
    parse_journal_paths,
    read_journal,
    waits_for,
)
from orchestrator.task_push import deploy_task_data
from orchestrator.transports import connect
from orchestrator.transports.base import Progress, Transport
from sti_runtime.device_facts import DeviceFacts
from sti_runtime.messages import (
    AGENT_LOG_FILE,
    JOB_FILE,
    JOURNAL_FILE,
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
_TRIES = 3
_RETRY_PAUSE_S = 0.5
_RETRY_PAUSE_MOST_S = 5.0
REACH_LIMIT_S = 120.0
"""So long is a device waited for that was reached before and is now gone, as for a reboot; one that was never
reached is tried _TRIES times."""
_FIRST_REACH_S = 8.0
"""A device that was never reached is not tried again after so long: nobody answers where it should be."""
_EXIT_LIMIT_S = 60.0
_LEAVE_LIMIT_S = 20.0
_LEAVE_PAUSE_S = 0.2

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")


class HostWorker:
    """Drives the devices of one lab host. All methods raise DeviceError and its kinds."""

    def __init__(self, settings: Settings, devices: Sequence[Device]) -> None:
        self._settings = settings
        self._devices = {device.name: device for device in devices}
        self._transports: dict[str, Transport] = {}
        self._have_agent: set[str] = set()
        self._agent_files: dict[str, AgentFile] = {}
        self._workdirs: dict[str, str] = {}
        self._reached: set[str] = set()
        self._locks = {device.name: threading.RLock() for device in devices}
        self._transports_lock = threading.Lock()
        self._progress: dict[str, tuple[int, int]] = {}
        self._waits: dict[str, str] = {}
        self._leaving: list[threading.Thread] = []
        self._hierarchies: Hierarchies = system_hierarchies()

    def close(self) -> None:
        """Finish what goes on in the background and give connections back; agents go on."""
        for thread in self._leaving:
            thread.join(_LEAVE_LIMIT_S)
        with self._transports_lock:
            for transport in self._transports.values():
                transport.close()
            self._transports.clear()

    # -------------------------------------------------------------- asking

    def architecture(self, name: str) -> str:
        """Of ``toolchain.ARCHITECTURES``; asked without an agent."""
        transport = self._connect(name)
        return self._retried(name, lambda: device_architecture(transport))

    def facts(self, name: str) -> DeviceFacts:
        """What the device says of itself; marks the spool of an emulated device first."""
        device, transport = self._device(name, check=True)
        with self._locks[name]:
            return self._retried(
                name, lambda: read_facts(transport, self.spool(name), emulated=device.emulated)
            )

    def look(self, name: str) -> Seen:
        """What this host sees of the device without an agent; its work folder is made if it can be."""
        transport, spool = self._connect(name), self.spool(name)
        return self._retried(name, lambda: look(transport, spool))

    def spool(self, name: str) -> str:
        """The device's work folder; a local one may be relative to the inventory."""
        device = self._devices[name]
        if device.transport == "local":
            given = self._settings.inventory.parent / (device.workdir or "")
            return str(given if device.workdir else self._settings.spool(name))
        if device.workdir is not None:
            return device.workdir
        with self._locks[name]:
            if name not in self._workdirs:
                transport = self._connect(name)
                self._workdirs[name] = self._retried(name, transport.default_workdir)
            return self._workdirs[name]

    def progress(self, name: str) -> Underway:
        """How far the deploy to a device is, and what the call under way waits for; asks nothing of it."""
        return Underway(*self._progress.get(name, (0, 0)), self._waits.get(name, ""))

    # -------------------------------------------------------------- deploying

    def deploy(
        self,
        name: str,
        bundle_path: Path,
        tasks: Sequence[Path] = (),
        lease: Lease | None = None,
        identity: str | None = None,
    ) -> tuple[DeployReport, ...]:
        """Bring a bundle and task data to the device, the agent too where it is missing; a report of each.

        Where nothing lacks, one command is all that goes over the link. ``identity``: the device that it is
        meant for; other hardware gets no content, but a StableError.
        """
        digests = [bundle_digest(bundle_path), *(file_digest(path) for path in tasks)]
        spool, forward = self.spool(name), self._forward(name)

        def act() -> tuple[DeployReport, ...]:
            transport, held = self._held(name, digests)
            if identity is not None:
                refuse_replaced(name, before=identity, now=held.identity)
            bundle = deploy_bundle(transport, spool, bundle_path, forward, lease=lease, held=held)
            rows = [
                deploy_task_data(transport, spool, path, forward, lease=lease, held=held) for path in tasks
            ]
            return (bundle, *rows)

        with self._locks[name]:
            try:
                return self._retried(name, act)
            finally:
                self._progress.pop(name, None)

    def _held(self, name: str, digests: Sequence[str]) -> tuple[Transport, Held]:
        """What of some content the device holds, its agent looked at by the same question."""
        device, transport = self._devices[name], self._connect(name)
        if not device.native:
            return transport, ask_held(transport, self.spool(name), digests)
        agent = self._bring(name, transport, ("has", *digests, "--spool", self.spool(name)))
        return transport, Held.from_answer(agent.answer, name)

    def _forward(self, name: str) -> Progress:
        def forward(done: int, total: int) -> None:
            self._progress[name] = (done, total)

        return forward

    # -------------------------------------------------------------- jobs

    def start_job(self, name: str, job: Job) -> bool:
        """Bring a job to the device and start the agent on it, or resume it.

        Returns False when there was nothing to start: the agent is at it, or has ended it.
        Raises: StableError when this attempt's folder holds another job.
        """
        device, transport = self._device(name, check=True)
        spool = self.spool(name)
        folder = f"{spool}/jobs/{job.id}/{job.attempt}"
        with self._locks[name]:
            if not self._retried(name, lambda: push_job(transport, spool, job)):
                state = call_agent(transport, spool, "status", job.id, str(job.attempt)).get("state")
                if state in ("running", "ended"):
                    return False
            if device.transport == "adb":
                try:
                    await_boot(transport, lambda: self._waits.update({name: "Android has not booted yet"}))
                finally:
                    self._waits.pop(name, None)
            argv = (*transport.agent_argv, "run", f"{folder}/{JOB_FILE}", "--spool", spool)
            prefix = self._enter_groups(device, job.emulation)
            pid = transport.start_detached((*prefix, *argv), log=f"{folder}/{AGENT_LOG_FILE}")
            _log.info("agent started", device=name, job=job.id, attempt=job.attempt, pid=pid)
            await_start(transport, folder, pid)
            return True

    def poll(self, name: str, job_id: str, attempt: int, offset: int, wait_s: float) -> PollResult:
        """New journal records from ``offset`` (a previous ``next_offset``, or 0).

        Returns as soon as there is a record or the job does not run, else after ``wait_s``.
        """
        _, transport = self._device(name)
        folder = f"{self.spool(name)}/jobs/{job_id}/{attempt}"
        deadline = time.monotonic() + wait_s
        while True:
            # Liveness first: what an agent wrote before it was seen dead is then surely read below.
            running = agent_runs(transport, folder)
            result = read_journal(transport, f"{folder}/{JOURNAL_FILE}", offset, running=running)
            if not running and not result.records and result.state == "stopped":
                answer = call_agent(transport, self.spool(name), "status", job_id, str(attempt))
                result = replace(result, state=checked_state(answer, name))
            if result.records or result.state != "running" or time.monotonic() >= deadline:
                break
            time.sleep(transport.poll_pause_s)
        if result.state == "ended":
            self._leave_groups(name)
        elif result.state == "running" and not result.records:
            result = replace(result, detail=waits_for(transport, folder))
        elif result.state == "stopped":
            result = replace(result, detail=log_tail(transport, f"{folder}/{AGENT_LOG_FILE}"))
        return result

    def journals(self, name: str) -> list[tuple[str, int]]:
        """(job, attempt) of every journal on the device. Raises: DeviceError."""
        _, transport = self._device(name)
        folder = f"{self.spool(name)}/jobs"
        # Without that folder there are none; a listing that fails must not pass for that.
        script = 'if test -e "$1"; then exec find "$1" -type f -name "$2"; fi'
        argv = ("sh", "-c", script, "sh", folder, JOURNAL_FILE)
        found = self._retried(name, lambda: transport.run(argv, timeout_s=60))
        if not found.ok or found.truncated:
            raise StableError(
                f"its journals below {folder} cannot be listed: {found.error_text() or found.exit_code}.",
                "Check that its user may read that folder.",
                device=name,
            )
        return parse_journal_paths(found.stdout, folder)

    def stop_job(self, name: str, job_id: str, attempt: int) -> bool:
        """Ask the agent to stop after its unit; whether there was one to ask."""
        _, transport = self._device(name)
        with self._locks[name]:
            answer = call_agent(transport, self.spool(name), "stop", job_id, str(attempt))
        return answer.get("signalled") is not None

    def clean(self, name: str, lease: Lease | None = None) -> dict[str, Any]:
        """Remove everything of ours from the device; the answer says what was there. Where the agent has no
        room to do it, content is removed before; if need be, all of it by plain commands."""
        with self._locks[name]:
            try:
                answer = self._clean(name, lease)
            except DeviceFullError as error:
                _log.warning("no room to clean: content is removed first", device=name, cause=error.what)
                answer = self._clean_full(name, lease)
            self._have_agent.discard(name)  # it removed itself
            self._agent_files.pop(name, None)
            if (decided := self._settings.emulation / name).exists():
                shutil.rmtree(decided)
            self._leave_groups(name)
        return answer

    def _clean(self, name: str, lease: Lease | None) -> dict[str, Any]:
        """By our agent. It may still be held a moment by one that has just ended its job."""
        _, transport = self._device(name)
        return self._ask_to_clean(name, transport, lease)

    def _ask_to_clean(self, name: str, transport: Transport, lease: Lease | None) -> dict[str, Any]:
        return self._retried(
            name, lambda: call_agent(transport, self.spool(name), "clean", *lease_arguments(lease))
        )

    def _clean_full(self, name: str, lease: Lease | None) -> dict[str, Any]:
        """On a full disk: by our agent once content is gone, by one that is there, by plain commands."""
        transport, spool = self._connect(name), self.spool(name)
        self._retried(name, lambda: remove_content(transport, spool, lease))
        try:
            return self._clean(name, lease)
        except DeviceFullError as error:
            _log.warning("still no room for the agent", device=name, cause=error.what)
        for path in self._retried(name, lambda: agents_there(transport, spool)):
            transport.agent_argv = (path,)
            try:
                return self._ask_to_clean(name, transport, lease)
            except StableError as error:
                _log.warning("an agent that is there does not clean", device=name, cause=error.what)
        removed = self._retried(name, lambda: remove_everything(transport, spool, lease))
        return {"removed": list(removed)}

    def take_over(self, name: str, lease: Lease) -> None:
        """Make the lease's store the device's owner, whoever was. Raises: AgentError for a stale lease."""
        _, transport = self._device(name)
        taking = lease_arguments(lease.model_copy(update={"takeover": True}))
        with self._locks[name]:
            # Any verb with a lease does it; this one forgets a job that nobody made.
            call_agent(transport, self.spool(name), "forget", "take-over", "1", *taking)

    def collect(self, name: str, keep: tuple[str, ...], lease: Lease) -> dict[str, Any]:
        """Remove bundles and task data that are not in ``keep`` (digests); running jobs keep theirs."""
        _, transport = self._device(name)
        arguments = [part for digest in keep for part in ("--keep", digest)]
        with self._locks[name]:
            return call_agent(transport, self.spool(name), "collect", *arguments, *lease_arguments(lease))

    def verify(self, name: str, bundle: str) -> None:
        """Check every chunk of a deployed bundle on the device. Raises: StableError naming the damage."""
        _, transport = self._device(name)
        with self._locks[name]:
            answer = call_agent(transport, self.spool(name), "verify", bundle, timeout_s=COMMIT_TIMEOUT_S)
        if answer.get("state") != "intact":
            chunks = str(answer.get("damaged"))[:80]
            raise StableError(
                f"bundle {bundle[:12]} was damaged on its storage (chunks {chunks}).",
                "Deploy again: what is damaged is sent anew. If it is damaged again, its storage is failing.",
                device=name,
            )

    # -------------------------------------------------------------- emulation

    def emulation(self, name: str, lease: Lease, bundle: str | None = None) -> ResolvedEmulation | None:
        """How a slowed device is slowed, verified on first use and remembered; None for one at full speed.

        ``bundle``: a deployed one, at whose read size the verification reads.
        """
        device, transport = self._device(name)
        if device.emulate is None or not device.emulate.limited:
            return None
        if device.transport == "local":
            Path(self.spool(name)).mkdir(parents=True, exist_ok=True)  # its disk is what gets limited

        def probe(emulation: Emulation) -> VerifiedEmulation:
            identity = self.facts(name).identity
            return self._probe(device, transport, identity, lease, emulation, bundle)

        with self._locks[name]:
            site = self._site(device)
            return resolve_emulation(device, site, probe, self._emulation_cache(name, bundle), bundle=bundle)

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
        self.start_job(device.name, job)
        offset, deadline = 0, time.monotonic() + _PROBE_LIMIT_S
        verified: VerifiedEmulation | None = None
        cause = ""
        while True:
            polled = self.poll(device.name, job.id, job.attempt, offset, 10.0)
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
                call_agent(transport, self.spool(device.name), "stop", job.id, str(job.attempt))
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
        spool = self.spool(device.name)
        script = 'if test -e "$1"; then exec ls "$1"; fi'
        folder = f"{spool}/jobs/{EMULATION_JOB}"
        listed = self._retried(
            device.name, lambda: transport.run(["sh", "-c", script, "sh", folder], timeout_s=60)
        )
        for attempt in parse_attempts(listed.stdout):
            call_agent(transport, spool, "stop", EMULATION_JOB, str(attempt))
            self._forget_ended(transport, device, attempt)

    def _forget_ended(self, transport: Transport, device: Device, attempt: int) -> None:
        """Remove an ended verification's folder; its process may outlive its journal a little, on a slowed
        device by seconds. Raises: DeviceError; TransientError if it still runs after a while."""
        deadline = time.monotonic() + _EXIT_LIMIT_S
        while True:
            try:
                call_agent(transport, self.spool(device.name), "forget", EMULATION_JOB, str(attempt))
                return
            except TransientError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.1)

    def _site(self, device: Device) -> GroupSite:
        spool = Path(self.spool(device.name))
        return GroupSite.of(device, spool, self._hierarchies)

    def _enter_groups(self, device: Device, emulation: Emulation | None) -> tuple[str, ...]:
        try:
            return self._site(device).enter(emulation)
        except CgroupUnavailableError as error:
            raise StableError(
                f"the limits that it was verified with cannot be set: {error}.",
                "Run as the user that verified it, or run stifarm devices clean to verify it anew.",
                device=device.name,
            ) from error

    def _leave_groups(self, name: str) -> None:
        """Remove the device's control groups, in the background: its agent may take seconds to be gone.

        Removing is harmless to a next job: a group with a process in it stays, and each try holds the
        device's lock, under which a job enters its groups.
        """
        device = self._devices[name]
        if device.emulate is None or device.transport != "local":
            return

        def leave() -> None:
            deadline = time.monotonic() + _LEAVE_LIMIT_S
            while time.monotonic() < deadline:
                with self._locks[name]:
                    if self._site(device).remove():
                        return
                time.sleep(_LEAVE_PAUSE_S)
            _log.warning("control groups stay: a process is still in them", device=name)

        thread = threading.Thread(target=leave, name=f"leave-{name}", daemon=True)
        thread.start()
        self._leaving.append(thread)

    def _emulation_cache(self, name: str, bundle: str | None) -> Path:
        return self._settings.emulation / name / f"{bundle or 'any'}.json"

    # -------------------------------------------------------------- inner

    def _connect(self, name: str) -> Transport:
        with self._transports_lock:
            if name not in self._transports:
                self._transports[name] = connect(self._devices[name])
            return self._transports[name]

    def _device(self, name: str, *, check: bool = False) -> tuple[Device, Transport]:
        """A device and its transport, with the native agent on it where its engine is native.

        ``check``: look again whether it is there and whole, and mend it.
        """
        device, transport = self._devices[name], self._connect(name)
        if device.native and (check or name not in self._have_agent):
            with self._locks[name]:
                try:
                    self._retried(name, lambda: self._bring(name, transport, ("version",)))
                finally:
                    self._progress.pop(name, None)
        return device, transport

    def _bring(self, name: str, transport: Transport, asking: Sequence[str]) -> PushedAgent:
        """Have the native agent on a device by asking it. Which one that is, is found out once: an executable
        of another architecture would not run there and be replaced."""
        if name not in self._agent_files:
            self._agent_files[name] = agent_file(device_architecture(transport), name)
        file, forward = self._agent_files[name], self._forward(name)
        try:
            agent = bring_agent(transport, self.spool(name), forward, file=file, asking=asking)
        except StableError:
            del self._agent_files[name]  # it may be another machine by now
            raise
        transport.agent_argv = (agent.path,)
        self._have_agent.add(name)
        return agent

    def _retried(self, name: str, action: Callable[[], _T]) -> _T:
        """Repeat an idempotent action while its errors are transient: a few times, but for a device that
        was there before and is out of reach REACH_LIMIT_S long. ``progress`` says so meanwhile."""
        try:
            return self._until_it_works(name, action)
        finally:
            self._waits.pop(name, None)

    def _until_it_works(self, name: str, action: Callable[[], _T]) -> _T:
        began = time.monotonic()
        pause_s, tries = _RETRY_PAUSE_S, 0
        while True:
            try:
                done = action()
            except TransientError as error:
                out_of_reach, waited_s = isinstance(error, LinkError), time.monotonic() - began
                waited_for = out_of_reach and name in self._reached
                tries += not waited_for
                if waited_s > REACH_LIMIT_S if waited_for else tries >= _TRIES:
                    raise
                if out_of_reach and not waited_for and waited_s > _FIRST_REACH_S:
                    raise
                _log.warning("trying again", device=error.device, cause=error.what)
                cause = error.what.removeprefix(f"{name}: ").rstrip(".")
                self._waits[name] = f"out of reach ({cause})" if waited_for else f"trying again ({cause})"
            else:
                self._reached.add(name)
                return done
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _RETRY_PAUSE_MOST_S)
