"""How long what is left of a run will take: pure functions over measured durations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from db.statistics import median

DEFAULT_NS = {
    "health": 5 * 10**9,
    "importance": 300 * 10**9,
    "profile": 60 * 10**9,
    "execute": 60 * 10**9,
    "evaluate": 60 * 10**9,
}
"""What a batch is thought to take before any of its kind has ended."""


@dataclass(frozen=True)
class Typical:
    """Median durations of batches that have ended: of a kind on a device, else of the kind, else a guess."""

    here: Mapping[tuple[str | None, str], int]
    anywhere: Mapping[str, int]

    @classmethod
    def of(cls, durations: Iterable[tuple[str | None, str, int]]) -> Typical:
        """From (device, kind, ns) of batches."""
        here: dict[tuple[str | None, str], list[int]] = defaultdict(list)
        anywhere: dict[str, list[int]] = defaultdict(list)
        for device, kind, duration_ns in durations:
            here[device, kind].append(duration_ns)
            anywhere[kind].append(duration_ns)
        return cls(
            {key: median(values) for key, values in here.items()},
            {key: median(values) for key, values in anywhere.items()},
        )

    def batch_ns(self, device: str | None, kind: str) -> int:
        """What a batch takes there."""
        return self.here.get((device, kind)) or self.anywhere.get(kind) or DEFAULT_NS[kind]


def left_by_lane(
    left: Mapping[tuple[str | None, str], int], typical: Typical, lane_of: Callable[[str | None], str]
) -> dict[str, int]:
    """ns of work on each lane, of ``left``: batches by (device, kind). A lane does one at a time."""
    lanes: dict[str, int] = defaultdict(int)
    for (device, kind), count in left.items():
        lanes[lane_of(device)] += count * typical.batch_ns(device, kind)
    return dict(lanes)


def left_ns(
    left: Mapping[tuple[str | None, str], int], typical: Typical, lane_of: Callable[[str | None], str]
) -> int:
    """How long all of it takes when no other campaign has work: lanes run side by side."""
    return max(left_by_lane(left, typical, lane_of).values(), default=0)
