"""Where campaigns stand: counts, what goes on, the time they took and the time they will take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from db.campaign_work import durations, left, put_back_causes, sizes, under_way
from db.campaigns import OPEN, cell_counts, runs_of
from db.controllers import list_controllers
from db.leases import database_wall_ns
from db.models import CampaignBatchRow, CampaignRow, CampaignRunRow
from orchestrator.campaigns.estimate import Typical, amounts, left_ns
from orchestrator.campaigns.lanes import lanes_of
from orchestrator.controllers import may_work_on_campaigns
from orchestrator.farm import Farm
from sti_runtime.units import NONE, NS_PER_S

_NOT_LEFT = ("done", "failed", "skipped", "infeasible", "cancelled")


@dataclass(frozen=True)
class RunStatus:
    """Where one run stands. ``elapsed_ns``: the true time since it began; ``left_ns``: an estimate, None when
    it is over. ``doing``: what goes on by device ("" is the host); ``waits``: why batches were put back.
    ``worked_on``: whether there is a controller that may work on it; None when it is over.
    """

    campaign: str
    number: int
    state: str
    trigger: str
    cause: str | None
    counts: Mapping[str, int]
    elapsed_ns: int | None
    left_ns: int | None
    doing: Mapping[str, str]
    waits: tuple[str, ...]
    worked_on: bool | None = None

    @property
    def total(self) -> int:
        """Cells in all."""
        return sum(self.counts.values())

    @property
    def ended(self) -> int:
        """Cells that will not change."""
        return sum(self.counts.get(state, 0) for state in _NOT_LEFT)


def statuses(farm: Farm, campaigns: Sequence[CampaignRow], *, runs: int | None = 1) -> list[RunStatus]:
    """The newest ``runs`` runs of each campaign (None: all), newest first."""
    with farm.store.reader() as session:
        now, typical = database_wall_ns(session), Typical.of(durations(session))
        going = under_way(session)
        found = [
            (campaign, run) for campaign in campaigns for run in runs_of(session, campaign.id, limit=runs)
        ]
        counts = cell_counts(session, [run.id for _, run in found])
        waits = {run.id: put_back_causes(session, run.id) for _, run in found if run.state in OPEN}
        waiting = {
            run.id: amounts(left(session, run.id).get(run.id, {}), sizes(session, run.id))
            for _, run in found
            if run.state in OPEN
        }
        controllers = list_controllers(session) if waiting else ()
    at_work = any(may_work_on_campaigns(controller, now) for controller in controllers)
    lanes = lanes_of(farm.inventory.devices, farm.settings.machine_lock)
    return [
        RunStatus(
            campaign=campaign.name,
            number=run.number,
            state=run.state,
            trigger=run.trigger,
            cause=run.cause,
            counts=counts[run.id],
            elapsed_ns=_elapsed(run, now),
            left_ns=left_ns(waiting[run.id], typical, lambda name: lanes.get(name, name or ""))
            if run.id in waiting
            else None,
            doing=_doing(going, run, now) if at_work else {},
            waits=tuple(waits.get(run.id, ())),
            worked_on=at_work if run.state in OPEN else None,
        )
        for campaign, run in found
    ]


def _elapsed(run: CampaignRunRow, now_wall_ns: int) -> int | None:
    if run.started_wall_ns is None:
        return None
    return max(0, (run.ended_wall_ns or now_wall_ns) - run.started_wall_ns)


def _doing(going: Sequence[CampaignBatchRow], run: CampaignRunRow, now_wall_ns: int) -> dict[str, str]:
    return {
        row.device
        or "": f"{row.kind} for {(now_wall_ns - (row.started_wall_ns or now_wall_ns)) // NS_PER_S} s"
        for row in going
        if row.run_id == run.id
    }


def format_span(duration_ns: int | None) -> str:
    """A long duration for people: "2 h 05 min", "48 s"."""
    if duration_ns is None:
        return NONE
    seconds = duration_ns // NS_PER_S
    if seconds < 120:
        return f"{seconds} s"
    minutes = seconds // 60
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
