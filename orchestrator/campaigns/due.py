"""When a schedule is due: pure functions over a cron expression, a time zone and two moments.

As Debian's cron has it on days when clocks change: a job of a set time that falls into a skipped hour runs
right after it, one in a repeated hour runs once; jobs of every hour or minute go by elapsed time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim, CronSimError

from orchestrator.errors import CampaignError
from sti_runtime.units import NS_PER_S

GRACE_NS = 300 * NS_PER_S
"""A due time that is noticed within this is on time; later it was missed."""

MOST_DUE = 50_000
"""Due times that are looked at in one go: more than a schedule of every minute has in _LOOK_BACK_NS."""

_LOOK_BACK_NS = 31 * 86_400 * NS_PER_S

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Decision:
    """What to do about due times: begin a run for ``due_wall_ns`` (None: none), and ``missed`` others."""

    due_wall_ns: int | None
    trigger: str
    missed: int
    settled_wall_ns: int


def check_cron(cron: str, timezone: str) -> None:
    """Raises: CampaignError for an expression or a time zone that is none, or that is never due."""
    try:
        zone = ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise CampaignError(
            f"--timezone: {timezone!r} is no time zone that is known here.",
            "Write it like Europe/Berlin or UTC (on a system without a time zone database: install tzdata).",
        ) from error
    remedy = (
        'Write five fields, minute hour day-of-month month day-of-week, like "0 2 * * *" (02:00 every day).'
    )
    if len(cron.split()) != 5:
        raise CampaignError(f"--cron: {cron!r} has not five fields.", remedy)
    try:
        next(CronSim(cron, datetime(2026, 1, 1, tzinfo=zone)))
    except (CronSimError, StopIteration) as error:
        what = str(error) or "no such time ever comes"
        raise CampaignError(f"--cron: {cron!r}: {what[:1].lower()}{what[1:]}.", remedy) from error


def due_times(
    cron: str, timezone: str, after_wall_ns: int, until_wall_ns: int, *, most: int = MOST_DUE
) -> list[int]:
    """The due times in (after, until], oldest first, in ns since the epoch; ``most`` of them."""
    found: list[int] = []
    for due in CronSim(cron, _moment(after_wall_ns, timezone)):
        due_wall_ns = _wall_ns(due)
        if due_wall_ns > until_wall_ns or len(found) == most:
            break
        # In a repeated hour the search begins at the first of the two.
        if due_wall_ns > after_wall_ns:
            found.append(due_wall_ns)
    return found


def unsettled(cron: str, timezone: str, settled_wall_ns: int, now_wall_ns: int) -> list[int]:
    """The due times since the last look: the last month's, of a rarer schedule all."""
    recent = max(settled_wall_ns, now_wall_ns - _LOOK_BACK_NS)
    dues = due_times(cron, timezone, recent, now_wall_ns)
    return dues or due_times(cron, timezone, settled_wall_ns, now_wall_ns)


def next_due(cron: str, timezone: str, after_wall_ns: int) -> int:
    """The first due time after a moment."""
    for due in CronSim(cron, _moment(after_wall_ns, timezone)):
        if _wall_ns(due) > after_wall_ns:
            return _wall_ns(due)
    raise CampaignError(f"{cron!r} is never due.", "Give the campaign another schedule.")


def decide(dues: Sequence[int], now_wall_ns: int, catch_up: str) -> Decision | None:
    """What to do about the due times since the last look; None when there are none.

    The newest one runs when it is on time. When it was missed, as all before it, it runs once under
    ``catch_up`` once, and not at all under ``skip``.
    """
    if not dues:
        return None
    newest = dues[-1]
    if now_wall_ns - newest <= GRACE_NS:
        return Decision(newest, "schedule", len(dues) - 1, newest)
    if catch_up == "once":
        return Decision(newest, "catch-up", len(dues) - 1, newest)
    return Decision(None, "schedule", len(dues), newest)


def shown(wall_ns: int, timezone: str) -> str:
    """A moment for people, in the schedule's time zone."""
    return _moment(wall_ns, timezone).strftime("%Y-%m-%d %H:%M:%S %Z")


def local_date(wall_ns: int, timezone: str) -> str:
    """The date of a moment there: YYYY-MM-DD."""
    return _moment(wall_ns, timezone).date().isoformat()


def _moment(wall_ns: int, timezone: str) -> datetime:
    return (_EPOCH + timedelta(microseconds=wall_ns // 1000)).astimezone(ZoneInfo(timezone))


def _wall_ns(moment: datetime) -> int:
    return (moment - _EPOCH) // timedelta(microseconds=1) * 1000
