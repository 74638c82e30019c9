"""Every error that stifarm raises on purpose, as one tree.

    StifarmError
    ├── InputError            something the user gave is wrong (exit code 2)
    │   ├── CheckpointError   a model checkpoint that cannot be imported
    │   ├── DatasetError      task data that cannot be read
    │   └── UnitsError        a quantity such as "4MB/s" that does not parse
    ├── FormatError           a file of ours (bundle, plan, job, journal) is malformed or damaged
    │   └── DigestError       bytes do not have the digest their manifest states
    ├── InfeasiblePlanError   no trained submodel meets the target latency
    ├── SolverError           the planner exact has no solver, or no optimum in its limit
    ├── ResourceError         disk, memory or a buffer is too small for what was asked
    ├── StorageReadError      a file of a bundle could not be read where its manifest says
    └── (orchestrator.errors adds the farm's own branches)

A message says what happened, to which device or file, and what to do next.
"""

from __future__ import annotations

from typing import Any


def _rebuild(kind: type[StifarmError], arguments: tuple[Any, ...], state: dict[str, Any]) -> StifarmError:
    """Unpickle an error of the tree without calling its constructor (keyword-only arguments survive)."""
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(state)
    return error


class StifarmError(Exception):
    """Base of the tree: ``what`` happened, and the ``remedy`` the user can apply.

    ``str(error)`` is one paragraph: what, then the remedy. ``exit_code`` is the CLI's.
    """

    exit_code = 1

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle with all attributes: errors cross process borders."""
        return _rebuild, (type(self), self.args, dict(self.__dict__))

    def __str__(self) -> str:
        return f"{self.what} {self.remedy}".strip()


class InputError(StifarmError):
    """Something the user gave is wrong; nothing was changed."""

    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint folder is incomplete, truncated or of an unsupported architecture."""


class DatasetError(InputError):
    """Task data cannot be read, lacks a column or holds an unknown label."""


class UnitsError(InputError):
    """A quantity with a unit does not parse."""


class FormatError(StifarmError):
    """A file of one of our formats is malformed, truncated, over-long or from a newer version."""


class DigestError(FormatError):
    """Bytes on storage do not have the digest that their manifest states."""


class InfeasiblePlanError(StifarmError):
    """No trained submodel meets the target; ``smallest_target_ns`` is the smallest T that works."""

    def __init__(self, what: str, remedy: str = "", *, smallest_target_ns: int) -> None:
        super().__init__(what, remedy)
        self.smallest_target_ns = smallest_target_ns


class SolverError(StifarmError):
    """The solver of the planner ``exact`` is not installed, or found no optimum in its limit."""


class ResourceError(StifarmError):
    """Storage, memory or a buffer is too small for what was asked."""


class StorageReadError(StifarmError):
    """Storage failed, or a file of a bundle ends before its manifest says it does."""
