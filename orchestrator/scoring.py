"""Importance on this host: shards scored by Ray workers, every score kept as soon as it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol, TypeVar

from db import importance as queries
from orchestrator.farm import Farm
from orchestrator.library import DEV_SPLIT, PROFILE_SPLIT, KnownBundle, model_of, task_rows
from sti_runtime.bundle import Bundle
from sti_runtime.importance import (
    ImportanceTask,
    SplitScore,
    build_profile,
    choose_base_fidelity,
    is_above_chance,
    plan_units,
    prepare_rows,
    score_configuration,
    score_shards,
    tensors_at,
)
from sti_runtime.importance_profile import ImportanceProfile
from sti_runtime.rows import rows_digest
from sti_runtime.shard import ShardId
from sti_runtime.task_data import load_task_data

HIGH_FIDELITY = 32

T = TypeVar("T")
R = TypeVar("R")


class Mapper(Protocol):
    """Runs a function over items in worker processes; (item, result) in the order they are ready."""

    def map_tasks(
        self, function: Callable[[T], R], items: Iterable[T], *, num_cpus: float = 1
    ) -> Iterator[tuple[T, R]]: ...


@dataclass(frozen=True)
class ScoreUnit:
    """What one worker scores: shards of a bundle on the first ``rows`` labelled rows of a file."""

    bundle: Path
    task_data: Path
    rows: int
    base_fidelity: int
    shards: tuple[ShardId, ...]


@dataclass(frozen=True)
class BaseUnit:
    """The base configuration: the lowest fidelity that is not at chance."""

    bundle: Path
    task_data: Path
    rows: int


@dataclass(frozen=True)
class UniformScore:
    """The whole model with every shard at ``fidelity``, on ``rows`` dev rows."""

    fidelity: int
    correct: int
    rows: int
    loss_nano: int


def score_uniform(farm: Farm, bundle: KnownBundle, task: str) -> Iterator[UniformScore]:
    """Score the whole model at each fidelity of the bundle on the task's dev rows, on this host.

    Raises: InputError.
    """
    _, data = task_rows(farm, task, DEV_SPLIT, model_of(farm, bundle))
    config = bundle.manifest.model
    rows = prepare_rows(data, config)
    for fidelity in bundle.manifest.fidelities:
        score = score_configuration(config, tensors_at(bundle.bundle, fidelity), rows).score
        yield UniformScore(fidelity, score.correct, len(rows.labels), score.loss_nano)


@lru_cache(maxsize=1)
def _task(bundle: Path, task_data: Path, rows: int, base_fidelity: int) -> ImportanceTask:
    opened = Bundle.open(bundle)
    config = opened.manifest.model
    return ImportanceTask(
        config=config,
        base=tensors_at(opened, base_fidelity),
        high=tensors_at(opened, HIGH_FIDELITY),
        rows=prepare_rows(load_task_data(task_data), config, rows),
    )


def score_unit(unit: ScoreUnit) -> list[tuple[ShardId, SplitScore]]:
    """Score one unit in a worker process, on one thread."""
    task = _task(unit.bundle, unit.task_data, unit.rows, unit.base_fidelity)
    return list(score_shards(task, unit.shards, threads=1))


def score_base(unit: BaseUnit) -> tuple[int, SplitScore]:
    """(base fidelity, its score), in a worker process."""
    bundle = Bundle.open(unit.bundle)
    rows = prepare_rows(load_task_data(unit.task_data), bundle.manifest.model, unit.rows)
    choice = choose_base_fidelity(bundle, rows, threads=1)
    return choice.fidelity, choice.score


@dataclass(frozen=True)
class Scored:
    """An importance profile; ``scored`` shards were scored now, the others were in the store."""

    profile: ImportanceProfile
    scored: int
    above_chance: bool


def score_importance(
    farm: Farm,
    mapper: Mapper,
    bundle: KnownBundle,
    task: str,
    *,
    rows: int,
    workers: int,
    advance: Callable[[int, int], None] | None = None,
) -> Scored:
    """The exhaustive importance profile of a bundle's model on a task's profile split.

    Resumable: scores are rows in the store, only missing ones are computed. Raises: InputError, PoolError.
    """
    model = model_of(farm, bundle)
    digest, data = task_rows(farm, task, PROFILE_SPLIT, model)
    path = farm.settings.tasks / f"{digest}.safetensors"
    chosen = prepare_rows(data, model.config, rows)
    count, split = len(chosen.labels), rows_digest(chosen)

    def key_at(fidelity: int) -> queries.ScoreKey:
        return queries.ScoreKey(
            model_digest=model.digest,
            task=task,
            split_digest=split,
            base_fidelity=fidelity,
            quantizer=bundle.manifest.quantizer.label,
        )

    with farm.store.reader() as session:
        known = {k: queries.scores_done(session, key_at(k)) for k in bundle.manifest.fidelities}
    base_fidelity = next((k for k in sorted(known) if queries.BASE in known[k]), None)
    if base_fidelity is None:
        # In a worker, as the shards are: with other numbers of threads BLAS may sum in another order.
        _, (base_fidelity, base) = next(
            iter(mapper.map_tasks(score_base, [BaseUnit(bundle.bundle.path, path, count)]))
        )
        _keep(farm, key_at(base_fidelity), [(queries.BASE, base)], count)
    else:
        base = _split_score(known[base_fidelity][queries.BASE])
    key = key_at(base_fidelity)
    done: dict[ShardId, SplitScore] = {
        shard: _split_score(found) for shard, found in known[base_fidelity].items() if shard != queries.BASE
    }
    total = model.config.layers * model.config.heads
    if advance is not None:
        advance(len(done), total)
    units = [
        ScoreUnit(bundle.bundle.path, path, count, base_fidelity, tuple(shards))
        for shards in plan_units(model.config, done, workers)
    ]
    before = len(done)
    for _, scores in mapper.map_tasks(score_unit, units):
        _keep(farm, key, scores, count)
        done |= dict(scores)
        if advance is not None:
            advance(len(done), total)
    profile = build_profile(
        model.config,
        done,
        base,
        base_fidelity=base_fidelity,
        model_digest=model.digest,
        task=task,
        split_digest=split,
        rows=count,
    )
    with farm.store.session() as session:
        newest = queries.latest_importance(session, model.digest, task)
        if newest is None or newest.digest != profile.digest:  # else its age would begin anew
            queries.save_importance_profile(session, profile)
    return Scored(profile, len(done) - before, is_above_chance(base.score.correct, chosen.labels))


def _split_score(stored: queries.StoredScore) -> SplitScore:
    return SplitScore(stored.score, stored.half_a_loss_nano or 0, stored.half_b_loss_nano or 0)


def _keep(farm: Farm, key: queries.ScoreKey, scores: Iterable[tuple[ShardId, SplitScore]], rows: int) -> None:
    with farm.store.session() as session:
        for shard, score in scores:
            queries.record_score(
                session,
                key,
                shard,
                queries.StoredScore(score.score, rows, score.even_loss_nano, score.odd_loss_nano),
            )
