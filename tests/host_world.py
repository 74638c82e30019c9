"""A controller's head node and lab hosts on one machine, each process with a home of its own, on loopback.

Run as a program it is a controller: ``python -m tests.host_world ROOT DEVICE UNITS`` drives a job of that
many probe units on a device of some host, so that tests can kill it.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from orchestrator import fleet
from orchestrator.dispatch import Request, Worker, run_job
from orchestrator.farm import Farm, controlling
from orchestrator.host_book import hosts_of
from orchestrator.jobs import DeviceTarget
from orchestrator.lab_hosts import LabHosts
from orchestrator.ray.pool import RayPool
from sti_runtime.messages import ProbeUnit
from tests.agent_data import OPEN_GATES, REPO
from tests.farm_world import open_world, wait_for

CLI = (sys.executable, "-c", "from orchestrator.cli import main; main()")
CONTROLLER = "version: 1\ndevices: [{name: own, transport: local, threads: 1, emulate: {mechanism: lab}}]"
HOSTS = {"bench1": ("one", "both"), "bench2": ("two", "both")}
HIDDEN = "bench2"
"""The host that does not see the controller's folders."""


@dataclass
class HostWorld:
    """One farm below ``root``: the controller in ``root`` itself, each host in a folder of its name."""

    root: Path
    address: str = "127.0.0.1:0"
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def prepare(self) -> None:
        """Write inventories: the devices are virtual, so that this machine can be several of them."""
        (self.root / "inventory.yaml").write_text(CONTROLLER)
        for host, names in HOSTS.items():
            (self.root / host).mkdir()
            devices = [
                f"{{name: {name}, transport: local, threads: 1, labels: {{bench: {host}}},"
                " emulate: {mechanism: lab}}"
                for name in names
            ]
            (self.root / host / "inventory.yaml").write_text(f"version: 1\ndevices: [{', '.join(devices)}]")

    def up(self) -> None:
        """Start the head node; at the address it had before, if it ever ran."""
        self._start("head", self.root, CLI, "host", "up", "--listen", self.address)
        found: list[str] = []

        def listening() -> bool:
            found[:] = re.findall(r"stifarm host join (\S+)", self.log("head"))
            return bool(found)

        self._wait("head", listening)
        self.address = found[-1]

    def join(self, host: str) -> None:
        """Start a host; returns when it has joined."""
        home = self.root / host / ".stifarm"
        home.mkdir(exist_ok=True)
        (home / "ray_token").write_bytes((self.root / ".stifarm/ray_token").read_bytes())
        joined = self.joins(host)
        before: Sequence[str] = ()
        if host == HIDDEN:
            hide = ['mount -t tmpfs none "$0/bundles"', 'mount -t tmpfs none "$0/tasks"', 'exec "$@"']
            rooted = () if os.geteuid() == 0 else ("--map-root-user",)
            farm_home = str(self.root / ".stifarm")
            before = ("unshare", "--mount", *rooted, "sh", "-c", " && ".join(hide), farm_home)
        self._start(host, self.root / host, (*before, *CLI), "host", "join", self.address, "--name", host)
        self._wait(host, lambda: self.joins(host) > joined)

    def joins(self, host: str) -> int:
        """How often a host has joined so far."""
        return self.log(host).count(f"{host} joined")

    def log(self, name: str) -> str:
        """What a process has said."""
        path = self.root / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def node_processes(self, host: str) -> dict[str, psutil.Process]:
        """A host's own process, its raylet, and its worker if it has one by now."""
        own = psutil.Process(self.running[host].pid)
        found = {"join": own}
        for child in own.children(recursive=True):
            with suppress(psutil.Error):
                if child.name() == "raylet":
                    found["raylet"] = child
                elif child.cmdline()[:1] and child.cmdline()[0].startswith("ray::HostActor"):
                    found["actor"] = child
        return found

    def kill(self, name: str) -> None:
        """Kill -9 a process; what it started for Ray goes with it."""
        process = self.running.pop(name)
        process.kill()
        process.wait(60)

    def end(self) -> None:
        """End all of it."""
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
            process.wait(60)

    def verb(self, folder: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a verb of the command line in a folder below the root."""
        return subprocess.run(
            (*CLI, *words),
            cwd=self.root / folder,
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def _start(self, name: str, folder: Path, command: Sequence[str], *words: str) -> None:
        with (self.root / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                (*command, *words), cwd=folder, env=_environment(), stdout=log, stderr=log
            )

    def _wait(self, name: str, condition: object) -> None:
        def ready() -> bool:
            assert self.running[name].poll() is None, self.log(name)
            assert callable(condition)
            return bool(condition())

        wait_for(ready, f"{name} to be up")


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "STIFARM_"))}
    return {**kept, "PYTHONPATH": str(REPO)}


def require_namespaces() -> None:
    """Skips where a process cannot have mounts of its own: then no path can be hidden from a host."""
    rooted = () if os.geteuid() == 0 else ("--map-root-user",)
    tried = subprocess.run(
        ("unshare", "--mount", *rooted, "mount", "-t", "tmpfs", "none", "/mnt"),
        capture_output=True,
        check=False,
    )
    if tried.returncode != 0:
        pytest.skip("a host of its own view of the files needs mount namespaces (root, or user namespaces)")


@contextmanager
def driving(farm: Farm) -> Iterator[LabHosts]:
    """The farm's hosts, driven by this process."""
    with controlling(farm), RayPool(farm.settings) as pool:
        yield hosts_of(farm, pool)


def probe_request(farm: Farm, worker: Worker, name: str, units: int, *, again: int = 0) -> Request:
    """A job of probe units on a device; they wait for the lock ``machine.lock`` in the farm's folder."""
    device = next(device for device in farm.inventory.devices if device.name == name)
    device_id, facts = fleet.probe_device(farm, worker, device)
    target = DeviceTarget(
        identity=facts.identity,
        engine="native",
        threads=1,
        queue_depth=1,
        cpus=(),
        machine_lock=str(farm.settings.inventory.parent / "machine.lock"),
        emulation=None,
        gates=OPEN_GATES,
    )
    probes = tuple(ProbeUnit(number=number, kind="probe") for number in range(units))
    return Request(name, device_id, facts.agent_digest, target, "probe", None, None, probes, again)


def _control(root: Path, device: str, units: int) -> None:
    with open_world(root) as farm, driving(farm) as hosts:
        request = probe_request(farm, hosts.worker, device, units)
        assert run_job(farm.store, hosts.worker, farm.owner, request).complete


if __name__ == "__main__":
    _control(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
