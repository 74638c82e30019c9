"""Facts of an Android device, as its shell user can read them; from Android 6 (API 23) on."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import lru_cache
from types import MappingProxyType

from orchestrator.device_facts import linux_facts
from orchestrator.device_facts.table import Fact, Value
from sti_runtime.android import AndroidBattery, own_serial, parse_battery, parse_thermal

GETPROP = ("getprop",)
BATTERY = ("dumpsys", "battery")
THERMAL = ("dumpsys", "thermalservice")
STAY_ON = ("settings", "get", "global", "stay_on_while_plugged_in")
POWER = ("sh", "-c", "dumpsys power | grep -E 'mWakefulness=' | head -n 1")
ROOT = ("sh", "-c", "id; command -v su")


@lru_cache(maxsize=8)  # several facts are of the same text
def parse_properties(text: str) -> Mapping[str, str]:
    """``[name]: [value]`` lines of getprop; a value may go over several lines.

    In one pass: a device may begin values as often as it likes, and end none.
    """
    found: dict[str, str] = {}
    name, value = "", list[str]()
    for line in text.split("\n"):
        if name:
            value.append(line)
        else:
            name, begun, rest = line[1:].partition("]: [")
            if not line.startswith("[") or not begun or "]" in name:
                name = ""
            value = [rest]
        if name and value[-1].endswith("]"):
            found[name] = "\n".join(value)[:-1].strip()
            name = ""
    return MappingProxyType(found)


def property_of(*names: str) -> Callable[[str], Value]:
    """A parser: the first of these properties that has a value."""

    def parse(text: str) -> Value:
        properties = parse_properties(text)
        return next((properties[name] for name in names if properties.get(name)), None)

    return parse


def parse_api_level(text: str) -> int | None:
    """The version of the platform's interfaces: 34 for Android 14."""
    level = parse_properties(text).get("ro.build.version.sdk", "")
    return int(level) if re.fullmatch(r"[0-9]{1,3}", level) else None


def parse_abis(text: str) -> tuple[str, ...]:
    """The kinds of executables it runs, the preferred one first."""
    properties = parse_properties(text)
    listed = properties.get("ro.product.cpu.abilist") or properties.get("ro.product.cpu.abi", "")
    return tuple(part.strip() for part in listed.split(",") if part.strip())


def parse_serial(text: str) -> str | None:
    """Its own serial number; None for what a whole model shares."""
    properties = parse_properties(text)
    numbers = (own_serial(properties.get(name, "")) for name in ("ro.serialno", "ro.boot.serialno"))
    return next((number for number in numbers if number is not None), None)


def parse_stay_awake(text: str) -> bool | None:
    """Whether "Stay awake" of the developer options is on, for one kind of power at least."""
    return None if not re.fullmatch(r"\s*[0-9]{1,3}\s*", text) else int(text) > 0


def parse_awake(text: str) -> bool | None:
    """Whether the device is awake, and not dozing behind a dark screen."""
    match = re.search(r"mWakefulness=(\w+)", text)
    return None if match is None else match[1] == "Awake"


def parse_root(text: str) -> str | None:
    """``adbd`` (every command is root's), ``su`` (there is one), or None."""
    if re.search(r"^uid=0\b", text, re.MULTILINE):
        return "adbd"
    return "su" if re.search(r"^/\S*su$", text, re.MULTILINE) else None


def parse_faked_battery(text: str) -> bool:
    """Whether somebody holds the battery's values at what ``dumpsys battery set`` said."""
    return "UPDATES STOPPED" in text


def _battery(take: Callable[[AndroidBattery], Value]) -> Callable[[str], Value]:
    def parse(text: str) -> Value:
        battery = parse_battery(text)
        return None if battery is None else take(battery)

    return parse


ANDROID_FACTS: tuple[Fact, ...] = (
    Fact("model", GETPROP, property_of("ro.product.model")),
    Fact("manufacturer", GETPROP, property_of("ro.product.manufacturer")),
    Fact("soc", GETPROP, property_of("ro.soc.model", "ro.board.platform", "ro.hardware")),
    Fact("os", GETPROP, property_of("ro.build.version.release")),
    Fact("build", GETPROP, property_of("ro.build.fingerprint")),
    Fact("api_level", GETPROP, parse_api_level),
    Fact("abis", GETPROP, parse_abis),
    Fact("serial", GETPROP, parse_serial),
    Fact("root", ROOT, parse_root),
    Fact("battery_percent", BATTERY, _battery(lambda battery: battery.percent), volatile=True),
    Fact("battery_milli_c", BATTERY, _battery(lambda battery: battery.temperature_milli_c), volatile=True),
    Fact("battery_health", BATTERY, _battery(lambda battery: battery.health), volatile=True),
    Fact("battery_faked", BATTERY, parse_faked_battery, volatile=True),
    Fact("plugged", BATTERY, _battery(lambda battery: battery.plugged), volatile=True),
    Fact("thermal_status", THERMAL, lambda text: parse_thermal(text).status, volatile=True),
    Fact("stay_awake", STAY_ON, parse_stay_awake, volatile=True),
    Fact("awake", POWER, parse_awake, volatile=True),
    *linux_facts.KERNEL_FACTS,
)
