"""From a campaign's matrix to its batches of cells: a pure function.

A batch is what one job measures: the cells of one device, bundle, task, engine and repeat, which compare
policies, T and |S| in one interleaved, randomised job. Batches are numbered in the order in which a device
has them; what a kind needs comes before it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TypeVar

from db.campaigns import NewBatch, NewCell
from orchestrator.campaigns.spec import CampaignSpec
from orchestrator.inventory import Device
from sti_runtime.policies import uses_preload

MOST_CELLS = 24
"""Cells of one batch: those of one T go together as far as that allows, those of one T and |S| always."""

MOST_IN_ALL = 1_000_000
"""Cells of one run."""

T = TypeVar("T")


@dataclass(frozen=True)
class Content:
    """A bundle and a task of a campaign. ``bundle``: its digest; ``shard_bytes``: of its model's shards at 32
    bits, which preload buffers may be shares of.
    """

    bundle: str
    task: str
    shard_bytes: int


@dataclass(frozen=True)
class Combination:
    """What a device is profiled for and runs plans of."""

    content: Content
    engine: str


def count_cells(spec: CampaignSpec, devices: Sequence[Device], contents: Sequence[Content]) -> int:
    """How many cells ``expand`` will make of it, without making them."""
    pairs = sum(len(_engines(spec, device)) for device in devices) * len(contents)
    matrix = count_planned(spec)
    planned = bool(spec.planned_kinds)
    return (
        len(devices) * ("health" in spec.kinds)
        + len(contents) * (planned or "importance" in spec.kinds)
        + pairs * (spec.repeats if "profile" in spec.kinds else int(planned))
        + pairs * matrix * (spec.repeats if "execute" in spec.kinds else 0)
        + pairs * matrix * ("evaluate" in spec.kinds)
    )


def count_planned(spec: CampaignSpec) -> int:
    """How many planned cells one device, content, engine and repeat have."""
    return len(spec.targets) * sum(_group_sizes(spec))


def count_batches(spec: CampaignSpec) -> int:
    """How many batches the planned cells of one device, content, engine and repeat make."""
    of_target = [[None] * size for size in _group_sizes(spec)]
    return sum(1 for _ in _packed([of_target] * len(spec.targets)))


def expand(
    spec: CampaignSpec, devices: Sequence[Device], contents: Sequence[Content], *, seed: int
) -> Iterator[NewBatch]:
    """Every batch of one run, in order. ``seed``: of the orders of combinations and cells."""
    for number, batch in enumerate(_batches(spec, devices, contents, seed)):
        yield replace(batch, number=number)


def _batches(
    spec: CampaignSpec, devices: Sequence[Device], contents: Sequence[Content], seed: int
) -> Iterator[NewBatch]:
    planned = bool(spec.planned_kinds)
    if planned or "importance" in spec.kinds:
        for content in contents:
            fresh = spec.importance_rows is not None or "importance" in spec.kinds
            yield _batch("importance", content, None, 0, (NewCell(0),), fresh=fresh)
    for device in devices:
        order = random.Random(f"{seed}/{device.name}")
        combinations = [Combination(c, engine) for c, engine in product(contents, _engines(spec, device))]
        for batch in _of_device(spec, combinations, order):
            yield replace(batch, device=device.name)


def _of_device(
    spec: CampaignSpec, combinations: Sequence[Combination], order: random.Random
) -> Iterator[NewBatch]:
    one = (NewCell(0),)
    if "health" in spec.kinds:
        yield _batch("health", None, None, 0, one)
    fresh = "profile" in spec.kinds
    if fresh or spec.planned_kinds:
        for repeat in range(spec.repeats if fresh else 1):
            for each in _shuffled(combinations, order):
                yield _batch("profile", each.content, each.engine, repeat, one, fresh=fresh)
    for kind in spec.planned_kinds:
        for repeat in range(spec.repeats if kind == "execute" else 1):
            for each in _shuffled(combinations, order):
                for cells in _cells(spec, each.content, order):
                    yield _batch(kind, each.content, each.engine, repeat, cells)


def _batch(
    kind: str,
    content: Content | None,
    engine: str | None,
    repeat: int,
    cells: tuple[NewCell, ...],
    *,
    fresh: bool = True,
) -> NewBatch:
    return NewBatch(
        number=0,
        device=None,
        kind=kind,
        bundle_digest=None if content is None else content.bundle,
        task=None if content is None else content.task,
        engine=engine,
        repeat=repeat,
        fresh=fresh,
        cells=cells,
    )


def _cells(spec: CampaignSpec, content: Content, order: random.Random) -> Iterator[tuple[NewCell, ...]]:
    """The cells of one combination, by batch: T and |S| in random order, their policies together."""
    using = [policy for policy in spec.planning_policies if uses_preload(policy)]
    others = [policy for policy in spec.planning_policies if not uses_preload(policy)]
    by_target = []
    for target in order.sample(spec.targets, len(spec.targets)):
        sizes = spec.preload_sizes if using else ()
        groups = [
            [NewCell(0, target, size.text, size.resolved(content.shard_bytes), policy) for policy in using]
            for size in order.sample(sizes, len(sizes))
        ]
        if others:
            groups.insert(0, [NewCell(0, target, None, 0, policy) for policy in others])
        by_target.append(groups)
    for cells in _packed(by_target):
        yield tuple(replace(cell, number=number) for number, cell in enumerate(cells))


def _group_sizes(spec: CampaignSpec) -> list[int]:
    """How many cells of one T go together, by |S|; first those of policies that have no use for it."""
    using = sum(map(uses_preload, spec.planning_policies))
    others = len(spec.planning_policies) - using
    return [others] * bool(others) + [using] * (len(spec.preload_sizes) if using else 0)


def _packed(by_target: Sequence[Sequence[Sequence[T]]]) -> Iterator[list[T]]:
    """Groups in batches of at most ``MOST_CELLS``; no group is parted, a T only where it does not fit."""
    filled: list[T] = []
    for groups in by_target:
        if filled and len(filled) + sum(map(len, groups)) > MOST_CELLS:
            yield filled
            filled = []
        for group in groups:
            if filled and len(filled) + len(group) > MOST_CELLS:
                yield filled
                filled = []
            filled = [*filled, *group]
    if filled:
        yield filled


def _engines(spec: CampaignSpec, device: Device) -> tuple[str, ...]:
    return tuple(spec.engines) or (device.engine,)


def _shuffled(items: Sequence[Combination], order: random.Random) -> list[Combination]:
    return order.sample(list(items), len(items))
