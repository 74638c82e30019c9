"""Paired differences, the interval of p95, and figures' looks."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from db.statistics import p95_interval, percentile
from orchestrator.figures.style import looks
from orchestrator.results.paired import difference, mean_difference, pooled_difference


def test_the_interval_of_p95_covers_it_and_needs_seventy_two_samples() -> None:
    assert p95_interval(range(71)) is None
    few = p95_interval(range(72))
    assert few is not None
    assert few.high == 71
    rng, inside, trials = random.Random(1), 0, 400
    for _ in range(trials):
        interval = p95_interval([rng.randrange(10**6) for _ in range(100)])
        assert interval is not None
        inside += interval.low <= 950_000 <= interval.high
    assert inside >= 0.93 * trials
    many = p95_interval(range(1000))
    assert many is not None
    assert many.low < percentile(range(1000), 95) < many.high


def test_differences_are_paired_over_rows() -> None:
    one = np.array([True] * 90 + [False] * 10)
    other = one.copy()
    other[:4] = False
    same = difference(one, one)
    assert (same.points, same.error) == (0.0, 0.0)
    found = difference(one, other)
    assert found.points == pytest.approx(4.0)
    assert found.error == pytest.approx(100 * math.sqrt(0.04 * 0.96 / 99))
    assert found.low < 4 < found.high
    with pytest.raises(ValueError, match="cannot be paired"):
        difference(one, other[:5])


def test_means_take_tasks_as_independent_and_places_as_not() -> None:
    one = np.array([True] * 9 + [False])
    other = np.array([True] * 5 + [False] * 5)
    each = difference(one, other)
    both = mean_difference([each, each])
    assert both is not None
    assert (both.points, both.of) == (each.points, 2)
    assert both.error == pytest.approx(each.error / math.sqrt(2))
    places = pooled_difference([(one, other)] * 3)
    assert places is not None
    assert (places.points, places.error) == (pytest.approx(each.points), pytest.approx(each.error))
    assert mean_difference([]) is pooled_difference([]) is None


def test_every_policy_has_a_look_of_its_own() -> None:
    names = [f"policy-{number}" for number in range(14)]
    found = looks(names)
    assert len({(look.colour, look.marker) for look in found.values()}) == len(names)
    assert found == looks(names)
