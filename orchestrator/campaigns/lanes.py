"""Lanes: what does one thing at a time. Devices of one machine share a lane, as does this host's own work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from orchestrator.inventory import Device
from orchestrator.side_by_side import by_machine

HOST = "(host)"
"""The lane of what is done on this host, when no device of the inventory is this machine."""


def lanes_of(devices: Iterable[Device], own_lock: Path) -> Mapping[str | None, str]:
    """The lane of every device, and under None that of the host, which disturbs devices on this machine."""
    lanes: dict[str | None, str] = {None: HOST}
    for group in by_machine(devices, own_lock):
        for device in group:
            lanes[device.name] = group[0].name
            if device.shared_machine(own_lock) == str(own_lock):
                lanes[None] = group[0].name
    return lanes
