"""Phones that adb servers list, matched with the inventory, and the inventory's lines for new ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.inventory import RESERVED_NAMES, Device
from orchestrator.transports.adb_link import with_port
from orchestrator.transports.adb_own import adb_word
from orchestrator.transports.adb_server import DEFAULT_PORT, AdbServer, Listed, server_address
from orchestrator.transports.adb_socket import ServerAddress
from orchestrator.transports.adb_states import READY, trouble_of

_USABLE_SERIAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:@()/-]{0,127}")
_TCP_SERIAL = re.compile(r"([A-Za-z0-9_.-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}")
_EMULATOR = re.compile(r"emulator-[0-9]+")


@dataclass(frozen=True)
class Found:
    """A device that an adb server lists. ``name``: the inventory's, None where it has none for it; ``what``
    and ``remedy``: why it cannot be used, empty where it can."""

    server: ServerAddress
    serial: str
    state: str
    model: str
    name: str | None
    what: str
    remedy: str


def servers_of(
    devices: Iterable[Device], environment: Mapping[str, str] | None = None
) -> tuple[ServerAddress, ...]:
    """The usual adb server first, then the others that the inventory names."""
    named = [server_address(d.adb_server, environment) for d in devices if d.transport == "adb"]
    return tuple(dict.fromkeys([server_address(None, environment), *named]))


def ask_server(
    address: ServerAddress,
    devices: Sequence[Device],
    environment: Mapping[str, str] | None = None,
    *,
    start: bool = False,
) -> list[Found]:
    """What one server lists. ``start``: one is started where none runs. Raises: DeviceError about it."""
    server = AdbServer(address, "adb", ours=start)
    return matched(address, server.devices(), devices, environment)


def how_to_end(address: ServerAddress) -> str:
    """What ends an adb server that was started here."""
    port = "" if address.port == DEFAULT_PORT else f" -P {address.port}"
    return f"End it when no program uses it any more: {adb_word()}{port} kill-server"


def matched(
    address: ServerAddress,
    listed: Iterable[Listed],
    devices: Iterable[Device],
    environment: Mapping[str, str] | None = None,
) -> list[Found]:
    """Listed devices with their names in the inventory."""
    names = {
        serial_of(device): device.name
        for device in devices
        if device.transport == "adb" and server_address(device.adb_server, environment) == address
    }
    found = []
    for one in listed:
        trouble = trouble_of(one.state)
        what, remedy = ("", "") if trouble is None else (trouble.what, trouble.remedy)
        model = one.details.get("model", "").replace("_", " ")
        found.append(Found(address, one.serial, one.state, model, names.get(one.serial), what, remedy))
    return found


def serial_of(device: Device) -> str:
    """What the server lists a device of the inventory as."""
    return device.serial or with_port(device.address or "")


def entries_for(found: Sequence[Found], taken: Iterable[str], usual: ServerAddress) -> dict[Found, str]:
    """The inventory's lines for each device that can be used and has no name there. ``taken``: names in use;
    ``usual``: the adb server that needs no mention."""
    names = {*taken, *RESERVED_NAMES}
    entries: dict[Found, str] = {}
    for one in found:
        if one.name is None and one.state == READY and _USABLE_SERIAL.fullmatch(one.serial):
            name = _free_name(one.model, names)
            names.add(name)
            entries[one] = _entry(one, name, usual)
    return entries


def _free_name(model: str, taken: set[str]) -> str:
    base = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")[:48] or "phone"
    return next(n for n in (base, *(f"{base}-{i}" for i in range(2, len(taken) + 3))) if n not in taken)


def _entry(one: Found, name: str, usual: ServerAddress) -> str:
    way = "address" if _TCP_SERIAL.fullmatch(one.serial) else "serial"
    virtual = _EMULATOR.fullmatch(one.serial) is not None
    lines = [
        f"  - name: {name}",
        "    transport: adb",
        f'    {way}: "{one.serial}"',
        *([] if one.server == usual else [f'    adb_server: "{one.server}"']),
        "    labels:",
        "      kind: phone",
        "    prepare:                    # changed while something is timed, then put back",
        "      stay_awake: true",
        "    gates:                      # checked before anything is timed",
        "      max_temperature_c: 40",
        "      min_battery_percent: 30",
        "      min_free: 500MB",
        "      wait_limit_s: 600",
        *(["    emulate:                    # no real phone", "      mechanism: lab"] if virtual else []),
    ]
    return "\n".join(lines) + "\n"
