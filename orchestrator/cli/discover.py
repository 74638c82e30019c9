"""The verb devices discover: what adb servers see, and the inventory's lines for what it lacks."""

from __future__ import annotations

import os

import typer

from orchestrator.cli.context import JsonOption, Options
from orchestrator.cli.output import emit_json, fail, note, out, table, warn
from orchestrator.discovery import Found, ask_server, entries_for, how_to_end, servers_of
from orchestrator.errors import DeviceError
from orchestrator.inventory import Device, load_inventory
from orchestrator.transports.adb_own import adb_word, listens
from sti_runtime.errors import StifarmError
from sti_runtime.units import NONE

NOTHING = """\
No phone is seen. Check:
  - on the phone: Settings > About phone, tap Build number seven times;
    then Developer options > USB debugging
  - the cable: many only charge; another cable or port
  - on this computer: Android's udev rules and the group plugdev
    (Debian: android-sdk-platform-tools-common)
  - a phone in the network: its adb over TCP ({adb} tcpip 5555);
    in the inventory: address: "HOST:5555"\
"""
BOARD = """\
A board over ssh is not discovered; add it by hand,
then: stifarm doctor --devices my-board
  - name: my-board
    transport: ssh
    address: "user@host:22"      # a host of ~/.ssh/config will do
    labels:
      kind: board\
"""


def discover(context: typer.Context, json: JsonOption = False) -> None:
    """List the phones that adb servers see, with ready inventory entries for those that the inventory lacks.

    Example: stifarm devices discover
    """
    options = context.obj
    assert isinstance(options, Options)
    path = options.settings().inventory
    devices = load_inventory(path).devices
    found, errors = _look(devices)
    usual = servers_of(devices, os.environ)[0]
    entries = entries_for(found, [device.name for device in devices], usual)
    if json:
        emit_json([_document(one, entries.get(one)) for one in found])
    else:
        _show(found, entries, str(path), {device.name for device in devices if device.emulated})
    raise typer.Exit(1 if errors and not found else 0)


def _look(devices: tuple[Device, ...]) -> tuple[list[Found], list[StifarmError]]:
    """What every server lists. The usual one is started where it does not run; others are not."""
    found: list[Found] = []
    errors: list[StifarmError] = []
    usual, *others = servers_of(devices, os.environ)
    for address in (usual, *others):
        if address != usual and not listens(address):
            note(f"no adb server runs at {address}")
            continue
        ran = listens(address)
        try:
            found += ask_server(address, devices, os.environ, start=address == usual)
            if not ran:
                note(f"an adb server was started at {address}, and stays. {how_to_end(address)}")
        except DeviceError as error:
            fail(error)
            errors.append(error)
    return found, errors


def _document(one: Found, entry: str | None) -> dict[str, str | None]:
    return {
        "adb_server": str(one.server),
        "serial": one.serial,
        "state": one.state,
        "model": one.model or None,
        "device": one.name,
        "what": one.what or None,
        "remedy": one.remedy or None,
        "entry": entry,
    }


def _show(found: list[Found], entries: dict[Found, str], inventory: str, emulated: set[str]) -> None:
    if not found:
        note(NOTHING.format(adb=adb_word()))
    else:
        table(
            "Phones",
            ("serial", "state", "model", "adb server", "in the inventory"),
            [
                (
                    one.serial,
                    one.state,
                    one.model or NONE,
                    str(one.server),
                    "no"
                    if one.name is None
                    else f"{one.name} (emulated)"
                    if one.name in emulated
                    else one.name,
                )
                for one in found
            ],
        )
        for one in found:
            if one.what:
                warn(f"{one.name or one.serial}: {one.what} {one.remedy}")
    if entries:
        note(f"Below devices: in {inventory}, add:")
        for entry in entries.values():
            out.print(entry, markup=False, soft_wrap=True)
    note(BOARD)
