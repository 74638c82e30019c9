"""What whoever started a job is told while it runs, and how long a device is waited for that is lost."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from orchestrator.errors import LinkError, TransientError

LINK_LIMIT_S = 600
"""So long is a device waited for that is lost while its job is under way: a reboot, a cable."""

_LINK_PAUSE_S = 0.5
_LINK_PAUSE_MOST_S = 5.0

Advance = Callable[[int, int, str], None]
"""Called with (units done, units in all, what the job waits for or "")."""


class Shown:
    """What whoever started a job is told of it: units done, and what it waits for."""

    def __init__(self, device: str, total: int, advance: Advance | None) -> None:
        self._device, self._total, self._advance = device, total, advance
        self._done, self._waits = 0, ""

    def done(self, units: int) -> None:
        """So many units are done; a job that gets on waits for nothing."""
        self._done, self._waits = units, ""
        self._tell()

    def waits(self, cause: str) -> None:
        """Gates that are shut or a link that is lost; empty: neither."""
        if cause == self._waits:
            return
        if not (cause and self._waits):
            structlog.get_logger(__name__).info("waits", device=self._device, cause=cause or "no more")
        self._waits = cause
        self._tell()

    def _tell(self) -> None:
        if self._advance is not None:
            self._advance(self._done, self._total, self._waits)


class Link:
    """How long a device has been out of reach while its job is under way."""

    def __init__(self, device: str, shown: Shown) -> None:
        self._device, self._shown = device, shown
        self._since: float | None = None
        self._pause_s = _LINK_PAUSE_S

    def there(self) -> None:
        """The device has answered."""
        if self._since is not None:
            self._shown.waits("")
        self._since, self._pause_s = None, _LINK_PAUSE_S

    def lost(self, error: TransientError) -> None:
        """Wait a moment after a call that failed. Raises: LinkError when the limit is used up."""
        now = time.monotonic()
        self._since = now if self._since is None else self._since
        cause = error.what.removeprefix(f"{self._device}: ").rstrip(".")
        self._shown.waits(f"out of reach; its job goes on when it is back ({cause})")
        if now - self._since > LINK_LIMIT_S:
            raise LinkError(
                f"it could not be reached for {LINK_LIMIT_S} s ({error.what})",
                f"{error.remedy} Nothing measured is lost: run the same command again when it can be reached,"
                " and its job goes on.",
                device=self._device,
            ) from error
        time.sleep(self._pause_s)
        self._pause_s = min(2 * self._pause_s, _LINK_PAUSE_MOST_S)
