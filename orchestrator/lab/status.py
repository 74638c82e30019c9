"""How a lab's devices are: what a table or a machine is told."""

from __future__ import annotations

import time
from typing import Any

from orchestrator.lab import devices
from orchestrator.lab.follow import throttled_milli
from orchestrator.lab.state import DeviceState, Lab
from sti_runtime.units import format_bytes


def device_states(lab: Lab) -> list[dict[str, Any]]:
    """Every device in plain words; ``state``: up, rebooting or down."""
    now_ns = time.time_ns()
    return [
        {
            "name": device.name,
            "kind": device.kind,
            "state": state_word(device),
            "address": f"{device.address}:{device.port}",
            "boot_id": device.boot_id or None,
            "workdir": device.workdir,
            "limits": limits_text(device),
            "faults": [
                {"fault": fault.kind, "since_s": max(0, now_ns - fault.since_wall_ns) // 1_000_000_000}
                for fault in device.faults
            ],
            "notes": list(device.notes),
        }
        for device in lab.devices()
    ]


def state_word(device: DeviceState) -> str:
    """Whether it runs."""
    if device.fault("reboot") is not None:
        return "rebooting"
    return "up" if devices.runs(device) else "down"


def limits_text(device: DeviceState) -> str:
    """Its rates and who keeps them."""
    parts = []
    if device.read_bytes_per_s is not None:
        parts.append(f"reads {format_bytes(device.read_bytes_per_s)}/s")
    share = throttled_milli(device) if device.fault("throttle") else device.cpu_share_milli
    if share is not None:
        parts.append(f"{share / 1000:g} CPU")
    if not parts:
        return "none"
    return f"{', '.join(parts)} ({device.groups or 'agent'})"
