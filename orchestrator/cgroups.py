"""Control groups: which limits the kernel can enforce here, how to set them, how to take them back.

Nothing outside our own groups (``stifarm/<name>`` of each hierarchy) is ever written.

Source: kernel documentation, admin-guide/cgroup-v1/blkio-controller, scheduler/sched-bwc,
admin-guide/cgroup-v2.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator import cgroup_exec
from sti_runtime.errors import StifarmError

CgroupMechanism = Literal["cgroup-v1", "cgroup-v2"]

PARENT = "stifarm"
MIN_QUOTA_US = 1000
"""The kernel's smallest CPU quota. A quota of 1-2 ms keeps the stops below the times that are measured."""

MAX_PERIOD_US = 1_000_000


class CgroupUnavailableError(StifarmError):
    """Why a limit cannot be set here; the text is a clause for a message. Never leaves emulation."""


@dataclass(frozen=True)
class Hierarchies:
    """Mount points; ``None``: not mounted."""

    cpu_v1: Path | None
    blkio_v1: Path | None
    unified: Path | None


@dataclass(frozen=True)
class GroupLimits:
    """One group and what is written into its files, in this order."""

    mechanism: CgroupMechanism
    folder: Path
    writes: tuple[tuple[str, str], ...]

    @property
    def procs(self) -> Path:
        """The file that takes the ids of processes to enter."""
        return self.folder / "cgroup.procs"


def find_hierarchies(mounts: str) -> Hierarchies:
    """Mounted hierarchies from the text of /proc/self/mounts."""
    found: dict[str, Path] = {}
    for line in mounts.splitlines():
        _, mount_point, kind, options, *_ = line.split(" ")
        names = {"cgroup2": ["unified"], "cgroup": options.split(",")}.get(kind, [])
        for name in names:
            found.setdefault(name, Path(mount_point.replace("\\040", " ")))
    return Hierarchies(found.get("cpu"), found.get("blkio"), found.get("unified"))


def system_hierarchies() -> Hierarchies:
    """Hierarchies mounted on this machine; none where there is no /proc."""
    mounts = Path("/proc/self/mounts")
    return find_hierarchies(mounts.read_text() if mounts.exists() else "")


def quota_and_period_us(share_milli: int) -> tuple[int, int]:
    """CPU quota and period, µs, for a share in thousandths of one CPU: the smallest the kernel takes.

    Raises: CgroupUnavailableError for a share below 0.001.
    """
    if share_milli >= 1000:
        return MIN_QUOTA_US * share_milli // 1000, MIN_QUOTA_US
    period_us = round(MIN_QUOTA_US * 1000 / share_milli)
    if period_us > MAX_PERIOD_US:
        raise CgroupUnavailableError(f"a CPU share of {share_milli / 1000:g} is below what a quota can give")
    return MIN_QUOTA_US, period_us


def block_device(path: Path, sys_dev: Path = Path("/sys/dev/block")) -> str:
    """ "major:minor" of the whole disk below ``path``, whose reads the kernel can limit.

    Raises: CgroupUnavailableError where there is no such disk (tmpfs, overlay, network).
    """
    device = path.stat().st_dev
    entry = sys_dev / f"{os.major(device)}:{os.minor(device)}"
    if not entry.exists():
        raise CgroupUnavailableError(f"{path} is on no block device")
    folder = entry.resolve()
    if (folder / "partition").exists():
        folder = folder.parent  # limits are set on whole disks only
    return (folder / "dev").read_text().strip()


def cpu_limits(hierarchies: Hierarchies, name: str, share_milli: int) -> GroupLimits:
    """The group that limits CPU time. Raises: CgroupUnavailableError."""
    quota_us, period_us = quota_and_period_us(share_milli)
    if _offers(hierarchies.unified, "cpu"):
        assert hierarchies.unified is not None
        writes: tuple[tuple[str, str], ...] = (("cpu.max", f"{quota_us} {period_us}"),)
        return GroupLimits("cgroup-v2", hierarchies.unified / PARENT / name, writes)
    if hierarchies.cpu_v1 is None:
        raise CgroupUnavailableError("no control group hierarchy offers CPU limits")
    writes = (("cpu.cfs_period_us", str(period_us)), ("cpu.cfs_quota_us", str(quota_us)))
    return GroupLimits("cgroup-v1", hierarchies.cpu_v1 / PARENT / name, writes)


def io_limits(hierarchies: Hierarchies, name: str, bytes_per_s: int, disk: str) -> GroupLimits:
    """The group that limits reads of ``disk`` ("major:minor"). Raises: CgroupUnavailableError."""
    if _offers(hierarchies.unified, "io"):
        assert hierarchies.unified is not None
        writes: tuple[tuple[str, str], ...] = (("io.max", f"{disk} rbps={bytes_per_s}"),)
        return GroupLimits("cgroup-v2", hierarchies.unified / PARENT / name, writes)
    if hierarchies.blkio_v1 is None:
        raise CgroupUnavailableError("no control group hierarchy offers limits of reading")
    writes = (("blkio.throttle.read_bps_device", f"{disk} {bytes_per_s}"),)
    return GroupLimits("cgroup-v1", hierarchies.blkio_v1 / PARENT / name, writes)


def _offers(unified: Path | None, controller: str) -> bool:
    """Whether the unified hierarchy hands ``controller`` to groups below its root already."""
    if unified is None:
        return False
    control = unified / "cgroup.subtree_control"
    return control.exists() and controller in control.read_text().split()


def apply_limits(limits: Iterable[GroupLimits]) -> None:
    """Make the groups and set their limits; again is harmless. Raises: CgroupUnavailableError."""
    for group in limits:
        try:
            group.folder.mkdir(parents=True, exist_ok=True)
            if group.mechanism == "cgroup-v2":
                for file, _ in group.writes:
                    _write(group.folder.parent / "cgroup.subtree_control", f"+{file.split('.')[0]}")
            for file, value in group.writes:
                _write(group.folder / file, value)
        except OSError as error:
            raise CgroupUnavailableError(f"{group.folder} cannot be set up: {error.strerror}") from error


def _write(path: Path, value: str) -> None:
    # One write without O_CREAT or O_TRUNC: the files exist in a real hierarchy, and only there.
    handle = os.open(path, os.O_WRONLY)
    try:
        os.write(handle, value.encode())
    finally:
        os.close(handle)


def launch_prefix(limits: Sequence[GroupLimits]) -> tuple[str, ...]:
    """argv that, before a command's own, makes it run inside the groups; empty for no groups."""
    if not limits:
        return ()
    procs = dict.fromkeys(str(group.procs) for group in limits)
    return (sys.executable, "-I", "-S", str(cgroup_exec.__file__), *procs, "--")


def remove_groups(hierarchies: Hierarchies, name: str) -> bool:
    """Remove a device's groups; whether all are gone (a process in one keeps it: try again)."""
    gone = True
    for root in {hierarchies.cpu_v1, hierarchies.blkio_v1, hierarchies.unified} - {None}:
        assert root is not None
        gone &= _remove(root / PARENT / name)
        _remove(root / PARENT)  # stays while other devices have groups in it
    return gone


def _remove(folder: Path) -> bool:
    try:
        folder.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
            raise CgroupUnavailableError(f"{folder} cannot be removed: {error.strerror}") from error
        return False
    return True
