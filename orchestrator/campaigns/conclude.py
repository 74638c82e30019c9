"""The end of a run: its state, and what is missing of it, told as loudly as a failure."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy.orm import Session

from db.campaign_plans import plan_changes
from db.campaign_samples import devices_with_data, first_cause
from db.campaign_work import left_in
from db.campaigns import cell_counts, end_run, runs_of
from db.events import EventLevel, record_event
from db.models import CampaignRow, CampaignRunRow
from sti_runtime.units import in_words

UNFINISHED = ("failed", "skipped", "cancelled", "queued", "running")


def conclude_run(session: Session, run: CampaignRunRow) -> bool:
    """End a run that has no work left; of two controllers one does, and tells what is missing."""
    if left_in(session, run.id):
        return False
    counts = cell_counts(session, [run.id])[run.id]
    state = "failed" if any(counts.get(each) for each in UNFINISHED) else "done"
    if not end_run(session, run.id, state):
        return False
    name, before = session.get_one(CampaignRow, run.campaign_id).name, previous_run(session, run)
    if before is not None:
        for change in plan_changes(session, before.id, run.id):
            level: EventLevel = "info" if change.feasible else "warning"
            record_event(session, level, "plan-changed", f"run {run.number} of {name}: {change}")
    for device, why in missing_devices(session, run).items():
        what = f"run {run.number} of {name} has no data of {device}: {in_words(why)}"
        record_event(session, "error", "data-missing", what)
    if state == "failed":
        record_event(
            session, "error", "campaign-failed", f"run {run.number} of {name} ended: {_counted(counts)}"
        )
    return True


def missing_devices(session: Session, run: CampaignRunRow) -> dict[str, str]:
    """Why a device is without data in a run: of those that it asked for, or that the last one before it to
    end had data of."""
    asked, had = devices_with_data(session, run.id)
    before = previous_run(session, run)
    earlier = [] if before is None else devices_with_data(session, before.id)[1]
    missing = dict[str, str]()
    for device in sorted({*asked, *earlier} - {*had}):
        if device in asked:
            missing[device] = first_cause(session, run.id, device) or "nothing was measured anew"
        else:
            assert before is not None
            missing[device] = f"run {before.number} had some, and this one does not select it"
    return missing


def previous_run(session: Session, run: CampaignRunRow) -> CampaignRunRow | None:
    """The last run of the campaign before this one that ran to an end."""
    earlier = (each for each in runs_of(session, run.campaign_id) if each.number < run.number)
    return next((each for each in earlier if each.state in ("done", "failed") and each.started_wall_ns), None)


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
