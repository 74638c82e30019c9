"""What Android's own programs print, as values: pure parsers that agent and host share.

Nothing is guessed: a reading that is faked (updates stopped, status overridden), that its service does not
vouch for (thermal HAL not ready) or that cannot be one is None.
"""

from __future__ import annotations

from dataclasses import dataclass

PLAUSIBLE_MILLI_C = range(-40_000, 150_001)
_NO_SERIALS = ("unknown", "0123456789abcdef")
_NO_TEMPERATURES = (6, 7, 8)
"""Types of a thermal HAL's readings that are a battery's voltage, current and charge.

Source: hardware/interfaces/thermal, TemperatureType."""


@dataclass(frozen=True)
class AndroidBattery:
    """What ``dumpsys battery`` says of the battery. ``plugged``: powered by a cable or a pad."""

    percent: int | None
    temperature_milli_c: int | None
    plugged: bool
    health: str | None


@dataclass(frozen=True)
class AndroidThermal:
    """What ``dumpsys thermalservice`` says: (name, milli °C) of each sensor; ``status``: 0 to 6, shutdown."""

    zones: tuple[tuple[str, int | None], ...]
    status: int | None


def plausible_milli_c(value: int | None) -> int | None:
    """A reading, or None: a zone without a sensor reads 0 or INT_MIN."""
    return value if value is not None and value in PLAUSIBLE_MILLI_C and value != 0 else None


def own_serial(value: str) -> str | None:
    """A serial number, or None for what is none and for what all devices of a model share."""
    serial = value.strip()
    return serial if serial.strip("0") and serial.lower() not in _NO_SERIALS else None


def parse_battery(text: str) -> AndroidBattery | None:
    """The battery; None without one and where its values are faked (``dumpsys battery set``).

    Source: frameworks/base, services/core/java/com/android/server/BatteryService.java, dumpInternal.
    """
    values = dict(_pair(line) for line in text.splitlines() if ":" in line)
    if "UPDATES STOPPED" in text or values.get("present") != "true":
        return None
    level, scale, tenths = (_integer(values.get(name)) for name in ("level", "scale", "temperature"))
    known = level is not None and scale is not None and 0 <= level <= scale < 1_000_000 and scale > 0
    health = _integer(values.get("health"))
    return AndroidBattery(
        percent=100 * level // scale if known and level is not None and scale is not None else None,
        temperature_milli_c=plausible_milli_c(None if tenths is None else 100 * tenths),
        plugged=any(
            values.get(f"{source} powered") == "true" for source in ("AC", "USB", "Wireless", "Dock")
        ),
        health=None if health is None else _HEALTH.get(health),
    )


_HEALTH = {2: "good", 3: "overheated", 4: "dead", 5: "over voltage", 6: "failing", 7: "cold"}
"""Source: android.os.BatteryManager, BATTERY_HEALTH_*; 1 is unknown."""


def parse_thermal(text: str) -> AndroidThermal:
    """Sensors and status of the thermal service (since Android 10); empty where its HAL is not ready.

    Source: frameworks/base, services/core/java/com/android/server/power/ThermalManagerService.java, dump.
    """
    ready, overridden, current = False, False, False
    status: int | None = None
    zones: list[tuple[str, int | None]] = []
    for line in text.splitlines():
        inside = line[:1] in (" ", "\t")
        if not inside:
            current = line.startswith("Current temperatures")
        zone = _zone(line) if inside and current else None
        if zone is not None:
            zones.append(zone)
        key, value = _pair(line)
        if key == "HAL Ready":
            ready = value == "true"
        elif key == "IsStatusOverride":
            overridden = value == "true"
        elif key == "Thermal Status":
            number = _integer(value)
            status = number if number is not None and 0 <= number <= 6 else None
    return AndroidThermal(tuple(zones) if ready else (), status if ready and not overridden else None)


def _zone(line: str) -> tuple[str, int | None] | None:
    """One line such as ``Temperature{mValue=41.2, mType=0, mName=cpu0, mStatus=0}``."""
    value, kind, name = (_field(line, key) for key in ("mValue=", "mType=", "mName="))
    number = _integer(kind)
    if "Temperature{" not in line or not value or not name or number is None or number in _NO_TEMPERATURES:
        return None
    try:
        degrees = float(value)
        milli_c = round(1000 * degrees) if abs(degrees) < 1e6 else 0
    except ValueError:
        milli_c = 0
    return name, plausible_milli_c(milli_c)


def _field(line: str, key: str) -> str:
    """The text behind ``key``, up to the next comma or brace."""
    return line.partition(key)[2].partition(",")[0].partition("}")[0]


def _pair(line: str) -> tuple[str, str]:
    key, _, value = line.partition(":")
    return key.strip(), value.strip()


def _integer(text: str | None) -> int | None:
    try:
        return None if text is None else int(text)
    except ValueError:
        return None
