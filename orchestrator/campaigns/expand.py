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

from db.campaigns import NewBatch, NewCell
from orchestrator.campaigns.spec import CampaignSpec
from orchestrator.inventory import Device

MOST_CELLS = 24
"""Cells of one batch: more go to several, but never policies of one T and |S|."""

MOST_IN_ALL = 1_000_000
"""Cells of one run."""


@dataclass(frozen=True)
class Content:
    """A bundle and a task of a campaign; ``bundle``: its digest."""

    bundle: str
    task: str


@dataclass(frozen=True)
class Combination:
    """What a device is profiled for and runs plans of."""

    content: Content
    engine: str


def count_cells(spec: CampaignSpec, devices: Sequence[Device], contents: Sequence[Content]) -> int:
    """How many cells ``expand`` will make of it, without making them."""
    pairs = sum(len(_engines(spec, device)) for device in devices) * len(contents)
    matrix = len(spec.targets) * len(spec.preload_bytes) * len(spec.policies)
    planned = bool(spec.planned_kinds)
    return (
        len(devices) * ("health" in spec.kinds)
        + len(contents) * (planned or "importance" in spec.kinds)
        + pairs * (spec.repeats if "profile" in spec.kinds else int(planned))
        + pairs * matrix * (spec.repeats if "execute" in spec.kinds else 0)
        + pairs * matrix * ("evaluate" in spec.kinds)
    )


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
            yield _batch("importance", content, None, 0, (NewCell(0),), fresh=False)
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
                for cells in _chunks(spec, order):
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


def _chunks(spec: CampaignSpec, order: random.Random) -> Iterator[tuple[NewCell, ...]]:
    """The cells of one combination, by batch: (T, |S|) in random order, their policies together."""
    policies = spec.planning_policies
    groups = list(product(spec.targets, spec.preload_bytes))
    order.shuffle(groups)
    size = max(1, MOST_CELLS // len(policies))
    for start in range(0, len(groups), size):
        asked = [(*group, policy) for group in groups[start : start + size] for policy in policies]
        yield tuple(NewCell(number, *one) for number, one in enumerate(asked))


def _engines(spec: CampaignSpec, device: Device) -> tuple[str, ...]:
    return tuple(spec.engines) or (device.engine,)


def _shuffled(items: Sequence[Combination], order: random.Random) -> list[Combination]:
    return order.sample(list(items), len(items))
