"""What works, what is missing and how to mend it: pure functions over what was gathered of a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.counterpart import missing_engine
from orchestrator.device_facts.linux_facts import governors_fixed
from orchestrator.device_facts.seen import Seen
from orchestrator.inventory import Device, EmulateSpec
from orchestrator.transports.adb_own import adb_word
from sti_runtime.device_facts import DeviceFacts
from sti_runtime.errors import StifarmError
from sti_runtime.units import format_bytes, format_rate

LITTLE_SPACE_BYTES = 1 << 30
NO_SPACE_BYTES = 64 << 20
WRONG_CLOCK_S = 86_400
SKEWED_CLOCK_S = 300
LOW_BATTERY_PERCENT = 20
_THERMAL = ("none", "light", "moderate", "severe", "critical", "emergency", "shutdown")
"""Source: android.os.PowerManager, THERMAL_STATUS_*."""


@dataclass(frozen=True)
class Finding:
    """One thing looked at. ``state``: ok, note or problem."""

    subject: str
    state: str
    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Examined:
    """What was gathered of a device. ``seen`` None: not reached, ``error`` says why; ``facts`` None: reached,
    but its agent gave none, or was not asked (``error`` None)."""

    device: Device
    seen: Seen | None
    facts: DeviceFacts | None
    error: StifarmError | None


Check = Callable[[Examined, Seen], list[Finding]]


def findings_of(examined: Examined) -> list[Finding]:
    """All findings about one device."""
    if examined.seen is None:
        return [_failed(examined)]
    return [finding for check in CHECKS for finding in check(examined, examined.seen)]


def same_hardware(examined: Sequence[Examined]) -> list[Finding]:
    """Names of the inventory behind which the same device is."""
    by_identity: dict[str, list[Device]] = {}
    for one in examined:
        if one.facts is not None:
            by_identity.setdefault(one.facts.identity, []).append(one.device)
    return [
        Finding(
            " = ".join(device.name for device in devices),
            "problem",
            f"the inventory's lines {_lines(devices)} lead to the same device ({identity})",
            "Keep one of them; two names for one device would measure it against itself.",
        )
        for identity, devices in by_identity.items()
        if len(devices) > 1
    ]


def _lines(devices: Sequence[Device]) -> str:
    return " and ".join(f"{device.line} ({device.name})" for device in devices)


def _failed(examined: Examined) -> Finding:
    error = examined.error
    if error is None:
        return Finding(examined.device.name, "problem", "it was not looked at")
    return said(error, examined.device.name)


def said(error: StifarmError, device: str) -> Finding:
    """An error of a device as a finding about it."""
    return Finding(device, "problem", error.what.removeprefix(f"{device}: "), error.remedy)


# ------------------------------------------------------------------ what it is


def check_agent(examined: Examined, seen: Seen) -> list[Finding]:
    """That it can be reached, and that its agent is there, runs and has the engine."""
    name, facts = examined.device.name, examined.facts
    what = " ".join(seen.text(key) for key in ("manufacturer", "model", "soc") if seen.values.get(key))
    parts = [what or seen.text("machine"), _system(seen)]
    if examined.device.emulate is not None:
        parts.append(f"emulated ({slowed(examined.device.emulate)})")
    found = [Finding(name, "ok", f"reached: {', '.join(parts)}")]
    if facts is None and examined.error is None:
        return [*found, Finding(name, "note", "its agent was not asked")]
    if facts is None:
        return [*found, _failed(examined)]
    cpu = ", ".join([facts.cpu_model or facts.architecture, f"{len(facts.cpus)} CPUs", *facts.gpus])
    found.append(Finding(name, "ok", f"agent {facts.agent} runs: {cpu}"))
    missing = missing_engine(examined.device, facts)
    if missing is not None:
        found.append(said(missing, name))
    return found + [Finding(name, "note", note) for note in facts.notes if not note.startswith("direct IO")]


def slowed(spec: EmulateSpec) -> str:
    """How the inventory wants an emulated device slowed."""
    parts = []
    if spec.read_bytes_per_s is not None:
        parts.append(f"reads {format_rate(spec.read_bytes_per_s)}")
    if spec.cpu_share_milli is not None:
        parts.append(f"CPU {spec.cpu_share_milli / 10:g} %")
    return ", ".join(parts) or "not slowed"


def _system(seen: Seen) -> str:
    if seen.system == "android":
        return f"Android {seen.text('os')} (API {seen.text('api_level')})"
    container = seen.values.get("container")
    return seen.text("os") + (f" in a container ({container})" if container else "")


def check_workdir(examined: Examined, seen: Seen) -> list[Finding]:
    """That the work folder can be written to, executed from, and has room."""
    name, workdir = examined.device.name, seen.workdir
    other = "Set another workdir in the inventory"
    problem = seen.values.get("write_problem")
    if problem is not None:
        cause = " (its file system is mounted read-only)" if seen.values.get("read_only") else ""
        return [
            Finding(
                name, "problem", f"nothing can be written to {workdir}{cause}: {problem}",
                f"{other}, or make this one writable for the user of the connection.",
            )
        ]  # fmt: skip
    found = []
    if seen.values.get("noexec") and examined.device.native:
        found.append(
            Finding(
                name, "problem", f"{workdir} is mounted noexec: the agent cannot be started there",
                f"{other} on a file system that allows execution, or mount it with exec.",
            )
        )  # fmt: skip
    free = seen.number("free_bytes")
    if free is not None and free < LITTLE_SPACE_BYTES:
        state = "problem" if free < NO_SPACE_BYTES else "note"
        found.append(
            Finding(name, state, f"{format_bytes(free)} free below {workdir}", f"Free some space. {other}.")
        )
    return found


def check_direct_io(examined: Examined, _seen: Seen) -> list[Finding]:
    """That reads can bypass the page cache."""
    facts = examined.facts
    if facts is None or facts.storage.direct_io == "works":
        return []
    return [
        Finding(
            examined.device.name,
            "note",
            f"direct IO below {facts.storage.path} ({facts.storage.filesystem}): {facts.storage.direct_io}",
            "Cold reads then rest on evicting the page cache and are checked by bytes read; "
            "a workdir on ext4, xfs or f2fs is better.",
        )
    ]


# ------------------------------------------------------------------ how it is


def check_clock(examined: Examined, seen: Seen) -> list[Finding]:
    """That its wall clock is near this host's. Nothing is ordered by it, but samples carry its times."""
    offset_s = seen.clock_offset_s
    if offset_s is None or abs(offset_s) < SKEWED_CLOCK_S:
        return []
    days = abs(offset_s) / 86_400
    size = f"{days:.0f} days" if days >= 2 else f"{abs(offset_s) / 60:.0f} minutes"
    way = "ahead of" if offset_s > 0 else "behind"
    remedy = (
        "Settings > System > Date & time > set automatically."
        if seen.system == "android"
        else "Set it: timedatectl set-ntp true, or date -s as root."
    )
    state = "problem" if abs(offset_s) > WRONG_CLOCK_S else "note"
    return [Finding(examined.device.name, state, f"its clock is {size} {way} this host's", remedy)]


def check_gates(examined: Examined, _seen: Seen) -> list[Finding]:
    """That the gates that are asked have a sensor: else units run ungated."""
    gates, facts, name = examined.device.gates, examined.facts, examined.device.name
    if facts is None:
        return []
    found = []
    if gates.max_temperature_milli_c is not None and not any(
        zone.temperature_milli_c is not None for zone in facts.thermal_zones
    ):
        found.append(Finding(name, "note", "no temperature can be read: its gate gives ungated",
                             "Take the gate out of the inventory, or watch it yourself."))  # fmt: skip
    if gates.min_battery_percent is not None and not facts.battery:
        found.append(Finding(name, "note", "no battery can be read: its gate gives ungated",
                             "Take the gate out of the inventory."))  # fmt: skip
    return found


def check_clocks_fixed(examined: Examined, seen: Seen) -> list[Finding]:
    """That CPU clocks do not follow the load."""
    governors = seen.words("governors")
    if not governors or governors_fixed(governors):
        return []
    return [
        Finding(
            examined.device.name,
            "note",
            f"clocks follow the load (governor {', '.join(governors)}): latencies vary more",
            "With root, set the governor performance while measuring; without, expect wider intervals.",
        )
    ]


def check_power(examined: Examined, seen: Seen) -> list[Finding]:
    """Battery and heat of a phone."""
    name, found = examined.device.name, []
    percent, status = seen.number("battery_percent"), seen.number("thermal_status")
    if seen.values.get("battery_faked"):
        found.append(Finding(name, "note", "its battery's values are held at what somebody set",
                             f"End that: {_adb(examined.device)} shell dumpsys battery reset"))  # fmt: skip
    if percent is not None and percent < LOW_BATTERY_PERCENT:
        plugged = "charging" if seen.values.get("plugged") else "not plugged in"
        found.append(Finding(name, "note", f"battery at {percent} %, {plugged}",
                             "Charge it: a phone slows down when its battery is low."))  # fmt: skip
    health = seen.values.get("battery_health")
    if health not in (None, "good"):
        found.append(Finding(name, "note", f"its battery says of itself: {health}",
                             "Let it cool, or have the battery replaced."))  # fmt: skip
    if status is not None and status > 0:
        found.append(Finding(name, "note", f"it is throttled by heat now ({_THERMAL[status]})",
                             "Let it cool before measuring; a temperature gate waits for that."))  # fmt: skip
    return found


def _adb(device: Device) -> str:
    """What a command for a phone begins with."""
    return f"{adb_word()} -s {device.serial or device.address}"


def check_wakefulness(examined: Examined, seen: Seen) -> list[Finding]:
    """That a phone does not fall asleep in a measurement."""
    if seen.system != "android" or seen.values.get("stay_awake") is not False:
        return []
    asleep = "" if seen.values.get("awake") in (True, None) else "; its screen is off now"
    return [
        Finding(
            examined.device.name,
            "note",
            f"it may fall asleep while measuring{asleep}",
            "Turn on Developer options > Stay awake, and keep it plugged in.",
        )
    ]


CHECKS: tuple[Check, ...] = (
    check_agent,
    check_workdir,
    check_direct_io,
    check_clock,
    check_gates,
    check_clocks_fixed,
    check_power,
    check_wakefulness,
)
