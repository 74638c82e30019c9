"""All that a page of results is made of, read from the store (and the labels from the task data it names)."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
from sqlalchemy.orm import Session

from db import campaign_results as queries
from db.artifacts import bundle_manifest, find_bundle, model_info, task_data
from db.campaign_results import Samples, SpotCheck
from db.campaign_samples import Found, Question, found_in
from db.documents import parse
from db.grounds import profile_record
from db.importance import latest_importance
from db.jobs import task_data_asked
from db.models import CampaignRow, CampaignRunRow, DeviceProfileRow, DeviceRow, EvaluationRow, PlanRow, RunRow
from db.runs import Accuracy, accuracy_of
from orchestrator.campaigns.spec import CampaignSpec
from orchestrator.campaigns.start import spec_of
from orchestrator.farm import Farm
from orchestrator.library import DEV_SPLIT
from orchestrator.report import unfit_in_words
from orchestrator.results.gains import expected_gains
from orchestrator.results.paired import Right
from sti_runtime.importance_profile import ImportanceProfile
from sti_runtime.manifest import Manifest
from sti_runtime.messages import VerifiedEmulation, computes_alike
from sti_runtime.model_store import ModelInfo
from sti_runtime.shard import shard_bytes
from sti_runtime.task_data import load_task_data


@dataclass(frozen=True)
class Cell:
    """One question of the run with what is known of it.

    ``right``: by dev row; None without the labels. ``kinds``: of measurements that the campaign asks.
    ``gain_nano``: expected of its plan by the additive model, where it rests on an importance profile.
    """

    found: Found
    bundle: str
    plan: PlanRow | None
    samples: Samples | None
    accuracy: Accuracy | None
    right: Right | None
    kinds: Sequence[str] = ("execute", "evaluate")
    gain_nano: int | None = None

    @property
    def asked(self) -> Question:
        """What it asks."""
        return self.found.question

    @property
    def target_ns(self) -> int | None:
        """T."""
        return self.found.target_ns

    @property
    def infeasible(self) -> bool:
        """Whether no plan meets its T."""
        return set(self.found.states) == {"infeasible"}

    @property
    def missing(self) -> bool:
        """Whether it should have samples or accuracy and has not (yet)."""
        return not self.infeasible and bool(self.lacking)

    @property
    def lacking(self) -> tuple[str, ...]:
        """What was asked of it and is not there."""
        known = {"execute": self.samples is not None, "evaluate": self.accuracy is not None}
        return tuple(
            word
            for kind, word in (("execute", "latency"), ("evaluate", "accuracy"))
            if kind in self.kinds and not known[kind]
        )

    @property
    def within(self) -> int:
        """Requests within T."""
        return sum(one <= (self.target_ns or 0) for one in self.samples.latency_ns) if self.samples else 0


@dataclass(frozen=True)
class Speed:
    """What a device's profile says of one bundle, medians: all shards read at 32 bits, the model computed."""

    device: str
    bundle: str
    task: str
    read_ns: int
    compute_ns: int
    profile: str

    @property
    def ratio(self) -> float:
        """How much longer reading takes than computing."""
        return self.read_ns / max(1, self.compute_ns)


@dataclass(frozen=True)
class DeviceFound:
    """A device of the run. ``mechanisms``: how it was slowed; ``verified``: the newest check of that."""

    row: DeviceRow
    agents: tuple[str, ...]
    systems: tuple[str, ...]
    engines: tuple[str, ...]
    threads: tuple[int, ...]
    mechanisms: tuple[str, ...]
    verified: VerifiedEmulation | None
    gates: Mapping[str, int]


@dataclass(frozen=True)
class Results:
    """A run of a campaign, finished or not.

    ``models``: what is known of the bundles' models, by bundle. ``estimates``: the gradient's profiles beside
    ``importance``. ``dev_rows``: by task, how many of how many it was measured on.
    """

    campaign: CampaignRow
    run: CampaignRunRow
    spec: CampaignSpec
    cells: tuple[Cell, ...]
    devices: tuple[DeviceFound, ...]
    speeds: tuple[Speed, ...]
    manifests: Mapping[str, Manifest]
    importance: Mapping[tuple[str, str], ImportanceProfile]
    spot_checks: tuple[SpotCheck, ...]
    cell_states: Mapping[str, int]
    models: Mapping[str, ModelInfo] = field(default_factory=dict)
    estimates: Mapping[tuple[str, str], ImportanceProfile] = field(default_factory=dict)
    dev_rows: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """Tasks in the campaign's order."""
        return tuple(dict.fromkeys(cell.asked.task for cell in self.cells))

    @cached_property
    def by_starvation(self) -> tuple[str, ...]:
        """Devices, the one that reads slowest for what it computes first; those without a profile last."""
        ratios: dict[str, list[float]] = {}
        for speed in self.speeds:
            ratios.setdefault(speed.device, []).append(speed.ratio)
        known = sorted(ratios, key=lambda name: -sum(ratios[name]) / len(ratios[name]))
        others = sorted({cell.asked.device for cell in self.cells} - ratios.keys())
        return (*known, *others)

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """T as the campaign says it, the tightest first (by what they came to where that is known)."""
        known: dict[str, int] = dict.fromkeys(self.spec.targets, 0)
        for cell in self.cells:
            known[cell.asked.target] = max(known.get(cell.asked.target, 0), cell.target_ns or 0)
        return tuple(sorted(known, key=lambda text: (known[text], text)))

    @cached_property
    def _by_policy(self) -> dict[tuple[str, str], list[Cell]]:
        found: dict[tuple[str, str], list[Cell]] = {}
        for cell in self.cells:
            found.setdefault((cell.asked.task, cell.asked.policy), []).append(cell)
        return found

    def pick(self, **asked: str) -> list[Cell]:
        """Cells whose question has these values."""
        cells: Sequence[Cell] = self.cells
        if "task" in asked and "policy" in asked:
            cells = self._by_policy.get((asked["task"], asked["policy"]), [])
        return [c for c in cells if all(getattr(c.asked, key) == value for key, value in asked.items())]

    def largest_preload(self, **asked: str) -> Cell | None:
        """Of the cells of these values the one with the largest |S|."""
        return max(self.pick(**asked), key=lambda cell: cell.asked.preload_bytes, default=None)


def gather(farm: Farm, session: Session, campaign: CampaignRow, run: CampaignRunRow) -> Results:
    """Read everything of a run. Raises: InputError; FormatError, DatasetError for damaged files."""
    spec = spec_of(campaign)
    found = found_in(session, run.id) or found_in(session, run.id, kind="evaluate")
    plans = queries.plans_by_digest(session, {one.plans[-1] for one in found if one.plans})
    rights = _Rights(farm, session, [plan.content_digest for plan in plans.values()])
    bundles = {digest: find_bundle(session, digest) for digest in {one.question.bundle for one in found}}
    manifests = {digest: bundle_manifest(row) for digest, row in bundles.items()}
    measured = queries.samples_of(session, found)
    runs = queries.runs_by_id(session, {n for samples in measured if samples for n in samples.runs})
    data = _task_data(session, found, measured, runs)
    profiles = _ranked(session, plans.values())
    gains = expected_gains(plans.values(), profiles)
    cells = []
    for one, samples in zip(found, measured, strict=True):
        plan = plans.get(one.plans[-1]) if one.plans else None
        accuracy = right = None
        if plan is not None:
            asked = one.question
            accuracy = accuracy_of(
                session,
                plan.content_digest,
                asked.task,
                engine=asked.engine,
                task_data_digest=data.get((asked.bundle, asked.task)),
            )
            if accuracy is not None:
                right = rights.of(plan.content_digest, accuracy.task_data_digest, asked.engine)
        bundle = bundles[one.question.bundle].name
        gain = None if plan is None else gains.get(plan.digest)
        cells.append(Cell(one, bundle, plan, samples, accuracy, right, spec.kinds, gain))
    rows = queries.devices_by_name(session, {one.question.device for one in found})
    importance = _importance(cells, profiles)
    states: dict[str, int] = {}
    for cell in cells:
        for state, count in cell.found.states.items():
            states[state] = states.get(state, 0) + count
    return Results(
        campaign=campaign,
        run=run,
        spec=spec,
        cells=tuple(cells),
        devices=tuple(_device(rows[name], runs) for name in sorted(rows)),
        speeds=_speeds(session, cells, manifests),
        manifests=manifests,
        importance=importance,
        spot_checks=tuple(queries.spot_checks(session, runs, {row.id: name for name, row in rows.items()})),
        cell_states=states,
        models={digest: model_info(session, row.model_digest) for digest, row in bundles.items()},
        estimates=_estimates(session, importance),
        dev_rows=_dev_rows(session, sorted({task for _, task in data}), set(data.values())),
    )


# ------------------------------------------------------------------ parts


class _Rights:
    """Which rows each content gets right. Labels are in the task data, predictions in the store."""

    def __init__(self, farm: Farm, session: Session, contents: Sequence[str]) -> None:
        self._folder = farm.settings.tasks
        self._session = session
        self._contents = set(contents)
        self._labels: dict[str, npt.NDArray[np.int64] | None] = {}
        self._rows: dict[str, dict[str, list[EvaluationRow]]] = {}
        self._known: dict[tuple[str, str, bool], Right | None] = {}

    def of(self, content: str, task_data: str, engine: str) -> Right | None:
        """By labelled row; None where the task data are not in this home."""
        key = (content, task_data, engine.endswith("-int8"))
        if key not in self._known:
            self._known[key] = self._right(content, task_data, engine)
        return self._known[key]

    def _right(self, content: str, task_data: str, engine: str) -> Right | None:
        if task_data not in self._labels:
            path = self._folder / f"{task_data}.safetensors"
            labels = load_task_data(path).labels if path.is_file() else None
            self._labels[task_data] = None if labels is None else labels[labels >= 0].astype(np.int64)
            self._rows[task_data] = queries.evaluations(self._session, self._contents, {task_data})
        known = self._labels[task_data]
        if known is None:
            return None
        for row in reversed(self._rows[task_data].get(content, [])):
            if computes_alike(row.engine, engine):
                classes = np.array(parse(row.predictions_json), np.int64)
                return classes == known if classes.shape == known.shape else None
        return None


def _device(row: DeviceRow, runs: Sequence[RunRow]) -> DeviceFound:
    mine = [run for run in runs if run.device_id == row.id]
    verified = [run.verified_json for run in mine if run.verified_json]
    gates: dict[str, int] = {}
    for run in mine:
        gates[run.gate_verdict] = gates.get(run.gate_verdict, 0) + 1
    named = [(what, one) for r in mine for what, one in (("io", r.io_mechanism), ("cpu", r.cpu_mechanism))]
    return DeviceFound(
        row=row,
        agents=_once(f"{run.agent or '?'} ({(run.agent_digest or '?')[:12]})" for run in mine),
        systems=_once(", ".join(filter(None, (run.os_build, run.kernel))) for run in mine),
        engines=_once(run.engine for run in mine),
        threads=tuple(sorted({run.threads for run in mine})),
        mechanisms=_once(f"{what}: {mechanism}" for what, mechanism in named if mechanism),
        verified=VerifiedEmulation.model_validate_json(verified[-1]) if verified else None,
        gates=gates,
    )


def _once(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(texts)))


def _speeds(session: Session, cells: Sequence[Cell], manifests: Mapping[str, Manifest]) -> tuple[Speed, ...]:
    named = {
        (cell.asked.device, cell.asked.bundle, cell.bundle, cell.asked.task): cell.plan.device_profile_digest
        for cell in cells
        if cell.plan is not None
    }
    rows: dict[str, DeviceProfileRow] = queries.profiles_by_digest(session, set(named.values()))
    speeds = []
    for (device, bundle, name, task), digest in sorted(named.items()):
        if digest not in rows:
            continue
        profile, model = profile_record(rows[digest]), manifests[bundle].model
        shards = model.layers * model.heads
        speeds.append(
            Speed(
                device=device,
                bundle=name,
                task=task,
                read_ns=shards * profile.io.median_ns(shard_bytes(model) // shards),
                compute_ns=model.layers * profile.layer_ns(model.heads, p95=False),
                profile="unfit: " + "; ".join(map(unfit_in_words, profile.unfit)) if profile.unfit else "fit",
            )
        )
    return tuple(speeds)


def _task_data(
    session: Session, found: Sequence[Found], measured: Sequence[Samples | None], runs: Sequence[RunRow]
) -> dict[tuple[str, str], str]:
    """By bundle and task: the rows that the campaign's newest run of it was timed on; where nothing was
    timed, that its newest job asked for."""
    used = {run.id: run.task_data_digest for run in runs}
    newest: dict[tuple[str, str], int] = {}
    for one, samples in zip(found, measured, strict=True):
        key = (one.question.bundle, one.question.task)
        newest[key] = max((newest.get(key, 0), *(samples.runs if samples else ())))
    jobs: dict[tuple[str, str], set[str]] = {}
    for one in found:
        jobs.setdefault((one.question.bundle, one.question.task), set()).update(job for job, _ in one.jobs)
    asked = {key: task_data_asked(session, ids) for key, ids in jobs.items() if newest[key] not in used}
    timed = {key: used[run] for key, run in newest.items() if run in used}
    return timed | {key: digest for key, digest in asked.items() if digest is not None}


def _dev_rows(session: Session, tasks: Iterable[str], used: Collection[str]) -> dict[str, tuple[int, int]]:
    """By task: rows of the data used, of those of the newest whole split."""
    counts = {}
    for task in tasks:
        data = task_data(session, task)
        mine = [row.rows for row in data if row.digest in used]
        whole = [row.rows for row in data if row.split == DEV_SPLIT]
        if mine and whole:
            counts[task] = (mine[0], whole[0])
    return counts


def _ranked(session: Session, plans: Iterable[PlanRow]) -> dict[str, ImportanceProfile]:
    """The importance profiles that plans rest on, by digest."""
    digests = {plan.importance_digest for plan in plans if plan.importance_digest}
    return {
        digest: ImportanceProfile.from_json(row.profile_json.encode(), source=f"importance {digest[:12]}")
        for digest, row in queries.importance_by_digest(session, digests).items()
    }


def _importance(
    cells: Sequence[Cell], profiles: Mapping[str, ImportanceProfile]
) -> dict[tuple[str, str], ImportanceProfile]:
    """By (bundle's name, task): the profile that the newest plans rest on."""
    named = {
        (cell.bundle, cell.asked.task): cell.plan.importance_digest or ""
        for cell in cells
        if cell.asked.policy == "sti" and cell.plan is not None
    }
    return {key: profiles[digest] for key, digest in named.items() if digest in profiles}


def _estimates(
    session: Session, importance: Mapping[tuple[str, str], ImportanceProfile]
) -> dict[tuple[str, str], ImportanceProfile]:
    """The gradient's estimate for the model of each profile, where the store holds one."""
    found = {
        key: latest_importance(session, profile.model_digest, key[1], "gradient")
        for key, profile in importance.items()
    }
    return {key: profile for key, profile in found.items() if profile is not None}
