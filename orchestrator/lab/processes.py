"""Ending processes of the lab, and finding them by what they were started with."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable

from orchestrator.errors import LabError
from orchestrator.processes import PROC, ProcessId, alive, descendants, identify, kill

END_LIMIT_S = 30.0
_PAUSE_S = 0.02


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
