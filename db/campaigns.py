"""Queries about campaigns and their runs. Times are the database's clock."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from sqlalchemy import func, insert, or_, select, update
from sqlalchemy.orm import Session

from db.documents import document
from db.errors import ReplacedError
from db.leases import database_wall_ns
from db.models import CampaignBatchRow, CampaignCellRow, CampaignRow, CampaignRunRow
from sti_runtime.errors import FormatError, InputError
from sti_runtime.records import Record

Trigger = Literal["manual", "schedule", "catch-up"]
OPEN = ("queued", "running")
"""States of a run that has not ended, and of a cell."""

_AT_ONCE = 500


@dataclass(frozen=True)
class Taken:
    """The run of a campaign to work on, None when nothing is missing of its last one. ``how``: it was open;
    ``missing`` of its cells were put back; it has begun.
    """

    run: CampaignRunRow | None
    how: Literal["open", "reopened", "begun", "complete"]
    missing: int = 0


@dataclass(frozen=True)
class NewCell:
    """A cell of a batch to be made; see ``CampaignCellRow``."""

    number: int
    target: str | None = None
    preload: str | None = None
    preload_bytes: int | None = None
    policy: str | None = None


@dataclass(frozen=True)
class NewBatch:
    """A batch to be made; see ``CampaignBatchRow``."""

    number: int
    device: str | None
    kind: str
    bundle_digest: str | None
    task: str | None
    engine: str | None
    repeat: int
    fresh: bool
    cells: tuple[NewCell, ...]


# ------------------------------------------------------------------ campaigns


def save_campaign(
    session: Session,
    spec: Record,
    *,
    name: str,
    priority: int,
    deadline_ns: int | None,
    seed: int,
    replace: bool = False,
) -> CampaignRow:
    """The campaign of this name and content, made when it is new.

    Raises: InputError when the name has other content, unless it is to be replaced and no run of it is open.
    """
    now, text, digest = database_wall_ns(session), document(spec), spec.digest
    row = session.scalars(select(CampaignRow).where(CampaignRow.name == name).with_for_update()).one_or_none()
    if row is None:
        row = CampaignRow(name=name, created_wall_ns=now)
    elif has_content(row, spec):
        return row
    elif not replace:
        raise InputError(
            f"The campaign {name} is there already, with other content.",
            "Give this one another name, or replace it for the runs to come with --replace.",
        )
    elif open_runs(session, campaign_id=row.id):
        raise InputError(
            f"A run of the campaign {name} is open, and it goes by the content it began with.",
            f"Wait for its end, or end it: stifarm campaign cancel {name}. Then replace the campaign.",
        )
    row.spec_json, row.spec_digest = text, digest
    row.priority, row.deadline_ns, row.seed, row.updated_wall_ns = priority, deadline_ns, seed, now
    session.add(row)
    session.flush()
    return row


def has_content(campaign: CampaignRow, spec: Record) -> bool:
    """Whether the campaign asks this. One that an earlier version kept may lack fields that have defaults."""
    if campaign.spec_digest == spec.digest:
        return True
    try:
        kept = type(spec).from_json(campaign.spec_json.encode(), source=f"campaign {campaign.name}")
    except FormatError:
        return False
    return kept == spec


def lock_campaign(session: Session, campaign_id: int, spec: Record) -> CampaignRow:
    """The campaign as it is now; nobody replaces it before this transaction ends.

    Raises: ReplacedError when it asks something else than ``spec`` by now.
    """
    query = select(CampaignRow).where(CampaignRow.id == campaign_id).with_for_update()
    row = session.scalars(query.execution_options(populate_existing=True)).one()
    if not has_content(row, spec):
        raise ReplacedError(
            f"The campaign {row.name} was given other content meanwhile.",
            f"See what goes on there: stifarm campaign status {row.name}; then run this command again.",
        )
    return row


def find_campaign(session: Session, name: str) -> CampaignRow | None:
    """A campaign by its name."""
    return session.scalars(select(CampaignRow).where(CampaignRow.name == name)).one_or_none()


def list_campaigns(session: Session) -> Sequence[CampaignRow]:
    """All campaigns by name."""
    return session.scalars(select(CampaignRow).order_by(CampaignRow.name)).all()


# ------------------------------------------------------------------ runs


def create_run(
    session: Session,
    campaign: CampaignRow,
    batches: Iterable[NewBatch],
    *,
    trigger: Trigger,
    state: str = "running",
    cause: str | None = None,
    schedule_id: int | None = None,
    due_wall_ns: int | None = None,
) -> CampaignRunRow | None:
    """A new run with its work; None when the schedule has a run of that due time already."""
    session.scalars(select(CampaignRow.id).where(CampaignRow.id == campaign.id).with_for_update()).one()
    now = database_wall_ns(session)
    due = now if due_wall_ns is None else due_wall_ns
    table = CampaignRunRow
    if schedule_id is not None:
        known = select(table.id).where(table.schedule_id == schedule_id, table.due_wall_ns == due)
        if session.scalars(known).first() is not None:
            return None
    highest = session.scalar(select(func.max(table.number)).where(table.campaign_id == campaign.id)) or 0
    run = CampaignRunRow(campaign_id=campaign.id, schedule_id=schedule_id, number=highest + 1, state=state)
    run.trigger, run.cause, run.due_wall_ns = trigger, cause, due
    run.deadline_wall_ns = None if campaign.deadline_ns is None else due + campaign.deadline_ns
    run.ended_wall_ns = None if state in OPEN else now
    session.add(run)
    session.flush()
    waiting = iter(batches)
    while some := list(islice(waiting, _AT_ONCE)):
        _insert(session, run.id, some)
    return run


def go_on(session: Session, campaign_id: int, spec: Record, *, again: bool = False) -> Taken | None:
    """Take the campaign's open run, or what is missing of its last one; None: it is for a new run to begin.

    ``again``: the last one, if it has ended, is left as it is. Raises: ReplacedError.
    """
    campaign = lock_campaign(session, campaign_id, spec)
    opened = open_runs(session, campaign_id=campaign_id)
    if opened:
        return Taken(opened[0], "open")
    last = None if again else last_run(session, campaign)
    if last is None:
        return None
    missing = reopen_run(session, last.id)
    if missing:
        return Taken(last, "reopened", missing)
    return Taken(None, "complete") if cell_counts(session, [last.id])[last.id] else None


def runs_of(session: Session, campaign_id: int, *, limit: int | None = None) -> Sequence[CampaignRunRow]:
    """The runs of a campaign, newest first."""
    query = select(CampaignRunRow).where(CampaignRunRow.campaign_id == campaign_id)
    return session.scalars(query.order_by(CampaignRunRow.number.desc()).limit(limit)).all()


def last_run(session: Session, campaign: CampaignRow) -> CampaignRunRow | None:
    """The newest run of what the campaign asks now that was not skipped; None when it was replaced since."""
    table = CampaignRunRow
    query = select(table).where(table.campaign_id == campaign.id, table.state != "skipped")
    run = session.scalars(query.order_by(table.number.desc()).limit(1)).one_or_none()
    # A campaign is replaced only while no run of it is open.
    if run is None or (run.ended_wall_ns is not None and run.ended_wall_ns <= campaign.updated_wall_ns):
        return None
    return run


def open_runs(session: Session, *, campaign_id: int | None = None) -> Sequence[CampaignRunRow]:
    """Runs that have not ended, oldest first."""
    query = select(CampaignRunRow).where(CampaignRunRow.state.in_(OPEN))
    if campaign_id is not None:
        query = query.where(CampaignRunRow.campaign_id == campaign_id)
    return session.scalars(query.order_by(CampaignRunRow.due_wall_ns, CampaignRunRow.id)).all()


def newest_run_id(session: Session) -> int:
    """The highest row id of a run; 0 when there is none."""
    return session.scalar(select(func.max(CampaignRunRow.id))) or 0


def runs_among(session: Session, run_ids: Collection[int], *, after: int) -> Sequence[CampaignRunRow]:
    """The runs with these row ids or one above ``after``, and all that are open; by their ids."""
    table = CampaignRunRow
    wanted = or_(table.id.in_(run_ids), table.id > after, table.state.in_(OPEN))
    return session.scalars(select(table).where(wanted).order_by(table.id)).all()


def cell_counts(session: Session, run_ids: Sequence[int]) -> Mapping[int, Mapping[str, int]]:
    """How many cells of each run are in each state."""
    table = CampaignCellRow
    query = (
        select(table.run_id, table.state, func.count())
        .where(table.run_id.in_(run_ids))
        .group_by(table.run_id, table.state)
    )
    counts: dict[int, dict[str, int]] = {run_id: {} for run_id in run_ids}
    for run_id, state, count in session.execute(query):
        counts[run_id][state] = count
    return counts


def start_queued(session: Session, run_id: int) -> bool:
    """Let a queued run begin; False when another controller did."""
    return _set_run(session, run_id, ("queued",), state="running")


def end_run(session: Session, run_id: int, state: str) -> bool:
    """End a run whose work is over; False when it was ended before."""
    return _set_run(session, run_id, ("running",), state=state, ended_wall_ns=database_wall_ns(session))


def cancel_run(session: Session, run_id: int, cause: str) -> bool:
    """Cancel a run that is open: what has not begun is over; what runs is for its controller to stop."""
    ended = database_wall_ns(session)
    if not _set_run(session, run_id, OPEN, state="cancelled", cause=cause, ended_wall_ns=ended):
        return False
    batches, cells = CampaignBatchRow, CampaignCellRow
    session.execute(
        update(batches)
        .where(batches.run_id == run_id, batches.state == "queued")
        .values(state="ended", ended_wall_ns=ended)
    )
    session.execute(
        update(cells)
        .where(cells.run_id == run_id, cells.state == "queued")
        .values(state="cancelled", cause=cause)
    )
    return True


def reopen_run(session: Session, run_id: int) -> int:
    """Put what failed, was skipped or was cancelled of an ended run back into the queue; how many cells.

    A run without such cells stays as it ended: also one that could not begin, which has none.
    """
    cells, batches = CampaignCellRow, CampaignBatchRow
    missing = cells.state.in_(("failed", "skipped", "cancelled"))
    if session.scalars(select(cells.id).where(cells.run_id == run_id, missing).limit(1)).first() is None:
        return 0
    reopened = {"state": "running", "cause": None, "ended_wall_ns": None}
    if not _set_run(session, run_id, ("failed", "cancelled"), **reopened):
        return 0
    lacking = select(cells.batch_id).where(cells.run_id == run_id, missing)
    session.execute(
        update(batches)
        .where(batches.run_id == run_id, batches.id.in_(lacking), batches.state == "ended")
        .values(state="queued", tries=0, not_before_wall_ns=0, cause=None, owner=None)
    )
    done = session.execute(
        update(cells)
        .where(cells.run_id == run_id, missing)
        .values(state="queued", cause=None)
        .returning(cells.id)
    ).all()
    return len(done)


def _set_run(session: Session, run_id: int, before: Sequence[str], **values: object) -> bool:
    table = CampaignRunRow
    done = session.execute(
        update(table).where(table.id == run_id, table.state.in_(before)).values(**values).returning(table.id)
    ).all()
    return bool(done)


def _insert(session: Session, run_id: int, some: Sequence[NewBatch]) -> None:
    rows = [
        {
            "run_id": run_id,
            "number": batch.number,
            "device": batch.device,
            "kind": batch.kind,
            "bundle_digest": batch.bundle_digest,
            "task": batch.task,
            "engine": batch.engine,
            "repeat": batch.repeat,
            "fresh": batch.fresh,
            "state": "queued",
            "tries": 0,
            "not_before_wall_ns": 0,
        }
        for batch in some
    ]
    table = CampaignBatchRow
    made = session.execute(insert(table).returning(table), rows).scalars()
    ids = {row.number: row.id for row in made}
    cells = [
        {
            "run_id": run_id,
            "batch_id": ids[batch.number],
            "number": cell.number,
            "target": cell.target,
            "preload": cell.preload,
            "preload_bytes": cell.preload_bytes,
            "policy": cell.policy,
            "state": "queued",
        }
        for batch in some
        for cell in batch.cells
    ]
    session.execute(insert(CampaignCellRow), cells)
