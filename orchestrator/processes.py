"""Processes, known by pid, start time and boot: a number that was given to another is not ours."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

from sti_runtime.records import NonNegative, Positive, Record

PROC = Path("/proc")


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


def command(pid: int) -> list[str]:
    """The words that a process was started with; empty when it is gone, or a zombie."""
    try:
        said = (PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return []
    return [word.decode(errors="replace") for word in said.split(b"\0")[:-1]]


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


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/<pid>/stat from the third (state) on."""
    try:
        return (PROC / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
