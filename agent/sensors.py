"""Sensors that need no root: what the kernel shows below /sys and /proc. Unreadable ones give None."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path

from sti_runtime.android import plausible_milli_c
from sti_runtime.messages import CPU_NUMBERS, ClockTimes, Sensors

SYS = Path(os.environ.get("STIFARM_SYSFS") or "/sys")
"""The kernel's sysfs; STIFARM_SYSFS names it where it is mounted elsewhere, as in a container."""
PROC = Path("/proc")


def read_text(path: Path) -> str | None:
    """First 64 KiB of a kernel file, stripped; None if it cannot be read."""
    try:
        with path.open("rb") as stream:
            return stream.read(65536).decode(errors="replace").strip()
    except OSError:
        return None


def read_int(path: Path) -> int | None:
    """The integer in a kernel file; None if it cannot be read or is none."""
    return parse_int(read_text(path))


def parse_int(text: str | None) -> int | None:
    """An integer, or None."""
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


def thermal_zones(sys: Path = SYS) -> tuple[tuple[str, int | None], ...]:
    """(type, temperature in milli °C) of each thermal zone; zones that read nonsense give None.

    Source: Documentation/driver-api/thermal/sysfs-api.rst.
    """
    return tuple(
        (read_text(folder / "type") or folder.name, plausible_milli_c(read_int(folder / "temp")))
        for folder in zone_folders(sys)
    )


def zone_folders(sys: Path = SYS) -> tuple[Path, ...]:
    """The folders of the thermal zones, by number."""
    return tuple(
        sorted(sys.glob("class/thermal/thermal_zone*"), key=lambda path: (len(path.name), path.name))
    )


def online_cpus(sys: Path = SYS) -> tuple[int, ...]:
    """Numbers of the CPUs that are online; those this process may use where the list is unreadable."""
    parsed = parse_cpu_list(read_text(sys / "devices/system/cpu/online") or "")
    return parsed or tuple(sorted(os.sched_getaffinity(0)))


def parse_cpu_list(text: str) -> tuple[int, ...]:
    """CPU numbers from a kernel list such as "0-3,6"; empty when malformed."""
    cpus: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        low, high = parse_int(first), parse_int(last or first)
        if low is None or high is None or not 0 <= low <= high < CPU_NUMBERS:
            return ()
        cpus.extend(range(low, high + 1))
    return tuple(cpus)


def cpu_file(cpu: int, name: str, sys: Path = SYS) -> Path:
    """A cpufreq file of one CPU."""
    return sys / f"devices/system/cpu/cpu{cpu}/cpufreq/{name}"


def cpu_clocks_khz(sys: Path = SYS) -> tuple[int, ...]:
    """Current clock of each online CPU; empty unless all can be read."""
    values = [read_int(cpu_file(cpu, "scaling_cur_freq", sys)) for cpu in online_cpus(sys)]
    return tuple(v for v in values if v is not None) if None not in values else ()


def parse_time_in_state(text: str) -> tuple[tuple[int, int], ...]:
    """(kHz, ms) of each line of a time_in_state file, whose unit is 10 ms.

    Source: Documentation/cpu-freq/cpufreq-stats.rst.
    """
    rows = []
    for line in text.splitlines():
        khz, _, units = line.strip().partition(" ")
        clock, spent = parse_int(khz), parse_int(units)
        if clock is not None and spent is not None and clock >= 0 and spent >= 0:
            rows.append((clock, 10 * spent))
    return tuple(rows)


def time_in_state(sys: Path = SYS) -> tuple[ClockTimes, ...]:
    """How long each clock domain has run at each of its clocks; those that can be read."""
    found = []
    for policy in sorted(sys.glob("devices/system/cpu/cpufreq/policy*"), key=lambda p: (len(p.name), p.name)):
        cpu = parse_int(policy.name.removeprefix("policy"))
        rows = parse_time_in_state(read_text(policy / "stats/time_in_state") or "")
        if cpu is not None and cpu >= 0 and rows:
            found.append(
                ClockTimes(cpu=cpu, khz=tuple(khz for khz, _ in rows), ms=tuple(ms for _, ms in rows))
            )
    return tuple(found)


def parse_meminfo(text: str) -> dict[str, int]:
    """/proc/meminfo as name → bytes."""
    rows = (line.split() for line in text.splitlines())
    return {row[0].rstrip(":"): 1024 * int(row[1]) for row in rows if len(row) >= 2 and row[1].isdigit()}


def parse_load_milli(text: str) -> int | None:
    """One-minute load average in thousandths from /proc/loadavg."""
    try:
        return round(1000 * float(text.split()[0]))
    except (ValueError, IndexError, OverflowError):
        return None


def battery_percent(sys: Path = SYS) -> int | None:
    """Charge of the device's battery; None without one (peripherals' batteries do not count)."""
    for supply in sorted(sys.glob("class/power_supply/*")):
        if read_text(supply / "type") == "Battery" and read_text(supply / "scope") != "Device":
            value = read_int(supply / "capacity")
            if value is not None and 0 <= value <= 100:
                return value
    return None


def has_battery(sys: Path = SYS) -> bool:
    """Whether the device runs from a battery, readable or not."""
    return any(
        read_text(supply / "type") == "Battery" and read_text(supply / "scope") != "Device"
        for supply in sys.glob("class/power_supply/*")
    )


def throttled(sys: Path = SYS) -> bool | None:
    """Whether a cooling device holds the CPU below its full clock now; None where none is shown."""
    return any_above_zero(read_int(device / "cur_state") for device in cpu_coolers(sys))


def cpu_coolers(sys: Path = SYS) -> tuple[Path, ...]:
    """The folders of the cooling devices that act on the CPU's clock, by number."""
    words = ("cpufreq", "cpu-", "processor")
    devices = sorted(sys.glob("class/thermal/cooling_device*"), key=lambda path: (len(path.name), path.name))
    return tuple(
        device
        for device in devices
        if any(word in (read_text(device / "type") or "").lower() for word in words)
    )


def any_above_zero(states: Iterable[int | None]) -> bool | None:
    """Whether a state that can be read is above 0; None when none can be read."""
    known = [state for state in states if state is not None]
    return any(state > 0 for state in known) if known else None


def free_bytes(folder: Path) -> int | None:
    """Bytes an unprivileged user can still write below ``folder``."""
    try:
        stat = os.statvfs(folder)
    except OSError:
        return None
    return stat.f_bavail * stat.f_frsize


def read_sensors(spool: Path, *, sys: Path = SYS, proc: Path = PROC) -> Sensors:
    """All sensors now. The temperature is the hottest zone's. Takes about a millisecond."""
    temperatures = [value for _, value in thermal_zones(sys) if value is not None]
    return Sensors(
        wall_ns=time.time_ns(),
        temperature_milli_c=max(temperatures, default=None),
        cpu_khz=cpu_clocks_khz(sys),
        load_milli=parse_load_milli(read_text(proc / "loadavg") or ""),
        available_memory_bytes=parse_meminfo(read_text(proc / "meminfo") or "").get("MemAvailable"),
        free_bytes=free_bytes(spool),
        battery_percent=battery_percent(sys),
        throttled=throttled(sys),
        time_in_state=time_in_state(sys),
    )
