"""What crosses Ray's borders: a value, or an error of our tree as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import structlog

from orchestrator.errors import PoolError
from orchestrator.home_files import of_storage
from sti_runtime.errors import StifarmError

_TEXT_CAP = 300
_TRACE = "Traceback (most recent call last)"

_log = structlog.get_logger(__name__)


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
    except OSError as error:
        refusal = of_storage(error)
        if refusal is None:
            raise
        _log.warning("a task failed at its storage", cause=refusal.what, exc_info=error)
        return Outcome(None, refusal)


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


def not_started(what: str, error: Exception) -> PoolError:
    """Our error for a start of Ray that failed: what it raises then is of any class, Exception itself where
    it waited too long for one of its processes."""
    _log.info("ray did not start", what=what, cause=str(error), kind=type(error).__name__)
    return PoolError(
        f"{what} could not be started: {in_short(error)}",
        "This machine may be too busy (Ray gives each of its processes 30 s or more to come up), or lack "
        "memory, space below its temporary folder, or the ports that it was given: see uptime, free and df. "
        "Then run the same command again: it goes on.",
    )


def in_short(error: Exception) -> str:
    """What an error of Ray's says, without what only its makers can use."""
    text = " ".join(str(error).partition(_TRACE)[0].split()) or type(error).__name__
    return f"{text[:_TEXT_CAP]}…" if len(text) > _TEXT_CAP else f"{text.rstrip(' .:')}."


@contextlib.contextmanager
def asking(what: str) -> Iterator[None]:
    """Within the block Ray's processes are asked for something. Raises: PoolError when they do not do it."""
    import ray

    try:
        yield
    except (ray.exceptions.RayError, RuntimeError, TimeoutError, ConnectionError) as error:
        raise PoolError(
            f"Ray did not {what}: {type(error).__name__}: {in_short(error)}",
            "This machine may be too busy, or one of Ray's processes was killed (see free memory). Run the "
            "same command again: it goes on.",
        ) from error
