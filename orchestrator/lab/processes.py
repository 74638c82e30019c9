"""Processes of the lab, known by pid, start time and boot: a number that was given to another is not ours."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from orchestrator.errors import LabError
from sti_runtime.records import NonNegative, Positive, Record

PROC = Path("/proc")
END_LIMIT_S = 30.0
_PAUSE_S = 0.02


class ProcessId(Record):
    """One process for all time. ``start_ticks``: field 22 of its stat. ``boot``: of the machine."""

    pid: Positive
    start_ticks: NonNegative
    boot: str


def machine_boot() -> str:
    """This boot of the machine."""
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def identify(pid: int) -> ProcessId | None:
    """The process that has this pid now; None when there is none but a zombie."""
    fields = _stat(pid)
    if fields is None or fields[0] == "Z":
        return None
    return ProcessId(pid=pid, start_ticks=int(fields[19]), boot=machine_boot())


def alive(process: ProcessId | None) -> bool:
    """Whether it is still that process, and no zombie."""
    return process is not None and identify(process.pid) == process


def descendants(pid: int) -> list[int]:
    """Pids of its children, theirs, and so on; parents first."""
    of: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        fields = _stat(int(entry.name)) if entry.name.isdigit() else None
        if fields is not None:
            of.setdefault(int(fields[1]), []).append(int(entry.name))
    found = list(of.get(pid, ()))
    for child in found:  # grows while it is walked
        found += of.get(child, ())
    return found


def end(process: ProcessId | None, *, also: Callable[[], list[int]] = list) -> None:
    """Kill a process, its descendants and what ``also`` finds, until none is left.

    Raises: LabError when one does not end in END_LIMIT_S.
    """
    targets: set[ProcessId] = set()
    deadline = time.monotonic() + END_LIMIT_S
    while True:
        if process is not None and alive(process):
            targets.add(process)
            targets |= _identified(descendants(process.pid))
        targets |= _identified(also())
        targets = {target for target in targets if alive(target)}
        if not targets:
            return
        for target in targets:
            kill(target, signal.SIGKILL)
        if time.monotonic() > deadline:
            pids = ", ".join(str(target.pid) for target in sorted(targets, key=lambda each: each.pid))
            raise LabError(
                f"The lab's processes {pids} do not end.", "They wait for storage; try again later."
            )
        time.sleep(_PAUSE_S)


def kill(process: ProcessId, number: signal.Signals) -> None:
    """Send a signal to exactly this process; nothing when it is gone."""
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return
    try:
        if alive(process):  # the handle is of the process that was looked at here
            signal.pidfd_send_signal(handle, number)
    except ProcessLookupError:
        pass  # it ended meanwhile
    finally:
        os.close(handle)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(process.pid, os.WNOHANG)  # one of our own children leaves no zombie


def with_variable(name: str, value: str) -> list[int]:
    """Pids of this user's processes that were started with an environment variable."""
    wanted = f"{name}={value}".encode()
    found: list[int] = []
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # gone, or another user's
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def _identified(pids: list[int]) -> set[ProcessId]:
    return {found for found in map(identify, pids) if found is not None}


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/<pid>/stat from the third (state) on."""
    try:
        return (PROC / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
