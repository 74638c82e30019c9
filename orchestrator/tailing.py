"""Tailing a job on a device: its journal from an offset, and whether its agent lives. Only reads."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import structlog

from orchestrator.errors import MissingFileError, StableError, new_agent_remedy
from orchestrator.transports.base import Transport
from sti_runtime.journal_format import READ_BYTES, parse_lines
from sti_runtime.messages import EndRecord, JournalRecord

PollState = Literal["absent", "running", "stopped", "ended", "damaged"]

_START_GRACE_S = 30.0
_BOOT_LIMIT_S = 180.0
_BOOT_PAUSE_S = 1.0
_JOB = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_ATTEMPT = re.compile(r"[1-9][0-9]{0,8}")
_PID_MOST = 1 << 30
_TICKS = re.compile(rb"[0-9]{1,20}")
_LOG_TAIL_BYTES = 2000
_LOG_LIMIT_S = 60.0
_NO_LOG = 90
_LOG_TAIL = f'[ -e "$1" ]||exit {_NO_LOG};exec tail -c "$2" "$1"'
_WAITING_CAP_BYTES = 500


@dataclass(frozen=True)
class PollResult:
    """A stretch of a job's journal and how the job stands.

    ``state``: "absent" (the job is not on the device), "running" (``detail``: which gates its unit waits
    for, if it does), "stopped" (the agent is gone before the end: start the job again; ``detail`` is the
    end of its log), "ended" (the end record is in ``records`` or was read before), "damaged" (the journal
    is; ``detail`` says how). ``records`` are good in every state.
    """

    records: tuple[JournalRecord, ...]
    next_offset: int
    state: PollState
    detail: str


def read_journal(transport: Transport, path: str, offset: int, *, running: bool) -> PollResult:
    """One read of the journal; "stopped" without a record means that the agent must be asked."""
    idle: PollState = "running" if running else "stopped"
    try:
        data = transport.read_from(path, offset, READ_BYTES)
    except MissingFileError:
        return PollResult((), offset, idle, "")
    part = parse_lines(data, offset=offset, source=f"{transport.device}: {path}")
    if part.problem is not None:
        return PollResult(part.records, part.next_offset, "damaged", str(part.problem))
    if part.records and isinstance(part.records[-1].payload, EndRecord):
        return PollResult(part.records, part.next_offset, "ended", "")
    more = len(data) == READ_BYTES  # then the journal was not read to its end
    return PollResult(part.records, part.next_offset, "running" if more else idle, "")


def checked_state(answer: dict[str, Any], device: str) -> PollState:
    """A job's state out of an agent's answer: not trusted. Raises: StableError."""
    states: dict[object, PollState] = {
        "absent": "absent", "running": "running", "stopped": "stopped", "ended": "ended",
    }  # fmt: skip
    state = answer.get("state")
    if not isinstance(state, str) or state not in states:
        raise StableError(
            f"the agent gives a job the state {str(state)[:40]!r}.",
            new_agent_remedy(device),
            device=device,
        )
    return states[state]


def parse_journal_paths(output: bytes, folder: str) -> list[tuple[str, int]]:
    """(job, attempt) out of paths ``<folder>/<job>/<attempt>/journal.log``; others are none of ours."""
    found = []
    for line in output.decode(errors="replace").splitlines():
        within, _, path = line.partition(f"{folder}/")
        parts = path.split("/")
        if not within and len(parts) == 3 and _JOB.fullmatch(parts[0]) and _ATTEMPT.fullmatch(parts[1]):
            found.append((parts[0], int(parts[1])))
    return sorted(found)


def parse_attempts(output: bytes) -> list[int]:
    """Attempt numbers out of a listing of a job's folder; other names are none of ours."""
    return sorted(int(name) for name in output.decode(errors="replace").split() if _ATTEMPT.fullmatch(name))


def waits_for(transport: Transport, folder: str) -> str:
    """Which gates a running job's unit waits for, in the agent's words; empty when for none."""
    try:
        data = transport.read_from(f"{folder}/waiting", 0, _WAITING_CAP_BYTES)
    except MissingFileError:
        return ""
    return " ".join(data.decode(errors="replace").split())


def log_tail(transport: Transport, path: str) -> str:
    """The end of the agent's log, however long it is. Raises: DeviceError."""
    done = transport.run(
        ["sh", "-c", _LOG_TAIL, "sh", path, str(_LOG_TAIL_BYTES)],
        timeout_s=_LOG_LIMIT_S,
        output_cap_bytes=_LOG_TAIL_BYTES,
    )
    if done.exit_code == _NO_LOG:
        return "The agent was not started."
    if not done.ok:
        return f"Its log {path} cannot be read: {done.error_text() or done.exit_code}."
    return done.stdout.decode(errors="replace").strip()


def await_boot(transport: Transport, waits: Callable[[str], None] = lambda _: None) -> None:
    """Wait while the device answers but is not ready for a job (``Transport.not_yet``). ``waits`` is told
    why while it is not. After _BOOT_LIMIT_S the job starts all the same, and the log says so."""
    deadline = time.monotonic() + _BOOT_LIMIT_S
    while why := transport.not_yet():
        if time.monotonic() > deadline:
            structlog.get_logger(__name__).warning(
                "it is not ready; its job starts all the same",
                device=transport.device,
                cause=why,
                waited_s=_BOOT_LIMIT_S,
            )
            return
        waits(why)
        time.sleep(_BOOT_PAUSE_S)


def await_start(transport: Transport, folder: str, pid: int) -> None:
    """Wait until the started agent has written its pid file, or is gone again.

    Until then ``poll`` could not tell an agent that is starting from one that has died.
    """
    deadline = time.monotonic() + _START_GRACE_S
    while time.monotonic() < deadline and not agent_runs(transport, folder) and _ticks(transport, pid):
        time.sleep(transport.poll_pause_s)


def agent_runs(transport: Transport, folder: str) -> bool:
    """Whether the process that the job's pid file names is alive: two small reads, no process started,
    so that looking does not disturb what is being timed on the same machine."""
    try:
        record = json.loads(transport.read_from(f"{folder}/pid", 0, 4096))
        pid, ticks = int(record["pid"]), int(record["start_ticks"])
    except MissingFileError:
        return False
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return False  # half-written or not one of ours: the agent's own verbs judge it
    return 0 < pid <= _PID_MOST and _ticks(transport, pid) == ticks


def _ticks(transport: Transport, pid: int) -> int | None:
    """Start time of a live process in clock ticks; None for none and for zombies.

    Source: proc_pid_stat(5), field 22.
    """
    try:
        stat = transport.read_from(f"/proc/{pid}/stat", 0, 4096)
    except MissingFileError:
        return None
    fields = stat.rpartition(b")")[2].split()
    if len(fields) < 20 or fields[0] in (b"Z", b"X") or not _TICKS.fullmatch(fields[19]):
        return None
    return int(fields[19])
