"""The verb doctor: gathers, side by side, and shows what orchestrator.doctor finds."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Annotated

import typer

from db.errors import StoreError
from orchestrator import fleet
from orchestrator.beside import Beside, look_beside
from orchestrator.cli.context import JsonOption, Options, Session, WaitOption, driving, farm_of
from orchestrator.cli.output import emit_json, listing, note
from orchestrator.discovery import servers_of
from orchestrator.doctor import Examined, Finding, findings_of, said, same_hardware
from orchestrator.errors import HostError, PoolError
from orchestrator.farm import ControllerBusyError, Farm
from orchestrator.home_checks import home_findings, wrong
from orchestrator.host_checks import exposed_at, host_findings, no_server, server_started
from orchestrator.inventory import Device, load_inventory
from orchestrator.matching import select
from orchestrator.report import format_age, hardware
from orchestrator.settings import Settings
from orchestrator.side_by_side import side_by_side
from orchestrator.store_place import NoStoreError
from orchestrator.transports.adb_own import listens
from sti_runtime.errors import ResourceError, StifarmError
from sti_runtime.units import many

_MARKS = {"ok": "✓", "note": "!", "problem": "✗"}


def doctor(
    context: typer.Context,
    devices: Annotated[
        str | None,
        typer.Option("--devices", "-d", help="Examine devices too: all, names, label=value, transport:adb."),
    ] = None,
    wait: WaitOption = False,
    json: JsonOption = False,
) -> None:
    """Say what works, what does not, and how to mend it: of this host and, with --devices, of devices.

    While another command drives devices they are looked at beside it, and those in use are left alone.
    Example: stifarm doctor --devices all
    """
    options = context.obj
    assert isinstance(options, Options)
    settings = options.settings()
    inventory = load_inventory(settings.inventory)
    with ExitStack() as opened:
        farm, store = _opened(opened, context)
        findings = [
            store,
            Finding("inventory", "ok", f"{settings.inventory}: {many(len(inventory.devices), 'device')}"),
            *host_findings(settings.home, inventory.devices, os.environ),
            *home_findings(settings),
            *_nodes(settings),
        ]
        if devices is not None:
            findings = (
                [*findings, _not_looked_at("the store cannot be used")]
                if farm is None
                else _with_devices(farm, findings, devices, wait=wait, again=options.again)
            )
    if json:
        emit_json([asdict(finding) for finding in findings])
    else:
        listing("Doctor", [(_MARKS[f.state], f.subject, f.text, f.remedy) for f in findings])
    problems = [f for f in findings if f.state == "problem"]
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    note(count if problems else "no problems")
    raise typer.Exit(1 if problems else 0)


def _opened(stack: ExitStack, context: typer.Context) -> tuple[Farm | None, Finding]:
    """The farm, if its store can be opened, and what is to be said of that."""
    try:
        farm = stack.enter_context(farm_of(context, existing=True))
    except (StoreError, ResourceError, NoStoreError) as error:
        return None, Finding("store", "problem", error.what.rstrip("."), error.remedy)
    return farm, Finding("store", "ok", farm.store.url)


def _not_looked_at(why: str, remedy: str = "Mend what is said above; then run this again.") -> Finding:
    return Finding("devices", "problem", f"not looked at: {why}", remedy)


def _with_devices(
    farm: Farm, findings: Sequence[Finding], devices: str, *, wait: bool, again: Callable[[str], str]
) -> list[Finding]:
    """The findings of before, and those about devices, in place of what was said of these."""
    usual = servers_of(farm.inventory.devices, os.environ)[0]
    ran = listens(usual)
    try:
        with driving(farm, devices, quarantined=True, wait=wait) as session:
            examined = {device.name for device in session.devices}
            found = _device_findings(farm, session)
    except ControllerBusyError as busy:
        chosen = select(farm.inventory.devices, devices)
        examined = {device.name for device in chosen}
        command = again(f"doctor --devices {shlex.quote(devices)} --wait")
        found = [_busy(busy, command), *beside_findings(look_beside(farm, chosen))]
    except (PoolError, HostError, StoreError, ResourceError) as error:
        examined, found = set(), [_not_looked_at(error.what.rstrip("."), error.remedy)]
    kept = [finding for finding in findings if finding.subject not in examined]
    if not ran and listens(usual):
        kept = [finding for finding in kept if finding != no_server(usual)]
        found.append(server_started(usual))
    return kept + found


def _nodes(settings: Settings) -> list[Finding]:
    """What is wrong with the files about nodes of Ray on this machine, the head's or a lab host's, and that
    these can be reached from elsewhere."""
    from orchestrator.ray.access import require_token
    from orchestrator.ray.board import Endpoint
    from orchestrator.ray.head import running_head
    from orchestrator.ray.join import joined_here

    found: list[Finding] = []
    with _told(found):
        if settings.ray_token.exists():
            require_token(settings.ray_token)
    with _told(found):
        if (head := running_head(settings)) is not None:
            found += exposed_at(head.endpoint.host)
    joined = None
    with _told(found):
        joined = joined_here(settings)
    if joined is not None:
        try:
            found += exposed_at(Endpoint.parse(joined.controller).host)
        except HostError as error:
            found.append(wrong(error, "Ray"))
    return list(dict.fromkeys(found))


@contextmanager
def _told(found: list[Finding]) -> Iterator[None]:
    """An error of the block about a file of the home becomes a finding."""
    try:
        yield
    except (HostError, PoolError) as error:
        found.append(wrong(error))


def _busy(busy: ControllerBusyError, again: str) -> Finding:
    what = busy.what.rstrip(".")
    return Finding(
        "controller",
        "note",
        f"{what}. Devices that are not in use are looked at beside it, without their agents",
        f"To examine all when it has ended: {again}",
    )


def beside_findings(found: Sequence[Beside]) -> list[Finding]:
    """What could be seen of devices beside another command, and of the others what was seen last."""
    findings = []
    for one in found:
        if one.why:
            seen = "never seen" if one.known is None else f"last seen {format_age(one.known.age_ns)} ago"
            what = "" if one.known is None else f": {hardware(one.known.facts.get('host_seen') or {})}"
            findings.append(Finding(one.device.name, "note", f"not looked at, for {one.why}; {seen}{what}"))
        else:
            findings += findings_of(Examined(one.device, one.seen, None, one.error))
    return findings


def _device_findings(farm: Farm, session: Session) -> list[Finding]:
    groups = [[device] for device in session.devices]
    answers = {
        device.name: examined
        for device, examined in side_by_side(groups, lambda device: examine(session, device), farm.stop)
    }
    examined = [answers[device.name] for device in session.devices]
    findings: list[Finding] = []
    registered: set[str] = set()
    for one in examined:
        findings += findings_of(one)
        # A second name for the same device is a finding of its own, below.
        if one.facts is not None and one.facts.identity not in registered:
            registered.add(one.facts.identity)
            findings += _registered(farm, session, one)
    return findings + same_hardware(examined)


def examine(session: Session, device: Device) -> Examined:
    """Look at one device, then ask its agent; what fails is kept, not raised."""
    seen = None
    try:
        seen = session.worker.look(device.name)
        return Examined(device, seen, session.worker.facts(device.name), None)
    except StifarmError as error:
        return Examined(device, seen, None, error)


def _registered(farm: Farm, session: Session, one: Examined) -> list[Finding]:
    """Note in the store what was seen; a finding when other hardware stands behind the name."""
    if one.facts is None or one.seen is None:
        return []
    try:
        fleet.register_facts(farm, session.worker, one.device, one.facts, seen=one.seen)
    except StifarmError as error:
        return [said(error, one.device.name)]
    return []
