"""Agent processes: the pid file, telling a running one from a stale pid, status and stop of a job."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

from agent.identity import boot_id
from agent.journal import scan
from agent.sensors import PROC, read_text
from agent.spool import Spool, write_atomic
from sti_runtime.messages import JOB_CAP_BYTES, JOB_FILE, JOURNAL_FILE, Job
from sti_runtime.records import canonical_json

PID_FILE = "pid"


def start_ticks(pid: int, proc: Path = PROC) -> int | None:
    """Start time of a live process in clock ticks since boot; None if there is none (zombies are none).

    Source: proc_pid_stat(5), field 22; the command name may hold blanks and parentheses.
    """
    text = read_text(proc / str(pid) / "stat")
    fields = (text or "").rpartition(")")[2].split()
    if len(fields) < 20 or fields[0] in ("Z", "X"):
        return None
    return int(fields[19])


def write_pid(folder: Path) -> None:
    """Say that this process runs the job in ``folder``. Raises: StifarmError."""
    me = os.getpid()
    record = {"boot_id": boot_id(), "pid": me, "start_ticks": start_ticks(me)}
    write_atomic(folder / PID_FILE, canonical_json(record))


def running_pid(folder: Path) -> int | None:
    """The process that runs the job in ``folder``; None when its pid file is absent or stale.

    A pid counts only if the boot and the process's start time are those in the file.
    """
    try:
        record = json.loads((folder / PID_FILE).read_bytes())
        pid, ticks, boot = record["pid"], record["start_ticks"], record["boot_id"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if type(pid) is not int or pid <= 1 or ticks is None or boot != boot_id():
        return None
    return pid if start_ticks(pid) == ticks else None


def job_status(spool: Spool, job_id: str, attempt: str) -> dict[str, Any]:
    """Where a job stands: absent, running, stopped (to be resumed) or ended.

    Raises: FormatError when its job file or journal is damaged.
    """
    folder = spool.job(job_id, attempt)
    nothing = {"pid": None, "journal_bytes": 0, "units": 0, "done": 0, "failed": 0, "refused": None}
    if not (folder / JOB_FILE).exists():
        return {"state": "absent", **nothing}
    job = Job.read(folder / JOB_FILE, cap_bytes=JOB_CAP_BYTES)
    pid = running_pid(folder)
    state = scan(folder / JOURNAL_FILE)
    name = "ended" if state.end is not None else "running" if pid is not None else "stopped"
    return {
        "state": name,
        "pid": pid,
        "journal_bytes": state.good_bytes,
        "units": len(job.units),
        "done": len(state.done),
        "failed": len(state.failed),
        "refused": state.end.refused if state.end is not None else None,
    }


def stop_job(spool: Spool, job_id: str, attempt: str) -> dict[str, Any]:
    """Ask the process that runs a job to stop after its unit (SIGTERM); never signals anything else."""
    pid = running_pid(spool.job(job_id, attempt))
    if pid is not None:
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            return {"signalled": None}
        try:
            # The handle is bound to one process; the check after it closes the gap of a reused pid.
            if running_pid(spool.job(job_id, attempt)) == pid:
                signal.pidfd_send_signal(handle, signal.SIGTERM)
                return {"signalled": pid}
        except ProcessLookupError:
            return {"signalled": None}
        finally:
            os.close(handle)
    return {"signalled": None}
