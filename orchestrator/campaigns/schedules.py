"""Firing schedules: a run for each due time, once, whichever controller looks first."""

from __future__ import annotations

from typing import cast

import structlog
from sqlalchemy.orm import Session

from db.campaigns import Trigger, create_run, lock_campaign, open_runs, runs_of
from db.errors import ReplacedError
from db.events import EventLevel, record_event
from db.leases import database_wall_ns
from db.models import CampaignRow, CampaignRunRow, ScheduleRow
from db.schedules import list_schedules, lock_schedule
from orchestrator.campaigns.due import Decision, decide, due_times, shown, unsettled
from orchestrator.campaigns.start import Resolved, begin_run, resolve, spec_of
from orchestrator.farm import Farm
from sti_runtime.errors import StifarmError

_log = structlog.get_logger(__name__)


def fire_due(farm: Farm) -> list[str]:
    """Begin the runs that are due; the names of their campaigns."""
    with farm.store.reader() as session:
        now = database_wall_ns(session)
        due = [
            (schedule.id, campaign)
            for schedule, campaign in list_schedules(session, active=True)
            if due_times(schedule.cron, schedule.timezone, schedule.settled_wall_ns, now, most=1)
        ]
    return [campaign.name for schedule_id, campaign in due if _fire(farm, schedule_id, campaign)]


def _fire(farm: Farm, schedule_id: int, campaign: CampaignRow) -> bool:
    resolved: Resolved | StifarmError
    try:
        resolved = resolve(farm, spec_of(campaign))
    except StifarmError as error:
        resolved = error
    try:
        return _settled(farm, schedule_id, campaign, resolved)
    except ReplacedError as error:
        _log.info("will be looked at again", campaign=campaign.name, cause=error.what)
        return False


def _settled(farm: Farm, schedule_id: int, campaign: CampaignRow, resolved: Resolved | StifarmError) -> bool:
    """Deal with a schedule's due times; whether there is a run of one. Raises: ReplacedError."""
    with farm.store.session() as session:
        schedule = lock_schedule(session, schedule_id)
        if schedule is None:
            return False
        now = database_wall_ns(session)
        dues = unsettled(schedule.cron, schedule.timezone, schedule.settled_wall_ns, now)
        decision = decide(dues, now, schedule.catch_up)
        if decision is None:
            return False
        schedule.settled_wall_ns = decision.settled_wall_ns
        if decision.missed:
            record_event(
                session,
                "warning",
                "schedule-missed",
                f"{campaign.name}: {decision.missed} due times passed without a run,"
                f" from {shown(dues[0], schedule.timezone)} on",
            )
        return decision.due_wall_ns is not None and _begin(session, schedule, campaign, decision, resolved)


def _begin(
    session: Session,
    schedule: ScheduleRow,
    campaign: CampaignRow,
    decision: Decision,
    resolved: Resolved | StifarmError,
) -> bool:
    """The run of a due time: begun, queued behind another, skipped for it, or failed before its start.

    Raises: ReplacedError.
    """
    trigger, due = cast(Trigger, decision.trigger), decision.due_wall_ns
    if not isinstance(resolved, StifarmError):
        lock_campaign(session, campaign.id, resolved.spec)
    before = open_runs(session, campaign_id=campaign.id)
    state, cause = "running", ""
    if isinstance(resolved, StifarmError):
        state, cause = "failed", f"it could not begin: {resolved}"
    elif before and (schedule.overlap == "skip" or any(row.state == "queued" for row in before)):
        state, cause = "skipped", f"run {before[0].number} was still under way"
    elif before:
        state = "queued"
    run: CampaignRunRow | None
    if isinstance(resolved, StifarmError) or state == "skipped":
        run = create_run(
            session,
            campaign,
            (),
            trigger=trigger,
            state=state,
            cause=cause,
            schedule_id=schedule.id,
            due_wall_ns=due,
        )
    else:
        run = begin_run(
            session,
            campaign,
            resolved,
            trigger=trigger,
            number=len(runs_of(session, campaign.id)) + 1,
            state=state,
            schedule_id=schedule.id,
            due_wall_ns=due,
        )
    if run is None:
        return False
    if cause:
        level: EventLevel = "error" if state == "failed" else "warning"
        record_event(session, level, f"campaign-{state}", f"run {run.number} of {campaign.name}: {cause}")
    _log.info("a schedule fired", campaign=campaign.name, run=run.number, state=state, trigger=trigger)
    return True
