"""How far a run is, while this command works on it: a bar on a terminal, a line every so often elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from db.errors import StoreError
from orchestrator.campaigns.status import RunStatus, format_span
from orchestrator.cli.output import Steps, err, note

LOOK_S = 2.0
"""So often the store is asked for a bar."""
LINE_S = 30.0
"""So often a line is written where there is no bar."""
_MOST_NAMED = 6


class RunProgress:
    """Shows where a run stands each time it is called, but not more often than is of use.

    A store that does not answer is left to whoever works on the run.
    """

    def __init__(
        self,
        bars: Steps,
        look: Callable[[], RunStatus],
        *,
        bar: bool | None = None,
        every_s: float | None = None,
    ) -> None:
        self._bars, self._look = bars, look
        self._bar = err.is_terminal if bar is None else bar
        self._every_s = (LOOK_S if self._bar else LINE_S) if every_s is None else every_s
        self._at: float | None = None
        self._said = ""

    def __call__(self) -> None:
        """Show where the run stands, if it is time."""
        if self._at is None or time.monotonic() - self._at >= self._every_s:
            self.show()

    def show(self) -> None:
        """Show where the run stands now."""
        self._at = time.monotonic()
        with suppress(StoreError):
            status = self._look()
            label = f"run {status.number} of {status.campaign}"
            if self._bar:
                self._bars.show(label, label, status.ended, status.total, in_words(status))
                return
            said = f"  {label}: {status.ended} of {status.total} cells; {in_words(status)}".rstrip("; ")
            if said != self._said:
                note(said)
            self._said = said


def in_words(status: RunStatus) -> str:
    """The time left, and what each device does: "about 4 min left; desk: profile for 12 s"."""
    left = f"about {format_span(status.left_ns)} left" if status.left_ns else ""
    doing = [f"{device or 'host'}: {what}" for device, what in sorted(status.doing.items())]
    if len(doing) > _MOST_NAMED:
        doing = [*doing[:_MOST_NAMED], f"and {len(doing) - _MOST_NAMED} more devices"]
    return "; ".join(filter(None, (left, *doing)))
