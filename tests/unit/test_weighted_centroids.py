"""Weighted k-means in one dimension: against brute force, its own starts, and inputs with little in them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sti_runtime.shard import F32
from sti_runtime.weighted_centroids import (
    F64,
    WeightedValues,
    companded_start,
    weighted_centroids,
    weighted_error,
)

COUNTS = (4, 8, 16, 32, 64)
VALUES = hnp.arrays(np.float32, st.integers(1, 200), elements=st.floats(-8, 8, width=32))


def masses_of(seed: int, count: int) -> F64:
    return np.random.default_rng(seed).standard_normal(count) ** 4 + 1e-3


def gaussian(count: int, seed: int = 0) -> F32:
    return (np.random.default_rng(seed).standard_normal(count) * 0.04).astype(np.float32)


def least_error(data: WeightedValues, count: int) -> float:
    """Over all ways to cut the sorted values into ``count`` runs."""
    best = np.inf
    for cuts in itertools.combinations(range(1, data.values.size), count - 1):
        edges, total = (0, *cuts, data.values.size), 0.0
        for first, last in itertools.pairwise(edges):
            values, masses = data.values[first:last], data.masses[first:last]
            total += float(masses @ (values - values @ masses / masses.sum()) ** 2)
        best = min(best, total)
    return best


@settings(max_examples=80, deadline=None)
@given(values=VALUES, seed=st.integers(0, 99), count=st.sampled_from(COUNTS))
def test_never_worse_than_its_starts_and_in_order(values: F32, seed: int, count: int) -> None:
    data = WeightedValues.of(values, masses_of(seed, values.size))
    centroids = weighted_centroids(data, count)
    assert centroids.shape == (count,)
    assert centroids.dtype == np.float32
    assert np.all(np.diff(centroids) >= 0)
    assert data.values[0] <= centroids[0]
    assert centroids[-1] <= data.values[-1]
    for cells in (count, 16 * count):
        start = companded_start(data, count, cells)
        if len(np.unique(values)) > count:
            assert weighted_error(data, centroids) <= weighted_error(data, start)


@settings(max_examples=40, deadline=None)
@given(values=VALUES, count=st.sampled_from(COUNTS), power=st.integers(-20, 20))
def test_equal_masses_are_as_none(values: F32, count: int, power: int) -> None:
    """A power of two, so that not even the rounding differs."""
    equal = weighted_centroids(WeightedValues.of(values, np.full(values.size, 2.0**power)), count)
    assert np.array_equal(equal, weighted_centroids(WeightedValues.of(values, np.ones(values.size)), count))


@settings(max_examples=40, deadline=None)
@given(values=VALUES, count=st.sampled_from(COUNTS))
def test_few_distinct_values_are_met_exactly(values: F32, count: int) -> None:
    few = values[:count]
    data = WeightedValues.of(few, masses_of(1, few.size))
    assert weighted_error(data, weighted_centroids(data, count)) == 0.0


def test_nothing_gives_zeros() -> None:
    empty = WeightedValues.of(np.empty(0, np.float32), np.empty(0))
    assert np.array_equal(weighted_centroids(empty, 4), np.zeros(4, np.float32))


def test_centroids_are_the_centres_of_mass_of_what_is_nearest() -> None:
    values = gaussian(5000)
    data = WeightedValues.of(values, masses_of(3, values.size))
    centroids = weighted_centroids(data, 8)
    codes = np.abs(data.values[:, None] - centroids.astype(np.float64)).argmin(1)
    means = np.bincount(codes, data.masses * data.values) / np.bincount(codes, data.masses)
    assert means == pytest.approx(centroids, rel=1e-5, abs=1e-7)


def test_near_the_least_error_there_is() -> None:
    """Lloyd's minima are local: on 30 draws of 14 values, mostly the best and on average near it."""
    ratios = []
    for seed in range(30):
        data = WeightedValues.of(gaussian(14, seed), masses_of(seed, 14))
        ratios.append(weighted_error(data, weighted_centroids(data, 4)) / least_error(data, 4))
    assert min(ratios) > 0.999
    assert np.median(ratios) < 1.05


def test_does_not_depend_on_the_order_of_values() -> None:
    values, masses = gaussian(999), masses_of(4, 999)
    order = np.random.default_rng(5).permutation(999)
    one = weighted_centroids(WeightedValues.of(values, masses), 16)
    assert np.array_equal(one, weighted_centroids(WeightedValues.of(values[order], masses[order]), 16))
