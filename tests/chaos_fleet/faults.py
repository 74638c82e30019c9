"""What goes wrong with a fleet and when: drawn from a seed, so that the same seed gives the same sequence."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

CONTROLLER, SECOND, DATABASE = "controller", "second", "database"
BOARD = "board-1"

SETTLED_S = 3.0
"""A target is left alone for so long after a fault of it has ended."""


@dataclass(frozen=True)
class Kind:
    """One kind of fault. ``target``: what it hits, "host" being any of them; ``weight``: how often it comes,
    relative to the others; ``longest_s``: it has ended by then."""

    target: str
    weight: int
    longest_s: float


KINDS: Mapping[str, Kind] = {
    "controller-kill": Kind(CONTROLLER, 4, 10),
    "controller-stop": Kind(CONTROLLER, 1, 5),
    "head-kill": Kind(CONTROLLER, 1, 0),
    "second-controller": Kind(SECOND, 3, 60),
    "host-kill": Kind("host", 3, 30),
    "node-kill": Kind("host", 2, 0),
    "worker-kill": Kind("host", 2, 0),
    "cut": Kind(BOARD, 2, 20),
    "reboot": Kind(BOARD, 1, 5),
}
"""Of every fleet. kill: with -9. A head, node or worker that was killed is brought back by what it served."""

POSTGRESQL: Mapping[str, Kind] = {
    "database-kill": Kind(DATABASE, 2, 15),
    "database-stop": Kind(DATABASE, 1, 30),
    "database-freeze": Kind(DATABASE, 2, 20),
    "backend-kill": Kind(DATABASE, 2, 0),
}
SQLITE: Mapping[str, Kind] = {"disk-full": Kind(DATABASE, 2, 30), "database-lock": Kind(DATABASE, 2, 45)}


@dataclass(frozen=True)
class Fault:
    """One fault: at ``at_s`` from the beginning, for ``duration_s``; ``seed`` chooses what else it needs."""

    number: int
    at_s: float
    kind: str
    target: str
    duration_s: float
    seed: int

    def __str__(self) -> str:
        lasts = f" for {self.duration_s:.1f} s" if self.duration_s else ""
        return f"{self.number:3}  {self.kind} of {self.target}{lasts}"


def sequence(
    seed: int, kinds: Mapping[str, Kind], hosts: Sequence[str], *, longest_pause_s: float
) -> Iterator[Fault]:
    """Faults without end. Those of different targets may overlap, of one target they do not."""
    chance = random.Random(seed)
    names = sorted(kinds)
    free_s: dict[str, float] = {}
    at_s = 0.0
    for number in count(1):
        at_s += chance.uniform(1, longest_pause_s)
        name = chance.choices(names, [kinds[name].weight for name in names])[0]
        target = kinds[name].target
        if target == "host":
            target = chance.choice(hosts)
        duration_s = chance.uniform(0, kinds[name].longest_s)
        at_s = max(at_s, free_s.get(target, 0.0))
        free_s[target] = at_s + duration_s + SETTLED_S
        yield Fault(number, at_s, name, target, duration_s, chance.randrange(1 << 30))
