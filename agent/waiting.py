"""What a job waits for, as a line of text beside its journal, for people; there only while it waits."""

from __future__ import annotations

import logging
from pathlib import Path

from sti_runtime.messages import GateVerdict

WAITING_FILE = "waiting"

log = logging.getLogger(__name__)


def line(shut: tuple[GateVerdict, ...]) -> str:
    """Which gates are shut, and why."""
    return "; ".join(f"{v.gate}: {v.detail}" for v in shut)


def note(folder: Path, shut: tuple[GateVerdict, ...]) -> None:
    """Say which gates are shut. What storage refuses is logged: the wait goes on."""
    try:
        (folder / WAITING_FILE).write_text(line(shut))
    except OSError as error:
        log.warning("%s: cannot be written: %s", error.filename, error.strerror)


def over(folder: Path) -> None:
    """The wait has ended, however it did."""
    try:
        (folder / WAITING_FILE).unlink(missing_ok=True)
    except OSError as error:
        log.warning("%s: cannot be removed: %s", error.filename, error.strerror)
