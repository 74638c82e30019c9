"""Importance over the farm's devices: their agents score the configurations as evaluation units, and the
scores become rows and profiles as this host's own do.

A shard takes two units, one on the even and one on the odd rows of the split, for split-half reliability.
Devices take shards from one queue, so that a slow one holds up no other. What a device has evaluated is in
the store, whoever asked: interrupted, scoring goes on from there.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import structlog

from db import artifacts
from db import importance as queries
from db.runs import Evaluated, evaluations_on
from orchestrator import fleet, jobs
from orchestrator.dispatch import Worker, run_job
from orchestrator.errors import StableError
from orchestrator.farm import Farm
from orchestrator.fleet import ReadyDevice
from orchestrator.inventory import Device
from orchestrator.library import KnownBundle
from orchestrator.measure import Work, request_of
from orchestrator.scoring import HIGH_FIDELITY, Scored, Subject
from orchestrator.side_by_side import side_by_side
from sti_runtime.errors import InputError, ResourceError, StifarmError
from sti_runtime.importance import SplitScore, candidates_of, is_above_chance
from sti_runtime.importance_plans import configuration_plan
from sti_runtime.importance_profile import Score
from sti_runtime.messages import computes_alike
from sti_runtime.plan import Plan
from sti_runtime.plan_build import Fidelity
from sti_runtime.rows import select_rows
from sti_runtime.shard import ShardId
from sti_runtime.task_data import TaskData, load_task_data, store_task_data

_log = structlog.get_logger(__name__)

ENGINE = "native"
"""Engines that compute like this one agree on a score but for rounding."""

_SHARES = 4
"""Jobs that each device is meant to take, about."""


@dataclass(frozen=True)
class Failed:
    """A device that left off, and why."""

    device: str
    error: StifarmError


def score_on_devices(
    farm: Farm,
    worker: Worker,
    devices: Sequence[Device],
    bundle: KnownBundle,
    task: str,
    *,
    rows: int,
    advance: Callable[[int, int], None] | None = None,
) -> tuple[Scored, list[Failed]]:
    """The exhaustive importance profile of a bundle's model, scored by these devices' agents.

    As ``scoring.score_importance``, whose scores it shares: what this host has scored is not scored again.
    Raises: InputError; StifarmError of the last device when none is left that could go on.
    """
    return _Scoring.of(farm, worker, bundle, task, rows).run(devices, advance)


@dataclass
class _Scoring:
    farm: Farm
    worker: Worker
    subject: Subject
    halves: tuple[Work, Work]

    @classmethod
    def of(cls, farm: Farm, worker: Worker, bundle: KnownBundle, task: str, rows: int) -> _Scoring:
        subject = Subject.of(farm, bundle, task, rows)
        if subject.count < 2:
            raise InputError("One row has no halves to compare.", "Score on two rows or more: --rows.")
        even, odd = (_half(subject, first) for first in (0, 1))
        return cls(farm, worker, subject, (even, odd))

    def run(
        self, devices: Sequence[Device], advance: Callable[[int, int], None] | None
    ) -> tuple[Scored, list[Failed]]:
        subject, failed = self.subject, _Failures()
        base_fidelity, base = self._base(devices, failed)
        config = subject.model.config
        every = [(layer, index) for layer in range(config.layers) for index in range(config.heads)]
        done = {s: score for s, score in subject.kept(base_fidelity).items() if s != queries.BASE}
        before, lock = len(done), threading.Lock()
        if advance is not None:
            advance(before, len(every))

        def keep(found: Mapping[ShardId, tuple[SplitScore, str]]) -> None:
            with lock:
                for shard, (score, device) in found.items():
                    subject.keep(base_fidelity, [(shard, score)], device=device)
                    done[shard] = score
                if advance is not None:
                    advance(len(done), len(every))

        while missing := [shard for shard in every if shard not in done]:
            left = failed.others(devices)
            waiting: queue.SimpleQueue[Sequence[ShardId]] = queue.SimpleQueue()
            for chunk in _chunks(missing, len(left)):
                waiting.put(chunk)

            def work(device: Device, waiting: queue.SimpleQueue[Sequence[ShardId]] = waiting) -> None:
                try:
                    ready: ReadyDevice | None = None
                    while (chunk := _next(waiting)) is not None:
                        keep(self._known(base_fidelity, chunk))
                        left_of_it = [shard for shard in chunk if shard not in done]
                        if left_of_it:
                            ready = ready or self._ready(device)
                            keep(self._measure(ready, base_fidelity, left_of_it))
                except StifarmError as error:
                    failed.add(device, error)

            for _ in side_by_side([[device] for device in left], work, self.farm.stop):
                pass
        subject.profile("exhaustive-accuracy", base_fidelity, base, done)
        profile = subject.profile("exhaustive", base_fidelity, base, done)
        above = is_above_chance(base.score.correct, subject.rows.labels)
        return Scored(profile, len(every) - before, above), failed.all

    def _base(self, devices: Sequence[Device], failed: _Failures) -> tuple[int, SplitScore]:
        """(base fidelity, its score): the store's, else measured by the first device that can."""
        fidelities = candidates_of(self.subject.bundle.bundle)
        for fidelity in fidelities:
            if (known := self.subject.kept(fidelity).get(queries.BASE)) is not None:
                return fidelity, known
        while True:
            device = failed.others(devices)[0]
            try:
                return self._measured_base(device, fidelities)
            except StifarmError as error:
                failed.add(device, error)

    def _measured_base(self, device: Device, fidelities: Sequence[int]) -> tuple[int, SplitScore]:
        ready: ReadyDevice | None = None
        lowest: tuple[int, SplitScore, str] | None = None
        for fidelity in fidelities:
            found = self._known(fidelity, [queries.BASE])
            if not found:
                ready = ready or self._ready(device)
                found = self._measure(ready, fidelity, [queries.BASE])
            score, by = found[queries.BASE]
            lowest = lowest or (fidelity, score, by)
            if is_above_chance(score.score.correct, self.subject.rows.labels):
                break
        else:
            assert lowest is not None
            fidelity, score, by = lowest
        self.subject.keep(fidelity, [(queries.BASE, score)], device=by)
        return fidelity, score

    # -------------------------------------------------------------- one device

    def _ready(self, device: Device) -> ReadyDevice:
        """The device with bundle and both halves of the rows. Raises: DeviceError, LeaseHeldError."""
        if not computes_alike(device.engine, ENGINE):
            raise StableError(
                f"its engine {device.engine} rounds activations, so its scores cannot stand beside others.",
                "Choose devices whose engine is native or torch.",
                device=device.name,
            )
        files = [self.farm.settings.tasks / f"{half.task_data}.safetensors" for half in self.halves]
        path = self.subject.bundle.bundle.path
        deployed = fleet.deploy(self.farm, self.worker, [device], path, files)[0]
        if deployed.error is not None:
            raise deployed.error
        return fleet.ready_device(self.farm, self.worker, device, self.subject.bundle.digest)

    def _measure(
        self, ready: ReadyDevice, base: int, shards: Sequence[ShardId]
    ) -> dict[ShardId, tuple[SplitScore, str]]:
        """Have a device evaluate the shards' plans on both halves. Raises: DeviceError."""
        units = jobs.evaluate_units([self._plan(base, shard) for shard in shards])
        for half in self.halves:
            request = request_of(ready, half, "evaluate", units)
            # Nothing is timed: a slowed device need not be slow for this.
            request = replace(request, target=replace(request.target, emulation=None))
            farm = self.farm
            run_job(farm.store, self.worker, farm.owner, request, stop=farm.stop).require_complete()
        found = self._known(base, shards)
        if len(found) < len(shards):  # else the same would be asked for ever
            raise StableError(
                f"it has done its jobs, and {len(shards) - len(found)} evaluations are not in the store.",
                "See what the store misses: stifarm db audit.",
                device=ready.name,
            )
        return found

    def _known(self, base: int, shards: Sequence[ShardId]) -> dict[ShardId, tuple[SplitScore, str]]:
        """What the store holds of evaluations of these shards on both halves, and on which device."""
        contents = {self._plan(base, shard).content_digest: shard for shard in shards}
        with self.farm.store.reader() as session:
            even, odd = (
                evaluations_on(session, contents, half.task_data, engine=ENGINE) for half in self.halves
            )
        return {
            shard: (_together(even[content], odd[content]), even[content].device)
            for content, shard in contents.items()
            if content in even and content in odd
        }

    def _plan(self, base: int, shard: ShardId) -> Plan:
        raised = () if shard == queries.BASE else (shard,)
        manifest = self.subject.bundle.manifest
        bits = cast(Fidelity, base)
        return configuration_plan(manifest, bits, HIGH_FIDELITY, raised, tokens=self.halves[0].tokens)


class _Failures:
    """Devices that left off; threads add to them."""

    def __init__(self) -> None:
        self.all: list[Failed] = []
        self._lock = threading.Lock()

    def add(self, device: Device, error: StifarmError) -> None:
        _log.warning("leaves off scoring importance", device=device.name, cause=str(error))
        with self._lock:
            self.all.append(Failed(device.name, error))

    def others(self, devices: Iterable[Device]) -> list[Device]:
        """The devices that go on. Raises: the last failure when there is none."""
        gone = {each.device for each in self.all}
        left = [device for device in devices if device.name not in gone]
        if not left:
            last = self.all[-1].error
            raise ResourceError(f"No device is left to score importance: {last.what}", last.remedy) from last
        return left


def _next(waiting: queue.SimpleQueue[Sequence[ShardId]]) -> Sequence[ShardId] | None:
    try:
        return waiting.get_nowait()
    except queue.Empty:
        return None


def _chunks(shards: Sequence[ShardId], devices: int) -> list[Sequence[ShardId]]:
    size = max(1, -(-len(shards) // (_SHARES * devices)))
    return [shards[i : i + size] for i in range(0, len(shards), size)]


def _together(even: Evaluated, odd: Evaluated) -> SplitScore:
    """The score of both halves: the mean loss is weighted by rows."""
    rows = even.rows + odd.rows
    loss_nano = (2 * (even.loss_nano * even.rows + odd.loss_nano * odd.rows) + rows) // (2 * rows)
    score = Score(loss_nano=loss_nano, correct=even.correct + odd.correct)
    return SplitScore(score, even.loss_nano, odd.loss_nano, even.correct)


def _half(subject: Subject, first: int) -> Work:
    """Every second row from ``first`` on as task data of its own, kept in the home and the store."""
    whole = load_task_data(subject.file)
    split = f"{whole.info.split}-{('even', 'odd')[first]}"
    rows = select_rows(subject.rows, np.arange(first, subject.count, 2))
    info = whole.info.model_copy(update={"split": split})
    data = TaskData(info, rows.input_ids, rows.token_types, rows.lengths, rows.labels)
    path: Path = store_task_data(data, subject.farm.settings.tasks)
    with subject.farm.store.session() as session:
        artifacts.save_task_data(
            session,
            digest=path.stem,
            task=subject.task,
            split=split,
            rows=data.rows,
            sequence_length=data.tokens,
            tokenizer_digest=data.info.tokenizer,
        )
    return Work(subject.bundle, subject.task, path.stem, data.rows, data.tokens)
