"""Queries about plans: keeping them, and answering what is known of them (``latest_plans``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from sqlalchemy import Row, Select, bindparam, func, select, update
from sqlalchemy.orm import Session, aliased

from db.artifacts import tokenizer_named
from db.devices import device_labels
from db.documents import document, now_wall_ns
from db.errors import StoreError
from db.grounds import ImportanceFacts, ProfileRef, predicted_interval, profile_record, references
from db.measured import Measured, measured_of
from db.models import BundleRow, DeviceProfileRow, DeviceRow, ImportanceProfileRow, ModelRow, PlanRow
from db.runs import Accuracy, Content, accuracies_of
from db.staleness import stale_reasons, with_state
from db.statistics import Interval
from db.upsert import save_new
from sti_runtime.errors import InputError
from sti_runtime.plan import PLAN_CAP_BYTES, Plan


@dataclass(frozen=True)
class PlanAnswer:
    """Everything known of one plan on one device.

    ``predicted_interval``: where a warm request is expected (``db.grounds``); None without its profile.
    ``borrowed``: its device profile is another device's, of the same chip.
    ``measured``: None until the plan ran there. ``accuracy``: None until its content was evaluated.
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


def save_plan(session: Session, plan: Plan, *, device_id: int, task: str) -> int:
    """Keep a plan as the planner's newest answer for a device and task; its row id is returned.

    Raises: StoreError when its bundle is not registered.
    """
    plan_id = ensure_plan(session, plan, device_id=device_id, task=task)
    session.execute(update(PlanRow).where(PlanRow.id == plan_id).values(planned_wall_ns=now_wall_ns()))
    return plan_id


def ensure_plan(session: Session, plan: Plan, *, device_id: int, task: str) -> int:
    """As ``save_plan``, but a plan that is there already does not become the newest answer."""
    digest, now = plan.digest, now_wall_ns()
    if session.get(BundleRow, plan.bundle) is None:
        raise StoreError(
            f"The store does not know bundle {plan.bundle[:12]} of plan {digest[:12]}.",
            "Build the bundle with this store: `stifarm bundle build`.",
        )
    device = session.get_one(DeviceRow, device_id)
    profile = _profile_of(session, device_id, plan.device_profile)
    save_new(
        session,
        PlanRow,
        {
            "digest": digest,
            "content_digest": plan.content_digest,
            "device_id": device_id,
            "task": task,
            "bundle_digest": plan.bundle,
            "importance_digest": plan.importance,
            "device_profile_digest": plan.device_profile,
            "device_profile_id": None if profile is None else profile.id,
            "planner": plan.planner,
            "policy": plan.policy,
            "target_ns": plan.target_ns,
            "preload_bytes": plan.preload_bytes,
            "working_bytes": plan.working_bytes,
            "sequence_length": plan.sequence_length,
            "depth": plan.submodel.depth,
            "width": plan.submodel.width,
            "mean_fidelity_milli": plan.mean_fidelity_milli,
            "preloaded_bytes": plan.preloaded_bytes,
            "streamed_bytes": plan.streamed_bytes,
            "predicted_latency_ns": plan.predicted.latency_ns,
            "predicted_median_latency_ns": plan.predicted.median_latency_ns,
            "predicted_stall_ns": plan.predicted.stall_ns,
            "within_target": plan.within_target,
            "borrowed": profile is not None and profile.device_id != device_id,
            "emulated": device.emulated or (profile is not None and profile.emulated),
            "plan_json": document(plan),
            "created_wall_ns": now,
            "planned_wall_ns": now,
        },
    )
    query = select(PlanRow.id).where(
        PlanRow.device_id == device_id, PlanRow.task == task, PlanRow.digest == digest
    )
    return session.scalars(query).one()


def plan_by_digest(session: Session, digest: str) -> Plan:
    """The plan whose digest starts so. Raises: InputError when none or several do."""
    query = select(PlanRow).where(PlanRow.digest.startswith(digest, autoescape=True))
    rows = {row.digest: row for row in session.scalars(query)}
    if len(rows) != 1:
        raise InputError(
            f"{digest!r} starts the digests of {len(rows)} plans.",
            "See `stifarm plans query`, and give enough of one's digest.",
        )
    return _plan(next(iter(rows.values())))


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
        for row in session.execute(query, given)
        if label is None or device_labels(row.DeviceRow).get(label[0]) == label[1]
    ]
    answers = []
    for first in range(0, len(found), _AT_ONCE):
        some = found[first : first + _AT_ONCE]
        emulated = {row.PlanRow.id: row.PlanRow.emulated or row.DeviceRow.emulated for row in some}
        measured = measured_of(session, emulated, request_kind=request_kind)
        contents = [_content(row) for row in some]
        reached = accuracies_of(session, set(contents), split=split)
        answers += [
            _answer(row, measured.get(row.PlanRow.id), reached.get(content))
            for row, content in zip(some, contents, strict=True)
        ]
    return answers


_AT_ONCE = 500  # plans that statements name


@cache
def _latest(filters: frozenset[str], *, real_only: bool) -> Select[*tuple[Any, ...]]:
    """The newest plan of every question with its device and profile; made once for each set of filters."""
    table = PlanRow
    question = (
        table.device_id,
        table.task,
        table.policy,
        table.target_ns,
        table.preload_bytes,
        table.working_bytes,
    )
    newest = func.row_number().over(
        partition_by=question, order_by=(table.planned_wall_ns.desc(), table.id.desc())
    )
    query = (
        select(table.id, newest.label("place"))
        .join(DeviceRow, DeviceRow.id == table.device_id)
        .where(DeviceRow.retired_wall_ns.is_(None))
    )
    columns = {
        "device": DeviceRow.name,
        "task": table.task,
        "target_ns": table.target_ns,
        "preload_bytes": table.preload_bytes,
        "policy": table.policy,
    }
    for name in sorted(filters):
        query = query.where(columns[name] == bindparam(name))
    if real_only:
        query = query.where(table.emulated.is_(False), DeviceRow.emulated.is_(False))
    placed = query.subquery()
    lender = aliased(DeviceRow)
    whole = (
        select(
            table,
            DeviceRow,
            DeviceProfileRow,
            ImportanceProfileRow.created_wall_ns.label("importance_wall_ns"),
            ImportanceProfileRow.rows.label("importance_rows"),
            lender.name.label("profiled_device"),
            ModelRow.info_json.label("model_info"),
        )
        .join(placed, placed.c.id == table.id)
        .join(DeviceRow, DeviceRow.id == table.device_id)
        .join(BundleRow, BundleRow.digest == table.bundle_digest)
        .join(ModelRow, ModelRow.digest == BundleRow.model_digest)
        .outerjoin(DeviceProfileRow, DeviceProfileRow.id == table.device_profile_id)
        .outerjoin(lender, lender.id == DeviceProfileRow.device_id)
        .outerjoin(ImportanceProfileRow, ImportanceProfileRow.digest == table.importance_digest)
        .where(placed.c.place == 1)
        .order_by(DeviceRow.name, table.task, table.policy, table.target_ns, table.preload_bytes)
        .order_by(table.working_bytes)
    )
    return with_state(whole)


def _content(row: Row[Any]) -> Content:
    stored: DeviceProfileRow | None = row.DeviceProfileRow
    engine = row.DeviceRow.engine if stored is None else stored.engine
    plan: PlanRow = row.PlanRow
    return Content(plan.content_digest, plan.task, tokenizer_named(row.model_info), engine)


def _answer(row: Row[Any], measured: Measured | None, accuracy: Accuracy | None) -> PlanAnswer:
    plan: PlanRow = row.PlanRow
    device: DeviceRow = row.DeviceRow
    stored: DeviceProfileRow | None = row.DeviceProfileRow
    profile = None if stored is None else profile_record(stored)
    importance = None
    if row.importance_wall_ns is not None:
        importance = ImportanceFacts(row.importance_wall_ns, row.importance_rows)
    return PlanAnswer(
        plan=_plan(plan),
        plan_id=plan.id,
        plan_digest=plan.digest,
        device=device.name,
        identity=device.identity,
        task=plan.task,
        predicted_latency_ns=plan.predicted_latency_ns,
        predicted_median_latency_ns=plan.predicted_median_latency_ns,
        predicted_interval=predicted_interval(plan, profile),
        measured=measured,
        accuracy=accuracy,
        profiles=references(plan, stored, profile, row.profiled_device, importance),
        stale=stale_reasons(plan, device, stored, row),
        borrowed=plan.borrowed,
        emulated=plan.emulated or device.emulated,
        mechanisms=measured.mechanisms if measured is not None else (),
        planned_wall_ns=plan.planned_wall_ns,
    )


def _profile_of(session: Session, device_id: int, digest: str) -> DeviceProfileRow | None:
    """The named profile: the device's own, else the device's it was borrowed from."""
    rows: Sequence[DeviceProfileRow] = session.scalars(
        select(DeviceProfileRow).where(DeviceProfileRow.digest == digest).order_by(DeviceProfileRow.id)
    ).all()
    return next((row for row in rows if row.device_id == device_id), rows[0] if rows else None)


def _plan(row: PlanRow) -> Plan:
    return _parsed(row.plan_json, row.digest)


@lru_cache(maxsize=256)
def _parsed(text: str, digest: str) -> Plan:
    # Devices alike have plans alike, and who asks once asks again.
    return Plan.from_json(text.encode(), source=f"plan {digest[:12]}", cap_bytes=PLAN_CAP_BYTES)
