"""Estimators of what the store keeps as raw samples; derived on read, never stored.

median         sample median (mean of the two middle order statistics when their number is even)
p95            nearest rank: the smallest sample with at least 95 % of samples at or below it
median_interval  distribution-free interval from order statistics; its level is at least the stated one
p95_interval   the same of the 95th percentile
wilson         score interval of a proportion
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

LEVEL_PPM = 950_000
"""Level of every interval: 95 %."""

_Z = 1.959963984540054
"""97.5th percentile of the standard normal."""


@dataclass(frozen=True)
class Interval:
    """An interval at a level of at least 95 %."""

    low: int
    high: int


@dataclass(frozen=True)
class Proportion:
    """``count`` of ``total``, with its Wilson interval in millionths."""

    count: int
    total: int
    low_ppm: int
    high_ppm: int

    @property
    def value_ppm(self) -> int:
        """The proportion in millionths."""
        return round(1_000_000 * self.count / self.total)


@dataclass(frozen=True)
class Summary:
    """Samples in brief. ``interval`` is that of the median; None for fewer than six samples."""

    count: int
    median: int
    p95: int
    interval: Interval | None


def median(samples: Sequence[int]) -> int:
    """Sample median, rounded down. Raises: ValueError when there are none."""
    ordered = _ordered(samples)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) // 2


def percentile(samples: Sequence[int], percent: int) -> int:
    """Nearest-rank percentile, ``percent`` in 1…100. Raises: ValueError."""
    if not 1 <= percent <= 100:
        raise ValueError(f"percent must be 1…100, not {percent}")
    ordered = _ordered(samples)
    return ordered[-(-percent * len(ordered) // 100) - 1]


def p95(samples: Sequence[int]) -> int:
    """95th percentile, nearest rank. Raises: ValueError when there are no samples."""
    return percentile(samples, 95)


def median_interval(samples: Sequence[int]) -> Interval | None:
    """95 % interval of the median: from the k-th smallest to the k-th largest sample.

    k is the largest with P(Binomial(n, ½) < k) ≤ 2.5 %. None when n < 6: no such k exists.
    Source: David & Nagaraja, Order Statistics, section 7.1.
    """
    ordered = _ordered(samples)
    k = _interval_rank(len(ordered))
    return Interval(ordered[k - 1], ordered[len(ordered) - k]) if k else None


@lru_cache(maxsize=4096)
def _interval_rank(n: int) -> int:
    """The k of ``median_interval``, exactly; 0 when there is none."""
    tail = Fraction(1_000_000 - LEVEL_PPM, 2_000_000) * 2**n
    below, k, ways = 0, 0, 1  # ways: C(n, k)
    while below + ways <= tail:
        below += ways
        ways = ways * (n - k) // (k + 1)
        k += 1
    return k


def p95_interval(samples: Sequence[int]) -> Interval | None:
    """95 % interval of the 95th percentile, from order statistics; None under 72 samples: none exists.

    Source: David & Nagaraja, Order Statistics, section 7.1.
    """
    ordered = _ordered(samples)
    places = _p95_places(len(ordered))
    return None if places is None else Interval(ordered[places[0]], ordered[places[1]])


@lru_cache(maxsize=4096)
def _p95_places(n: int) -> tuple[int, int] | None:
    """Places (from 0) of the bounds: P(Binomial(n, 0.95) ≤ first) and P(… > last) are at most 2.5 %."""
    whole, below = 100**n, [0]
    for k in range(n + 1):
        below.append(below[-1] + math.comb(n, k) * 95**k * 5 ** (n - k))
    # below[k]: P(Binomial < k), times ``whole``.
    tail = whole * (1_000_000 - LEVEL_PPM) // 2_000_000
    first = max((k for k in range(n + 1) if below[k] <= tail), default=0)
    last = next((k for k in range(1, n + 1) if whole - below[k] <= tail), n + 1)
    return (first - 1, last - 1) if 1 <= first <= last <= n else None


def wilson(count: int, total: int, *, z: float = _Z) -> Proportion:
    """A proportion with its Wilson score interval, at 95 % unless another ``z`` says otherwise.

    Raises: ValueError unless 0 ≤ count ≤ total > 0.

    Source: Wilson, JASA 22 (1927).
    """
    if not 0 <= count <= total or total == 0:
        raise ValueError(f"{count} of {total} is not a proportion")
    share, z2 = count / total, z * z
    centre = share + z2 / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    scale = 1 + z2 / total
    # At 0 and at all of them the bounds are exact; arithmetic would miss them by a rounding.
    low = 0 if count == 0 else math.floor(1_000_000 * max(0.0, (centre - spread) / scale))
    high = 1_000_000 if count == total else math.ceil(1_000_000 * min(1.0, (centre + spread) / scale))
    return Proportion(count, total, low, high)


def summarise(samples: Sequence[int]) -> Summary | None:
    """Count, median, p95 and the median's interval; None when there are no samples."""
    if not samples:
        return None
    ordered = sorted(samples)  # once: what is in order already is sorted in no time
    return Summary(len(ordered), median(ordered), p95(ordered), median_interval(ordered))


def _ordered(samples: Sequence[int]) -> list[int]:
    if not samples:
        raise ValueError("no samples")
    return sorted(samples)
