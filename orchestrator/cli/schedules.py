"""The verbs of schedules, and serve, which fires them."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer

from db.campaigns import go_on, list_campaigns, open_runs, runs_of
from db.events import record_event
from db.models import CampaignRow, ScheduleRow
from db.schedules import list_schedules, schedule_of, set_schedule_state
from orchestrator.alerts.delivery import telling
from orchestrator.campaigns.controller import Controller
from orchestrator.campaigns.due import next_due, shown
from orchestrator.campaigns.ends import RunEnds
from orchestrator.campaigns.report import counted
from orchestrator.campaigns.schedules import fire_due
from orchestrator.campaigns.start import begin_run, resolve, spec_of
from orchestrator.campaigns.status import format_span, statuses
from orchestrator.cli.campaign import means_of, tell_open
from orchestrator.cli.context import JsonOption, PortsOption, Session, driving, farm_of
from orchestrator.cli.output import emit_json, note, success, table, warn
from orchestrator.errors import CampaignError, near
from orchestrator.farm import Farm, impatient
from orchestrator.host_book import know_hosts
from orchestrator.inventory import Device
from orchestrator.inventory_watch import InventoryWatch
from orchestrator.lab_hosts import LabHosts
from orchestrator.worker import HostWorker
from sti_runtime.errors import InputError
from sti_runtime.units import NONE

schedules_app = typer.Typer(no_args_is_help=True, help="When campaigns run by themselves (docs/nightly.md).")

NameArgument = Annotated[str, typer.Argument(help="Campaign.")]


@schedules_app.command("list")
def list_(context: typer.Context, json: JsonOption = False) -> None:
    """Every schedule with its next due time.

    Example: stifarm schedules list
    """
    with farm_of(context, existing=True) as farm, farm.store.reader() as session:
        rows = list_schedules(session)
    shown_rows = [
        {
            "campaign": campaign.name,
            "cron": row.cron,
            "timezone": row.timezone,
            "state": row.state,
            "catch_up": row.catch_up,
            "overlap": row.overlap,
            "next": _next(row),
        }
        for row, campaign in rows
    ]
    if json:
        emit_json(shown_rows)
    else:
        columns = ("campaign", "cron", "timezone", "state", "catch-up", "overlap", "next")
        table("Schedules", columns, [tuple(value or NONE for value in one.values()) for one in shown_rows])


@schedules_app.command("pause")
def pause(context: typer.Context, name: NameArgument) -> None:
    """Let a schedule rest; what falls due meanwhile is not caught up.

    Example: stifarm schedules pause nightly
    """
    _set_state(context, name, "paused")


@schedules_app.command("resume")
def resume(context: typer.Context, name: NameArgument) -> None:
    """Let a paused schedule go on from now.

    Example: stifarm schedules resume nightly
    """
    _set_state(context, name, "active")


@schedules_app.command("remove")
def remove(context: typer.Context, name: NameArgument) -> None:
    """Take a campaign's schedule away; its runs and their data stay.

    Example: stifarm schedules remove nightly
    """
    _set_state(context, name, "removed")


@schedules_app.command("run-now")
def run_now(context: typer.Context, name: NameArgument) -> None:
    """Queue a run now, beside the schedule; stifarm serve works on it.

    Example: stifarm schedules run-now nightly
    """
    with farm_of(context, existing=True) as farm:
        _, campaign = _scheduled(farm, name)
        know_hosts(farm)
        resolved = resolve(farm, spec_of(campaign))
        with farm.store.session() as session:
            taken = go_on(session, campaign.id, resolved.spec, again=True)
            if taken is not None and taken.run is not None:
                raise CampaignError(
                    f"Run {taken.run.number} of {name} is open.", "Wait for its end, or cancel it."
                )
            number = len(runs_of(session, campaign.id)) + 1
            run = begin_run(session, campaign, resolved, trigger="manual", number=number)
        assert run is not None
        tell_open(context, farm, campaign, run)


@schedules_app.command("history")
def history(
    context: typer.Context,
    name: NameArgument,
    limit: Annotated[int, typer.Option(min=1, help="How many runs.")] = 20,
    json: JsonOption = False,
) -> None:
    """The runs of a scheduled campaign, newest first, with those that were skipped.

    Example: stifarm schedules history nightly
    """
    with farm_of(context, existing=True) as farm:
        schedule, campaign = _scheduled(farm, name)
        found = statuses(farm, [campaign], runs=limit)
        with farm.store.reader() as session:
            runs = runs_of(session, campaign.id, limit=limit)
    rows = [
        {
            "run": str(one.number),
            "due": shown(row.due_wall_ns, schedule.timezone),
            "trigger": one.trigger,
            "state": one.state,
            "took": None if one.elapsed_ns is None else format_span(one.elapsed_ns),
            "cells": counted(one),
            "cause": one.cause or "",
        }
        for one, row in zip(found, runs, strict=True)
    ]
    if json:
        emit_json([{**row, "counts": dict(one.counts)} for row, one in zip(rows, found, strict=True)])
    else:
        columns = (">run", "due", "trigger", "state", ">took", ">cells", "cause")
        table(
            f"Runs of {name}",
            columns,
            [tuple(NONE if value is None else value for value in one.values()) for one in rows],
        )


def serve(
    context: typer.Context,
    once: Annotated[bool, typer.Option("--once", help="End when no run is open and none is due.")] = False,
    listen: Annotated[
        str | None, typer.Option("--listen", help="Let lab hosts join at this machine's address, HOST:PORT.")
    ] = None,
    ports: PortsOption = None,
) -> None:
    """Fire schedules and work on open campaigns until it is stopped (Ctrl-C, SIGTERM).

    Example: stifarm serve --listen 192.0.2.7:6379
    """
    with (
        farm_of(context, wait_s=math.inf) as farm,  # it may start beside its database
        driving(farm, "all", listen=listen, ports=ports, quarantined=True, patient=True) as session,
        telling(impatient(farm.store)),
        terminated(farm.stop),
    ):
        note("serving: schedules fire and open campaigns are worked on; Ctrl-C stops it")
        controller = Controller(means_of(session))
        watch, ends = InventoryWatch(farm.settings.inventory), RunEnds(farm.store)

        def tick() -> None:
            _tick(session, watch)
            _tell_ends(context, ends)

        try:
            controller.run(lambda idle: once and idle and _no_run(farm), tick=tick)
            _tell_ends(context, ends)
        except KeyboardInterrupt:
            note("stopped; open campaigns go on with the next stifarm serve or campaign run")


@contextmanager
def terminated(stop: threading.Event) -> Iterator[None]:
    """SIGTERM sets ``stop`` within the block."""
    before = signal.signal(signal.SIGTERM, lambda _number, _frame: stop.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tick(session: Session, watch: InventoryWatch) -> None:
    if session.hosts is not None:
        if watch.changed():
            pool = session.pool
            reread(session.farm, session.hosts, pool.host_worker, pool.end_worker)
        session.hosts.farm_devices()  # the farm's inventory gets those of hosts that joined meanwhile
    _fire(session.farm)


def reread(
    farm: Farm,
    hosts: LabHosts,
    host_worker: Callable[[Sequence[Device]], HostWorker],
    end_worker: Callable[[HostWorker], None],
) -> None:
    """Go on with the inventory file as it is now; one that is not valid changes nothing and is told of. The
    worker of before ends with the last call of it."""
    try:
        changed = farm.read_inventory()
    except InputError as error:
        warn(f"{farm.settings.inventory} has changed and is not valid: {error.what}")
        with farm.store.session() as session:
            record_event(session, "error", "inventory-invalid", error.what)
        return
    if not changed:
        return
    hosts.own_changed(farm.own_devices, host_worker(farm.own_devices), end_worker)
    names = ", ".join(device.name for device in farm.own_devices) or "none"
    note(f"{farm.settings.inventory} was read anew; its devices: {names}")
    with farm.store.session() as session:
        record_event(session, "info", "inventory-read", f"its devices: {names}")


def _fire(farm: Farm) -> None:
    for name in fire_due(farm):
        note(f"{name} is due")


def _tell_ends(context: typer.Context, ends: RunEnds) -> None:
    """A line for each run that has ended since the last look."""
    for end in ends.look():
        seen_by = f"campaign report {end.campaign} --run {end.number}"
        if not end.counts:
            seen_by = f"schedules history {end.campaign}"
        (success if end.state == "done" else warn)(f"{end}. See it: {context.obj.again(seen_by)}")


def _no_run(farm: Farm) -> bool:
    with farm.store.reader() as session:
        return not open_runs(session)


def _next(row: ScheduleRow) -> str | None:
    if row.state != "active":
        return None
    return shown(next_due(row.cron, row.timezone, row.settled_wall_ns), row.timezone)


def _set_state(context: typer.Context, name: str, state: str) -> None:
    with farm_of(context, existing=True) as farm:
        schedule, _ = _scheduled(farm, name)
        with farm.store.session() as session:
            set_schedule_state(session, schedule.id, state)
        success(f"the schedule of {name} is {state}")


def _scheduled(farm: Farm, name: str) -> tuple[ScheduleRow, CampaignRow]:
    """Raises: CampaignError when the campaign has no schedule."""
    with farm.store.reader() as session:
        campaigns = {row.name: row for row in list_campaigns(session)}
        schedule = schedule_of(session, campaigns[name].id) if name in campaigns else None
        known = [campaign.name for _, campaign in list_schedules(session)]
    if schedule is None:
        raise CampaignError(
            f"{name!r} has no schedule.",
            f"{near(name, known)} Make one: stifarm campaign schedule {name} --cron …",
        )
    return schedule, campaigns[name]
