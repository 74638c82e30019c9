"""One batch, done on its device: what it needs is made, then its job is run and its cells are told.

Everything goes on where it was: plans are kept with the cells before the job begins, and the job's key holds
the run and the batch, so that a controller that takes a batch up again finds the same job.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from db.campaign_plans import ranking_of_run
from db.campaign_work import CellEnd
from db.devices import list_devices
from db.importance import importance_by_digest, latest_importance
from db.models import CampaignBatchRow, CampaignCellRow
from db.plans import plan_by_digest
from db.quarantine import refuse_quarantined
from orchestrator import fleet, jobs, measure
from orchestrator.campaigns.spec import PPM, CampaignSpec, parse_target
from orchestrator.dispatch import Outcome, Request, Runner, Worker, register_job, run_job
from orchestrator.errors import HostAwayError, LinkError, StableError
from orchestrator.farm import Farm
from orchestrator.fleet import ReadyDevice
from orchestrator.health.check import check_device
from orchestrator.health.recovery import climb
from orchestrator.inventory import Device
from orchestrator.library import find_bundle
from orchestrator.measure import Question, Work
from sti_runtime.errors import InfeasiblePlanError, InputError, ResourceError
from sti_runtime.importance_profile import ImportanceProfile
from sti_runtime.plan import Plan
from sti_runtime.policies import POLICIES
from sti_runtime.profile import DeviceProfile
from sti_runtime.records import sha256_hex
from sti_runtime.units import exact_ms

if TYPE_CHECKING:
    from orchestrator.scoring import Mapper  # with PyTorch

Ends = dict[int, CellEnd]
"""How cells ended, by their row ids."""

Note = Callable[[Mapping[int, CellEnd]], None]
"""Keeps what is known of cells by now."""


@dataclass(frozen=True)
class Means:
    """What batches are done with. ``mapper``: where importance is scored, on ``cpus`` CPUs. ``in_reach``:
    whether a device can be asked from here now; one whose host is away cannot. ``runner``: runs their jobs;
    None: each in its batch's thread."""

    farm: Farm
    worker: Worker
    mapper: Mapper
    cpus: int
    in_reach: Callable[[str], bool] = lambda device: True
    runner: Runner | None = None

    def run(self, request: Request) -> Outcome:
        """Run a job to its end. Raises: as ``dispatch.run_job``."""
        farm = self.farm
        if self.runner is None:
            return run_job(farm.store, self.worker, farm.owner, request, stop=farm.stop)
        return self.runner(request, stop=farm.stop)


@dataclass(frozen=True)
class Batch:
    """A claimed batch with its cells; ``of``: the campaign's name and the run's number."""

    spec: CampaignSpec
    of: str
    row: CampaignBatchRow
    cells: Sequence[CampaignCellRow]

    @property
    def again(self) -> int:
        """The repetition that its job is: every run measures anew, and the same run the same again."""
        return 1 + self._number("again")

    @property
    def seed(self) -> int:
        """The seed of its job's orders and rows."""
        return self._number(f"seed {self.spec.seed}")

    def all(self, end: CellEnd) -> Ends:
        """Every cell ended so."""
        return {cell.id: end for cell in self.cells}

    def _number(self, purpose: str) -> int:
        return int(sha256_hex(f"{purpose}/{self.of}/{self.row.number}".encode())[:15], 16) % (1 << 30)


def perform(means: Means, batch: Batch, note: Note) -> Ends:
    """Do a batch; ``means.farm.stop`` ends it. Raises: StifarmError; KeyboardInterrupt when stopped."""
    if batch.row.kind == "importance":
        return _importance(means, batch)
    device = _device(means, batch)
    if batch.row.kind == "health":
        return _health(means, batch, device, note)
    _refuse_quarantined(means.farm, device)
    assert batch.row.task is not None
    bundle = find_bundle(means.farm, batch.row.bundle_digest)
    work = Work.of(means.farm, bundle, batch.row.task, batch.spec.draw)
    ready = _ready(means, device, work, batch.row.engine or device.engine)
    if batch.row.kind == "profile":
        return _profile(means, batch, ready, work, note)
    plans = _plans(means.farm, batch, ready, work, note)
    return (_execute if batch.row.kind == "execute" else _evaluate)(means, batch, ready, work, plans, note)


def _device(means: Means, batch: Batch) -> Device:
    """The batch's device. Raises: HostAwayError when it left the inventory after the batch was claimed."""
    name = batch.row.device
    assert name is not None
    for device in means.farm.inventory.devices:
        if device.name == name:
            return device
    raise HostAwayError(
        f"it is no longer in the inventory of {means.farm.owner}.",
        "Put it back, or end the run: stifarm campaign cancel.",
        device=name,
    )


# ------------------------------------------------------------------ the kinds


def _importance(means: Means, batch: Batch) -> Ends:
    assert batch.row.task is not None
    bundle, rows = find_bundle(means.farm, batch.row.bundle_digest), batch.spec.importance_rows
    if rows is None:
        with means.farm.store.reader() as session:
            kept = latest_importance(session, bundle.model_digest, batch.row.task, "exhaustive")
        if kept is not None:
            taken = f"the store's importance profile {kept.digest[:12]}, of {kept.rows:,} rows, is used"
            return batch.all(CellEnd("done", taken, plan_digest=kept.digest))
    from orchestrator.scoring import score_importance  # loads PyTorch

    def advance(_done: int, _total: int) -> None:
        if means.farm.stop.is_set():
            raise KeyboardInterrupt

    made = score_importance(
        means.farm,
        means.mapper,
        bundle,
        batch.row.task,
        rows=rows or measure.IMPORTANCE_ROWS,
        workers=means.cpus,
        advance=advance,
    )
    known = None if made.scored else "the store has the scores of all its shards"
    return batch.all(CellEnd("done", known, plan_digest=made.profile.digest))


def _health(means: Means, batch: Batch, device: Device, note: Note) -> Ends:
    def run(request: Request) -> Outcome:
        return _run(means, replace(request, again=batch.again), batch.all(CellEnd("running")), note)

    checked = check_device(means.farm, means.worker, device, run=run)
    if checked.known and not checked.reached:
        error = LinkError("a health check did not reach it.", device=device.name)
        climbed = climb(means.farm, means.worker, device, error, quarantine=True, in_reach=means.in_reach)
        if isinstance(climbed, HostAwayError):
            raise climbed
        if climbed is error:
            checked = check_device(means.farm, means.worker, device, run=run)
    failed = "; ".join(f"{item.item}: {item.detail}" for item in checked.items if item.verdict == "fail")
    if checked.passed:
        return batch.all(CellEnd("done", job_id=checked.job_id))
    return batch.all(CellEnd("failed", failed or "it did not pass", job_id=checked.job_id))


def _profile(means: Means, batch: Batch, ready: ReadyDevice, work: Work, note: Note) -> Ends:
    farm = means.farm
    if not batch.row.fresh:
        with suppress(InputError):  # there is none yet
            measure.stored_profile(farm, ready.device, work)
            return batch.all(CellEnd("done", "the store's profile is used"))
    units = jobs.profile_units(work.bundle.manifest, work.rows, seed=batch.seed)
    request = measure.request_of(ready, work, "profile", units, again=batch.again)
    outcome = _run(means, request, batch.all(CellEnd("running")), note)
    outcome.require_complete()
    measure.fit(farm, ready, work, outcome.job_id)
    return batch.all(CellEnd("done", job_id=outcome.job_id))


def _execute(means: Means, batch: Batch, ready: ReadyDevice, work: Work, ends: Ends, note: Note) -> Ends:
    plans = _kept_plans(means.farm, ends)
    if not plans:
        return ends
    spec = batch.spec
    units = jobs.execute_units(
        list(plans.values()),
        work.rows,
        requests=spec.requests,
        warmups=measure.WARMUPS,
        request_kind=spec.request_kind,
        io_mode="buffered" if spec.request_kind == "cached" else "direct",
        rounds=measure.ROUNDS,
        seed=batch.seed,
    )
    request = measure.request_of(ready, work, "execute", units, again=batch.again)
    outcome = _run(means, request, ends, note)
    if not outcome.results:
        outcome.require_complete()
    failed = _failures(outcome)
    return {
        cell_id: end
        if end.state != "running"
        else replace(
            end,
            state="failed" if end.plan_digest in failed else "done",
            cause=failed.get(end.plan_digest or ""),
            job_id=outcome.job_id,
        )
        for cell_id, end in ends.items()
    }


def _evaluate(means: Means, batch: Batch, ready: ReadyDevice, work: Work, ends: Ends, note: Note) -> Ends:
    plans = _kept_plans(means.farm, ends)
    outcome = None
    if plans:
        outcome = measure.score_plans(
            means.farm, means.worker, ready, work, list(plans.values()), advance=None, run=means.run
        )
    done = CellEnd("done", None if outcome else "its accuracy was known")
    return {
        cell_id: end
        if end.state != "running"
        else replace(end, state="done", cause=done.cause, job_id=None if outcome is None else outcome.job_id)
        for cell_id, end in ends.items()
    }


# ------------------------------------------------------------------ what they need


def _refuse_quarantined(farm: Farm, device: Device) -> None:
    """Raises: QuarantinedError, before anything is sent to a device that gets no job."""
    with farm.store.reader() as session:
        row = next((row for row in list_devices(session) if row.name == device.name), None)
        if row is not None:
            refuse_quarantined(session, row.id)


def _ready(means: Means, device: Device, work: Work, engine: str) -> ReadyDevice:
    """The device with bundle and rows, computing with ``engine``. Raises: DeviceError, LeaseHeldError."""
    farm, worker = means.farm, means.worker
    rows = farm.settings.tasks / f"{work.task_data}.safetensors"
    deployed = fleet.deploy(farm, worker, [device], work.bundle.bundle.path, [rows])[0]
    if deployed.error is not None:
        raise deployed.error
    ready = fleet.ready_device(farm, worker, device, work.bundle.digest)
    if engine == device.engine:
        return ready
    other = next((name for name in ready.facts.engines if name == engine), None)
    if other is None:
        raise StableError(
            f"its agent has no {engine} engine (it has: {', '.join(ready.facts.engines)}).",
            "Take it out of the campaign's engines, or bring the device an agent that has it.",
            device=device.name,
        )
    return replace(ready, device=replace(device, engine=other), target=replace(ready.target, engine=other))


def _plans(farm: Farm, batch: Batch, ready: ReadyDevice, work: Work, note: Note) -> Ends:
    """The cells with their plans: those kept before, the others planned now; kept before they are run."""
    ends = {
        cell.id: CellEnd("running", None, cell.target_ns, cell.plan_digest, cell.job_id)
        for cell in batch.cells
        if cell.plan_digest is not None
    }
    missing = [cell for cell in batch.cells if cell.plan_digest is None]
    if not missing:
        return ends
    _, profile, _ = measure.stored_profile(farm, ready.device, work)
    questions = [_question(batch.spec, cell, profile, work.bundle.manifest.model.layers) for cell in missing]
    answers = measure.make_plans(farm, ready.device, work, questions, ranking=_ranking(farm, batch))
    for cell, answer in zip(missing, answers, strict=True):
        target_ns = answer.question.target_ns
        if answer.plan is None:
            assert answer.infeasible is not None
            ends[cell.id] = CellEnd("infeasible", smallest(answer.infeasible), target_ns)
        else:
            ends[cell.id] = CellEnd("running", None, target_ns, answer.plan.digest)
    note(ends)
    return ends


def _ranking(farm: Farm, batch: Batch) -> ImportanceProfile | None:
    """What a whole run plans by, whatever is scored meanwhile; None: one that an earlier version began."""
    row = batch.row
    assert row.task is not None
    with farm.store.reader() as session:
        digest = ranking_of_run(session, row.run_id, row.bundle_digest, row.task)
        return None if digest is None else importance_by_digest(session, digest)


def smallest(error: InfeasiblePlanError | ResourceError) -> str:
    """Why a cell has no plan, exactly (``units.in_words`` rounds it)."""
    if isinstance(error, ResourceError):
        return f"no plan at any T: {error}"
    return f"no plan meets its T; the smallest that works is {exact_ms(error.smallest_target_ns)}"


def whole_model_ns(profile: DeviceProfile, layers: int) -> int:
    """What computing the whole model takes a device: its fixed cost and every layer at full width, at p95."""
    width = max(row.width for row in profile.compute)
    return profile.fixed_p95.total_ns + layers * profile.t_comp_ns(width)


def _question(spec: CampaignSpec, cell: CampaignCellRow, profile: DeviceProfile, layers: int) -> Question:
    assert cell.target is not None
    assert cell.preload_bytes is not None
    target = parse_target(cell.target)
    target_ns = target.target_ns
    if target_ns is None:
        target_ns = (target.share_ppm or 0) * whole_model_ns(profile, layers) // PPM
    policy = next(name for name in POLICIES if name == cell.policy)
    return Question(
        max(1, target_ns), cell.preload_bytes, spec.working_bytes, policy, slack=spec.slack, seed=spec.seed
    )


def _kept_plans(farm: Farm, ends: Ends) -> dict[str, Plan]:
    """The plans of the cells that have one, each once."""
    digests = sorted({end.plan_digest for end in ends.values() if end.plan_digest and end.state == "running"})
    with farm.store.reader() as session:
        return {digest: plan_by_digest(session, digest) for digest in digests}


def _run(means: Means, request: Request, ends: Ends, note: Note) -> Outcome:
    """Run a job of the cells that are running, which know it from before it begins."""
    register_job(means.farm.store, request)
    note(
        {
            cell_id: replace(end, job_id=request.job_id) if end.state == "running" else end
            for cell_id, end in ends.items()
        }
    )
    return means.run(request)


def _failures(outcome: Outcome) -> dict[str, str]:
    """By plan: why a unit of it has no result."""
    failed: dict[str, str] = {}
    for unit in outcome.request.units:
        if unit.kind != "execute" or unit.number in outcome.results:
            continue
        failure = outcome.failures.get(unit.number)
        failed[unit.plan.digest] = (
            failure.what if failure else "; ".join(outcome.rejected) or "it left no result"
        )
    return failed
