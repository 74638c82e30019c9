"""Comparing two sets of samples: the ratio of their medians with an interval, and what to make of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from db.statistics import Proportion, median, wilson

PPM = 1_000_000
SAME_PPM = 50_000
"""A change of no more than 5 % is none."""

LEAST_SAMPLES = 7
"""Fewer have no interval of their median at 97.5 %."""

_Z_975 = 2.241403
"""The normal distribution holds 97.5 % within so many standard deviations."""

Verdict = Literal["same", "better", "worse", "not enough data"]


@dataclass(frozen=True)
class Ratio:
    """Median after ÷ median before in millionths, with an interval at a level of at least 95 %."""

    value_ppm: int
    low_ppm: int
    high_ppm: int


def median_ratio(before: Sequence[int], after: Sequence[int]) -> Ratio | None:
    """The ratio of two medians; None for fewer than ``LEAST_SAMPLES`` of either, or where the first may be 0.

    Each median lies in its order-statistic interval at 97.5 %, so the ratio lies between the quotients of
    their ends at 95 % or more (Bonferroni). It speaks of the samples: what differs between two nights and not
    within one is part of what is compared.
    """
    bounds = _bounds(before), _bounds(after)
    if bounds[0] is None or bounds[1] is None or bounds[0][0] <= 0:
        return None
    (low_before, high_before), (low_after, high_after) = bounds[0], bounds[1]
    return Ratio(
        value_ppm=PPM * median(after) // max(1, median(before)),
        low_ppm=PPM * low_after // high_before,
        high_ppm=-(-PPM * high_after // low_before),
    )


def share_ratio(before: Proportion, after: Proportion) -> Ratio | None:
    """The ratio of two shares, as of right answers; None where the first may be 0.

    Each lies in its Wilson interval at 97.5 %, so the ratio lies between the quotients of their ends at 95 %
    or more. Answers to the same rows are taken as if they were independent, which makes it too wide.
    """
    old, new = (wilson(each.count, each.total, z=_Z_975) for each in (before, after))
    if old.low_ppm <= 0:
        return None
    return Ratio(
        value_ppm=PPM * after.count * before.total // (after.total * before.count),
        low_ppm=PPM * new.low_ppm // old.high_ppm,
        high_ppm=-(-PPM * new.high_ppm // old.low_ppm),
    )


def verdict(ratio: Ratio | None, *, same_ppm: int = SAME_PPM, more_is_better: bool = False) -> Verdict:
    """What a ratio of times says: smaller is better, or of shares: ``more_is_better``.

    same: the whole interval lies within ``same_ppm`` of 1. worse, better: the whole interval lies above or
    below 1, of shares the other way round. Else the samples do not tell.
    """
    if ratio is None:
        return "not enough data"
    if PPM - same_ppm <= ratio.low_ppm and ratio.high_ppm <= PPM + same_ppm:
        return "same"
    if ratio.low_ppm > PPM:
        return "better" if more_is_better else "worse"
    if ratio.high_ppm < PPM:
        return "worse" if more_is_better else "better"
    return "not enough data"


def _bounds(samples: Sequence[int]) -> tuple[int, int] | None:
    """The 97.5 % interval of the median, as ``statistics.median_interval`` is at 95 %."""
    ordered = sorted(samples)
    n = len(ordered)
    tail = Fraction(25_000, 2 * PPM) * 2**n
    below, k = 0, 0
    while k < n and below + math.comb(n, k) <= tail:
        below += math.comb(n, k)
        k += 1
    return (ordered[k - 1], ordered[n - k]) if k else None
