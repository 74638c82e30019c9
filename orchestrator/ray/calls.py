"""What crosses Ray's borders: a value, or an error of our tree as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from orchestrator.errors import PoolError
from sti_runtime.errors import StifarmError


class Outcome:
    """What a task or call came to: a value, or an error of our tree."""

    def __init__(self, value: Any, error: StifarmError | None) -> None:
        self.value, self.error = value, error

    def get(self) -> Any:
        """The value. Raises: the error."""
        if self.error is not None:
            raise self.error
        return self.value


def guarded(function: Callable[[Any], Any], item: Any) -> Outcome:
    """Call a function where the task runs."""
    try:
        return Outcome(function(item), None)
    except StifarmError as error:
        return Outcome(None, error)


def fetch(reference: Any) -> Any:
    """The value behind a reference. Raises: the task's StifarmError, or PoolError."""
    import ray

    try:
        outcome = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise PoolError(f"A task failed unexpectedly: {error}", "Report it with this text.") from error
    except ray.exceptions.RayError as error:
        raise PoolError(
            f"A Ray worker died or was lost: {type(error).__name__}: {error}",
            "Check free memory (the kernel may have killed it), then run the command again: it resumes.",
        ) from error
    return outcome.get()
