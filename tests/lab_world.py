"""Labs for tests: brought up through the command line, looked at from outside, and all their traces."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.lab.machine import opened
from orchestrator.lab.state import Lab
from orchestrator.lab.status import device_states
from orchestrator.toolchain import cache_folder
from tests.agent_data import REPO

LIMIT_S = 300
NOBODY = 65534
PROGRAM = (sys.executable, "-c", "from orchestrator.cli import main; main()")


@dataclass(frozen=True)
class LabCli:
    """``stifarm lab …`` in one lab's folder; ``prefix``: argv that makes it run as somebody else."""

    folder: Path
    prefix: tuple[str, ...] = ()

    @property
    def lab(self) -> Lab:
        """The lab's folder."""
        return Lab(self.folder)

    def argv(self, *words: str) -> list[str]:
        """The command line of a verb."""
        return [*self.prefix, *PROGRAM, "lab", *words, "--dir", str(self.folder)]

    def start(self, *words: str) -> subprocess.Popen[str]:
        """A verb, started, leader of its own process group."""
        return subprocess.Popen(
            self.argv(*words),
            env=self._environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *words: str) -> tuple[int, str, str]:
        """Exit code, stdout, stderr of a verb."""
        done = subprocess.run(
            self.argv(*words), env=self._environment(), capture_output=True, text=True, timeout=LIMIT_S
        )
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout, done.stderr

    def json(self, *words: str) -> Any:
        """What a verb that succeeds answers machines."""
        code, out, err = self.run(*words, "--json")
        assert code == 0, err
        return json.loads(out)

    def farm(self, *words: str) -> Any:
        """What a verb of the farm answers machines; it succeeds, on the lab's inventory."""
        argv = [*PROGRAM, "--inventory", str(self.lab.inventory), *words, "--json"]
        done = subprocess.run(
            [*self.prefix, *argv], env=self._environment(), capture_output=True, text=True, timeout=LIMIT_S
        )
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr
        return json.loads(done.stdout)

    def devices(self) -> dict[str, Any]:
        """What ``lab status`` says, by device."""
        return {each["name"]: each for each in device_states(self.lab)}

    def ssh(self, name: str, command: str, *, limit_s: float = 60) -> subprocess.CompletedProcess[str]:
        """A command on a board by the system's own ssh client, with the lab's key and known hosts."""
        device = self.lab.device(name)
        options = {
            "BatchMode": "yes",
            "StrictHostKeyChecking": "yes",
            "UserKnownHostsFile": str(self.lab.known_hosts),
            "IdentitiesOnly": "yes",
            "ConnectTimeout": "20",
        }
        words = [word for key, value in options.items() for word in ("-o", f"{key}={value}")]
        argv = ["ssh", "-F", "none", *words, "-i", str(self.lab.key), "-p", str(device.port)]
        return subprocess.run(
            [*self.prefix, *argv, f"{device.user}@{device.address}", command],
            capture_output=True,
            text=True,
            timeout=limit_s,
        )

    def says(self, name: str, command: str) -> str:
        """What a command on a board says; it succeeds."""
        done = self.ssh(name, command)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def _environment(self) -> dict[str, str]:
        home = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPO), "HOME": str(self.folder.parent)}
        if self.prefix:
            return home
        return {**home, "XDG_CACHE_HOME": str(cache_folder().parents[1])}  # the agents are built already


def as_nobody(scratch: Path) -> tuple[str, ...]:
    """argv that makes a command run as a plain user, from whose sight nothing that it needs is closed."""
    steps = opened((Path(sys.prefix), Path(sys.base_prefix), REPO), scratch)
    lines = [" ".join(f"'{word}'" for word in step) for step in steps]
    become = f'exec setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups -- "$@"'
    return ("unshare", "--mount", "sh", "-ec", "\n".join([*lines, become]), "sh")


def traces(lab: Lab) -> dict[str, list[str]]:
    """Whatever of a lab is on this machine: processes, mounts, loop devices, links, routes, groups."""
    words = (str(lab.folder), f"lab-{lab.id}", f"{lab.id}/")
    found: dict[str, list[str]] = {"processes": [], "groups": []}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if any(word in line for word in words):
                found["processes"].append(line)
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    found["mounts"] = [line for line in mounts if any(word in line for word in words)]
    found["loops"] = [line for line in _lines("losetup", "-l", "-n") if str(lab.folder) in line]
    found["links"] = [line for line in _lines("ip", "-o", "link") if f"sf{lab.id}" in line]
    state = lab.state() if lab.state_file.exists() else None
    network = state.network if state is not None else None
    found["routes"] = [line for line in _lines("ip", "route") if network is not None and network in line]
    for place in Path("/sys/fs/cgroup").glob("*/stifarm/*") if Path("/sys/fs/cgroup").exists() else ():
        if f"lab-{lab.id}" in place.name:
            found["groups"].append(str(place))
    return found


def wait_for_no_traces(lab: Lab, limit_s: float = 60) -> None:
    """The kernel takes links and mounts of ended namespaces away a little later."""
    deadline = time.monotonic() + limit_s
    while any(traces(lab).values()):
        assert time.monotonic() < deadline, traces(lab)
        time.sleep(0.05)


def _lines(*argv: str) -> Sequence[str]:
    return subprocess.run(argv, capture_output=True, text=True, timeout=60).stdout.splitlines()
