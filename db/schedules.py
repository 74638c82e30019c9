"""Queries about schedules: when campaigns run by themselves. Times are the database's clock."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from db.leases import database_wall_ns
from db.models import CampaignRow, ScheduleRow


def put_schedule(
    session: Session, campaign_id: int, *, cron: str, timezone: str, catch_up: str, overlap: str
) -> ScheduleRow:
    """The one schedule of a campaign, as given; it begins now."""
    now = database_wall_ns(session)
    query = select(ScheduleRow).where(ScheduleRow.campaign_id == campaign_id).with_for_update()
    row = session.scalars(query).one_or_none() or ScheduleRow(campaign_id=campaign_id, created_wall_ns=now)
    row.cron, row.timezone, row.catch_up, row.overlap = cron, timezone, catch_up, overlap
    row.state, row.settled_wall_ns = "active", now
    session.add(row)
    session.flush()
    return row


def list_schedules(session: Session, *, active: bool = False) -> Sequence[tuple[ScheduleRow, CampaignRow]]:
    """Schedules that were not removed, with their campaigns, by name; with ``active`` no paused ones."""
    query = select(ScheduleRow, CampaignRow).join(CampaignRow, CampaignRow.id == ScheduleRow.campaign_id)
    states = ("active",) if active else ("active", "paused")
    rows = session.execute(query.where(ScheduleRow.state.in_(states)).order_by(CampaignRow.name))
    return [(schedule, campaign) for schedule, campaign in rows]


def schedule_of(session: Session, campaign_id: int) -> ScheduleRow | None:
    """The schedule of a campaign; None when it has none, or it was removed."""
    query = select(ScheduleRow).where(ScheduleRow.campaign_id == campaign_id, ScheduleRow.state != "removed")
    return session.scalars(query).one_or_none()


def set_schedule_state(session: Session, schedule_id: int, state: str) -> None:
    """Pause, resume or remove a schedule. One that is resumed begins now: nothing was missed meanwhile. One
    that is in that state stays as it is."""
    values: dict[str, object] = {"state": state}
    if state == "active":
        values["settled_wall_ns"] = database_wall_ns(session)
    table = ScheduleRow
    session.execute(update(table).where(table.id == schedule_id, table.state != state).values(**values))


def lock_schedule(session: Session, schedule_id: int) -> ScheduleRow | None:
    """An active schedule, held against other controllers to the end of the transaction."""
    query = select(ScheduleRow).where(ScheduleRow.id == schedule_id, ScheduleRow.state == "active")
    return session.scalars(query.with_for_update().execution_options(populate_existing=True)).one_or_none()
