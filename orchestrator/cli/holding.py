"""Verbs about who holds a device: reserve and unreserve (a person), quarantine and release (the farm)."""

from __future__ import annotations

import getpass
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from sqlalchemy.orm import Session as StoreSession

from db.clock import utc_text
from db.devices import find_device, list_devices
from db.models import QuarantineRow
from db.quarantine import PASSES_TO_RELEASE, begin_quarantine, end_quarantine, quarantines
from db.reservations import Held, holders, reserve, unreserve
from orchestrator.cli.context import JsonOption, farm_of
from orchestrator.cli.output import emit_json, fail, success
from orchestrator.cli.over_devices import finish
from orchestrator.errors import StableError
from orchestrator.farm import Farm
from orchestrator.hosts import OWN
from orchestrator.inventory import Device
from orchestrator.listed import select_listed
from sti_runtime.errors import InputError, StifarmError
from sti_runtime.units import parse_duration_ns

LONGEST_NS = 366 * 24 * 3600 * 10**9
"""Longest reservation: one that is forgotten ends."""

SelectorArgument = Annotated[
    str, typer.Argument(metavar="DEVICES", help="all, names, label=value, transport:adb, !name.")
]
ByOption = Annotated[str | None, typer.Option("--by", help="Who; by default this user on this host.")]


def reserve_(
    context: typer.Context,
    devices: SelectorArgument,
    length: Annotated[str, typer.Option("--for", help="How long: 4h, 90m.")],
    reason: Annotated[str | None, typer.Option("--reason", help="Why, for others to read.")] = None,
    by: ByOption = None,
    let_finish: Annotated[
        bool, typer.Option("--let-finish", help="Let a job that runs there end before it is yours.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Take devices out of the farm for a while, to use them by hand.

    The farm begins nothing there. A job that runs is asked to stop behind its present unit (within half a
    minute and that unit) and goes on where it was when the reservation is over.
    Example: stifarm devices reserve phone-a --for 4h --reason "debugging its camera"
    """
    length_ns = parse_length(length)
    holder = by or f"{getpass.getuser()}@{socket.gethostname()}"

    def take(session: StoreSession, device_id: int, name: str) -> dict[str, Any]:
        row = reserve(
            session, device_id, holder=holder, reason=reason, length_ns=length_ns, lets_finish=let_finish
        )
        lease = holders(session)[device_id].lease_owner
        using = f"; a job of {lease} " + ("ends first" if let_finish else "is asked to stop") if lease else ""
        _say(json, f"{name}: reserved by {holder} until {utc_text(row.until_wall_ns)}{using}")
        return {"device": name, "holder": holder, "until_wall_ns": row.until_wall_ns, "used_by": lease}

    _each(context, devices, take, json=json)


def unreserve_(context: typer.Context, devices: SelectorArgument, json: JsonOption = False) -> None:
    """Give reserved devices back to the farm.

    Example: stifarm devices unreserve phone-a
    """

    def give(session: StoreSession, device_id: int, name: str) -> dict[str, Any]:
        row = unreserve(session, device_id)
        _say(json, f"{name}: " + ("was not reserved" if row is None else f"no longer {row.holder}'s"))
        return {"device": name, "was_reserved": row is not None}

    _each(context, devices, give, json=json)


def quarantine_(
    context: typer.Context,
    devices: SelectorArgument,
    cause: Annotated[str, typer.Option("--cause", help="Why, for others to read.")],
    json: JsonOption = False,
) -> None:
    """Tell the farm not to rely on devices: they get no jobs but health checks until they are released.

    Example: stifarm devices quarantine phone-b --cause "its battery swells"
    """

    def put(session: StoreSession, device_id: int, name: str) -> dict[str, Any]:
        begun = begin_quarantine(session, device_id, cause)
        _say(json, f"{name}: " + ("in quarantine" if begun else "was in quarantine already"))
        return {"device": name, "begun": begun}

    _each(context, devices, put, json=json)


def release(
    context: typer.Context, devices: SelectorArgument, by: ByOption = None, json: JsonOption = False
) -> None:
    """End the quarantine of devices by a person's word; their past failures no longer count.

    Example: stifarm devices release phone-b
    """
    who = by or f"{getpass.getuser()}@{socket.gethostname()}"

    def free(session: StoreSession, device_id: int, name: str) -> dict[str, Any]:
        ended = end_quarantine(session, device_id, f"released by {who}")
        _say(json, f"{name}: " + ("released" if ended else "was in no quarantine"))
        return {"device": name, "released": ended}

    _each(context, devices, free, json=json)


def parse_length(text: str) -> int:
    """How long a reservation lasts, in ns. Raises: InputError."""
    try:
        length_ns = parse_duration_ns(text)
    except InputError as error:
        raise InputError(f"--for: {error.what}", "Write it like 4h or 90m.") from error
    if not 0 < length_ns <= LONGEST_NS:
        raise InputError(f"--for {text}: a reservation lasts up to 8784h.", "Write it like 4h or 90m.")
    return length_ns


# ------------------------------------------------------------------ what a list shows


@dataclass(frozen=True)
class Holdings:
    """Who holds which device, by the inventories' names."""

    held: Mapping[str, Held]
    quarantined: Mapping[str, QuarantineRow]

    def text(self, name: str) -> str:
        """For a table."""
        held, quarantine, parts = self.held.get(name, Held()), self.quarantined.get(name), []
        if held.reservation is not None:
            why = f" ({held.reservation.reason})" if held.reservation.reason else ""
            until = utc_text(held.reservation.until_wall_ns)
            parts.append(f"reserved by {held.reservation.holder} until {until}{why}")
        if held.lease_owner is not None:
            parts.append(f"in use by {held.lease_owner} until {utc_text(held.lease_until_wall_ns or 0)}")
        if quarantine is not None:
            passes = f"{quarantine.passes}/{PASSES_TO_RELEASE} checks passed"
            parts.append(
                f"quarantine since {utc_text(quarantine.since_wall_ns)}, {passes}: {quarantine.cause}"
            )
        return "; ".join(parts) or "free"

    def json(self, name: str) -> dict[str, Any]:
        """For machines; None where nobody holds it so."""
        held, quarantine = self.held.get(name, Held()), self.quarantined.get(name)
        reservation, lease = held.reservation, held.lease_owner
        return {
            "lease": None if lease is None else {"owner": lease, "until_wall_ns": held.lease_until_wall_ns},
            "reservation": None
            if reservation is None
            else {
                "holder": reservation.holder,
                "reason": reservation.reason,
                "since_wall_ns": reservation.since_wall_ns,
                "until_wall_ns": reservation.until_wall_ns,
            },
            "quarantine": None
            if quarantine is None
            else {
                "cause": quarantine.cause,
                "since_wall_ns": quarantine.since_wall_ns,
                "passes": quarantine.passes,
                "passes_to_release": PASSES_TO_RELEASE,
            },
        }


def holdings(farm: Farm) -> Holdings:
    """Who holds which device now."""
    with farm.store.reader() as session:
        names = {row.id: row.name for row in list_devices(session)}
        held, sick = holders(session), quarantines(session)
    return Holdings(
        {names[key]: row for key, row in held.items() if key in names},
        {names[key]: row for key, row in sick.items() if key in names},
    )


# ------------------------------------------------------------------ inner


def _each(
    context: typer.Context,
    selector: str,
    action: Callable[[StoreSession, int, str], dict[str, Any]],
    *,
    json: bool,
) -> None:
    """Do something in the store for every chosen device, each in a transaction of its own."""
    answers: list[dict[str, Any]] = []
    errors: list[StifarmError | None] = []
    with farm_of(context, existing=True) as farm:
        for device in select_listed(farm, selector):
            try:
                with farm.store.session() as session:
                    row = find_device(session, name=device.name)
                    if row is None:
                        raise _never_probed(device, context.obj.again)
                    answers.append(action(session, row.id, device.name))
                errors.append(None)
            except StifarmError as error:
                fail(error)
                errors.append(error)
    if json:
        emit_json(answers)
    finish(errors)


def _never_probed(device: Device, again: Callable[[str], str]) -> StableError:
    """What to say of a device that the store cannot tell from others: it does not know its hardware."""
    where = "" if device.host == OWN else f", while its host {device.host} is joined"
    return StableError(
        "it was never probed, so the store does not know which hardware its name means.",
        f"Probe it once{where}: {again(f'devices probe --devices {device.name}')}",
        device=device.name,
    )


def _say(quiet: bool, text: str) -> None:
    if not quiet:
        success(text)
