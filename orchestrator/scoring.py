"""Importance on this host: shards scored or estimated by Ray workers; every score is kept as soon as it is
there."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol, TypeVar

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
from sti_runtime.importance_gradient import Estimate, estimate_bundle
from sti_runtime.importance_levels import LevelKey, as_levels, score_levels, wanted_levels
from sti_runtime.importance_profile import ImportanceProfile, Method
from sti_runtime.model import Submodel
from sti_runtime.model_store import Model
from sti_runtime.rows import LabelledRows, rows_digest
from sti_runtime.shard import ShardId
from sti_runtime.task_data import load_task_data

HIGH_FIDELITY: Literal[32] = 32

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
class EstimateUnit:
    """The estimate of all shards on the first ``rows`` labelled rows of a file."""

    bundle: Path
    task_data: Path
    rows: int


def estimate_unit(unit: EstimateUnit) -> Estimate:
    """Estimate all shards in a worker process, on one thread."""
    bundle = Bundle.open(unit.bundle)
    rows = prepare_rows(load_task_data(unit.task_data), bundle.manifest.model, unit.rows)
    return estimate_bundle(bundle, rows, threads=1)


@dataclass(frozen=True)
class LevelUnit:
    """Submodels to be scored with all shards at one fidelity."""

    bundle: Path
    task_data: Path
    rows: int
    levels: tuple[LevelKey, ...]


def level_unit(unit: LevelUnit) -> list[tuple[LevelKey, SplitScore]]:
    """Score one unit in a worker process, on one thread."""
    bundle = Bundle.open(unit.bundle)
    rows = prepare_rows(load_task_data(unit.task_data), bundle.manifest.model, unit.rows)
    return list(score_levels(bundle, unit.levels, rows, threads=1))


@dataclass(frozen=True)
class Scored:
    """An importance profile; ``scored`` shards were scored now, the others were in the store."""

    profile: ImportanceProfile
    scored: int
    above_chance: bool


@dataclass(frozen=True)
class Subject:
    """What is scored: a bundle's model on labelled rows of a task's profile split."""

    farm: Farm
    bundle: KnownBundle
    model: Model
    task: str
    file: Path
    rows: LabelledRows

    @classmethod
    def of(cls, farm: Farm, bundle: KnownBundle, task: str, rows: int) -> Subject:
        """The first ``rows`` labelled rows. Raises: InputError, DatasetError."""
        model = model_of(farm, bundle)
        digest, data = task_rows(farm, task, PROFILE_SPLIT, model)
        file = farm.settings.tasks / f"{digest}.safetensors"
        return cls(farm, bundle, model, task, file, prepare_rows(data, model.config, rows))

    @property
    def count(self) -> int:
        """How many rows are scored on."""
        return len(self.rows.labels)

    def key(self, base_fidelity: int) -> queries.ScoreKey:
        """What its scores share in the store."""
        return queries.ScoreKey(
            model_digest=self.model.digest,
            task=self.task,
            split_digest=rows_digest(self.rows),
            base_fidelity=base_fidelity,
            quantizer=self.bundle.manifest.quantizer.label,
        )

    def keep(
        self, base_fidelity: int, scores: Iterable[tuple[ShardId, SplitScore]], *, device: str | None = None
    ) -> None:
        """Keep scores; ``device``: where they were measured, None: on this host."""
        key = self.key(base_fidelity)
        with self.farm.store.session() as session:
            for shard, found in scores:
                stored = queries.StoredScore(
                    found.score,
                    self.count,
                    found.even_loss_nano,
                    found.odd_loss_nano,
                    found.even_correct,
                    device,
                )
                queries.record_score(session, key, shard, stored)

    def kept(self, base_fidelity: int) -> dict[ShardId, SplitScore]:
        """The scores of shards and of the base that the store holds."""
        return {shard: found for shard, found in self._kept(base_fidelity).items() if shard[0] >= -1}

    def keep_levels(self, scores: Iterable[tuple[LevelKey, SplitScore]]) -> None:
        """Keep scores of submodels, all shards at one fidelity."""
        for (submodel, fidelity), found in scores:
            self.keep(fidelity, [(self._level(submodel), found)])

    def kept_levels(self, base_fidelity: int) -> dict[LevelKey, SplitScore]:
        """Those that the store holds."""
        wanted = wanted_levels(self.bundle.manifest, base_fidelity)
        kept = {fidelity: self._kept(fidelity) for _, fidelity in wanted}
        return {
            (submodel, fidelity): kept[fidelity][self._level(submodel)]
            for submodel, fidelity in wanted
            if self._level(submodel) in kept[fidelity]
        }

    def _level(self, submodel: Submodel) -> ShardId:
        known = self.model.info.submodels
        return queries.LEVELS, known.index(submodel) if submodel in known else len(known)

    def _kept(self, base_fidelity: int) -> dict[ShardId, SplitScore]:
        with self.farm.store.reader() as session:
            stored = queries.scores_done(session, self.key(base_fidelity))
        return {
            shard: SplitScore(s.score, s.half_a_loss_nano, s.half_b_loss_nano, s.half_a_correct)
            for shard, s in stored.items()
            if not (s.half_a_loss_nano is None or s.half_b_loss_nano is None or s.half_a_correct is None)
        }

    def profile(
        self, method: Method, base_fidelity: int, base: SplitScore, scores: Mapping[ShardId, SplitScore]
    ) -> ImportanceProfile:
        """The profile, kept as the newest of its method unless it is that already."""
        profile = build_profile(
            self.model.config,
            scores,
            base,
            base_fidelity=base_fidelity,
            model_digest=self.model.digest,
            task=self.task,
            split_digest=rows_digest(self.rows),
            rows=self.count,
            method=method,
            levels=as_levels(self.bundle.manifest, base_fidelity, self.kept_levels(base_fidelity)),
        )
        with self.farm.store.session() as session:
            newest = queries.latest_importance(session, self.model.digest, self.task, method)
            if newest is None or newest.digest != profile.digest:  # else its age would begin anew
                queries.save_importance_profile(session, profile)
        return profile


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

    Kept are two profiles of the same scores, ranked by loss (returned) and by accuracy; both hold the
    ``levels`` too. Resumable: scores are rows in the store, only missing ones are computed.
    Raises: InputError, PoolError.
    """
    subject = Subject.of(farm, bundle, task, rows)
    known = {k: subject.kept(k) for k in bundle.manifest.fidelities}
    base_fidelity = next((k for k in sorted(known) if queries.BASE in known[k]), None)
    if base_fidelity is None:
        # In a worker, as the shards are: with other numbers of threads BLAS may sum in another order.
        unit = BaseUnit(bundle.bundle.path, subject.file, subject.count)
        _, (base_fidelity, base) = next(iter(mapper.map_tasks(score_base, [unit])))
        subject.keep(base_fidelity, [(queries.BASE, base)])
    else:
        base = known[base_fidelity][queries.BASE]
    done = {shard: score for shard, score in known[base_fidelity].items() if shard != queries.BASE}
    config = subject.model.config
    total, before = config.layers * config.heads, len(done)
    known_levels, wanted = subject.kept_levels(base_fidelity), wanted_levels(bundle.manifest, base_fidelity)
    missing = [key for key in wanted if key not in known_levels]
    steps, left = total + len(wanted), len(missing)
    if advance is not None:
        advance(before + len(wanted) - left, steps)
    units = [
        ScoreUnit(bundle.bundle.path, subject.file, subject.count, base_fidelity, tuple(shards))
        for shards in plan_units(config, done, workers)
    ]
    for _, scores in mapper.map_tasks(score_unit, units):
        subject.keep(base_fidelity, scores)
        done |= dict(scores)
        if advance is not None:
            advance(len(done) + len(wanted) - left, steps)
    by_fidelity = [
        LevelUnit(
            bundle.bundle.path, subject.file, subject.count, tuple(key for key in missing if key[1] == k)
        )
        for k in sorted({fidelity for _, fidelity in missing})
    ]
    for _, levels in mapper.map_tasks(level_unit, by_fidelity):
        subject.keep_levels(levels)
        left -= len(levels)
        if advance is not None:
            advance(len(done) + len(wanted) - left, steps)
    subject.profile("exhaustive-accuracy", base_fidelity, base, done)
    profile = subject.profile("exhaustive", base_fidelity, base, done)
    return Scored(profile, total - before, is_above_chance(base.score.correct, subject.rows.labels))


def estimate_importance(farm: Farm, mapper: Mapper, bundle: KnownBundle, task: str, *, rows: int) -> Scored:
    """The estimated importance profile (method ``gradient``), from one pass over the profile split's rows.

    Raises: InputError, PoolError.
    """
    subject = Subject.of(farm, bundle, task, rows)
    unit = EstimateUnit(bundle.bundle.path, subject.file, subject.count)
    _, estimate = next(iter(mapper.map_tasks(estimate_unit, [unit])))
    profile = subject.profile("gradient", estimate.base_fidelity, estimate.base, estimate.scores)
    return Scored(profile, len(estimate.scores), estimate.above_chance)
