"""How a job under way goes on: a pure function from what was heard of its attempt to what is done next.

Who drives it, one device in a thread or a fleet in one loop, asks devices and store and tells the answer as
an event; the rules (restarts, patience, what ends an attempt) are here alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from orchestrator.errors import DeviceError, HostAwayError, LinkError, StableError, TransientError
from orchestrator.tailing import PollResult

RESTARTS = 3
"""So often is an agent started again that finishes no unit: more often than it may be killed in one before it
gives that unit up (``agent.open_unit``)."""

LINK_LIMIT_S = 600
"""So long is a device waited for that is lost while its job is under way: a reboot, a cable."""

_LINK_PAUSE_S = 0.5
_LINK_PAUSE_MOST_S = 5.0


@dataclass(frozen=True)
class Drive:
    """How one attempt stands. ``offset``: its journal is in the store up to there; ``finished``: units with a
    result or failure there; ``waits``: for what, for people; ``lost_s``: since when it is out of reach."""

    device: str
    job_id: str
    offset: int = 0
    finished: int = 0
    restarts: int = 0
    waits: str = ""
    lost_s: float | None = None
    pause_s: float = _LINK_PAUSE_S
    start: bool = True


@dataclass(frozen=True)
class Taken:
    """What the store made of a stretch of journal. ``finished``: units that have ended by now, in all;
    ``conflicts``: records that it has with other content."""

    finished: int
    complete: bool
    conflicts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Heard:
    """The device was asked. ``taken`` None: it had no new records."""

    polled: PollResult
    taken: Taken | None


@dataclass(frozen=True)
class Unheard:
    """The device could not be asked; ``at_s`` by the monotonic clock. ``started``: its agent was, before."""

    error: TransientError
    at_s: float
    started: bool


@dataclass(frozen=True)
class Look:
    """Look at the journal from the drive's offset, after a pause; start the agent before where
    ``Drive.start`` says so. ``restart``: what the agent that is gone had said, where one is."""

    after_s: float = 0.0
    restart: str | None = None


@dataclass(frozen=True)
class Over:
    """The attempt is over: by its end, or by an error. ``lose``: the attempt is closed as lost."""

    error: DeviceError | None = None
    lose: bool = False


Event = Heard | Unheard


def step(drive: Drive, event: Event) -> tuple[Drive, Look | Over]:
    """What an event makes of a drive, and what is to be done."""
    return _unheard(drive, event) if isinstance(event, Unheard) else _heard(drive, event)


def _unheard(drive: Drive, event: Unheard) -> tuple[Drive, Look | Over]:
    error, since = event.error, event.at_s if drive.lost_s is None else drive.lost_s
    cause = error.what.removeprefix(f"{drive.device}: ").rstrip(".")
    after = replace(
        drive,
        start=drive.start and not event.started,
        waits=f"out of reach; its job goes on when it is back ({cause})",
        lost_s=since,
        pause_s=min(2 * drive.pause_s, _LINK_PAUSE_MOST_S),
    )
    if event.at_s - since <= LINK_LIMIT_S:
        return after, Look(after_s=drive.pause_s)
    kind = HostAwayError if isinstance(error, HostAwayError) else LinkError
    given_up = kind(
        f"it could not be reached for {LINK_LIMIT_S} s ({error.what})",
        f"{error.remedy} Nothing measured is lost: run the same command again when it can be reached,"
        " and its job goes on.",
        device=drive.device,
    )
    given_up.__cause__ = error
    return after, Over(given_up)


def _heard(drive: Drive, event: Heard) -> tuple[Drive, Look | Over]:
    polled, taken = event.polled, event.taken
    gone = drive.lost_s is None and taken is None and polled.state != "running"
    after = replace(
        drive,
        offset=polled.next_offset,
        waits=polled.detail if polled.state == "running" else drive.waits if gone else "",
        lost_s=None,
        pause_s=_LINK_PAUSE_S,
        start=False,
    )
    if taken is not None:
        if taken.finished > drive.finished:
            after = replace(after, finished=taken.finished, restarts=0)  # it gets on, killed or not
        if taken.conflicts:
            return after, Over(_rewritten(drive, min(taken.conflicts)), lose=True)
        if taken.complete:
            return after, Over()
    if polled.state == "running" or polled.records:
        return after, Look()
    if polled.state == "ended":
        return after, Over()
    if polled.state == "damaged":
        return after, Over(_damaged(drive, polled.detail), lose=True)
    if after.restarts == RESTARTS:
        return after, Over(_given_up(after, polled.detail), lose=True)
    # From the start: after a reboot the journal may be shorter than what was read of it.
    again = replace(after, offset=0, restarts=after.restarts + 1, start=True)
    return again, Look(restart=polled.detail)


def _rewritten(drive: Drive, seq: int) -> StableError:
    return StableError(
        f"the journal of job {drive.job_id} was rewritten from record {seq} on:"
        " the device lost records that it had already sent, as after a power cut.",
        "What was sent is kept. Run the command again; a new attempt begins.",
        device=drive.device,
    )


def _damaged(drive: Drive, detail: str) -> StableError:
    return StableError(
        f"the journal of job {drive.job_id} is damaged: {detail}",
        "What came before the damage is kept. Run the command again; a new attempt begins.",
        device=drive.device,
    )


def _given_up(drive: Drive, detail: str) -> StableError:
    return StableError(
        f"the agent of job {drive.job_id} ended {drive.restarts + 1} times before its work was done:"
        f" {detail or 'it said nothing'}",
        "What it measured is kept. See the agent's log in the work folder; run the command again.",
        device=drive.device,
    )
