"""The cheap sensors between a unit's samples, and which samples they show to be throttled.

A watch reads once when it begins and once after every sample, never while one is timed (reads beside
compute excepted). A sample is
throttled when the reading before or the one after it shows throttling:

* a cooling device holds the CPU's clock below its full one;
* the kernel allows a used CPU less than when the watch began (``scaling_max_freq``: limits of the thermal
  and power management arrive there);
* a used CPU's clock is lower than when the watch began, where its governor does not follow the load;
* a watched thermal zone is hotter than the job's gate allows.

How many files a reading opens is bounded by the caps below, whatever the device has.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from agent.clocks import PLAUSIBLE_KHZ, domain_folders
from agent.sensors import (
    PROC,
    SYS,
    any_above_zero,
    cpu_coolers,
    parse_int,
    parse_load_milli,
    parse_meminfo,
    read_int,
    read_text,
    zone_folders,
)
from sti_runtime.android import plausible_milli_c
from sti_runtime.messages import Job, Reading

CLOCK_TOLERANCE_PERCENT = 15
"""By how much a clock may be lower than when the watch began: clocks are measured, and jitter."""

MAX_ZONES, MAX_COOLERS = 4, 16
"""Most thermal zones (the hottest when the watch begins) and cooling devices watched."""

FIXED_GOVERNORS = ("performance", "userspace")
"""Cpufreq governors under which the clock does not follow the load."""

KEPT_MILLI_C, KEPT_LOAD_MILLI, KEPT_MEMORY_SHARE = 1000, 250, 16
"""A reading is kept when temperature or load moved by this, available memory by one part in this many."""

_INT_BYTES, _TEXT_BYTES = 63, 8191
_Khz = tuple[int | None, int | None]
"""A clock domain's clock and ceiling."""


def used_cpus(job: Job) -> tuple[int, ...]:
    """The CPUs the agent computes on: those the job pins it to, else all it may use."""
    return job.cpus or tuple(sorted(os.sched_getaffinity(0)))


class Watch:
    """Readings of one unit. Making one takes the first reading."""

    def __init__(
        self, cpus: Sequence[int], limit_milli_c: int | None, *, sys: Path = SYS, proc: Path = PROC
    ) -> None:
        """``limit_milli_c``: the temperature gate's limit, None where none is asked."""
        self._limit_milli_c, self._proc = limit_milli_c, proc
        self._zones = _hottest_zones(sys)
        self._coolers = [str(folder / "cur_state") for folder in cpu_coolers(sys)[:MAX_COOLERS]]
        domains = [folder for _, folder in domain_folders(cpus, sys)]
        self._files = [(str(d / "scaling_cur_freq"), str(d / "scaling_max_freq")) for d in domains]
        khz = self._frequencies()
        self._least = [
            (_least(_judged_khz(domain, clock)), _least(ceiling))
            for domain, (clock, ceiling) in zip(domains, khz, strict=True)
        ]
        self._last = self._reading(0, khz)
        self._kept = [self._last]

    @classmethod
    def of_job(cls, job: Job) -> Watch:
        """A watch over the CPUs and the temperature limit of a job."""
        return cls(used_cpus(job), job.gates.max_temperature_milli_c)

    def sampled(self, after: int) -> bool:
        """Read again, ``after`` samples having been taken; whether the sample since the last reading counts
        as throttled."""
        before, self._last = self._last, self._reading(after, self._frequencies())
        if _differs(self._kept[-1], self._last):
            self._kept.append(self._last)
        return bool(before.throttled or self._last.throttled)

    @property
    def readings(self) -> tuple[Reading, ...]:
        """The first reading, the last, and those between that differ from the one kept before them."""
        last = () if self._kept[-1] is self._last else (self._last,)
        return (*self._kept, *last)

    def _frequencies(self) -> list[_Khz]:
        return [(_peek_khz(clock), _peek_khz(ceiling)) for clock, ceiling in self._files]

    def _reading(self, after: int, khz: Sequence[_Khz]) -> Reading:
        zones = [plausible_milli_c(_peek_int(path)) for path in self._zones]
        hottest = max((value for value in zones if value is not None), default=None)
        findings = [
            any_above_zero(_peek_int(path) for path in self._coolers),
            _above(hottest, self._limit_milli_c),
        ]
        for values, least in zip(khz, self._least, strict=True):
            findings += [_below(value, limit) for value, limit in zip(values, least, strict=True)]
        known = [finding for finding in findings if finding is not None]
        memory = parse_meminfo(_peek(f"{self._proc}/meminfo", _TEXT_BYTES) or "")
        return Reading(
            after=after,
            clocks_khz=tuple(clock for clock, _ in khz),
            ceilings_khz=tuple(ceiling for _, ceiling in khz),
            temperature_milli_c=hottest,
            load_milli=parse_load_milli(_peek(f"{self._proc}/loadavg", _INT_BYTES) or ""),
            available_memory_bytes=memory.get("MemAvailable"),
            throttled=any(known) if known else None,
        )


def _hottest_zones(sys: Path) -> list[str]:
    """The temperature files of the hottest zones now; of equally hot ones the first."""
    files = [folder / "temp" for folder in zone_folders(sys)]
    read = [(plausible_milli_c(read_int(file)), str(file)) for file in files]
    known = [(value, file) for value, file in read if value is not None]
    return [file for _, file in sorted(known, key=lambda row: -row[0])[:MAX_ZONES]]


def _judged_khz(domain: Path, khz: int | None) -> int | None:
    """The clock below which, less the tolerance, the domain is throttled; None where it follows the load."""
    if khz is None or read_text(domain / "scaling_governor") not in FIXED_GOVERNORS:
        return None
    sure = read_int(domain / "base_frequency")  # what is above it comes and goes with the other CPUs' load
    return khz if sure is None else min(khz, sure)


def _least(khz: int | None) -> int | None:
    return None if khz is None else -(-khz * (100 - CLOCK_TOLERANCE_PERCENT) // 100)


def _below(value: int | None, least: int | None) -> bool | None:
    return None if value is None or least is None else value < least


def _above(value: int | None, most: int | None) -> bool | None:
    return None if value is None or most is None else value > most


def _differs(kept: Reading, now: Reading) -> bool:
    """Whether a reading says something that the one kept before it does not."""
    return (
        kept.throttled != now.throttled
        or kept.ceilings_khz != now.ceilings_khz
        or any(
            _moved(was, is_, max(1, (was or 0) * CLOCK_TOLERANCE_PERCENT // 100))
            for was, is_ in zip(kept.clocks_khz, now.clocks_khz, strict=True)
        )
        or _moved(kept.temperature_milli_c, now.temperature_milli_c, KEPT_MILLI_C)
        or _moved(kept.load_milli, now.load_milli, KEPT_LOAD_MILLI)
        or _moved(
            kept.available_memory_bytes,
            now.available_memory_bytes,
            max(1, (kept.available_memory_bytes or 0) // KEPT_MEMORY_SHARE),
        )
    )


def _moved(was: int | None, is_: int | None, by: int) -> bool:
    if was is None or is_ is None:
        return was is not is_
    return abs(was - is_) >= by


def _peek(path: str, size: int) -> str | None:
    """The first ``size`` bytes of a kernel file, in one read; None if it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        return os.read(descriptor, size).decode(errors="replace").strip()
    except OSError:
        return None
    finally:
        os.close(descriptor)


def _peek_int(path: str) -> int | None:
    return parse_int(_peek(path, _INT_BYTES))


def _peek_khz(path: str) -> int | None:
    value = _peek_int(path)
    return value if value is not None and value in PLAUSIBLE_KHZ else None
