"""Control groups of the lab's devices: all that a device runs is in them, so it is limited as a whole."""

from __future__ import annotations

import time
from dataclasses import replace

from orchestrator.cgroups import (
    CgroupUnavailableError,
    GroupLimits,
    Hierarchies,
    apply_limits,
    cpu_limits,
    io_limits,
    remove_groups,
    system_hierarchies,
)
from orchestrator.errors import LabError
from orchestrator.lab.state import DeviceState

_GONE_LIMIT_S = 30.0


def group_name(lab_id: str, name: str) -> str:
    """The name of a device's groups."""
    return f"lab-{lab_id}-{name}"


def set_limits(lab_id: str, device: DeviceState, disk: str | None) -> tuple[GroupLimits, ...]:
    """Make a device's groups and set its rates; ``disk``: "major:minor" of its own disk.

    Raises: CgroupUnavailableError when the kernel cannot.
    """
    hierarchies, name = system_hierarchies(), group_name(lab_id, device.name)
    groups = [_cpu_group(hierarchies, name, device.cpu_share_milli)]
    if device.read_bytes_per_s is not None:
        if disk is None:
            raise CgroupUnavailableError("it has no disk of its own")
        groups.append(io_limits(hierarchies, name, device.read_bytes_per_s, disk))
    apply_limits(groups)
    return tuple(groups)


def set_cpu_share(lab_id: str, name: str, share_milli: int | None) -> None:
    """Change the CPU share of a device that is in a group; None: no limit. Raises: LabError."""
    try:
        apply_limits([_cpu_group(system_hierarchies(), group_name(lab_id, name), share_milli)])
    except CgroupUnavailableError as error:
        raise LabError(f"{name}: its CPU share cannot be set: {error}.") from error


def _cpu_group(hierarchies: Hierarchies, name: str, share_milli: int | None) -> GroupLimits:
    """Every device is in such a group, limited or not, so that it can be throttled while it runs."""
    if share_milli is not None:
        return cpu_limits(hierarchies, name, share_milli)
    group = cpu_limits(hierarchies, name, 1000)
    unlimited = {"cgroup-v1": ("cpu.cfs_quota_us", "-1"), "cgroup-v2": ("cpu.max", "max")}
    return replace(group, writes=(unlimited[group.mechanism],))


def drop_limits(lab_id: str, name: str) -> None:
    """Remove a device's groups; its processes have ended, and the kernel counts them out a little later.

    Raises: LabError when a process stays in one.
    """
    deadline = time.monotonic() + _GONE_LIMIT_S
    while not remove_groups(system_hierarchies(), group_name(lab_id, name)):
        if time.monotonic() > deadline:
            raise LabError(f"The control groups of {name} stay: a process is in them.", "Try again later.")
        time.sleep(0.02)
