"""Link and limits of a running device, set to what its active faults say: no faults, then full speed."""

from __future__ import annotations

from orchestrator.lab import limits, machine, net
from orchestrator.lab.state import DeviceState, Lab, LabState
from orchestrator.processes import alive

SLOW_BYTES_PER_S = 256_000
"""A slow link: a 2 Mbit/s radio."""

THROTTLED_PART = 4
"""A throttled device has this part of the CPU time that it has otherwise."""

WHOLE_CPU_MILLI = 1000


def follow_faults(lab: Lab, state: LabState, device: DeviceState) -> None:
    """Make link and limits follow the state; nothing of a device that is off. Raises: LabError."""
    cut = device.fault("cut") is not None
    rate = SLOW_BYTES_PER_S if device.fault("slow") else None
    if not state.means.network:
        machine.write_link(lab, device, cut=cut, bytes_per_s=rate)
    if device.process is None or not alive(device.process):
        return
    if state.means.network:
        net.set_carrier(device.process, up=not cut)
        net.set_rate(lab.id, device.index, device.process, rate)
    if device.groups is not None:
        throttled = device.fault("throttle") is not None
        share = throttled_milli(device) if throttled else device.cpu_share_milli
        limits.set_cpu_share(lab.id, device.name, share)


def throttled_milli(device: DeviceState) -> int:
    """The CPU share of a throttled device."""
    return max(1, (device.cpu_share_milli or WHOLE_CPU_MILLI) // THROTTLED_PART)
