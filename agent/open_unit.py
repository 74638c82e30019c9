"""The unit that is running, noted beside the journal: how an agent learns what its predecessor was killed in.

A limit on memory that is enforced by killing (a control group's, Android's low-memory killer) leaves the
agent no time for a record. So each unit is noted before it begins, and the note is removed when the process
leaves the job by itself, however it does: what a resumed agent finds was left by one that was killed. A unit
that the agent was killed in ``KILL_LIMIT`` times becomes a failure, and the next unit runs.

The note counts within one boot only; a power cut is no verdict on a unit. Hence it need not be flushed: what
a process has written outlives it in the page cache. It is written over in place, one line; what is left of a
longer one behind the newline means nothing. Format: docs/job-and-journal.md.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field

from agent.identity import boot_id
from agent.sensors import PROC, parse_int, read_text
from agent.spool import storage_error
from sti_runtime.errors import FormatError, ResourceError, StifarmError
from sti_runtime.messages import Unit
from sti_runtime.records import NonNegative, Record

log = logging.getLogger(__name__)

OPEN_UNIT_FILE = "open-unit"
KILL_LIMIT = 2
"""So many times may the agent be killed in one unit before the unit is a failure."""

_NOTE_CAP_BYTES = 512


class OpenUnit(Record):
    """Content of the note. ``kills``: how often the agent was killed in this unit before it began now.
    ``oom_kills``: the kernel's count when it first began; None where there is none to read."""

    boot_id: str = Field(min_length=1, max_length=64)
    kills: NonNegative
    oom_kills: NonNegative | None
    unit: NonNegative


class NoteError(Exception):
    """The note cannot be written: no failure of the unit, the run ends. ``cause`` says why."""

    def __init__(self, cause: StifarmError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class UnitNote:
    """The note of one job, open for writing, and what it said when it was opened."""

    def __init__(self, path: Path, descriptor: int, boot: str) -> None:
        self._path = path
        self._fd = descriptor
        self._boot = boot
        self._found = self._read()

    def _read(self) -> OpenUnit | None:
        try:
            line = os.pread(self._fd, _NOTE_CAP_BYTES, 0).partition(b"\n")[0]
            if not line:
                return None
            note = OpenUnit.from_json(line, source=str(self._path))
        except (OSError, FormatError) as error:
            log.warning("The note of the unit that was running is ignored: %s", error)
            return None
        return note if note.boot_id == self._boot else None

    def kills(self, unit: int) -> int:
        """How often the agent was killed in this unit, since the last boot."""
        found = self._found
        return found.kills + 1 if found is not None and found.unit == unit else 0

    def begin(self, unit: int) -> None:
        """Note that the unit runs from now on. Raises: NoteError."""
        found, kills = self._found, self.kills(unit)
        counted = found.oom_kills if found is not None and kills else oom_kills()
        note = OpenUnit(boot_id=self._boot, kills=kills, oom_kills=counted, unit=unit)
        line = note.to_json() + b"\n"
        try:
            written = 0
            while written < len(line):
                written += os.pwrite(self._fd, line[written:], written)
        except OSError as error:
            raise NoteError(storage_error(error, self._path)) from error

    def verdict(self, unit: Unit) -> ResourceError | None:
        """Why the unit is not run again; None if it is. Logs what is known of it."""
        kills = self.kills(unit.number)
        if kills == 0 or self._found is None:
            return None
        if kills < KILL_LIMIT:
            log.warning("The agent was killed while it ran unit %d (%s)", unit.number, unit.kind)
            return None
        return killed_error(unit, kills, self._found.oom_kills, oom_kills())


@contextmanager
def noting_units(folder: Path) -> Iterator[UnitNote]:
    """The note of the job in ``folder``; removed at the end. Raises: StorageFullError, InputError."""
    path = folder / OPEN_UNIT_FILE
    boot = boot_id()
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise storage_error(error, path) from error
    try:
        yield UnitNote(path, descriptor, boot)
    finally:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("%s: cannot be removed: %s", path, error.strerror)
        os.close(descriptor)


def oom_kills(proc: Path = PROC) -> int | None:
    """Processes that the kernel's out-of-memory killer has ended since boot, control groups' included.

    None where the kernel does not say. Source: mm/oom_kill.c (OOM_KILL of /proc/vmstat, since Linux 4.13).
    """
    for line in (read_text(proc / "vmstat") or "").splitlines():
        name, _, count = line.partition(" ")
        if name == "oom_kill":
            return parse_int(count)
    return None


def killed_error(unit: Unit, kills: int, before: int | None, now: int | None) -> ResourceError:
    """The error of a unit in which the agent was killed; ``before`` and ``now``: the kernel's counts."""
    if before is None or now is None:
        evidence = "this kernel does not count its out-of-memory kills"
    elif now > before:
        evidence = f"the kernel counts {now - before} out-of-memory kill(s) in that time"
    else:
        evidence = (
            "the kernel counts no out-of-memory kill of its own in that time,"
            " so it was Android's low-memory killer, a user, or a crash that agent.log tells of"
        )
    return ResourceError(
        f"The agent was killed {kills} times while it ran unit {unit.number} ({unit.kind}),"
        f" likely for lack of memory: {evidence}.",
        "Give the unit a smaller preload or working buffer, a smaller submodel or batch,"
        " or free memory on the device; then run it again.",
    )
