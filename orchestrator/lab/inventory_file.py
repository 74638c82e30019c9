"""The inventory of a lab, as any other: what ``stifarm --inventory DIR/inventory.yaml …`` reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from orchestrator.inventory import VERSION, parse_inventory
from orchestrator.lab.state import DeviceState, Lab, LabState
from orchestrator.settings import MACHINE_LOCK

HEAD = """\
# Written by stifarm lab up: the devices of the virtual lab beside it, and this machine.
# It is written anew by the next lab up. stifarm lab status shows the lab, stifarm lab down removes it.
"""

THIS_MACHINE: dict[str, Any] = {
    "name": "this-machine",
    "transport": "local",
    "labels": {"kind": "computer"},
}


def inventory_text(lab: Lab, state: LabState, devices: Sequence[DeviceState]) -> str:
    """The whole file; a valid inventory."""
    entries = [THIS_MACHINE, *(_entry(lab, state, device) for device in devices)]
    body = yaml.safe_dump({"version": VERSION, "devices": entries}, sort_keys=False, allow_unicode=True)
    text = f"{HEAD}\n{body}"
    parse_inventory(text.encode(), lab.inventory)
    return text


def _entry(lab: Lab, state: LabState, device: DeviceState) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": device.name,
        "transport": "ssh" if device.kind == "board" else "adb",
        "address": f"{device.address}:{device.port}",
        "workdir": device.workdir,
        "machine_lock": str(MACHINE_LOCK),
        "threads": 1,
        "labels": {"kind": device.kind, "lab": lab.id},
        "emulate": _emulate(device),
    }
    if device.kind == "board":
        entry["address"] = f"{device.user}@{entry['address']}"
        entry |= {"key_file": str(lab.key), "known_hosts": str(lab.known_hosts)}
    elif state.adb is not None:
        entry["adb_server"] = f"127.0.0.1:{state.adb.port}"
    if device.kind == "phone" and state.means.isolation != "none":
        entry["recovery"] = {"reboot": True}  # a board's user may not restart it, as on most real ones
    return entry


def _emulate(device: DeviceState) -> dict[str, Any]:
    if device.read_bytes_per_s is None and device.cpu_share_milli is None:
        return {"mechanism": "lab"}
    limits: dict[str, Any] = {"mechanism": f"lab-{device.groups}" if device.groups else "agent"}
    if device.read_bytes_per_s is not None:
        limits["read_bandwidth"] = f"{device.read_bytes_per_s}B/s"
    if device.cpu_share_milli is not None:
        limits["cpu_share"] = device.cpu_share_milli / 1000
    return limits
