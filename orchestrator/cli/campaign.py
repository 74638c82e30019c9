"""The verbs of campaign that begin, end and schedule runs."""

from __future__ import annotations

import sys
from dataclasses import replace as replace_field
from pathlib import Path
from typing import Annotated

import typer

from db.campaigns import (
    cancel_run,
    cell_counts,
    find_campaign,
    has_content,
    last_run,
    list_campaigns,
    open_runs,
)
from db.models import CampaignRow, CampaignRunRow
from db.schedules import put_schedule
from orchestrator.campaigns.controller import Controller
from orchestrator.campaigns.due import check_cron, next_due, shown
from orchestrator.campaigns.report import STATUS_COLUMNS, importance_of_run, status_cells
from orchestrator.campaigns.spec import CampaignSpec
from orchestrator.campaigns.spec_file import load_campaign
from orchestrator.campaigns.start import (
    Resolved,
    as_kept,
    estimated_ns,
    keep_campaign,
    resolve,
    spec_of,
    take_run,
)
from orchestrator.campaigns.status import RunStatus, format_span, statuses
from orchestrator.campaigns.steps import Means
from orchestrator.cli.campaign_progress import RunProgress
from orchestrator.cli.campaign_results import results
from orchestrator.cli.campaign_view import compare, report, status, unattended
from orchestrator.cli.context import FAILED, SOME_FAILED, AgainOption, JsonOption, Session, driving, farm_of
from orchestrator.cli.output import emit_json, note, steps, success, table, warn
from orchestrator.errors import CampaignError, near
from orchestrator.farm import ControllerBusyError, Farm
from orchestrator.host_book import know_hosts
from sti_runtime.units import many

campaign_app = typer.Typer(
    no_args_is_help=True, help="Matrices of measurements, resumed at any time (docs/campaigns.md)."
)
campaign_app.command("status")(status)
campaign_app.command("report")(report)
campaign_app.command("compare")(compare)
campaign_app.command("results")(results)

ASK_ABOVE = 1000
"""Runs of more cells are begun only after a yes."""

YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Begin a large matrix without asking.")]
TargetArgument = Annotated[
    str, typer.Argument(help="A campaign file, or the name of a campaign of the store.")
]
ReplaceOption = Annotated[
    bool, typer.Option("--replace", help="The file's content replaces that of the campaign of its name.")
]


@campaign_app.command("run")
def run(
    context: typer.Context,
    target: TargetArgument,
    again: AgainOption = False,
    replace: ReplaceOption = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="Only queue it: a running stifarm serve does the work.")
    ] = False,
    yes: YesOption = False,
    json: JsonOption = False,
) -> None:
    """Run a campaign, go on with an interrupted one, or do what is missing of the last one.

    Example: stifarm campaign run campaigns/nightly.yaml
    """
    with farm_of(context) as farm:
        know_hosts(farm)
        spec, resolved = _asked(farm, target, replace=replace)
        if _is_new(farm, spec, again=again, replace=replace):
            _agree(farm, resolved or resolve(farm, spec), yes=yes)
        campaign = _keep(farm, spec, replace=replace)
        opened = _taken(farm, campaign, spec, again=again)
        if opened is None:
            success(f"{campaign.name}: nothing is missing of its last run; --again measures anew")
            return
        if detach:
            tell_open(context, farm, campaign, opened)
            return
        drive(farm, ",".join(spec.devices), campaign, opened, quiet=json)
        (ended,) = statuses(farm, [campaign])
        with farm.store.reader() as session:
            importance = importance_of_run(session, opened.id)
    if json:
        emit_json({"campaign": campaign.name, "run": ended.number, "state": ended.state, **ended.counts})
    else:
        table("Campaign", STATUS_COLUMNS, [status_cells(ended)])
        for said in importance:
            note(said)
        note(f"its results: stifarm campaign report {campaign.name}; judged, and as a page: campaign results")
    if ended.state != "done":
        raise typer.Exit(SOME_FAILED if ended.counts.get("done") else FAILED)


def tell_open(context: typer.Context, farm: Farm, campaign: CampaignRow, run: CampaignRunRow) -> None:
    """Say that a run is open that is left to a controller, and where there is none, how to start one."""
    left_alone = unattended(context, statuses(farm, [campaign]))
    doing = "" if left_alone else "; stifarm serve works on it"
    success(f"run {run.number} of {campaign.name} is open{doing}")
    if left_alone:
        warn(left_alone)


def means_of(session: Session) -> Means:
    """What batches are done with in a session."""
    means = Means(session.farm, session.worker, session.pool, session.pool.cpus)
    return means if session.hosts is None else replace_field(means, in_reach=session.hosts.in_reach)


def drive(
    farm: Farm, selector: str, campaign: CampaignRow, run: CampaignRunRow, *, quiet: bool = False
) -> None:
    """Work on the store's open runs until this one has ended, and show how far it is unless ``quiet``."""

    def over(_idle: bool) -> bool:
        with farm.store.reader() as session:
            row = session.get_one(CampaignRunRow, run.id)
            return row.state not in ("queued", "running")

    def stands() -> RunStatus:
        (newest,) = statuses(farm, [campaign])
        if newest.number == run.number:
            return newest
        return next(one for one in statuses(farm, [campaign], runs=None) if one.number == run.number)

    try:
        with driving(farm, selector, quarantined=True) as session:
            note(
                f"run {run.number} of {campaign.name}; see it from elsewhere: stifarm campaign status --watch"
            )
            with steps(quiet=quiet) as bars:
                progress = RunProgress(bars, stands)
                Controller(means_of(session)).run(over, tick=(lambda: None) if quiet else progress)
                if not quiet:
                    progress.show()
    except ControllerBusyError as error:
        raise ControllerBusyError(
            f"{error.what} Run {run.number} of {campaign.name} is open.",
            "If that is stifarm serve, it works on this run (stifarm campaign status --watch). Else run this"
            " command again when it has ended.",
        ) from error


@campaign_app.command("list")
def list_(context: typer.Context, json: JsonOption = False) -> None:
    """The campaigns of the store with their last runs.

    Example: stifarm campaign list
    """
    with farm_of(context, existing=True) as farm:
        with farm.store.reader() as session:
            campaigns = list_campaigns(session)
        found = statuses(farm, campaigns)
    if json:
        emit_json(
            [
                {"campaign": row.name, "digest": row.spec_digest, "priority": row.priority}
                | next(({"run": s.number, "state": s.state} for s in found if s.campaign == row.name), {})
                for row in campaigns
            ]
        )
    else:
        table("Campaigns", STATUS_COLUMNS, [status_cells(one) for one in found])
        never = [row.name for row in campaigns if all(one.campaign != row.name for one in found)]
        if never:
            note(f"never run: {', '.join(never)}")


@campaign_app.command("cancel")
def cancel(context: typer.Context, name: Annotated[str, typer.Argument(help="Campaign.")]) -> None:
    """End a campaign's open runs: agents are asked to stop, what was measured is kept.

    Example: stifarm campaign cancel nightly
    """
    with farm_of(context, existing=True) as farm:
        campaign = named_campaign(farm, name)
        with farm.store.session() as session:
            runs = open_runs(session, campaign_id=campaign.id)
            numbers = [each.number for each in runs if cancel_run(session, each.id, "cancelled by a person")]
            running = [c.get("running", 0) for c in cell_counts(session, [r.id for r in runs]).values()]
        if not runs:
            note(f"{name}: no run of it is open")
            return
        if sum(running):
            _stop_running(farm, [each.id for each in runs])
        success(f"{name}: cancelled run {', '.join(map(str, numbers))}")


def _stop_running(farm: Farm, run_ids: list[int]) -> None:
    """Stop what is under way: the controller that does it is told by the store; without one, do it here."""

    def over(_idle: bool) -> bool:
        with farm.store.reader() as session:
            return not any(counts.get("running") for counts in cell_counts(session, run_ids).values())

    try:
        with driving(farm, "all", quarantined=True) as session:
            Controller(means_of(session)).run(over)
    except ControllerBusyError:
        note("the running controller stops what is under way")


@campaign_app.command("schedule")
def schedule(
    context: typer.Context,
    target: TargetArgument,
    cron: Annotated[str, typer.Option("--cron", help='Minute hour day month weekday: "0 2 * * *".')],
    timezone: Annotated[str, typer.Option("--timezone", help="Whose clock the times are of.")] = "UTC",
    catch_up: Annotated[
        str, typer.Option("--catch-up", help="Due times that passed while nothing ran: once, or skip.")
    ] = "once",
    overlap: Annotated[
        str, typer.Option("--overlap", help="Due while a run is open: skip it, or queue it.")
    ] = "skip",
    replace: ReplaceOption = False,
    yes: YesOption = False,
) -> None:
    """Let a campaign run by itself, as long as stifarm serve runs.

    Example: stifarm campaign schedule campaigns/nightly.yaml --cron "0 2 * * *" --timezone Europe/Berlin
    """
    for option, value, known in (
        ("--catch-up", catch_up, ("once", "skip")),
        ("--overlap", overlap, ("skip", "queue")),
    ):
        if value not in known:
            raise CampaignError(f"{option}: {value!r} is unknown.", f"Choose {' or '.join(known)}.")
    check_cron(cron, timezone)
    with farm_of(context) as farm:
        know_hosts(farm)
        spec, resolved = _asked(farm, target, replace=replace)
        _agree(farm, resolved or resolve(farm, spec), yes=yes)
        campaign = _keep(farm, spec, replace=replace)
        with farm.store.session() as session:
            row = put_schedule(
                session, campaign.id, cron=cron, timezone=timezone, catch_up=catch_up, overlap=overlap
            )
            first = next_due(cron, timezone, row.settled_wall_ns)
        success(f"{campaign.name} runs next at {shown(first, timezone)}, while stifarm serve runs")


# ------------------------------------------------------------------ finding, and beginning


def named_campaign(farm: Farm, name: str) -> CampaignRow:
    """A campaign of the store. Raises: CampaignError."""
    with farm.store.reader() as session:
        found = find_campaign(session, name)
        known = [row.name for row in list_campaigns(session)]
    if found is None:
        raise CampaignError(
            f"The store knows no campaign {name!r}.", f"{near(name, known)} Or give its file."
        )
    return found


def _asked(farm: Farm, target: str, *, replace: bool) -> tuple[CampaignSpec, Resolved | None]:
    """The campaign that an argument names, and what a file's stands for now: that of the store may go on with
    a run whose bundles are gone. Raises: CampaignError, CampaignFileError, InputError."""
    path = Path(target)
    if path.suffix not in (".yaml", ".yml") and not path.is_file():
        return spec_of(named_campaign(farm, target)), None
    spec = load_campaign(path)
    if not replace and (kept := as_kept(farm, spec)) != spec:
        note(
            f"{spec.name} is kept with importance_rows: {kept.importance_rows} and goes on with them; to take"
            " the store's profile instead, as this file says now: --replace"
        )
        spec = kept
    return spec, resolve(farm, spec)


def _keep(farm: Farm, spec: CampaignSpec, *, replace: bool) -> CampaignRow:
    with farm.store.session() as session:
        return keep_campaign(session, spec, replace=replace)


def _is_new(farm: Farm, spec: CampaignSpec, *, again: bool, replace: bool) -> bool:
    """Whether this begins a new run, rather than going on with one or being refused."""
    with farm.store.reader() as session:
        campaign = find_campaign(session, spec.name)
        if campaign is None:
            return True
        if not has_content(campaign, spec):
            return replace
        if open_runs(session, campaign_id=campaign.id):
            return False
        last = last_run(session, campaign)
        return again or last is None or not cell_counts(session, [last.id])[last.id]


def _agree(farm: Farm, resolved: Resolved, *, yes: bool) -> None:
    """Ask before a large matrix is begun. Raises: CampaignError where nobody can be asked; typer.Abort."""
    if resolved.cells <= ASK_ABOVE or yes:
        return
    about = format_span(estimated_ns(farm, resolved))
    what = f"The matrix of {resolved.spec.name} has {many(resolved.cells, 'cell')}; about {about} of work."
    if not sys.stdin.isatty():
        raise CampaignError(what, "Take values out of it, or agree to it with --yes.")
    typer.confirm(f"{what} Is that meant?", abort=True, err=True)


def _taken(farm: Farm, campaign: CampaignRow, spec: CampaignSpec, *, again: bool) -> CampaignRunRow | None:
    """The run to work on, told where it is none that begins now; None: nothing is missing."""
    taken = take_run(farm, campaign, spec, again=again)
    if taken.run is not None and taken.how == "open":
        note(f"goes on with run {taken.run.number}")
    elif taken.run is not None and taken.how == "reopened":
        note(f"run {taken.run.number}: {taken.missing} cells are missing and will be measured")
    return taken.run
