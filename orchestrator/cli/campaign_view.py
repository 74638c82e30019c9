"""The verbs of campaign that only look: status, report, compare."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated

import typer
from rich.live import Live
from rich.table import Table

from db.campaigns import OPEN, find_campaign, list_campaigns, runs_of
from db.models import CampaignRow, CampaignRunRow
from db.schedules import schedule_of
from orchestrator.campaigns.compare import Comparison, compare_runs
from orchestrator.campaigns.compare_tables import (
    COMPARED_COLUMNS,
    LACKING_COLUMNS,
    TELLS_NOTHING,
    asked_by_all,
    compared_rows,
    lacking_rows,
)
from orchestrator.campaigns.due import local_date
from orchestrator.campaigns.report import (
    STATUS_COLUMNS,
    causes_of,
    importance_of_run,
    in_common,
    report_json,
    report_tables,
    rows_of,
    status_cells,
)
from orchestrator.campaigns.status import RunStatus, statuses
from orchestrator.cli.context import JsonOption, farm_of
from orchestrator.cli.fitting import TableText
from orchestrator.cli.output import emit_json, grid, heading, lines, note, out, table, tables, warn
from orchestrator.errors import CampaignError, near
from orchestrator.farm import Farm

NameArgument = Annotated[str, typer.Argument(help="Campaign.")]
_WATCH_S = 1.0


def status(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="Campaign; all that are open without one.")] = None,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Keep it up to date until no run is open.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Where campaigns stand: cells by state, the time taken, the time left by what such work took before.

    Example: stifarm campaign status nightly --watch
    """
    with farm_of(context, existing=True) as farm:
        campaigns = known_campaigns(farm, name)
        found = statuses(farm, campaigns, runs=1 if name is None else 3)
        if json:
            emit_json([asdict(one) for one in found])
            return
        if watch:
            _watch(context, farm, campaigns)
            return
        table("Campaigns", STATUS_COLUMNS, [status_cells(one) for one in found])
        if left_alone := unattended(context, found):
            warn(left_alone)


def unattended(context: typer.Context, found: Sequence[RunStatus]) -> str:
    """That nobody works on runs that are open, and the command that does; empty where somebody may."""
    names = [one.campaign for one in found if one.worked_on is False]
    if not names:
        return ""
    again = context.obj.again
    return (
        f"no controller works on the open runs of {', '.join(dict.fromkeys(names))}. Start one:"
        f" {again('serve')}; or go on here: {again(f'campaign run {names[0]}')}"
    )


def _watch(context: typer.Context, farm: Farm, campaigns: Sequence[CampaignRow]) -> None:
    """Show the newest runs until none is open; where no terminal is, a line whenever a count changes."""

    def look() -> list[RunStatus]:
        return statuses(farm, campaigns)

    found = look()
    if not out.is_terminal:
        told = "", ""
        while True:
            line = "; ".join(
                f"{one.campaign} {one.number}: {one.ended}/{one.total} {one.state}" for one in found
            )
            left_alone = unattended(context, found)
            if (line, left_alone) != told:
                out.print(line, soft_wrap=True)
                if left_alone != told[1] and left_alone:
                    warn(left_alone)
                told = line, left_alone
            if all(one.state not in OPEN for one in found):
                return
            time.sleep(_WATCH_S)
            found = look()

    def shown() -> Table:
        caption = unattended(context, found)
        return grid("Campaigns", STATUS_COLUMNS, map(status_cells, found), caption=caption)

    with Live(shown(), console=out) as live:
        while any(one.state in OPEN for one in found):
            time.sleep(_WATCH_S)
            found = look()
            live.update(shown())


def report(
    context: typer.Context,
    name: NameArgument,
    number: Annotated[
        str, typer.Option("--run", help="Run: its number, last, last-1, or a date of its schedule.")
    ] = "last",
    json: JsonOption = False,
) -> None:
    """What a run found, finished or not: medians with intervals, accuracy, and why cells are missing.

    Example: stifarm campaign report nightly --run 2026-11-28
    """
    with farm_of(context, existing=True) as farm:
        campaign = known_campaigns(farm, name)[0]
        run = find_run(farm, campaign, number)
        with farm.store.reader() as session:
            rows, importance = rows_of(session, run.id), importance_of_run(session, run.id)
        standing = next(one for one in statuses(farm, [campaign], runs=None) if one.number == run.number)
    if json:
        cells = [report_json(row) for row in rows]
        emit_json({"status": asdict(standing), "importance": importance, "cells": cells})
        return
    heading(" — ".join(filter(None, (f"Run {run.number} of {name}: {run.state}", in_common(rows)))))
    tables(
        [
            *(TableText(each.device, each.columns, each.rows) for each in report_tables(rows)),
            TableText("All its cells", STATUS_COLUMNS, [status_cells(standing)]),
        ]
    )
    for said in (*importance, *causes_of(rows)):
        note(f"  {said}")


def compare(
    context: typer.Context,
    name: NameArgument,
    before: Annotated[
        str, typer.Argument(help="Run: its number, last-1, or a date of its schedule.")
    ] = "last-1",
    after: Annotated[str, typer.Argument(help="The run that is compared with it.")] = "last",
    json: JsonOption = False,
) -> None:
    """Compare two nights: each device's metrics with their ratio, its interval and a verdict.

    Example: stifarm campaign compare nightly 2026-11-27 2026-11-28
    """
    with farm_of(context, existing=True) as farm:
        campaign = known_campaigns(farm, name)[0]
        first, second = _two_runs(farm, campaign, before, after)
        with farm.store.reader() as session:
            found = compare_runs(session, first.id, second.id)
    if json:
        emit_json({"before": first.number, "after": second.number, **asdict(found)})
    else:
        _show_comparison(name, found, (first.number, second.number))
    for device in found.missing:
        warn(f"{device} has data in run {first.number} and none in run {second.number}")


def _two_runs(
    farm: Farm, campaign: CampaignRow, before: str, after: str
) -> tuple[CampaignRunRow, CampaignRunRow]:
    """The runs that these name. Raises: CampaignError when they are not two."""
    with farm.store.reader() as session:
        numbers = [row.number for row in runs_of(session, campaign.id) if row.state != "skipped"]
    if len(numbers) < 2:
        only = f"it has one, run {numbers[0]}" if numbers else "it has none"
        raise CampaignError(
            f"{campaign.name} has no two runs that could be compared: {only}.",
            f"Make {'another' if numbers else 'two'}: stifarm campaign run {campaign.name} --again"
            + (f"; what there is: stifarm campaign report {campaign.name}." if numbers else "."),
        )
    first, second = (find_run(farm, campaign, each) for each in (before, after))
    if first.id == second.id:
        other = next(number for number in numbers if number != first.number)
        pair = f"{min(other, first.number)} {max(other, first.number)}"
        raise CampaignError(
            f"{before} and {after} are the same run of {campaign.name}, {first.number}.",
            f"Name another one to compare it with: stifarm campaign compare {campaign.name} {pair}"
            f" (its newest runs: {', '.join(map(str, numbers[:10]))}).",
        )
    return first, second


def _show_comparison(name: str, found: Comparison, runs: tuple[int, int]) -> None:
    before, after = runs
    rows, lacking = compared_rows(found.metrics), lacking_rows(found.metrics, runs)
    common = asked_by_all(found.metrics)
    heading(f"{name}: run {after} against run {before}" + (f" — {common}" if common else ""))
    shown = []
    for device in dict.fromkeys(one.device for one in found.metrics):
        if device in rows:
            shown.append(TableText(device, COMPARED_COLUMNS, rows[device]))
        if device in lacking:
            shown.append(TableText(device, LACKING_COLUMNS, lacking[device]))
    tables(shown)
    if not shown:
        note("neither has a latency, an accuracy or a profile")
    if rows:
        told = [f"ratio: run {after} ÷ run {before}; a time below 1 is faster, an accuracy above 1 better."]
        unsure = any(row[-1] == "not enough data" for each in rows.values() for row in each)
        lines([*told, *([TELLS_NOTHING] if unsure else []), ""])
    for change in found.plans:
        note(f"  plan: {change}")


# ------------------------------------------------------------------ finding


def known_campaigns(farm: Farm, name: str | None) -> Sequence[CampaignRow]:
    """The campaign of this name, else all of the store. Raises: CampaignError."""
    with farm.store.reader() as session:
        known = list_campaigns(session)
        if name is None:
            return known
        found = find_campaign(session, name)
    if found is None:
        names = [row.name for row in known]
        raise CampaignError(f"The store knows no campaign {name!r}.", near(name, names))
    return [found]


def find_run(farm: Farm, campaign: CampaignRow, text: str) -> CampaignRunRow:
    """A run by its number, ``last`` (of those with work), ``last-1`` …, or the date that it was due on.

    Raises: CampaignError.
    """
    with farm.store.reader() as session:
        runs = [row for row in runs_of(session, campaign.id) if row.state != "skipped"]
        schedule = schedule_of(session, campaign.id)
    timezone = "UTC" if schedule is None else schedule.timezone
    back = text.removeprefix("last-") if text.startswith("last-") else "0" if text == "last" else ""
    if back.isdecimal():
        chosen = runs[int(back) : int(back) + 1]
    elif text.isdecimal():
        chosen = [row for row in runs if row.number == int(text)]
    else:
        chosen = [row for row in runs if local_date(row.due_wall_ns, timezone) == text][:1]
    if not chosen:
        numbers = ", ".join(str(row.number) for row in runs[:10]) or "none"
        raise CampaignError(
            f"{campaign.name} has no run {text!r}.",
            f"Its newest runs: {numbers}; or name a date: YYYY-MM-DD.",
        )
    return chosen[0]
