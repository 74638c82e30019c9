"""Stopping on SIGTERM and SIGINT: first after the running unit, at the second signal at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class AbandonUnitError(BaseException):
    """The second signal: leave the running unit without a record; it runs again on resume.

    Not an ``Exception``, so that nothing that handles a unit's errors takes it for one.
    """


class StopRequest:
    """Whether, and by which signal, the agent was asked to stop."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._in_unit = False

    def install(self) -> None:
        """Catch SIGTERM and SIGINT; ignore SIGHUP, for the connection may go while the job runs."""
        signal.signal(signal.SIGTERM, self._caught)
        signal.signal(signal.SIGINT, self._caught)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        again, self.signal = self.signal is not None, number
        if again and self._in_unit:
            self._in_unit = False
            raise AbandonUnitError

    def __call__(self) -> bool:
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal, as a shell says it."""
        return 128 + (self.signal or 0)

    @contextmanager
    def unit(self) -> Iterator[None]:
        """Inside, a second signal raises AbandonUnitError; outside, signals are only noted."""
        self._in_unit = True
        try:
            yield
        finally:
            self._in_unit = False
