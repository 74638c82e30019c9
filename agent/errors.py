"""The agent's branches of the error tree in ``sti_runtime.errors``, and the exit code of each.

StifarmError
├── RefusedError    the job must not run here: stale lease, other device, newer version (exit code 3)
│   └── EngineImportError   so does one whose engine is not there, at the first unit that needs it
├── StorageFullError (ResourceError)  no space for the journal; resumes when there is (exit code 4)
├── BusyError       another agent process holds the device (exit code 5)
└── GateError       a gate stayed shut for the whole wait limit; the unit did not run
"""

from __future__ import annotations

from sti_runtime.errors import ResourceError, StifarmError


class RefusedError(StifarmError):
    """The agent must not do this here; a retry of the same request is refused again."""

    exit_code = 3


class EngineImportError(RefusedError):
    """The engine that a unit needs cannot be imported: the job ends."""


class StorageFullError(ResourceError):
    """There is no space left to write what must be kept; nothing already written is lost."""

    exit_code = 4


class BusyError(StifarmError):
    """Another agent process is at work in this spool; try again when it is done."""

    exit_code = 5


class GateError(StifarmError):
    """A gate did not open within the wait limit."""
