"""What is asked of devices: profiles, plans, timed runs, accuracy. Each step reuses what the store holds."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import structlog

from db import importance as importance_queries
from db.borrowing import borrowed_profile
from db.devices import find_device
from db.grounds import profile_record
from db.measured import measured_of
from db.plan_answers import PlanAnswer, latest_plans
from db.plans import save_plan
from db.profiles import latest_profile, profile_of_job, profile_samples, save_device_profile
from db.runs import accuracy_of, predictions_of
from orchestrator import jobs
from orchestrator.dispatch import Outcome, Request, Worker, next_repetition, run_job
from orchestrator.drawn import Draw, dev_rows
from orchestrator.farm import Farm
from orchestrator.fleet import QUEUE_DEPTH, ReadyDevice
from orchestrator.following import Advance
from orchestrator.inventory import Device
from orchestrator.library import KnownBundle, model_of
from sti_runtime.errors import InfeasiblePlanError, InputError, ResourceError
from sti_runtime.importance_profile import ImportanceProfile, Method
from sti_runtime.messages import IoMode, RequestKind, Unit
from sti_runtime.plan import Plan, Policy
from sti_runtime.policies import plan_policy
from sti_runtime.profile import DeviceProfile
from sti_runtime.profile_fit import fit_profile

_log = structlog.get_logger(__name__)

WARMUPS = 2
ROUNDS = 2


@dataclass(frozen=True)
class Work:
    """The bundle and the task's rows that devices work with."""

    bundle: KnownBundle
    task: str
    task_data: str
    rows: int
    tokens: int

    @classmethod
    def of(cls, farm: Farm, bundle: KnownBundle, task: str, draw: Draw | None = None) -> Work:
        """With the dev rows, which no training or planning has seen, or a draw of them. Raises: InputError,
        ResourceError."""
        digest, data = dev_rows(farm, task, model_of(farm, bundle), draw)
        return cls(bundle, task, digest, data.rows, data.tokens)


def request_of(
    ready: ReadyDevice, work: Work, kind: str, units: tuple[Unit, ...], *, again: int = 0
) -> Request:
    """The request of a job on a device; ``again``: which repetition of it."""
    return Request(
        device=ready.name,
        device_id=ready.device_id,
        agent_digest=ready.facts.agent_digest,
        target=ready.target,
        kind=kind,
        bundle=work.bundle.digest,
        task_data=work.task_data,
        units=units,
        again=again,
    )


# ------------------------------------------------------------------ device profile


@dataclass(frozen=True)
class Profiled:
    """A device's profile; ``ran`` False when the store already had it."""

    device: str
    profile: DeviceProfile
    ran: bool


def profile_device(
    farm: Farm, worker: Worker, ready: ReadyDevice, work: Work, *, again: bool, advance: Advance | None
) -> Profiled:
    """Measure and fit a device, or reuse the fit of the same job. Raises: DeviceError, InputError."""
    units = jobs.profile_units(work.bundle.manifest, work.rows)
    request = request_of(ready, work, "profile", units)
    if again:
        request = next_repetition(farm.store, request)
    outcome = run_job(farm.store, worker, farm.owner, request, advance=advance, stop=farm.stop)
    outcome.require_complete()
    return Profiled(ready.name, fit(farm, ready, work, outcome.job_id), outcome.ran)


def fit(farm: Farm, ready: ReadyDevice, work: Work, job_id: str) -> DeviceProfile:
    """Fit the samples of one profile job and keep the result. Raises: InputError, FormatError."""
    manifest = work.bundle.manifest
    with farm.store.session() as session:
        samples = profile_samples(
            session,
            device_id=ready.device_id,
            bundle_digest=work.bundle.digest,
            engine=ready.target.engine,
            job_id=job_id,
        )
        fitted = None if samples is not None else profile_of_job(session, ready.device_id, job_id)
        if fitted is not None:
            return fitted  # its samples have been compacted
        if samples is None:
            raise InputError(
                f"Job {job_id} left no valid samples of {ready.name}.",
                "Run stifarm profile again; stifarm doctor tells why samples may be invalid.",
            )
        profile = fit_profile(
            bundle=work.bundle.digest,
            engine=ready.target.engine,
            sequence_length=work.tokens,
            threads=ready.target.threads,
            queue_depth=ready.target.queue_depth,
            emulated=ready.device.emulated,
            widths={submodel.width for submodel in manifest.submodels},
            fidelities=manifest.fidelities,
            io=samples.io,
            beside=samples.beside,
            compute=samples.compute,
            fixed=samples.fixed,
        )
        save_device_profile(
            session,
            profile,
            device_id=ready.device_id,
            job_id=job_id,
            measured_wall_ns=samples.newest_wall_ns,
        )
    return profile


# ------------------------------------------------------------------ planning


@dataclass(frozen=True)
class Question:
    """What a plan is wanted for. Units: ns, bytes. ``importance``: as ``importance_of`` takes a method."""

    target_ns: int
    preload_bytes: int
    working_bytes: int
    policy: Policy = "sti"
    slack: bool = True
    seed: int = 0
    importance: Method | None = None


@dataclass(frozen=True)
class Answer:
    """A plan, or why there is none (``infeasible``): not at this T, or with these buffers at no T."""

    device: str
    question: Question
    plan: Plan | None
    infeasible: InfeasiblePlanError | ResourceError | None


IMPORTANCE_ROWS = 500
"""Labelled rows of the profile split that shards are scored on, unless asked otherwise."""


def importance_of(
    farm: Farm, bundle: KnownBundle, task: str, method: Method | None = None
) -> ImportanceProfile:
    """The newest importance profile of the bundle's model by ``method``; None: exhaustive, else gradient.

    Raises: InputError.
    """
    with farm.store.reader() as session:
        profile = importance_queries.latest_importance(session, bundle.model_digest, task, method)
    if profile is None:
        by = "" if method is None else f" by method {method}"
        raise InputError(
            f"There is no importance profile of {bundle.name} on {task}{by}.",
            f"Make one: stifarm importance{' --method gradient' if method == 'gradient' else ''}"
            " (it runs on this host, no device is needed).",
        )
    return profile


def stored_profile(farm: Farm, device: Device, work: Work) -> tuple[int, DeviceProfile, bool]:
    """(device row, newest profile) of a device as the inventory now has it: threads and stated rates too.

    A device that has none borrows that of another of the same chip; third: whether it did.
    Raises: StoreError, InputError.
    """
    spec = device.emulate
    with farm.store.reader() as session:
        row = find_device(session, name=device.name)
        if row is None:
            raise InputError(
                f"{device.name}: the store has no profile of it, for it was never asked.",
                f"Measure it: stifarm profile --devices {device.name}.",
            )
        found = latest_profile(
            session,
            device_id=row.id,
            bundle_digest=work.bundle.digest,
            engine=device.engine,
            sequence_length=work.tokens,
            threads=device.threads or len(device.cpus) or None,
            queue_depth=QUEUE_DEPTH,
            rates=(None, None) if spec is None else (spec.read_bytes_per_s, spec.cpu_share_milli),
        )
        lent = None
        if found is None and spec is None:
            lent = borrowed_profile(
                session,
                device_id=row.id,
                bundle_digest=work.bundle.digest,
                engine=device.engine,
                sequence_length=work.tokens,
                threads=device.threads or len(device.cpus) or None,
                queue_depth=QUEUE_DEPTH,
            )
    if lent is not None:
        owner, found = lent
        _log.warning("has no profile; borrows one of the same chip", device=device.name, of=owner.name)
    if found is None:
        raise InputError(
            f"{device.name}: there is no profile for bundle {work.bundle.name}, as the inventory now has it.",
            f"Measure it: stifarm profile --devices {device.name}.",
        )
    return row.id, profile_record(found), lent is not None


def make_plans(
    farm: Farm,
    device: Device,
    work: Work,
    questions: Sequence[Question],
    *,
    ranking: ImportanceProfile | None = None,
) -> list[Answer]:
    """Plan for one device from the store alone; feasible plans are kept there. ``ranking``: what all are
    planned by; None: by the importance that each question says.

    Raises: InputError, StoreError when a profile is missing; SolverError.
    """
    name = device.name
    device_id, profile, borrowed = stored_profile(farm, device, work)
    ranked = {
        method: ranking or importance_of(farm, work.bundle, work.task, method)
        for method in {q.importance for q in questions}
    }
    answers = []
    for question in questions:
        try:
            plan = plan_policy(
                question.policy,
                work.bundle.manifest,
                ranked[question.importance],
                profile,
                target_ns=question.target_ns,
                preload_bytes=question.preload_bytes,
                working_bytes=question.working_bytes,
                seed=question.seed,
                slack=question.slack,
            )
        except (InfeasiblePlanError, ResourceError) as error:
            answers.append(Answer(name, question, None, error))
            continue
        if borrowed:
            plan = plan.model_copy(update={"flags": (*plan.flags, "borrowed-profile")})
        with farm.store.session() as session:
            save_plan(session, plan, device_id=device_id, task=work.task)
        answers.append(Answer(name, question, plan, None))
    return answers


# ------------------------------------------------------------------ runs and accuracy


@dataclass(frozen=True)
class RunSettings:
    """How plans are timed: ``requests`` counted requests of each plan, over ROUNDS rounds."""

    requests: int
    request_kind: RequestKind = "warm"
    io_mode: IoMode = "direct"
    seed: int = 0


def run_plans(
    farm: Farm,
    worker: Worker,
    ready: ReadyDevice,
    work: Work,
    plans: Sequence[Plan],
    settings: RunSettings,
    *,
    again: bool,
    advance: Advance | None,
) -> Outcome:
    """Time plans on a device, interleaved. Raises: DeviceError."""
    units = jobs.execute_units(
        plans,
        work.rows,
        requests=settings.requests,
        warmups=WARMUPS,
        request_kind=settings.request_kind,
        io_mode=settings.io_mode,
        rounds=ROUNDS,
        seed=settings.seed,
    )
    request = request_of(ready, work, "execute", units)
    if again:
        request = next_repetition(farm.store, request)
    outcome = run_job(farm.store, worker, farm.owner, request, advance=advance, stop=farm.stop)
    outcome.require_complete()
    return outcome


def score_plans(
    farm: Farm,
    worker: Worker,
    ready: ReadyDevice,
    work: Work,
    plans: Sequence[Plan],
    *,
    advance: Advance | None,
    run: Callable[[Request], Outcome] | None = None,
) -> Outcome | None:
    """Measure the accuracy of every plan content the store has none of; None when there is nothing to do.

    A plan's accuracy does not depend on the device but on how its engine computes, so any device whose
    engine computes alike will do. ``run``: runs the job. Raises: DeviceError.
    """
    with farm.store.reader() as session:

        def known(plan: Plan) -> bool:
            found = accuracy_of(
                session,
                plan.content_digest,
                work.task,
                task_data_digest=work.task_data,
                engine=ready.target.engine,
            )
            return found is not None

        missing = [plan for plan in plans if not known(plan)]
    if not missing:
        return None
    request = request_of(ready, work, "evaluate", jobs.evaluate_units(missing))
    # Nothing is timed: a slowed device need not be slow for this, nor this machine use a part of its CPUs.
    whole = ready.device.transport == "local" and not ready.device.cpus
    threads = max(1, len(ready.facts.cpus)) if whole else ready.target.threads
    request = replace(request, target=replace(request.target, emulation=None, threads=threads))
    if run is not None:
        outcome = run(request)
    else:
        outcome = run_job(farm.store, worker, farm.owner, request, advance=advance, stop=farm.stop)
    outcome.require_complete()
    return outcome


def spot_check(farm: Farm, work: Work, outcomes: Sequence[Outcome]) -> tuple[int, int]:
    """Compare the classes that timed requests gave with those of the evaluations: (compared, different).

    A plan's accuracy is measured once, on one device; this is the check that the others agree.
    """
    compared = different = 0
    with farm.store.reader() as session:
        for outcome in outcomes:
            for unit in outcome.request.units:
                result = outcome.results.get(unit.number)
                if unit.kind != "execute" or result is None or result.kind != "execute":
                    continue
                expected = predictions_of(
                    session, unit.plan.content_digest, work.task_data, engine=outcome.request.target.engine
                )
                if expected is None or len(expected) != work.rows:  # rows without labels have no prediction
                    continue
                for request in result.requests:
                    best = max(range(len(request.logits)), key=request.logits.__getitem__)
                    compared += 1
                    different += best != expected[request.row]
    return compared, different


def answers_for(
    farm: Farm,
    devices: Sequence[str],
    *,
    task: str | None = None,
    label: tuple[str, str] | None = None,
    target_ns: int | None = None,
    preload_bytes: int | None = None,
    policy: str | None = None,
    include_emulated: bool = True,
    request_kind: str = "warm",
    keep: Callable[[PlanAnswer], bool] = lambda _: True,
) -> list[PlanAnswer]:
    """Plan answers of the store for several devices, in their order; all devices without names."""
    found: list[PlanAnswer] = []
    names: list[str | None] = list(devices) or [None]
    with farm.store.reader(quick=True) as session:
        for name in names:
            found.extend(
                latest_plans(
                    session,
                    device=name,
                    label=label,
                    task=task,
                    target_ns=target_ns,
                    preload_bytes=preload_bytes,
                    policy=policy,
                    include_emulated=include_emulated,
                    request_kind=request_kind,
                )
            )
    return [answer for answer in found if keep(answer)]


def of_jobs(
    farm: Farm, answers: Sequence[PlanAnswer], jobs_done: Collection[str], *, request_kind: str = "warm"
) -> list[PlanAnswer]:
    """Answers whose ``measured`` is of these jobs only; ``pooled`` is what it was before."""
    plans = {answer.plan_id: answer.emulated for answer in answers}
    with farm.store.reader() as session:
        found = measured_of(session, plans, request_kind=request_kind, jobs=jobs_done)
    return [replace(answer, measured=found.get(answer.plan_id), pooled=answer.measured) for answer in answers]
