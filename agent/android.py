"""What an Android device tells only through its own programs, where the kernel's files are closed to shell.

A program takes 10 to 100 ms: these are for facts, the probe unit and gates, never between samples.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from sti_runtime.android import AndroidBattery, AndroidThermal, own_serial, parse_battery, parse_thermal
from sti_runtime.messages import Sensors

ROOT = Path(os.environ.get("STIFARM_ANDROID") or "/")
"""Where Android's file system begins; STIFARM_ANDROID names it where that is elsewhere."""
_LIMIT_S = 10.0
_OUTPUT_CAP_CHARS = 1 << 20


def is_android(root: Path = ROOT) -> bool:
    """Whether its getprop is there."""
    return os.access(root / "system/bin/getprop", os.X_OK)


def android_property(name: str, root: Path = ROOT) -> str | None:
    """A system property, asked of getprop; None where there is none or it is empty."""
    return (_asked("getprop", name, root) or "").strip() or None


def android_serial(root: Path = ROOT) -> str | None:
    """The serial number of the device; None where it has none of its own."""
    for name in ("ro.serialno", "ro.boot.serialno"):
        serial = own_serial(android_property(name, root) or "")
        if serial is not None:
            return serial
    return None


def android_battery(root: Path = ROOT) -> AndroidBattery | None:
    """The battery; None without one, or where it is not said."""
    said = _asked("dumpsys", "battery", root)
    return None if said is None else parse_battery(said)


def android_thermal(root: Path = ROOT) -> AndroidThermal | None:
    """The thermal service's sensors; None before Android 10."""
    said = _asked("dumpsys", "thermalservice", root)
    return None if said is None else parse_thermal(said)


def complete(sensors: Sensors, root: Path = ROOT) -> Sensors:
    """With what the kernel did not show: temperature, throttling, battery. Not on Android: as it is."""
    if not is_android(root):
        return sensors
    temperature, throttled = sensors.temperature_milli_c, sensors.throttled
    percent = sensors.battery_percent
    thermal = android_thermal(root) if temperature is None or throttled is None else None
    if thermal is not None:
        if throttled is None and thermal.status is not None:
            throttled = thermal.status > 0
        if temperature is None:
            temperature = max((value for _, value in thermal.zones if value is not None), default=None)
    battery = android_battery(root) if temperature is None or percent is None else None
    if battery is not None:
        percent = battery.percent if percent is None else percent
        temperature = battery.temperature_milli_c if temperature is None else temperature
    return sensors.model_copy(
        update={
            "temperature_milli_c": temperature,
            "throttled": throttled,
            "battery_percent": percent,
        }
    )


def _asked(program: str, argument: str, root: Path) -> str | None:
    """What a program of the device printed; None unless it ended well, in time, and said something."""
    path = root / "system/bin" / program
    if not os.access(path, os.X_OK):
        return None
    try:
        done = subprocess.run(
            [path, argument], stdin=subprocess.DEVNULL, capture_output=True, timeout=_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    text = done.stdout.decode(errors="replace")[:_OUTPUT_CAP_CHARS]
    return text if done.returncode == 0 and text else None
