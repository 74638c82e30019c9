"""What one lab host does with the devices that hang on it. Knows nothing of Ray or the store.

``HostWorker`` keeps nothing that a restart would miss: every method finds out where the device stands
and goes on from there, so calling it again after any crash is the way to resume. Methods that change a
device are serialised per device; ``poll`` only reads and may run beside them. Neighbours: reach (getting at
devices) and emulated_devices (slowing them).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from orchestrator.agent_push import device_architecture, remove_others
from orchestrator.agent_verbs import VERB_TIMEOUT_S, call_agent, lease_arguments
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
from orchestrator.emulated_devices import EmulatedDevices
from orchestrator.emulation import ResolvedEmulation
from orchestrator.errors import DeviceFullError, StableError
from orchestrator.facts import read_facts
from orchestrator.full_disk import agents_there, remove_content, remove_everything
from orchestrator.hosts import OWN
from orchestrator.inventory import Device
from orchestrator.job_push import push_job
from orchestrator.listing import listed
from orchestrator.pump.watch import Drained, HostPump, Order
from orchestrator.reach import Reach
from orchestrator.recovering import Stepped, fresh_server, reboot, reconnect
from orchestrator.settings import Settings
from orchestrator.tailing import (
    PollResult,
    agent_runs,
    await_boot,
    await_start,
    checked_state,
    log_tail,
    parse_journal_paths,
    read_journal,
    waits_for,
)
from orchestrator.task_push import deploy_task_data
from orchestrator.transports.base import Transport
from sti_runtime.device_facts import DeviceFacts
from sti_runtime.messages import AGENT_LOG_FILE, JOB_FILE, JOURNAL_FILE, Job, Lease

_log = structlog.get_logger(__name__)


class HostWorker:
    """Drives the devices of one lab host. All methods raise DeviceError and its kinds."""

    def __init__(self, settings: Settings, devices: Sequence[Device]) -> None:
        self._reach = Reach(settings, devices)
        self._emulated = EmulatedDevices(settings, self._reach, self)
        self._pump: HostPump | None = None
        self._pump_lock = threading.Lock()

    def close(self) -> None:
        """Finish what goes on in the background and give connections back; agents go on."""
        if self._pump is not None:
            self._pump.close()
        self._emulated.close()
        self._reach.close()

    # -------------------------------------------------------------- asking

    def architecture(self, name: str) -> str:
        """Of ``toolchain.ARCHITECTURES``; asked without an agent."""
        transport = self._reach.transport(name)
        return self._reach.retried(name, lambda: device_architecture(transport))

    def facts(self, name: str) -> DeviceFacts:
        """What the device says of itself; marks the spool of an emulated device first."""
        device, transport = self._reach.device(name, check=True)
        with self._reach.locks[name]:
            return self._reach.retried(
                name, lambda: read_facts(transport, self._reach.spool(name), emulated=device.emulated)
            )

    def look(self, name: str) -> Seen:
        """What this host sees of the device without an agent; its work folder is made if it can be."""
        transport, spool = self._reach.transport(name), self._reach.spool(name)
        return self._reach.retried(name, lambda: look(transport, spool))

    def recover(self, name: str, step: str) -> Stepped:
        """Take one step of the recovery ladder; what it came to. Does not wait for calls under way."""
        device, transport = self._reach.devices[name], self._reach.transport(name)
        if step == "reconnect":
            return reconnect(transport)
        if step == "fresh-server":
            return fresh_server(transport)
        return reboot(device, transport)

    def spool(self, name: str) -> str:
        """The device's work folder; see ``Reach.spool``."""
        return self._reach.spool(name)

    def progress(self, name: str) -> Underway:
        """How far the deploy to a device is, and what the call under way waits for; asks nothing of it."""
        return self._reach.underway(name)

    def halt(self, name: str) -> None:
        """Stop the transfer under way to a device, or the wait for it; see ``Reach.halt``."""
        self._reach.halt(name)

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
        spool, forward = self._reach.spool(name), self._reach.forward(name)

        def act() -> tuple[DeployReport, ...]:
            transport, held = self._held(name, digests)
            if identity is not None:
                refuse_replaced(name, before=identity, now=held.identity)
            bundle = deploy_bundle(transport, spool, bundle_path, forward, lease=lease, held=held)
            rows = [
                deploy_task_data(transport, spool, path, forward, lease=lease, held=held) for path in tasks
            ]
            return (bundle, *rows)

        with self._reach.locks[name]:
            try:
                return self._reach.retried(name, act)
            finally:
                self._reach.transferred(name)

    def _held(self, name: str, digests: Sequence[str]) -> tuple[Transport, Held]:
        """What of some content the device holds, its agent looked at by the same question."""
        device, transport = self._reach.devices[name], self._reach.transport(name)
        if not device.native:
            return transport, ask_held(transport, self._reach.spool(name), digests)
        agent = self._reach.bring(name, transport, ("has", *digests, "--spool", self._reach.spool(name)))
        return transport, Held.from_answer(agent.answer, name)

    # -------------------------------------------------------------- jobs

    def start_job(self, name: str, job: Job) -> bool:
        """Bring a job to the device and start the agent on it, or resume it.

        Returns False when there was nothing to start: the agent is at it, or has ended it.
        Raises: StableError when this attempt's folder holds another job.
        """
        device, transport = self._reach.device(name, check=True)
        spool = self._reach.spool(name)
        folder = f"{spool}/jobs/{job.id}/{job.attempt}"
        with self._reach.locks[name]:
            sent = self._reach.retried(name, lambda: push_job(transport, spool, job))
            self._reach.let_in(name)
            if not sent:
                state = call_agent(transport, spool, "status", job.id, str(job.attempt)).get("state")
                if state in ("running", "ended"):
                    return False
            with self._reach.waiting_for(name) as say:
                await_boot(transport, say)
            argv = (*transport.agent_argv, "run", f"{folder}/{JOB_FILE}", "--spool", spool)
            prefix = self._emulated.enter(device, job.emulation)
            pid = transport.start_detached((*prefix, *argv), log=f"{folder}/{AGENT_LOG_FILE}")
            _log.info("agent started", device=name, job=job.id, attempt=job.attempt, pid=pid)
            await_start(transport, folder, pid)
            return True

    def poll(self, name: str, job_id: str, attempt: int, offset: int, wait_s: float) -> PollResult:
        """New journal records from ``offset`` (a previous ``next_offset``, or 0).

        Returns as soon as there is a record or the job does not run, else after ``wait_s``.
        """
        _, transport = self._reach.device(name)
        folder = f"{self._reach.spool(name)}/jobs/{job_id}/{attempt}"
        deadline = time.monotonic() + wait_s
        while True:
            # Liveness first: what an agent wrote before it was seen dead is then surely read below.
            running = agent_runs(transport, folder)
            result = read_journal(transport, f"{folder}/{JOURNAL_FILE}", offset, running=running)
            if not running and not result.records and result.state == "stopped":
                answer = call_agent(transport, self._reach.spool(name), "status", job_id, str(attempt))
                result = replace(result, state=checked_state(answer, name))
            if result.records or result.state != "running" or time.monotonic() >= deadline:
                break
            time.sleep(transport.poll_pause_s)
        if result.state == "ended":
            self._emulated.leave(name)
        elif result.state == "running" and not result.records:
            result = replace(result, detail=waits_for(transport, folder))
        elif result.state == "stopped":
            result = replace(result, detail=log_tail(transport, f"{folder}/{AGENT_LOG_FILE}"))
        return result

    def host(self, name: str) -> str:
        """The host that a device hangs on: this one."""
        return OWN

    def exchange(self, name: str, orders: Sequence[Order], leave: Sequence[str], wait_s: float) -> Drained:
        """Watch the jobs of this host's devices, and give what has come of them; see ``HostPump``. ``name``:
        any of them."""
        with self._pump_lock:
            if self._pump is None:
                self._pump = HostPump(self, lambda device: self._reach.transport(device).poll_pause_s)
        return self._pump.exchange(orders, leave, wait_s)

    def journals(self, name: str) -> list[tuple[str, int]]:
        """(job, attempt) of every journal on the device. Raises: DeviceError."""
        _, transport = self._reach.device(name)
        folder = f"{self._reach.spool(name)}/jobs"
        script = 'if test -e "$1"; then exec find "$1" -type f -name "$2"; fi'
        found = self._reach.retried(name, lambda: listed(transport, script, folder, JOURNAL_FILE))
        return parse_journal_paths(found, folder)

    def stop_job(self, name: str, job_id: str, attempt: int) -> bool:
        """Ask the agent to stop after its unit; whether there was one to ask."""
        _, transport = self._reach.device(name)
        with self._reach.locks[name]:
            answer = call_agent(transport, self._reach.spool(name), "stop", job_id, str(attempt))
        return answer.get("signalled") is not None

    def clean(self, name: str, lease: Lease | None = None) -> dict[str, Any]:
        """Remove everything of ours from the device; the answer says what was there. Where the agent has no
        room to do it, content is removed before; if need be, all of it by plain commands."""
        with self._reach.locks[name]:
            try:
                answer = self._clean(name, lease)
            except DeviceFullError as error:
                _log.warning("no room to clean: content is removed first", device=name, cause=error.what)
                answer = self._clean_full(name, lease)
            self._reach.agent_left(name)
            self._emulated.forget(name)
        return answer

    def _clean(self, name: str, lease: Lease | None) -> dict[str, Any]:
        """By our agent. It may still be held a moment by one that has just ended its job."""
        _, transport = self._reach.device(name)
        return self._ask_to_clean(name, transport, lease)

    def _ask_to_clean(self, name: str, transport: Transport, lease: Lease | None) -> dict[str, Any]:
        return self._asked(name, transport, "clean", *lease_arguments(lease))

    def _asked(
        self, name: str, transport: Transport, *words: str, timeout_s: float = VERB_TIMEOUT_S
    ) -> dict[str, Any]:
        """The agent's answer to a verb that may be repeated."""
        spool = self._reach.spool(name)
        return self._reach.retried(name, lambda: call_agent(transport, spool, *words, timeout_s=timeout_s))

    def _clean_full(self, name: str, lease: Lease | None) -> dict[str, Any]:
        """On a full disk: by our agent once content is gone, by one that is there, by plain commands."""
        transport, spool = self._reach.transport(name), self._reach.spool(name)
        self._reach.retried(name, lambda: remove_content(transport, spool, lease))
        try:
            return self._clean(name, lease)
        except DeviceFullError as error:
            _log.warning("still no room for the agent", device=name, cause=error.what)
        for path in self._reach.retried(name, lambda: agents_there(transport, spool)):
            transport.agent_argv = (path,)
            try:
                return self._ask_to_clean(name, transport, lease)
            except StableError as error:
                _log.warning("an agent that is there does not clean", device=name, cause=error.what)
        removed = self._reach.retried(name, lambda: remove_everything(transport, spool, lease))
        return {"removed": list(removed)}

    def take_over(self, name: str, lease: Lease) -> None:
        """Make the lease's store the device's owner, whoever was. Raises: AgentError for a stale lease."""
        _, transport = self._reach.device(name)
        taking = lease_arguments(lease.model_copy(update={"takeover": True}))
        with self._reach.locks[name]:
            # Any verb with a lease does it; this one forgets a job that nobody made.
            self._asked(name, transport, "forget", "take-over", "1", *taking)

    def collect(self, name: str, keep: tuple[str, ...], lease: Lease) -> dict[str, Any]:
        """Remove bundles and task data that are not in ``keep`` (digests); running jobs keep theirs. Of
        agents that were pushed only the present one stays."""
        device, transport = self._reach.device(name)
        arguments = [part for digest in keep for part in ("--keep", digest)]
        with self._reach.locks[name]:
            answer = self._asked(name, transport, "collect", *arguments, *lease_arguments(lease))
            if device.native:
                self._reach.retried(name, lambda: remove_others(transport, transport.agent_argv[0]))
        return answer

    def verify(self, name: str, bundle: str) -> None:
        """Check every chunk of a deployed bundle on the device. Raises: StableError naming the damage."""
        _, transport = self._reach.device(name)
        with self._reach.locks[name]:
            answer = self._asked(name, transport, "verify", bundle, timeout_s=COMMIT_TIMEOUT_S)
        if answer.get("state") != "intact":
            chunks = str(answer.get("damaged"))[:80]
            raise StableError(
                f"bundle {bundle[:12]} was damaged on its storage (chunks {chunks}).",
                "Deploy again: what is damaged is sent anew. If it is damaged again, its storage is failing.",
                device=name,
            )

    def emulation(self, name: str, lease: Lease, bundle: str | None = None) -> ResolvedEmulation | None:
        """How a slowed device is slowed; see ``EmulatedDevices.resolve``."""
        return self._emulated.resolve(name, lease, bundle, lambda: self.facts(name).identity)
