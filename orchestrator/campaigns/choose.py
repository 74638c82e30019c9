"""Which batch a free lane does next: pure functions.

A lane is what does one thing at a time: a device, the devices that share a machine, the host. The rule:

1. A run whose deadline would be missed if it went on with its share of the lane goes first, the earliest
   deadline before others; one whose deadline has passed has nothing to win and shares as before.
2. Else the run that has had least of the lane for its priority, since the youngest of the open runs began;
   of equals the one that was due first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from db.campaign_work import Waiting


def next_batch(
    ready: Sequence[Waiting], had_ns: Mapping[int, int], left_ns: Mapping[int, int], now_wall_ns: int
) -> Waiting | None:
    """The batch of one lane that goes next; None when none is ready.

    By run: ``had_ns`` of the lane so far, ``left_ns`` of work on it.
    """
    if not ready:
        return None
    weights = {each.run_id: each.priority for each in ready}
    total = sum(weights.values())

    def late(each: Waiting) -> bool:
        if each.deadline_wall_ns is None or each.deadline_wall_ns <= now_wall_ns:
            return False
        shared_ns = left_ns.get(each.run_id, 0) * total // each.priority
        return now_wall_ns + shared_ns > each.deadline_wall_ns

    hurried = [each for each in ready if late(each)]
    if hurried:
        return min(hurried, key=lambda e: (e.deadline_wall_ns, e.due_wall_ns, e.run_id, e.batch_id))
    return min(
        ready,
        key=lambda e: (had_ns.get(e.run_id, 0) / e.priority, e.due_wall_ns, e.run_id, e.batch_id),
    )
