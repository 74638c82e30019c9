"""A policy against ``sti`` in the same places (device, T, |S|): what leaving out or replacing a part does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from db.statistics import Proportion, wilson
from orchestrator.results.gather import Cell, Results
from orchestrator.results.paired import Difference, Right, mean_difference, pooled_difference


@dataclass(frozen=True)
class Effect:
    """A policy's accuracy less that of ``sti``, mean over tasks, each pooled over its places.

    ``within``, ``within_sti``: requests within T where both were timed. ``memory``: of all parts, over that
    of ``sti``, geometric mean. ``infeasible``: in how many places it is where ``sti`` is not.
    """

    policy: str
    mean: Difference | None
    by_task: tuple[str, ...]
    infeasible: int
    within: Proportion | None
    within_sti: Proportion | None
    memory: float | None


def effects(results: Results) -> list[Effect]:
    """The effect of every policy but ``sti``."""
    others = dict.fromkeys(cell.asked.policy for cell in results.cells if cell.asked.policy != "sti")
    return [effect_of(results, policy) for policy in others]


def effect_of(results: Results, policy: str) -> Effect:
    """The effect of one policy."""
    by_task: dict[str, Difference] = {}
    infeasible = 0
    timed: list[tuple[Cell, Cell]] = []
    for task in results.tasks:
        pairs: list[tuple[Right, Right]] = []
        for mine, other in same_places(results, task, policy):
            infeasible += other.infeasible and not mine.infeasible
            if mine.samples is not None and other.samples is not None:
                timed.append((mine, other))
            if mine.right is None or other.right is None or mine.right.shape != other.right.shape:
                continue
            if not pairs or pairs[0][0].shape == mine.right.shape:
                pairs.append((other.right, mine.right))
        pooled = pooled_difference(pairs)
        if pooled is not None:
            by_task[task] = pooled
    return Effect(
        policy,
        mean_difference(list(by_task.values())),
        tuple(f"{task} {found} ({found.of})" for task, found in by_task.items()),
        infeasible,
        _within(other for _, other in timed),
        _within(mine for mine, _ in timed),
        _memory(timed),
    )


def same_places(results: Results, task: str, policy: str) -> Iterator[tuple[Cell, Cell]]:
    """(``sti``'s cell, the policy's) of each place; a policy without a use for |S| serves for every |S|."""
    for mine in results.pick(task=task, policy="sti"):
        asked = mine.asked
        for other in results.pick(
            task=task,
            policy=policy,
            device=asked.device,
            target=asked.target,
            engine=asked.engine,
            bundle=asked.bundle,
        ):
            if other.asked.preload in ("", asked.preload):
                yield mine, other


def _within(cells: Iterator[Cell]) -> Proportion | None:
    """Requests within T; a cell that stands for several places counts once."""
    distinct = {cell.asked: cell for cell in cells}.values()
    total = sum(len(cell.samples.latency_ns) for cell in distinct if cell.samples)
    return wilson(sum(cell.within for cell in distinct), total) if total else None


def _memory(timed: list[tuple[Cell, Cell]]) -> float | None:
    logs = [
        math.log(other.samples.memory.parts_bytes / mine.samples.memory.parts_bytes)
        for mine, other in timed
        if mine.samples and other.samples
    ]
    return math.exp(sum(logs) / len(logs)) if logs else None
