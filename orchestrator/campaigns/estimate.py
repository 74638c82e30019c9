"""How long what is left of a run will take: pure functions over measured durations.

A batch takes a time of its own (its device is asked, its content looked at, its plans are made) and one for
each of its parts: of execute a request to a cell, else a cell. Both are read off a line through what batches
of different sizes took.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from db.statistics import median
from sti_runtime.units import NS_PER_S


@dataclass(frozen=True)
class Amount:
    """Work: batches, and the parts they are of in all."""

    batches: int
    parts: int


@dataclass(frozen=True)
class Line:
    """What a batch takes: ``batch_ns``, and ``part_ns`` for each of its parts."""

    batch_ns: int
    part_ns: int

    def ns(self, amount: Amount) -> int:
        """What so much takes, one batch after the other."""
        return amount.batches * self.batch_ns + amount.parts * self.part_ns

    @classmethod
    def of(cls, took: Sequence[tuple[int, int]]) -> Line:
        """From (parts, ns) of batches: least squares through the median of each size, by how many had it.

        Where that says nothing (one size only, larger ones took no longer) all time goes with the parts, so
        that what is much larger than anything so far is not taken for nothing.
        """
        by_size: dict[int, list[int]] = defaultdict(list)
        for parts, duration_ns in took:
            by_size[max(1, parts)].append(duration_ns)
        points = [(len(values), parts, median(values)) for parts, values in by_size.items()]
        mean_parts = sum(count * parts for count, parts, _ in points) / len(took)
        mean_ns = sum(count * ns for count, _, ns in points) / len(took)
        spread = sum(count * (parts - mean_parts) ** 2 for count, parts, _ in points)
        if spread:
            along = sum(count * (parts - mean_parts) * (ns - mean_ns) for count, parts, ns in points)
            slope = along / spread
            start = mean_ns - slope * mean_parts
            if slope > 0 and start >= 0:
                return cls(round(start), round(slope))
        return cls(0, median([ns // max(1, parts) for parts, ns in took]))


GUESSES = {
    "health": Line(0, 5 * NS_PER_S),
    "importance": Line(0, 300 * NS_PER_S),
    "profile": Line(0, 60 * NS_PER_S),
    "execute": Line(10 * NS_PER_S, NS_PER_S // 5),
    "evaluate": Line(10 * NS_PER_S, 20 * NS_PER_S),
}
"""What batches are thought to take before any of their kind has ended."""


@dataclass(frozen=True)
class Typical:
    """What batches that have ended took: of a kind on a device, else of the kind, else a guess."""

    here: Mapping[tuple[str | None, str], Line]
    anywhere: Mapping[str, Line]

    @classmethod
    def of(cls, durations: Iterable[tuple[str | None, str, int, int]]) -> Typical:
        """From (device, kind, parts, ns) of batches."""
        here: dict[tuple[str | None, str], list[tuple[int, int]]] = defaultdict(list)
        anywhere: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for device, kind, parts, duration_ns in durations:
            here[device, kind].append((parts, duration_ns))
            anywhere[kind].append((parts, duration_ns))
        return cls(
            {key: Line.of(took) for key, took in here.items()},
            {key: Line.of(took) for key, took in anywhere.items()},
        )

    def line(self, device: str | None, kind: str) -> Line:
        """What batches take there."""
        return self.here.get((device, kind)) or self.anywhere.get(kind) or GUESSES[kind]


def amounts(
    left: Mapping[tuple[str | None, str], int], sizes: Mapping[tuple[str | None, str], tuple[int, int]]
) -> dict[tuple[str | None, str], Amount]:
    """What is left of a run by (device, kind): batches as counted, their parts by what those of the run have
    on average. ``sizes``: (batches, parts) of the whole run."""
    found = {}
    for key, count in left.items():
        batches, parts = sizes.get(key, (1, 1))
        found[key] = Amount(count, count * parts // batches)
    return found


def left_by_lane(
    left: Mapping[tuple[str | None, str], Amount], typical: Typical, lane_of: Callable[[str | None], str]
) -> dict[str, int]:
    """ns of work on each lane, of ``left`` by (device, kind). A lane does one batch at a time."""
    lanes: dict[str, int] = defaultdict(int)
    for (device, kind), amount in left.items():
        lanes[lane_of(device)] += typical.line(device, kind).ns(amount)
    return dict(lanes)


def left_ns(
    left: Mapping[tuple[str | None, str], Amount], typical: Typical, lane_of: Callable[[str | None], str]
) -> int:
    """How long all of it takes when no other campaign has work: lanes run side by side."""
    return max(left_by_lane(left, typical, lane_of).values(), default=0)
