"""What whoever started a job is told while it runs."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from orchestrator.stepping import Drive

Advance = Callable[[int, int, str], None]
"""Called with (units done, units in all, what the job waits for or "")."""


class Shown:
    """What whoever started a job is told of it: units done, and what it waits for."""

    def __init__(self, device: str, total: int, advance: Advance | None) -> None:
        self._device, self._total, self._advance = device, total, advance
        self._done, self._waits = 0, ""

    def stands(self, drive: Drive, *, news: bool) -> None:
        """How a job stands now; ``news``: records of it came."""
        waits, before = drive.waits, self._waits
        self._done, self._waits = drive.finished, waits
        if bool(waits) != bool(before):
            structlog.get_logger(__name__).info("waits", device=self._device, cause=waits or "no more")
        if self._advance is not None and (news or waits != before):
            self._advance(self._done, self._total, self._waits)
