"""Which batch goes next, how long is left, when schedules are due, and what two nights say."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from db.campaign_work import Waiting
from db.ratios import median_ratio, share_ratio, verdict
from db.statistics import wilson
from orchestrator.campaigns.choose import next_batch
from orchestrator.campaigns.due import (
    GRACE_NS,
    check_cron,
    decide,
    due_times,
    next_due,
    shown,
    unsettled,
)
from orchestrator.campaigns.estimate import (
    GUESSES,
    Amount,
    Line,
    Typical,
    amounts,
    left_by_lane,
    left_ns,
)
from orchestrator.errors import CampaignError

S = 10**9
BERLIN = "Europe/Berlin"


def waiting(run_id: int, priority: int = 10, deadline_wall_ns: int | None = None) -> Waiting:
    return Waiting(
        batch_id=run_id,
        run_id=run_id,
        campaign=f"c{run_id}",
        priority=priority,
        due_wall_ns=run_id,
        deadline_wall_ns=deadline_wall_ns,
        started_wall_ns=None,
        device="a",
        kind="execute",
        ready=True,
        left=1,
    )


def at(text: str, *, fold: int = 0) -> int:
    """ns of a moment in Berlin."""
    return int(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(BERLIN), fold=fold).timestamp()) * S


# ------------------------------------------------------------------ choice


def test_time_is_shared_by_priority() -> None:
    had: Counter[int] = Counter()
    runs = [waiting(1, priority=30), waiting(2, priority=10)]
    for _ in range(400):
        chosen = next_batch(runs, had, {1: 10**15, 2: 10**15}, 0)
        assert chosen is not None
        had[chosen.run_id] += S
    assert had[1] == 3 * had[2]


def test_equals_go_by_due_time_and_none_is_none() -> None:
    assert next_batch([], {}, {}, 0) is None
    chosen = next_batch([waiting(2), waiting(1)], {}, {}, 0)
    assert chosen is not None
    assert chosen.run_id == 1


def test_a_deadline_that_would_be_missed_goes_first_and_one_that_is_past_does_not() -> None:
    hurried, calm = waiting(2, deadline_wall_ns=100 * S), waiting(1)
    had = {2: 10**15, 1: 0}

    def chosen(left_ns_: int, now: int, *more: Waiting) -> int:
        found = next_batch([hurried, calm, *more], had, {2: left_ns_, 3: 90 * S}, now)
        assert found is not None
        return found.run_id

    assert chosen(60 * S, 0) == 2  # 60 s at half the time are 120 s
    assert chosen(40 * S, 0) == 1
    assert chosen(60 * S, 100 * S) == 1
    earlier = replace(waiting(3), deadline_wall_ns=90 * S)
    assert chosen(60 * S, 0, earlier) == 3


# ------------------------------------------------------------------ estimates


def test_estimates_are_medians_of_what_ended_and_lanes_run_side_by_side() -> None:
    typical = Typical.of([("a", "health", 1, seconds * S) for seconds in (10, 30, 20)])
    assert typical.line("a", "health") == typical.line("b", "health") == Line(0, 20 * S)
    assert typical.line("b", "profile") == GUESSES["profile"]
    lanes = {"a": "1", "b": "1", "c": "2", None: "host"}
    left: dict[tuple[str | None, str], Amount] = {
        ("a", "health"): Amount(2, 2), ("b", "health"): Amount(1, 1), ("c", "health"): Amount(1, 1)
    }  # fmt: skip
    assert left_by_lane(left, typical, lanes.__getitem__) == {"1": 60 * S, "2": 20 * S}
    assert left_ns(left, typical, lanes.__getitem__) == 60 * S
    assert left_ns({}, typical, lanes.__getitem__) == 0


def test_a_large_batch_is_not_taken_for_a_small_one() -> None:
    # 4 s for each batch, and half a second for each request: of 1 cell, of 2 cells, one that had to wait.
    took = [(30, 19 * S), (30, 19 * S), (30, 99 * S), (60, 34 * S), (60, 34 * S)]
    line = Line.of(took)
    assert line == Line(4 * S, S // 2)
    assert line.ns(Amount(10, 10 * 24 * 100)) == 12_040 * S
    assert Line.of([(30, 15 * S), (30, 21 * S), (30, 18 * S)]) == Line(0, 18 * S // 30)  # of one size
    assert Line.of([(30, 60 * S), (60, 30 * S)]) == Line(0, 5 * S // 4)  # larger ones took no longer
    assert Line.of([(1, 1 * S), (2, 10 * S)]) == Line(0, 3 * S)  # no batch takes less than nothing


def test_what_is_left_of_a_run_has_batches_of_its_sizes() -> None:
    sizes = {("a", "execute"): (10, 10 * 24 * 30), (None, "importance"): (1, 1)}
    assert amounts({("a", "execute"): 3}, sizes) == {("a", "execute"): Amount(3, 3 * 24 * 30)}
    assert amounts({("b", "execute"): 3}, sizes) == {("b", "execute"): Amount(3, 3)}


# ------------------------------------------------------------------ due times


@pytest.mark.parametrize(
    ("cron", "after", "until", "expected"),
    [
        # The hour from 2 to 3 does not exist on that day: the job runs right after it.
        ("30 2 * * *", "2026-03-28T12:00", "2026-03-30T12:00", ["03-29 03:00 CEST", "03-30 02:30 CEST"]),
        # It comes twice: the job runs in the first.
        ("30 2 * * *", "2026-10-24T12:00", "2026-10-26T12:00", ["10-25 02:30 CEST", "10-26 02:30 CET"]),
        ("0 * * * *", "2026-03-29T00:30", "2026-03-29T03:30", ["03-29 01:00 CET", "03-29 03:00 CEST"]),
        (
            "*/30 * * * *",
            "2026-10-25T01:45",
            "2026-10-25T02:45",
            ["10-25 02:00 CEST", "10-25 02:30 CEST"],
        ),
        (
            "*/30 * * * *",  # goes by elapsed time
            "2026-10-25T01:45",
            "2026-10-25T03:15",
            [f"10-25 {t}" for t in ("02:00 CEST", "02:30 CEST", "02:00 CET", "02:30 CET", "03:00 CET")],
        ),
        ("0 2 * * *", "2026-06-01T02:00", "2026-06-02T01:59", []),
        ("0 2 29 2 *", "2026-01-01T00:00", "2028-03-01T00:00", ["02-29 02:00 CET"]),
    ],
)
def test_due_times_on_days_when_clocks_change(cron: str, after: str, until: str, expected: list[str]) -> None:
    found = due_times(cron, BERLIN, at(after), at(until))
    assert [shown(due, BERLIN)[5:16] + shown(due, BERLIN)[19:] for due in found] == expected


def test_a_change_of_half_an_hour() -> None:
    zone = "Australia/Lord_Howe"

    def moment(text: str) -> int:
        return int(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()) * S

    # 02:00 becomes 02:30 there; half a year later 02:00 becomes 01:30.
    found = due_times("15 2 * * *", zone, moment("2026-10-03T12:00"), moment("2026-10-05T12:00"))
    assert [shown(due, zone)[5:16] for due in found] == ["10-04 02:30", "10-05 02:15"]
    found = due_times("45 1 * * *", zone, moment("2026-04-04T12:00"), moment("2026-04-06T12:00"))
    assert [shown(due, zone)[5:16] for due in found] == ["04-05 01:45", "04-06 01:45"]
    assert found[0] == moment("2026-04-05T01:45")


def test_a_look_in_the_repeated_hour_does_not_run_a_job_again() -> None:
    first = at("2026-10-25T02:30")
    for look in (first, at("2026-10-25T02:10", fold=1), at("2026-10-25T02:50", fold=1)):
        assert due_times("30 2 * * *", BERLIN, look, at("2026-10-26T02:00")) == []
    assert next_due("30 2 * * *", BERLIN, at("2026-10-25T02:10", fold=1)) == at("2026-10-26T02:30")


@settings(max_examples=30)
@given(
    minutes=st.lists(st.integers(1, 4000), min_size=1, max_size=12),
    cron=st.sampled_from(["*/20 * * * *", "30 2 * * *", "0 1-4 * * *"]),
    start=st.sampled_from(["2026-03-28T20:00", "2026-10-24T20:00", "2026-07-01T00:00"]),
)
def test_every_due_time_is_settled_once_however_often_one_looks(
    minutes: list[int], cron: str, start: str
) -> None:
    settled, now, found = at(start), at(start), list[int]()
    for step in minutes:
        now += step * 60 * S
        dues = due_times(cron, BERLIN, settled, now)
        found += dues
        settled = dues[-1] if dues else settled
    assert found == due_times(cron, BERLIN, at(start), now)


def test_after_downtime_once_or_not_at_all() -> None:
    dues = [1 * S, 2 * S, 3 * S]
    late = 3 * S + GRACE_NS + 1
    assert decide([], 5, "once") is None
    caught = decide(dues, late, "once")
    assert caught is not None
    assert (caught.due_wall_ns, caught.trigger, caught.missed) == (3 * S, "catch-up", 2)
    skipped = decide(dues, late, "skip")
    assert skipped is not None
    assert (skipped.due_wall_ns, skipped.missed, skipped.settled_wall_ns) == (None, 3, 3 * S)
    for catch_up in ("once", "skip"):
        on_time = decide(dues, 3 * S + GRACE_NS, catch_up)
        assert on_time is not None
        assert (on_time.due_wall_ns, on_time.trigger, on_time.missed) == (3 * S, "schedule", 2)


def test_years_of_downtime_leave_the_newest_due_time() -> None:
    now = at("2026-11-28T12:00")
    every_minute = unsettled("* * * * *", BERLIN, at("2020-01-01T00:00"), now)
    assert (every_minute[-1], len(every_minute)) == (now, 31 * 24 * 60)
    assert unsettled("0 0 1 1 *", BERLIN, at("2020-06-01T00:00"), now)[-1] == at("2026-01-01T00:00")


@pytest.mark.parametrize("cron", ["", "0 2 * *", "61 * * * *", "0 0 30 2 *", "a b c d e", "@daily"])
def test_bad_cron_is_told_with_an_example(cron: str) -> None:
    with pytest.raises(CampaignError, match=r'"0 2 \* \* \*"'):
        check_cron(cron, "UTC")


def test_bad_timezone() -> None:
    for timezone in ("Europe/Berlinn", "../etc/passwd", ""):
        with pytest.raises(CampaignError, match="--timezone"):
            check_cron("0 2 * * *", timezone)
    check_cron("0 2 * * *", BERLIN)


# ------------------------------------------------------------------ two nights


def test_verdicts_of_two_nights() -> None:
    night = list(range(1000, 1040))
    slower = [3 * sample for sample in night]
    assert verdict(median_ratio(night, night)) == "same"
    assert verdict(median_ratio(night, slower)) == "worse"
    assert verdict(median_ratio(slower, night)) == "better"
    assert verdict(median_ratio(night[:6], night)) == "not enough data"
    assert verdict(median_ratio([], night)) == "not enough data"
    noisy = [1, 10_000] * 10
    assert verdict(median_ratio(noisy, noisy)) == "not enough data"
    assert median_ratio([0] * 20, night) is None


@given(
    before=st.lists(st.integers(1, 10**6), min_size=7, max_size=40),
    after=st.lists(st.integers(1, 10**6), min_size=7, max_size=40),
)
def test_a_ratio_lies_in_its_interval(before: list[int], after: list[int]) -> None:
    ratio = median_ratio(before, after)
    assert ratio is not None
    assert ratio.low_ppm <= ratio.value_ppm <= ratio.high_ppm


def test_shares_of_right_answers_are_better_when_they_are_more() -> None:
    few, many, most = wilson(5000, 10_000), wilson(9000, 10_000), wilson(9050, 10_000)
    assert verdict(share_ratio(few, many), more_is_better=True) == "better"
    assert verdict(share_ratio(many, few), more_is_better=True) == "worse"
    assert verdict(share_ratio(many, most), more_is_better=True) == "same"
    assert share_ratio(wilson(0, 10), many) is None
    ratio = share_ratio(many, few)
    assert ratio is not None
    assert ratio.low_ppm < ratio.value_ppm < ratio.high_ppm
