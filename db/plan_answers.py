"""What is known of plans on their devices (``latest_plans``): two statements for as many as 500 plans.

Statements are made once, and of tables, not of their classes: who asks waits for what the ORM does.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import Row, Select, bindparam, select
from sqlalchemy.orm import Session

from db.artifacts import tokenizer_named
from db.devices import labels_of
from db.grounds import ImportanceFacts, ProfileRef, parsed_profile, predicted_interval, references
from db.measured import Measured, measured_of
from db.models import BundleRow, DeviceProfileRow, DeviceRow, ImportanceProfileRow, ModelRow, PlanRow
from db.plans import parsed_plan, place_among_answers
from db.runs import Accuracy, accuracy_listed, evaluations_listed
from db.staleness import stale_reasons, with_state
from db.statistics import Interval
from sti_runtime.plan import Plan


@dataclass(frozen=True)
class PlanAnswer:
    """Everything known of one plan on one device.

    ``predicted_interval``: where a warm request is expected (``db.grounds``); None without its profile.
    ``borrowed``: its device profile is another device's, of the same chip.
    ``measured``: by all jobs; None until the plan ran there. ``pooled``: where ``measured`` is of some jobs
    only, what it is by all of them. ``accuracy``: None until its content was evaluated.
    ``stale``: why the plan or its profile may no longer hold, in the words of ``db.staleness``; empty when
    nothing is known to have changed.
    ``mechanisms``: what slowed the device (emulated ones), as recorded by the runs.
    """

    plan: Plan
    plan_id: int
    plan_digest: str
    device: str
    identity: str
    task: str
    predicted_latency_ns: int
    predicted_median_latency_ns: int
    predicted_interval: Interval | None
    measured: Measured | None
    accuracy: Accuracy | None
    profiles: tuple[ProfileRef, ...]
    stale: tuple[str, ...]
    borrowed: bool
    emulated: bool
    mechanisms: tuple[str, ...]
    planned_wall_ns: int
    pooled: Measured | None = None


def latest_plans(
    session: Session,
    *,
    device: str | None = None,
    label: tuple[str, str] | None = None,
    task: str | None = None,
    target_ns: int | None = None,
    preload_bytes: int | None = None,
    policy: str | None = None,
    include_emulated: bool = False,
    request_kind: str = "warm",
    split: str | None = None,
) -> list[PlanAnswer]:
    """The newest plan of every (device, task, policy, T, |S|, W) that matches, with what is known of it.

    An emulated device is left out unless named by ``device`` or asked for by ``include_emulated``; so are
    devices whose name went to other hardware. ``label`` is (name, value). ``request_kind``: which requests
    ``measured`` sums up (kinds are never mixed). ``split``: whose accuracy; by default of the newest
    evaluation on a split that is neither trained nor planned on. Of a split only the task's newest data
    count (those that the bundle's model can read): accuracy on data replaced since is no answer.
    """
    wanted = {
        "device": device,
        "task": task,
        "target_ns": target_ns,
        "preload_bytes": preload_bytes,
        "policy": policy,
    }
    given = {name: value for name, value in wanted.items() if value is not None}
    query = _latest(frozenset(given), real_only=device is None and not include_emulated)
    found = [
        row
        for row in session.execute(query, given).all()
        if label is None or labels_of(row.device_labels_json).get(label[0]) == label[1]
    ]
    emulated = {row.id: row.emulated or row.device_emulated for row in found}
    measured: dict[int, Measured] = {}
    for first in range(0, len(found), _AT_ONCE):
        asked = {row.id: emulated[row.id] for row in found[first : first + _AT_ONCE]}
        measured |= measured_of(session, asked, request_kind=request_kind)
    return [_answer(row, measured.get(row.id), split) for row in found]


_AT_ONCE = 500  # plans that a statement names


_OF_PLAN = (
    "id",
    "digest",
    "content_digest",
    "device_id",
    "task",
    "bundle_digest",
    "importance_digest",
    "device_profile_digest",
    "predicted_latency_ns",
    "predicted_median_latency_ns",
    "borrowed",
    "emulated",
    "plan_json",
    "planned_wall_ns",
)
_OF_DEVICE = ("name", "identity", "engine", "emulated", "agent_digest", "labels_json")
_OF_PROFILE = (
    "id",
    "device_id",
    "digest",
    "engine",
    "job_id",
    "unfit",
    "agent_digest",
    "measured_wall_ns",
)
"""What answers are made of: of the plan as named, of device and profile with that word before it."""


@cache
def _latest(filters: frozenset[str], *, real_only: bool) -> Select[*tuple[Any, ...]]:
    """The newest plan of every question with its device and profile; made once for each set of filters."""
    plan, device, profile = PlanRow.__table__.c, DeviceRow.__table__.c, DeviceProfileRow.__table__.c
    bundle, model, scored = BundleRow.__table__.c, ModelRow.__table__.c, ImportanceProfileRow.__table__.c
    lender = DeviceRow.__table__.alias()
    newest = _newest(filters, real_only=real_only).subquery()
    whole = (
        select(
            *(plan[name] for name in _OF_PLAN),
            *(device[name].label(f"device_{name}") for name in _OF_DEVICE),
            *(profile[name].label(f"profile_{name}") for name in _OF_PROFILE),
            profile.profile_json,
            lender.c.name.label("profiled_on"),
            scored.created_wall_ns.label("importance_wall_ns"),
            scored.rows.label("importance_rows"),
            scored.method.label("importance_method"),
            model.info_json.label("model_info"),
            evaluations_listed(plan.content_digest, plan.task).label("evaluations"),
        )
        .join_from(PlanRow.__table__, newest, newest.c.id == plan.id)
        .join(DeviceRow.__table__, device.id == plan.device_id)
        .join(BundleRow.__table__, bundle.digest == plan.bundle_digest)
        .join(ModelRow.__table__, model.digest == bundle.model_digest)
        .outerjoin(DeviceProfileRow.__table__, profile.id == plan.device_profile_id)
        .outerjoin(lender, lender.c.id == profile.device_id)
        .outerjoin(ImportanceProfileRow.__table__, scored.digest == plan.importance_digest)
        .where(newest.c.place == 1)
        .order_by(device.name, plan.task, plan.policy, plan.target_ns, plan.preload_bytes, plan.working_bytes)
    )
    return with_state(whole)


def _newest(filters: frozenset[str], *, real_only: bool) -> Select[*tuple[Any, ...]]:
    """Plans that match, each with its place among those of its question, the newest first."""
    plan, device = PlanRow.__table__.c, DeviceRow.__table__.c
    query = (
        select(plan.id, place_among_answers())
        .join_from(PlanRow.__table__, DeviceRow.__table__, device.id == plan.device_id)
        .where(device.retired_wall_ns.is_(None))
    )
    columns = {
        "device": device.name,
        "task": plan.task,
        "target_ns": plan.target_ns,
        "preload_bytes": plan.preload_bytes,
        "policy": plan.policy,
    }
    for name in sorted(filters):
        query = query.where(columns[name] == bindparam(name))
    if real_only:
        query = query.where(plan.emulated.is_(False), device.emulated.is_(False))
    return query


def _answer(row: Row[Any], measured: Measured | None, split: str | None) -> PlanAnswer:
    profile = None if row.profile_id is None else parsed_profile(row.profile_json, row.profile_digest)
    importance = None
    if row.importance_wall_ns is not None:
        importance = ImportanceFacts(row.importance_wall_ns, row.importance_rows, row.importance_method)
    return PlanAnswer(
        plan=parsed_plan(row.plan_json, row.digest),
        plan_id=row.id,
        plan_digest=row.digest,
        device=row.device_name,
        identity=row.device_identity,
        task=row.task,
        predicted_latency_ns=row.predicted_latency_ns,
        predicted_median_latency_ns=row.predicted_median_latency_ns,
        predicted_interval=predicted_interval(row, profile),
        measured=measured,
        accuracy=accuracy_listed(
            row.evaluations,
            tokenizer=tokenizer_named(row.model_info),
            engine=row.device_engine if row.profile_id is None else row.profile_engine,
            split=split,
        ),
        profiles=references(row, profile, importance),
        stale=stale_reasons(row),
        borrowed=row.borrowed,
        emulated=row.emulated or row.device_emulated,
        mechanisms=measured.mechanisms if measured is not None else (),
        planned_wall_ns=row.planned_wall_ns,
    )
