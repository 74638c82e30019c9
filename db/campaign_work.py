"""Queries by which controllers share out the work of campaigns: claims, their renewal, how work ended.

A claim is a conditional UPDATE of one batch, so that of two controllers one has it. It runs out by the
database's clock; the same owner takes its own up again at once, as a controller that was killed does.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, and_, case, exists, func, or_, select, update
from sqlalchemy.orm import Session

from db.documents import storable
from db.leases import database_wall_ns
from db.models import CampaignBatchRow, CampaignCellRow, CampaignRow, CampaignRunRow

CLAIM_TTL_NS = 120 * 10**9
PLANNED_KINDS = ("execute", "evaluate")
REQUESTS = 30
"""Counted requests of a cell where a campaign does not say how many."""

_Batch, _Cell, _Run = CampaignBatchRow, CampaignCellRow, CampaignRunRow


@dataclass(frozen=True)
class Waiting:
    """The first batch of a run that a device (None: the host) has not begun.

    ``ready``: what it needs has ended and its time has come. ``left``: batches that wait there in all.
    """

    batch_id: int
    run_id: int
    campaign: str
    priority: int
    due_wall_ns: int
    deadline_wall_ns: int | None
    started_wall_ns: int | None
    device: str | None
    kind: str
    ready: bool
    left: int


@dataclass(frozen=True)
class CellEnd:
    """How a cell ended, or what is known of it so far (``state`` running). ``plan_digest``: of an importance
    cell the digest of its profile, which the run plans by."""

    state: str
    cause: str | None = None
    target_ns: int | None = None
    plan_digest: str | None = None
    job_id: str | None = None


def waiting(session: Session, now_wall_ns: int) -> list[Waiting]:
    """For every open run and device the batch that is next there."""
    firsts = (
        select(_Batch.run_id, _Batch.device, func.min(_Batch.number).label("number"), func.count().label("n"))
        .join(_Run, _Run.id == _Batch.run_id)
        .where(_Batch.state == "queued", _Run.state == "running")
        .group_by(_Batch.run_id, _Batch.device)
        .subquery()
    )
    blocking = _importance_left(session)
    query = (
        select(_Batch, _Run, CampaignRow.name, CampaignRow.priority, firsts.c.n)
        .join(firsts, and_(firsts.c.run_id == _Batch.run_id, firsts.c.number == _Batch.number))
        .join(_Run, _Run.id == _Batch.run_id)
        .join(CampaignRow, CampaignRow.id == _Run.campaign_id)
        .order_by(_Run.due_wall_ns, _Run.id, _Batch.number)
    )
    return [
        Waiting(
            batch_id=batch.id,
            run_id=run.id,
            campaign=name,
            priority=priority,
            due_wall_ns=run.due_wall_ns,
            deadline_wall_ns=run.deadline_wall_ns,
            started_wall_ns=run.started_wall_ns,
            device=batch.device,
            kind=batch.kind,
            ready=batch.not_before_wall_ns <= now_wall_ns
            and not (batch.kind in PLANNED_KINDS and (run.id, batch.bundle_digest, batch.task) in blocking),
            left=left,
        )
        for batch, run, name, priority, left in session.execute(query)
    ]


def _importance_left(session: Session) -> set[tuple[int, str | None, str | None]]:
    """(run, bundle, task) of the importance profiles that open runs have not made so far."""
    query = (
        select(_Batch.run_id, _Batch.bundle_digest, _Batch.task)
        .join(_Run, _Run.id == _Batch.run_id)
        .where(_Run.state == "running", _Batch.kind == "importance", _Batch.state != "ended")
    )
    return {(run, bundle, task) for run, bundle, task in session.execute(query)}


def under_way(session: Session) -> Sequence[CampaignBatchRow]:
    """Batches that a controller works on, or did when it died."""
    return session.scalars(select(_Batch).where(_Batch.state == "running").order_by(_Batch.id)).all()


def cancelled_under_way(session: Session, batch_ids: Collection[int]) -> set[int]:
    """Those of the batches whose runs have been cancelled."""
    query = select(_Batch.id).join(_Run, _Run.id == _Batch.run_id)
    return set(session.scalars(query.where(_Batch.id.in_(batch_ids), _Run.state == "cancelled")))


def claim(session: Session, batch_id: int, owner: str, *, cancelled: bool = False) -> bool:
    """Claim a batch that waits, or that is ours or nobody's any more.

    ``cancelled``: one of a cancelled run, to end it.
    """
    now = database_wall_ns(session)
    free = or_(
        _Batch.state == "queued",
        and_(
            _Batch.state == "running",
            or_(_Batch.owner == owner, func.coalesce(_Batch.claimed_until_wall_ns, 0) < now),
        ),
    )
    run_is = _Run.state == ("cancelled" if cancelled else "running")
    wanted = exists().where(_Run.id == _Batch.run_id, run_is)
    found = session.execute(
        update(_Batch)
        .where(_Batch.id == batch_id, free, wanted)
        .values(
            owner=owner,
            claimed_until_wall_ns=now + CLAIM_TTL_NS,
            started_wall_ns=case((_Batch.state == "queued", now), else_=_Batch.started_wall_ns),
            state="running",
        )
        .returning(_Batch.run_id)
        .execution_options(synchronize_session=False)
    ).scalar_one_or_none()
    if found is None:
        return False
    session.execute(
        update(_Cell).where(_Cell.batch_id == batch_id, _Cell.state == "queued").values(state="running")
    )
    session.execute(
        update(_Run).where(_Run.id == found, _Run.started_wall_ns.is_(None)).values(started_wall_ns=now)
    )
    return True


def renew(session: Session, batch_ids: Collection[int], owner: str) -> set[int]:
    """Extend claims that are still ours; which these are."""
    until = database_wall_ns(session) + CLAIM_TTL_NS
    return set(
        session.scalars(
            update(_Batch)
            .where(_Batch.id.in_(batch_ids), _ours(owner))
            .values(claimed_until_wall_ns=until)
            .returning(_Batch.id)
        )
    )


def cells_of(session: Session, batch_id: int) -> Sequence[CampaignCellRow]:
    """The cells of a batch in order."""
    return session.scalars(select(_Cell).where(_Cell.batch_id == batch_id).order_by(_Cell.number)).all()


def note_cells(session: Session, batch_id: int, owner: str, ends: Mapping[int, CellEnd]) -> bool:
    """Keep what is known of cells by now; False when the claim was lost, and nothing is changed."""
    held = select(_Batch.id).where(_Batch.id == batch_id, _ours(owner)).with_for_update()
    if session.scalars(held).one_or_none() is None:
        return False
    for cell_id, end in ends.items():
        session.execute(
            update(_Cell)
            .where(_Cell.id == cell_id, _Cell.batch_id == batch_id)
            .values(
                state=end.state,
                cause=None if end.cause is None else storable(end.cause),
                target_ns=end.target_ns,
                plan_digest=end.plan_digest,
                job_id=end.job_id,
            )
        )
    return True


def end_batch(session: Session, batch_id: int, owner: str, ends: Mapping[int, CellEnd]) -> bool:
    """End a batch with its cells; False when the claim was lost, and nothing is changed."""
    if not note_cells(session, batch_id, owner, ends):
        return False
    now = database_wall_ns(session)
    session.execute(
        update(_Batch).where(_Batch.id == batch_id).values(state="ended", owner=None, ended_wall_ns=now)
    )
    return True


def put_back(
    session: Session, batch_id: int, owner: str, *, cause: str | None, wait_ns: int = 0, failed: bool = False
) -> bool:
    """Give a batch back to the queue, to be tried again after ``wait_ns``; False when the claim was lost."""
    not_before = database_wall_ns(session) + wait_ns
    done = session.execute(
        update(_Batch)
        .where(_Batch.id == batch_id, _ours(owner))
        .values(
            state="queued",
            owner=None,
            not_before_wall_ns=not_before,
            cause=None if cause is None else storable(cause),
            tries=_Batch.tries + int(failed),
        )
        .returning(_Batch.id)
    ).all()
    if done:
        session.execute(
            update(_Cell).where(_Cell.batch_id == batch_id, _Cell.state == "running").values(state="queued")
        )
    return bool(done)


def skip_dependents(session: Session, batch: CampaignBatchRow, cause: str) -> None:
    """Skip what cannot be had without a batch that failed: of an importance the plans of its bundle and task,
    of a device's profile (when none of its repeats is left or done) those on it."""
    same = [_Batch.run_id == batch.run_id, _Batch.bundle_digest == batch.bundle_digest]
    same.append(_Batch.task == batch.task)
    if batch.kind == "profile":
        same += [_Batch.device == batch.device, _Batch.engine == batch.engine]
        done = exists().where(_Cell.batch_id == _Batch.id, _Cell.state.in_(("done", "queued", "running")))
        others = select(_Batch.id).where(*same, _Batch.kind == "profile", _Batch.id != batch.id, done)
        if session.scalars(others).first() is not None:
            return
    _skip(session, [*same, _Batch.kind.in_(PLANNED_KINDS)], "skipped", cause)


def fail_device(session: Session, batch: CampaignBatchRow, cause: str) -> None:
    """Give up the rest of a run on a device that cannot be reached."""
    _skip(session, [_Batch.run_id == batch.run_id, _Batch.device == batch.device], "failed", cause)


def left(session: Session, run_id: int | None = None) -> Mapping[int, dict[tuple[str | None, str], int]]:
    """By run: how many batches of each (device, kind) have not ended; of one run or of all open ones. Without
    those for which what the store has will do, which take no time."""
    query = (
        select(_Batch.run_id, _Batch.device, _Batch.kind, func.count())
        .join(_Run, _Run.id == _Batch.run_id)
        .where(_Batch.state != "ended", _Batch.fresh)
        .group_by(_Batch.run_id, _Batch.device, _Batch.kind)
    )
    query = query.where(_Run.state == "running" if run_id is None else _Run.id == run_id)
    found: dict[int, dict[tuple[str | None, str], int]] = {}
    for run, device, kind, count in session.execute(query):
        found.setdefault(run, {})[device, kind] = count
    return found


def had(session: Session, now_wall_ns: int) -> Mapping[tuple[int, str | None], int]:
    """ns of each device that each open run has had since the youngest of them began."""
    youngest = select(func.max(_Run.started_wall_ns)).where(_Run.state == "running").scalar_subquery()
    spent = func.sum(func.coalesce(_Batch.ended_wall_ns, now_wall_ns) - _Batch.started_wall_ns)
    query = (
        select(_Batch.run_id, _Batch.device, spent)
        .join(_Run, _Run.id == _Batch.run_id)
        .where(_Run.state == "running", _Batch.state != "queued", _Batch.started_wall_ns >= youngest)
        .group_by(_Batch.run_id, _Batch.device)
    )
    return {(run, device): int(spent_ns or 0) for run, device, spent_ns in session.execute(query)}


def sizes(session: Session, run_id: int) -> Mapping[tuple[str | None, str], tuple[int, int]]:
    """By (device, kind) of a run: how many batches it has, and how many parts they are of in all.

    A part is what the time that a batch takes goes with: of execute a request to a cell, else a cell.
    """
    query = (
        select(_Batch.device, _Batch.kind, func.count(_Batch.id.distinct()), func.count())
        .join(_Cell, _Cell.batch_id == _Batch.id)
        .where(_Batch.run_id == run_id)
        .group_by(_Batch.device, _Batch.kind)
    )
    campaign_id = session.get_one(_Run, run_id).campaign_id
    requests = _requests(session, {campaign_id})[campaign_id]
    return {
        (device, kind): (batches, cells * (requests if kind == "execute" else 1))
        for device, kind, batches, cells in session.execute(query)
    }


def durations(session: Session, *, limit: int = 1000) -> list[tuple[str | None, str, int, int]]:
    """(device, kind, parts, ns) of the newest batches that ended with something measured; ``parts`` as in
    ``sizes``, of the cells that were measured. What the store knew, or what had no plan, took no time."""
    measured = and_(
        _Cell.batch_id == _Batch.id,
        _Cell.state == "done",
        or_(_Cell.job_id.is_not(None), _Cell.cause.is_(None)),
    )
    cells = select(func.count()).select_from(_Cell).where(measured).correlate(_Batch).scalar_subquery()
    query = (
        select(
            _Batch.device, _Batch.kind, _Batch.ended_wall_ns - _Batch.started_wall_ns, cells, _Run.campaign_id
        )
        .join(_Run, _Run.id == _Batch.run_id)
        .where(_Batch.state == "ended", _Batch.started_wall_ns.is_not(None), exists().where(measured))
        .order_by(_Batch.ended_wall_ns.desc())
        .limit(limit)
    )
    found = session.execute(query).all()
    requests = _requests(session, {campaign_id for *_, campaign_id in found})
    return [
        (device, kind, count * (requests[campaign_id] if kind == "execute" else 1), max(0, spent or 0))
        for device, kind, spent, count, campaign_id in found
    ]


def _requests(session: Session, campaign_ids: Collection[int]) -> dict[int, int]:
    """How many counted requests campaigns ask of a cell, as they are now."""
    query = select(CampaignRow.id, CampaignRow.spec_json).where(CampaignRow.id.in_(campaign_ids))
    return {id_: int(json.loads(spec).get("requests", REQUESTS)) for id_, spec in session.execute(query)}


def last_moves(session: Session) -> Mapping[str | None, int]:
    """By device: when a batch of it last began, ended, or was claimed for, of the runs that are open."""
    moved = func.max(
        case(
            (_Batch.state == "ended", _Batch.ended_wall_ns),
            else_=func.coalesce(_Batch.claimed_until_wall_ns, _Batch.started_wall_ns),
        )
    )
    query = select(_Batch.device, moved).join(_Run, _Run.id == _Batch.run_id).where(_Run.state == "running")
    return {
        device: int(at) for device, at in session.execute(query.group_by(_Batch.device)) if at is not None
    }


def put_back_causes(session: Session, run_id: int, *, limit: int = 5) -> list[str]:
    """Why batches of a run were put back into the queue, each cause once."""
    query = select(_Batch.device, _Batch.cause).where(_Batch.run_id == run_id, _Batch.state == "queued")
    rows = session.execute(query.where(_Batch.cause.is_not(None)).distinct().limit(limit))
    return [str(cause) if (device or "") in str(cause) else f"{device}: {cause}" for device, cause in rows]


def left_in(session: Session, run_id: int) -> int:
    """How many batches of a run have not ended."""
    query = select(func.count()).where(_Batch.run_id == run_id, _Batch.state != "ended")
    return session.scalar(query) or 0


def _ours(owner: str) -> ColumnElement[bool]:
    return and_(_Batch.state == "running", _Batch.owner == owner)


def _skip(session: Session, conditions: Sequence[ColumnElement[bool]], state: str, cause: str) -> None:
    now = database_wall_ns(session)
    ended = session.scalars(
        update(_Batch)
        .where(*conditions, _Batch.state == "queued")
        .values(state="ended", ended_wall_ns=now)
        .returning(_Batch.id)
    ).all()
    session.execute(
        update(_Cell)
        .where(_Cell.batch_id.in_(ended), _Cell.state == "queued")
        .values(state=state, cause=storable(cause))
    )
