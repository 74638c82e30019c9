"""The clock domains of the CPUs that are used, and the gate on their governor and ceiling.

A ceiling is the highest clock that the kernel allows a domain now (``scaling_max_freq``): limits of the
thermal and power management, and switched-off boosts, arrive there, whatever the load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.sensors import SYS, read_int, read_text
from sti_runtime.messages import Gates, GateVerdict

MAX_DOMAINS = 16
"""Most clock domains looked at."""

PLAUSIBLE_KHZ = range(2_000_000_001)
_NAME_CHARS = 63


@dataclass(frozen=True)
class ClockDomain:
    """How a clock domain is set; ``cpu``: the first used CPU of it. ``None``: not readable."""

    cpu: int
    governor: str | None
    ceiling_khz: int | None


def domain_folders(cpus: Sequence[int], sys: Path = SYS) -> list[tuple[int, Path]]:
    """The first CPU of each clock domain with its cpufreq folder; CPUs of one domain share one folder."""
    found: dict[tuple[int, int], tuple[int, Path]] = {}
    for cpu in cpus:
        folder = sys / f"devices/system/cpu/cpu{cpu}/cpufreq"
        try:
            stat = folder.stat()
        except OSError:
            continue  # a CPU without cpufreq
        found.setdefault((stat.st_dev, stat.st_ino), (cpu, folder))
        if len(found) == MAX_DOMAINS:
            break
    return list(found.values())


def read_domains(cpus: Sequence[int], sys: Path = SYS) -> tuple[ClockDomain, ...]:
    """How the clock domains of these CPUs are set now."""
    domains = []
    for cpu, folder in domain_folders(cpus, sys):
        governor, ceiling = read_text(folder / "scaling_governor"), read_int(folder / "scaling_max_freq")
        domains.append(
            ClockDomain(
                cpu,
                governor[:_NAME_CHARS] if governor else None,
                ceiling if ceiling is not None and ceiling in PLAUSIBLE_KHZ else None,
            )
        )
    return tuple(domains)


def asked(gates: Gates) -> bool:
    """Whether anything is asked of the clocks."""
    return (gates.governor, gates.min_khz, gates.max_khz) != (None, None, None)


def judge_clocks(gates: Gates, domains: Sequence[ClockDomain]) -> GateVerdict:
    """The gate ``clocks``: it fails where one domain is not as asked, whatever cannot be read elsewhere."""
    for domain in domains:
        problem = _problem(gates, domain)
        if problem is not None:
            return GateVerdict(gate="clocks", verdict="fail", detail=f"cpu{domain.cpu}: {problem}")
    for domain in domains:
        lacks = _unreadable(gates, domain)
        if lacks is not None:
            return GateVerdict(gate="clocks", verdict="ungated", detail=f"cpu{domain.cpu}: {lacks}")
    if not domains:
        return GateVerdict(gate="clocks", verdict="ungated", detail="no clock can be read")
    names = ", ".join(f"cpu{domain.cpu}" for domain in domains)
    return GateVerdict(gate="clocks", verdict="pass", detail=f"as wanted: {names}")


def _problem(gates: Gates, domain: ClockDomain) -> str | None:
    if None not in (gates.governor, domain.governor) and domain.governor != gates.governor:
        return f"governor {domain.governor}, wanted {gates.governor}"
    ceiling = domain.ceiling_khz
    if ceiling is not None and gates.min_khz is not None and ceiling < gates.min_khz:
        return f"its ceiling {ceiling}kHz < {gates.min_khz}kHz"
    if ceiling is not None and gates.max_khz is not None and ceiling > gates.max_khz:
        return f"its ceiling {ceiling}kHz > {gates.max_khz}kHz"
    return None


def _unreadable(gates: Gates, domain: ClockDomain) -> str | None:
    if gates.governor is not None and domain.governor is None:
        return f"its governor cannot be read; wanted {gates.governor}"
    if (gates.min_khz, gates.max_khz) != (None, None) and domain.ceiling_khz is None:
        return "its ceiling cannot be read"
    return None
