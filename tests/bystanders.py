"""Whoever shares a lab with the farm under faults: what the farm and its recovery must leave alone.

Processes that other sessions started on the farm's own devices, another user's adb server with his phone and
his open shell, and another farm with a job on a board of its own. Each says in the end that it was left
alone, or what was done to it. As a program this is that farm: ``python -m tests.bystanders ROOT UNITS``.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sqlalchemy import select

from db.models import JobRow
from orchestrator import fleet
from orchestrator.dispatch import Request, run_job
from orchestrator.farm import controlling, open_farm
from orchestrator.lab import adb_server, machine, phone
from orchestrator.lab.phone import PhoneSpec
from orchestrator.lab.state import Lab
from orchestrator.processes import ProcessId, alive, identify
from orchestrator.settings import load_settings
from orchestrator.worker import HostWorker
from sti_runtime.messages import ProbeUnit, ResultRecord
from tests.adb_side import Server, adb_environment
from tests.agent_data import REPO
from tests.farm_world import attempts_of, journal, stored_records, wait_for
from tests.lab_world import LabCli

LOOP = "while :; do sleep 1; done"
LOOK_S = 0.5
CLIENT_S = 30
END_S = 120
RIVAL_UNITS = 6


@dataclass
class Foreign:
    """A loop on a device that somebody else's session started there. It dies with a reboot only, and is then
    started again; ``restarts`` counts that."""

    lab: Lab
    device: str
    start: Callable[[str, str], None]
    token: str = field(default_factory=lambda: f"bystander-{secrets.token_hex(6)}")
    process: ProcessId | None = None
    boot: str = ""
    restarts: int = -1
    touched: list[str] = field(default_factory=list)

    def look(self) -> None:
        """Notice an end, and whose doing it was; start again after a reboot, once the device lets us."""
        if self.process is not None and not alive(self.process):
            device = self.lab.device(self.device)
            if device.boot_id == self.boot and device.process is not None and device.fault("reboot") is None:
                self.touched.append(f"the process {self.process.pid} on {self.device} was ended")
            self.process = None
        if self.process is None:
            self.boot = self.lab.device(self.device).boot_id
            self.start(
                self.device, f"setsid sh -c '{LOOP}' {self.token} </dev/null >/dev/null 2>&1 & sleep 0.2"
            )
            self.process = self._find()
            self.restarts += self.process is not None

    def _find(self) -> ProcessId | None:
        wanted = "\0".join(("sh", "-c", LOOP, self.token, "")).encode()
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and (entry / "cmdline").read_bytes() == wanted:
                    return identify(int(entry.name))
            except (FileNotFoundError, ProcessLookupError):
                continue
        return None


@dataclass(frozen=True)
class OtherUser:
    """An adb server, a phone and an open shell of somebody else on this machine."""

    server: Server
    pid: int
    serial: str
    shell: subprocess.Popen[bytes]

    def adb(self, *argv: str) -> subprocess.CompletedProcess[bytes]:
        """His client."""
        return subprocess.run(
            [self.server.program, *argv], env=self.server.environment, capture_output=True, timeout=CLIENT_S
        )

    def touched(self) -> list[str]:
        """What was done to it."""
        found = []
        if not self.server.running() or self.server.pid != self.pid:
            found.append("another user's adb server was ended")
        if self.shell.poll() is not None:
            found.append("another user's adb shell was ended")
        said = self.adb("-s", self.serial, "shell", "echo still here")
        if said.stdout.strip() != b"still here":
            found.append(f"another user's phone does not answer him: {said.stderr.decode()}")
        return found


@contextmanager
def other_user(folder: Path) -> Iterator[OtherUser]:
    """Him and what is his."""
    with ExitStack() as stack:
        his = phone.start(PhoneSpec("his", "BYSTANDER-1"), folder / "phone")
        stack.callback(phone.stop, his.folder)
        server = Server(folder / "server")
        stack.callback(server.kill)
        argv = [server.program, "-s", his.endpoint]
        connected = [server.program, "connect", his.endpoint]
        subprocess.run(connected, env=server.environment, capture_output=True, timeout=CLIENT_S, check=True)
        subprocess.run(
            [*argv, "wait-for-device"], env=server.environment, capture_output=True, timeout=END_S, check=True
        )
        shell = subprocess.Popen(
            [*argv, "shell", LOOP],
            env=server.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        stack.callback(shell.wait)
        stack.callback(shell.kill)
        yield OtherUser(server, server.pid, his.endpoint, shell)


@dataclass(frozen=True)
class Rival:
    """Another farm's controller and store below ``root``, at a job on the board ``device``."""

    lab: Lab
    root: Path
    device: str
    controller: subprocess.Popen[str]

    def touched(self) -> list[str]:
        """What was done to it; it is waited for."""
        _, said = self.controller.communicate(timeout=END_S)
        if self.controller.returncode != 0:
            return [f"another farm's controller failed: {said[-1000:]}"]
        state, device = self.lab.state(), self.lab.device(self.device)
        jobs = machine.seen_from_here(self.lab, state, device, device.workdir) / "jobs"
        with open_farm(load_settings(environ={}, cwd=self.root)) as farm:
            with farm.store.reader() as session:
                (job,) = session.scalars(select(JobRow.id)).all()
            there, stored = journal(jobs / job / "1"), stored_records(farm, job, 1)
            attempts = attempts_of(farm, job)
        results = [record for record in stored if isinstance(record.payload, ResultRecord)]
        if attempts != [(1, "done")] or there != stored or len(results) != RIVAL_UNITS:
            return [f"another farm's job is not whole: {attempts}, {len(stored)} of {len(there)} records"]
        return []


@contextmanager
def rival(lab: Lab, root: Path, device: str) -> Iterator[Rival]:
    """It, with its job begun; ``root`` holds its inventory."""
    with subprocess.Popen(
        [sys.executable, "-m", "tests.bystanders", str(root), str(RIVAL_UNITS)],
        cwd=REPO,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as controller:
        try:
            yield Rival(lab, root, device, controller)
        finally:
            controller.kill()


class Bystanders:
    """All of them. ``no_server``: held while the lab's adb server is down: a client would start another."""

    def __init__(self, lab: Lab, devices: dict[str, str], user: OtherUser, rival: Rival) -> None:
        self.user, self.rival, self.no_server = user, rival, threading.Lock()
        self._lab = lab
        starts = {"board": self._over_ssh, "phone": self._over_adb}
        self.foreign = [Foreign(lab, name, starts[kind]) for name, kind in devices.items()]
        self._looking, self._ended = threading.Lock(), threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look after those that die with their devices, for the length of the block."""
        self.await_all()
        self._watch.start()
        try:
            yield
        finally:
            self._ended.set()
            self._watch.join()

    def await_all(self) -> None:
        """Until every process runs; its device is on and can be reached."""

        def all_run() -> bool:
            self.look()
            return all(each.process is not None for each in self.foreign)

        wait_for(all_run, "the bystanders' processes", END_S)

    def touched(self) -> list[str]:
        """What was done to any of them; devices are on."""
        self.await_all()
        found = [what for each in self.foreign for what in each.touched]
        return [*found, *self.user.touched(), *self.rival.touched()]

    def look(self) -> None:
        """At every process, and start again what died with its device."""
        with self._looking:
            for each in self.foreign:
                each.look()

    def _look(self) -> None:
        while not self._ended.wait(LOOK_S):
            self.look()

    def _over_ssh(self, name: str, command: str) -> None:
        try:
            LabCli(self._lab.folder).ssh(name, command, limit_s=CLIENT_S)
        except subprocess.TimeoutExpired:
            return  # its link is cut; it is tried again

    def _over_adb(self, name: str, command: str) -> None:
        with self.no_server:
            device, state = self._lab.device(name), self._lab.state()
            if state.adb is None:
                return
            environment = adb_environment(self._lab.adb_home, state.adb.port)
            serial = f"{device.address}:{device.port}"
            try:
                for words in (["connect", serial], ["-s", serial, "shell", command]):
                    argv = [adb_server.program(), *words]
                    subprocess.run(argv, env=environment, capture_output=True, timeout=CLIENT_S)
            except subprocess.TimeoutExpired:
                return


def _control(root: Path, units: int) -> None:
    """The other farm's controller: one job of probe units on its only device."""
    with open_farm(load_settings(environ={}, cwd=root)) as farm, controlling(farm):
        worker = HostWorker(farm.settings, farm.inventory.devices)
        try:
            ready = fleet.ready_device(farm, worker, farm.inventory.devices[0], "0" * 64)
            request = Request(
                device=ready.name,
                device_id=ready.device_id,
                agent_digest=ready.facts.agent_digest,
                target=ready.target,
                kind="probe",
                bundle=None,
                task_data=None,
                units=tuple(ProbeUnit(number=number, kind="probe") for number in range(units)),
            )
            run_job(farm.store, worker, farm.owner, request).require_complete()
        finally:
            worker.close()


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    _control(Path(sys.argv[1]), int(sys.argv[2]))
