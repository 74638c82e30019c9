"""Quantities with units: parsing what users write, formatting what they read.

All times inside are integer nanoseconds, all sizes integer bytes. Decimal prefixes (kB, MB) are
powers of 1000, binary ones (KiB, MiB) powers of 1024.
"""

from __future__ import annotations

import re
from decimal import Decimal

from sti_runtime.errors import UnitsError

NS_PER_S = 1_000_000_000
LARGEST = 2**63 - 1
"""Largest quantity of any kind: what a database column holds."""

NONE = "–"
"""What people read where there is nothing to show."""

_SIZES = {
    "": 1, "b": 1,
    "kb": 10**3, "mb": 10**6, "gb": 10**9,
    "kib": 2**10, "mib": 2**20, "gib": 2**30,
}  # fmt: skip
_TIMES = {"ns": 1, "us": 10**3, "µs": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}
_CLOCKS = {"khz": 1, "mhz": 10**3, "ghz": 10**6}
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-zµ]*)\s*", re.IGNORECASE)

_EXACT_MS = re.compile(r"\b([0-9]+)\.([0-9]{6})ms\b")


def lacks_unit(text: str) -> bool:
    """Whether a text is a number alone."""
    match = _QUANTITY.fullmatch(text)
    return match is not None and not match[2]


def _parse(text: str, table: dict[str, int], example: str, what: str, *, likely: tuple[str, ...] = ()) -> int:
    """``likely``: the units that a number without one may be meant in, where it needs one."""
    match = _QUANTITY.fullmatch(text)
    if likely and lacks_unit(text):
        meant = " or ".join(f"{text.strip()}{unit}" for unit in likely)
        raise UnitsError(f"{text!r} has no unit.", f"Write it like {meant}.")
    if match is None or match[2].lower() not in table:
        raise UnitsError(f"{text!r} is not {what}.", f"Write it like {example}.")
    value = int(Decimal(match[1]) * table[match[2].lower()])
    if value > LARGEST:
        raise UnitsError(f"{text!r} is larger than anything here can be.", f"Write it like {example}.")
    return value


def parse_bytes(text: str) -> int:
    """Bytes from "4MB", "512 KiB" or "4096". Raises: UnitsError."""
    return _parse(text, _SIZES, "4MB, 512KiB or 4096", "a size")


def parse_duration_ns(text: str) -> int:
    """Nanoseconds from "150ms" or "0.2 s"; a bare number is refused. Raises: UnitsError."""
    return _parse(text, _TIMES, "150ms or 0.2s", "a duration", likely=("ms", "s"))


def parse_rate(text: str) -> int:
    """Bytes per second from "20MB/s". Raises: UnitsError."""
    if not text.strip().lower().endswith("/s"):
        raise UnitsError(f"{text!r} is not a rate.", "Write it like 20MB/s.")
    rate = _parse(text.strip()[:-2], _SIZES, "20MB/s", "a rate")
    if rate == 0:
        raise UnitsError(f"{text!r} is a rate of zero.", "Write it like 20MB/s.")
    return rate


def parse_khz(text: str) -> int:
    """Kilohertz from "1.8GHz" or "600 MHz"; a bare number is refused. Raises: UnitsError."""
    return _parse(text, _CLOCKS, "1.8GHz or 600MHz", "a clock frequency", likely=("MHz",))


def format_bytes(count: int) -> str:
    """A size for people: "1.2 MB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 999.5 * size else f"{count / size:.0f} {unit}"
    return f"{count} B"


def format_rate(bytes_per_s: int) -> str:
    """A rate for people: "4 MB/s"."""
    return f"{format_bytes(bytes_per_s)}/s"


def format_ns(duration_ns: int) -> str:
    """A duration for people: "12.3 ms"."""
    for unit, size in (("s", 10**9), ("ms", 10**6), ("µs", 10**3)):
        if duration_ns >= size:
            return (
                f"{duration_ns / size:.3g} {unit}"
                if duration_ns < 999.5 * size
                else f"{duration_ns / size:.0f} {unit}"
            )
    return f"{duration_ns} ns"


def many(count: int, noun: str) -> str:
    """How many of something: "1 device", "1,200 devices"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


# ------------------------------------------------------------------ least durations


def format_ns_up(duration_ns: int) -> str:
    """A least duration for people, rounded up to three digits: "60.7 ms" of 60.62 ms. What is shown can be
    typed where so much is needed, and is enough."""
    step = 10 ** max(0, len(str(duration_ns)) - 3)
    return format_ns(-(-duration_ns // step) * step)


def exact_ms(duration_ns: int) -> str:
    """A least duration for machines, which parses back to exactly the same: "152.345678ms"."""
    return f"{duration_ns // 10**6}.{duration_ns % 10**6:06d}ms"


def in_words(text: str) -> str:
    """A text in which ``exact_ms`` wrote durations, with these as ``format_ns_up`` does."""
    return _EXACT_MS.sub(lambda found: format_ns_up(10**6 * int(found[1]) + int(found[2])), text)
