"""Facts of a Linux board, and those of the kernel that an Android device shares with it."""

from __future__ import annotations

import re

from orchestrator.device_facts.table import WORKDIR, Fact

UNAME = ("uname", "-a")
MACHINE = ("uname", "-m")
DATE = ("date", "+%s")
CPUINFO = ("cat", "/proc/cpuinfo")
MEMINFO = ("cat", "/proc/meminfo")
MOUNTS = ("sh", "-c", 'cd "$1" && pwd -P && cat /proc/mounts', "sh", WORKDIR)
DISK_SPACE = ("df", "-k", WORKDIR)
WRITE = (
    "sh",
    "-c",
    '{ mkdir -p "$1" && : > "$1/.stifarm-write" && echo ok >> "$1/.stifarm-write" '
    '&& rm "$1/.stifarm-write" && echo writable; } 2>&1',
    "sh",
    WORKDIR,
)
GOVERNORS = ("sh", "-c", "cat /sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor")
MODEL = ("sh", "-c", "cat /proc/device-tree/model || cat /sys/class/dmi/id/product_name")
COMPATIBLE = ("cat", "/proc/device-tree/compatible")
OS_RELEASE = ("sh", "-c", "cat /etc/os-release || cat /usr/lib/os-release")
CGROUP_MEMORY = (
    "sh",
    "-c",
    "cat /sys/fs/cgroup/memory.max || cat /sys/fs/cgroup/memory/memory.limit_in_bytes",
)
CONTAINER = (
    "sh",
    "-c",
    "cat /run/systemd/container; "
    "test -e /.dockerenv && echo docker; test -e /run/.containerenv && echo podman",
)

_FIXED = frozenset({"performance", "userspace"})
_WRITE_MARK = "writable"


def parse_line(text: str) -> str | None:
    """The first line that says something."""
    return next((line.strip(" \t\0") for line in text.splitlines() if line.strip(" \t\0")), None)


def parse_epoch_s(text: str) -> int | None:
    """``date +%s``: the device's wall clock, seconds since the epoch."""
    return int(text) if re.fullmatch(r"\s*-?[0-9]{1,12}\s*", text) else None


def parse_cpu(text: str) -> str | None:
    """What /proc/cpuinfo calls the CPU, or the hardware around it where the CPU has only numbers."""
    rows = [line.partition(":") for line in text.splitlines()]
    values = {key.strip(): value.strip() for key, found, value in reversed(rows) if found and value.strip()}
    names = (values.get(key) for key in ("model name", "Hardware", "Model", "Processor"))
    return next((name for name in names if name), None)


def meminfo_bytes(text: str, name: str) -> int | None:
    """A row of /proc/meminfo."""
    match = re.search(rf"^{re.escape(name)}:\s+([0-9]{{1,15}}) kB$", text, re.MULTILINE)
    return None if match is None else 1024 * int(match[1])


def parse_free_bytes(text: str) -> int | None:
    """The space that ``df -k`` says is left; its columns are found from the percentage, wherever lines break.

    Old Android (toolbox) prints sizes such as 9.5G instead, the free one fourth.
    """
    rows = text.split("\n", 1)[-1]
    match = re.search(r"\s([0-9]{1,18})\s+[0-9]{1,18}\s+([0-9]{1,18})\s+[0-9]{1,3}%\s", rows)
    if match is not None:
        return 1024 * int(match[2])
    size = r"\s+[0-9.]{1,18}[KMGT]?"
    match = re.search(rf"^\S+{size}{size}\s+([0-9]{{1,9}}(?:\.[0-9]{{1,9}})?)([KMGT]?)\s", rows, re.MULTILINE)
    return None if match is None else int(float(match[1]) * 1024 ** " KMGT".index(match[2] or " "))


def mount_of(text: str) -> tuple[str, tuple[str, ...]] | None:
    """(file system, options) of the mount that holds a folder: its path, then /proc/mounts.

    Source: proc_pid_mounts(5), fstab(5): blanks are written as \\040.
    """
    path, _, mounts = text.strip().partition("\n")
    best: tuple[int, str, tuple[str, ...]] | None = None
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) < 4 or not path.startswith("/"):
            continue
        point = fields[1].replace("\\040", " ").rstrip("/")
        inside = path == point or path.startswith(point + "/")
        if inside and (best is None or len(point) >= best[0]):
            best = (len(point), fields[2], tuple(fields[3].split(",")))
    return None if best is None else best[1:]


def parse_filesystem(text: str) -> str | None:
    """The file system of the work folder."""
    mount = mount_of(text)
    return None if mount is None else mount[0]


def parse_mount_option(option: str, text: str) -> bool | None:
    """Whether the work folder's file system is mounted with ``option``."""
    mount = mount_of(text)
    return None if mount is None else option in mount[1]


def parse_write_problem(text: str) -> str | None:
    """Why nothing can be written to the work folder; None when it can."""
    lines = text.strip().splitlines()
    if _WRITE_MARK in lines:
        return None
    return lines[-1] if lines else "it said nothing"


def parse_governors(text: str) -> tuple[str, ...]:
    """The distinct clock governors, in order."""
    return tuple(dict.fromkeys(text.split()))


def parse_soc(text: str) -> str | None:
    """The chip: the most general name of the device tree's ``compatible``, such as ``brcm,bcm2712``.

    Source: Devicetree Specification, 2.3.1: from most specific to most general.
    """
    names = [name.strip() for name in text.split("\0") if name.strip()]
    return names[-1] if names else None


def parse_distribution(text: str) -> str | None:
    """PRETTY_NAME of os-release(5), else NAME."""
    for key in ("PRETTY_NAME", "NAME"):
        match = re.search(rf"^{key}=[\"']?(.*?)[\"']?$", text, re.MULTILINE)
        if match is not None and match[1]:
            return match[1]
    return None


def parse_limit_bytes(text: str) -> int | None:
    """A control group's limit on memory; None without one (``max``, or the largest number)."""
    match = re.match(r"\s*([0-9]{1,20})\s*$", text)
    return int(match[1]) if match is not None and int(match[1]) < 1 << 60 else None


def governors_fixed(governors: tuple[str, ...]) -> bool:
    """Whether clocks stay where they are, whatever the load."""
    return bool(governors) and set(governors) <= _FIXED


KERNEL_FACTS: tuple[Fact, ...] = (
    Fact("machine", MACHINE, parse_line),
    Fact("kernel", UNAME, parse_line),
    Fact("memory_bytes", MEMINFO, lambda text: meminfo_bytes(text, "MemTotal")),
    Fact("swap_bytes", MEMINFO, lambda text: meminfo_bytes(text, "SwapTotal"), volatile=True),
    Fact("governors", GOVERNORS, parse_governors, volatile=True),
    Fact("clock_s", DATE, parse_epoch_s, volatile=True),
    Fact("write_problem", WRITE, parse_write_problem, volatile=True),
    Fact("filesystem", MOUNTS, parse_filesystem, volatile=True),
    Fact("read_only", MOUNTS, lambda text: parse_mount_option("ro", text), volatile=True),
    Fact("noexec", MOUNTS, lambda text: parse_mount_option("noexec", text), volatile=True),
    Fact("free_bytes", DISK_SPACE, parse_free_bytes, volatile=True),
)
"""``write_problem`` stands before those of the mount: writing makes the folder."""

LINUX_FACTS: tuple[Fact, ...] = (
    Fact("model", MODEL, parse_line),
    Fact("soc", COMPATIBLE, parse_soc),
    Fact("cpu", CPUINFO, parse_cpu),
    Fact("os", OS_RELEASE, parse_distribution),
    Fact("cgroup_memory_bytes", CGROUP_MEMORY, parse_limit_bytes),
    Fact("container", CONTAINER, parse_line),
    *KERNEL_FACTS,
)
