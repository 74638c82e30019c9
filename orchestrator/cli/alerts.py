"""Verbs about alerts: add, list, remove, test, deliver."""

from __future__ import annotations

import os
import re
import shlex
import time
from typing import Annotated, Any

import typer

from db import alerts
from db.models import AlertRow
from db.models.work import EVENT_LEVELS
from orchestrator.alerts.delivery import deliver_all, deliver_until, send
from orchestrator.alerts.sending import check_url, shown_url, startable
from orchestrator.cli.context import JsonOption, farm_of
from orchestrator.cli.output import emit_json, note, success, table, warn
from orchestrator.errors import near
from sti_runtime.errors import InputError
from sti_runtime.units import NONE

alerts_app = typer.Typer(no_args_is_help=True, help="Who is told of events, by webhook or by command.")

NameArgument = Annotated[str, typer.Argument(help="The alert's name.")]


@alerts_app.command("add")
def add(
    context: typer.Context,
    name: NameArgument,
    webhook: Annotated[str | None, typer.Option("--webhook", help="URL that events are POSTed to.")] = None,
    webhook_variable: Annotated[
        str | None,
        typer.Option("--webhook-variable", help="Environment variable that holds the URL, if it is secret."),
    ] = None,
    command: Annotated[
        str | None, typer.Option("--command", help="Program and arguments; the event is its input.")
    ] = None,
    level: Annotated[
        str, typer.Option("--level", help=f"Least level: {', '.join(EVENT_LEVELS)}.")
    ] = "warning",
) -> None:
    """Tell somebody of events from now on.

    Example: stifarm alerts add oncall --webhook-variable ONCALL_URL --level error
    """
    if re.fullmatch(r"[a-z0-9][a-z0-9_.-]{0,63}", name) is None:
        raise InputError(f"{name!r} is not 1 to 64 of a-z, 0-9, '.', '_', '-'.", "Choose another name.")
    if level not in EVENT_LEVELS:
        raise InputError(f"--level {level!r} is unknown.", near(level, EVENT_LEVELS))
    kind, target = _target(webhook, webhook_variable, command)
    with farm_of(context) as farm, farm.store.session() as session:
        alerts.add_alert(session, name, kind, target, level)
    success(f"alert {name}: events of level {level} and worse; try it: stifarm alerts test {name}")
    doubt = startable(target[0]) if kind == "command" else None
    if doubt is not None:
        warn(f"{doubt}; events wait until it starts where stifarm serve (or alerts deliver) runs")


@alerts_app.command("list")
def list_(context: typer.Context, json: JsonOption = False) -> None:
    """List alerts, what is still to be told, and what hinders it; secrets in addresses are not shown.

    Example: stifarm alerts list
    """
    with farm_of(context, existing=True) as farm, farm.store.reader() as session:
        rows = [
            {
                "name": row.name,
                "kind": row.kind,
                "target": shown_target(row),
                "level": row.level,
                "pending": alerts.count_pending(session, row),
                "tries": row.tries,
                "problem": row.last_problem,
            }
            for row in alerts.list_alerts(session)
        ]
    if json:
        emit_json(rows)
        return
    table(
        "Alerts",
        ("alert", "kind", "target", "level", ">pending", ">tries", "problem"),
        [tuple(NONE if value is None else str(value) for value in row.values()) for row in rows],
    )


@alerts_app.command("remove")
def remove(context: typer.Context, name: NameArgument) -> None:
    """Tell them no more.

    Example: stifarm alerts remove oncall
    """
    with farm_of(context, existing=True) as farm, farm.store.session() as session:
        alerts.remove_alert(session, name)
    success(f"alert {name}: removed")


@alerts_app.command("test")
def test(context: typer.Context, name: NameArgument) -> None:
    """Send a made-up event now, whatever the level.

    Example: stifarm alerts test oncall
    """
    with farm_of(context, existing=True) as farm:
        with farm.store.reader() as session:
            row = alerts.get_alert(session, name)
        document = {
            "id": f"{farm.store.store_id}/test", "level": row.level, "kind": "test",
            "what": "This is a test.", "device": None, "job": None, "wall_ns": time.time_ns(),
        }  # fmt: skip
        send(row, document, os.environ)
    success(f"alert {name}: taken")


@alerts_app.command("deliver")
def deliver(
    context: typer.Context,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until interrupted.")] = False,
) -> None:
    """Tell of events now, where no controller does it.

    Example: stifarm alerts deliver --follow
    """
    with farm_of(context, existing=True) as farm:
        if follow:
            note("telling of events; Ctrl-C ends it, nothing is lost")
            deliver_until(farm.store, farm.stop)
        else:
            note(f"{deliver_all(farm.store)} events were taken")


def shown_target(row: AlertRow) -> str:
    """Where an alert goes, without what may be secret in it."""
    target: Any = alerts.target_of(row)
    if row.kind == "command":
        return f"{target[0]} …" if len(target) > 1 else str(target[0])
    return shown_url(target["url"]) if "url" in target else f"${target['variable']}"


def _target(webhook: str | None, variable: str | None, command: str | None) -> tuple[str, Any]:
    """(kind, target). Raises: InputError."""
    if sum(given is not None for given in (webhook, variable, command)) != 1:
        raise InputError(
            "An alert has one target.", "Give --webhook URL, --webhook-variable NAME or --command CMD."
        )
    if webhook is not None:
        return "webhook", {"url": check_url(webhook)}
    if variable is not None:
        if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,199}", variable) is None:
            raise InputError(
                "--webhook-variable: that is no name of a variable.", "Name one like ONCALL_URL."
            )
        return "webhook", {"variable": variable}
    try:
        argv = shlex.split(command or "")
    except ValueError as error:
        raise InputError(f"--command: {error}.", "Quote it like a shell; none is run.") from error
    if not argv:
        raise InputError("--command: it is empty.", "Give a program and its arguments.")
    return "command", argv
