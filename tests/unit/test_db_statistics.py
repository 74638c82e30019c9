"""Estimators against their definitions and known values."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from db.statistics import Interval, median, median_interval, p95, percentile, summarise, wilson

SAMPLES = st.lists(st.integers(0, 10**12), min_size=1, max_size=200)


def test_median_is_the_middle() -> None:
    assert median([3, 1, 2]) == 2
    assert median([4, 1, 2, 3]) == 2
    with pytest.raises(ValueError, match="no samples"):
        median([])


@given(SAMPLES, st.integers(1, 100))
def test_percentile_is_the_smallest_sample_with_enough_below(samples: list[int], percent: int) -> None:
    found = percentile(samples, percent)
    assert found in samples
    assert 100 * sum(s <= found for s in samples) >= percent * len(samples)
    smaller = [s for s in samples if s < found]
    if smaller:
        assert 100 * sum(s <= max(smaller) for s in samples) < percent * len(samples)


def test_p95_of_a_hundred() -> None:
    assert p95(range(1, 101)) == 95
    assert p95([7]) == 7
    with pytest.raises(ValueError, match="percent"):
        percentile([1], 0)


def test_median_interval_has_the_tables_ranks() -> None:
    # Ranks (k, n - k + 1) of the nonparametric 95 % interval of the median, from published tables.
    for n, k in ((6, 1), (8, 1), (9, 2), (10, 2), (20, 6), (25, 8), (50, 18), (100, 40)):
        assert median_interval(range(1, n + 1)) == Interval(k, n - k + 1), n
    assert median_interval([1, 2, 3, 4, 5]) is None


@given(SAMPLES)
def test_median_interval_covers_at_its_level_and_holds_the_median(samples: list[int]) -> None:
    interval = median_interval(samples)
    n = len(samples)
    if interval is None:
        assert n < 6
        return
    assert interval.low <= median(samples) <= interval.high
    k = median_interval(range(1, n + 1))
    assert k is not None
    missed = 2 * sum(math.comb(n, i) for i in range(k.low))
    assert Fraction(missed, 2**n) <= Fraction(5, 100)


def test_wilson_known_values() -> None:
    half = wilson(50, 100)
    assert (half.low_ppm, half.high_ppm) == (403_831, 596_169)
    all_right = wilson(10, 10)
    assert (all_right.value_ppm, all_right.low_ppm, all_right.high_ppm) == (1_000_000, 722_467, 1_000_000)
    with pytest.raises(ValueError, match="not a proportion"):
        wilson(1, 0)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_its_proportion_and_is_symmetric(case: tuple[int, int]) -> None:
    count, total = case
    found, mirrored = wilson(count, total), wilson(total - count, total)
    assert 0 <= found.low_ppm <= found.value_ppm <= found.high_ppm <= 1_000_000
    assert abs(found.low_ppm + mirrored.high_ppm - 1_000_000) <= 1


def test_summary_of_nothing_is_none() -> None:
    assert summarise([]) is None
    summary = summarise([5, 5])
    assert summary is not None
    assert (summary.count, summary.median, summary.interval) == (2, 5, None)
