"""How a job under way goes on: every event and what is done next."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orchestrator.errors import HostAwayError, LinkError, StableError
from orchestrator.stepping import LINK_LIMIT_S, RESTARTS, Drive, Heard, Look, Over, Taken, Unheard, step
from orchestrator.tailing import PollResult, PollState
from sti_runtime.messages import EndRecord, JournalRecord

DRIVE = Drive("desk", "probe-1", start=False)
RECORD = JournalRecord(
    seq=0, boot_id="b", wall_ns=1, payload=EndRecord(type="end", done=1, failed=0, refused=None)
)


def idle(state: PollState, detail: str = "", offset: int = 0) -> Heard:
    """A look that brought no record."""
    return Heard(PollResult((), offset, state, detail), None)


def news(taken: Taken, state: PollState = "running", offset: int = 10) -> Heard:
    """A look that brought a record, which the store has taken."""
    return Heard(PollResult((RECORD,), offset, state, ""), taken)


def unheard(at_s: float, *, started: bool = False) -> Unheard:
    """The cable is out."""
    return Unheard(LinkError("its cable is out.", "Put it in.", device="desk"), at_s, started)


def failure(then: Look | Over) -> StableError | LinkError:
    """The error that a job ended by."""
    assert isinstance(then, Over)
    assert isinstance(then.error, StableError | LinkError)
    return then.error


def test_a_job_that_runs_is_looked_at_again_where_its_journal_ended() -> None:
    drive, then = step(Drive("desk", "probe-1"), news(Taken(1, complete=False)))
    assert then == Look()
    assert (drive.offset, drive.finished, drive.start) == (10, 1, False)


def test_it_is_over_with_its_end() -> None:
    assert step(DRIVE, news(Taken(1, complete=True), "ended"))[1] == Over()
    assert step(DRIVE, idle("ended"))[1] == Over()


def test_records_before_the_end_are_read_on_whatever_the_state() -> None:
    assert step(DRIVE, news(Taken(1, complete=False), "stopped"))[1] == Look()
    assert step(DRIVE, news(Taken(1, complete=False), "ended"))[1] == Look()


def test_an_agent_that_is_gone_is_started_again_and_its_journal_read_from_the_start() -> None:
    drive, then = step(replace(DRIVE, offset=10), idle("stopped", "Killed", 10))
    assert then == Look(restart="Killed")
    assert (drive.start, drive.offset, drive.restarts) == (True, 0, 1)


def test_an_agent_that_gets_nothing_done_is_given_up_and_its_attempt_lost() -> None:
    drive = DRIVE
    for _ in range(RESTARTS):
        drive, then = step(drive, idle("stopped"))
        assert isinstance(then, Look)
    _, then = step(drive, idle("absent"))
    assert isinstance(then, Over)
    assert then.lose
    assert f"ended {RESTARTS + 1} times" in failure(then).what


def test_a_unit_that_is_done_forgives_the_starts_before() -> None:
    drive, _ = step(replace(DRIVE, restarts=RESTARTS), news(Taken(1, complete=False)))
    assert drive.restarts == 0
    drive, _ = step(replace(drive, restarts=2), news(Taken(1, complete=False)))
    assert drive.restarts == 2


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (idle("damaged", "byte 7"), "is damaged: byte 7"),
        (news(Taken(1, complete=False, conflicts=(5, 4))), "was rewritten from record 4 on"),
    ],
)
def test_a_journal_that_cannot_be_believed_loses_the_attempt(event: Heard, words: str) -> None:
    _, then = step(DRIVE, event)
    assert isinstance(then, Over)
    assert then.lose
    assert words in failure(then).what


def test_a_device_out_of_reach_is_asked_again_at_growing_intervals_and_given_up_in_the_end() -> None:
    drive, pauses = DRIVE, []
    for at_s in (100.0, 101.0, 102.0, 103.0, 104.0, 105.0):
        drive, then = step(drive, unheard(at_s))
        assert isinstance(then, Look)
        pauses.append(then.after_s)
    assert pauses == sorted(pauses)
    assert pauses[0] == 0.5
    assert pauses[-1] == 5.0
    assert drive.waits == "out of reach; its job goes on when it is back (its cable is out)"
    _, then = step(drive, unheard(100.0 + LINK_LIMIT_S + 1))
    assert isinstance(then, Over)
    assert not then.lose
    assert "Nothing measured is lost" in failure(then).remedy
    back, _ = step(drive, idle("running"))
    assert (back.waits, back.lost_s, back.pause_s) == ("", None, 0.5)


def test_an_agent_that_was_started_before_the_link_was_lost_is_not_started_again() -> None:
    assert step(replace(DRIVE, start=True), unheard(1.0))[0].start
    assert not step(replace(DRIVE, start=True), unheard(1.0, started=True))[0].start


def test_what_it_waits_for_is_shown_until_it_gets_on() -> None:
    drive, _ = step(DRIVE, idle("running", "temperature: 50 C"))
    assert drive.waits == "temperature: 50 C"
    drive, _ = step(drive, news(Taken(1, complete=False)))
    assert drive.waits == ""


def test_what_is_given_up_says_whether_its_host_was_away() -> None:
    for kind in (LinkError, HostAwayError):
        error = kind("host bench1 is out of reach.", device="desk")
        drive, _ = step(DRIVE, Unheard(error, 1.0, started=False))
        _, then = step(drive, Unheard(error, 2.0 + LINK_LIMIT_S, started=False))
        assert type(failure(then)) is kind
