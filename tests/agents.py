"""The agents that one contract binds: the torch agent, and the native executables of every architecture.

Executables of another architecture run under qemu's user emulation (Debian package qemu-user).
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.agent_push import MACHINES
from orchestrator.toolchain import ARCHITECTURES, build_agent

REPO = Path(__file__).resolve().parent.parent
TORCH = "torch"
AGENTS = (TORCH, *ARCHITECTURES)
QEMU = {"x86_64": "qemu-x86_64", "aarch64": "qemu-aarch64", "armv7": "qemu-arm"}


@dataclass(frozen=True)
class Agent:
    """One way to run an agent on this machine. ``emulated``: qemu carries it out."""

    name: str
    argv: tuple[str, ...]
    emulated: bool
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def native(self) -> bool:
        """Whether it is an executable of ours, not Python."""
        return self.name != TORCH

    @property
    def engine(self) -> str:
        """The engine whose jobs it takes."""
        return "native" if self.native else "torch"

    def start(
        self, *arguments: object, stdin: Path | int = Path(os.devnull), **options: Any
    ) -> subprocess.Popen[bytes]:
        """Start one verb; ``stdin``: a file that is its input, or subprocess.PIPE."""
        with contextlib.ExitStack() as opened:
            source = stdin if isinstance(stdin, int) else opened.enter_context(stdin.open("rb"))
            return subprocess.Popen(
                [*self.argv, *map(str, arguments)],
                cwd=REPO,
                stdin=source,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=os.environ | dict(self.environment),
                **options,
            )

    def call(self, *arguments: object, timeout_s: float = 300, **options: Any) -> tuple[int, dict[str, Any]]:
        """Run one verb to its end; its exit code and what it printed."""
        process = self.start(*arguments, **options)
        try:
            output, errors = process.communicate(timeout=timeout_s)
        finally:
            process.kill()
        assert output, f"it said nothing (exit code {process.returncode}). {errors.decode()}"
        report: dict[str, Any] = json.loads(output)
        return process.returncode, report

    def in_environment(self, **variables: str) -> Agent:
        """The same with more environment variables."""
        return replace(self, environment={**self.environment, **variables})


def abandon(started: subprocess.Popen[bytes], limit_s: float = 120) -> None:
    """Send SIGTERM until the agent has gone: two that come together count as one."""
    deadline = time.monotonic() + limit_s
    while started.poll() is None:
        assert time.monotonic() < deadline, f"the agent still runs after {limit_s} s of signals"
        started.send_signal(signal.SIGTERM)
        time.sleep(0.05)


def agent_called(name: str) -> Agent:
    """The agent of that name of ``AGENTS``, built if need be. Skips where nothing here can run it."""
    if name == TORCH:
        return Agent(TORCH, (sys.executable, "-m", "agent"), emulated=False)
    path = str(build_agent(name))
    if MACHINES.get(platform.machine()) == name:
        return Agent(name, (path,), emulated=False)
    emulator = shutil.which(QEMU[name]) or shutil.which(f"{QEMU[name]}-static")
    if emulator is None:
        pytest.skip(f"the {name} agent needs {QEMU[name]} here (Debian package qemu-user)")
    return Agent(name, (emulator, path), emulated=True, environment={"STIFARM_EMULATOR": emulator})
