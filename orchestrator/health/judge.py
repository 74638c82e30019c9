"""What a health check finds: pure functions over what was gathered of a device. They fail closed.

What cannot be read is ``ungated``, never a pass. An item is required where the inventory has a gate for it,
and always when it must be there on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from db.quarantine import Item
from orchestrator.device_facts.seen import Seen
from orchestrator.doctor import LOW_BATTERY_PERCENT, NO_SPACE_BYTES, WRONG_CLOCK_S
from orchestrator.inventory import Device
from sti_runtime.device_facts import DeviceFacts
from sti_runtime.journal_format import PROTOCOL_VERSION
from sti_runtime.messages import Sensors
from sti_runtime.units import format_bytes


@dataclass(frozen=True)
class Gathered:
    """What was seen of a device. ``seen`` None: not reached; ``facts`` None: its agent gave none; ``sensors``
    None: the probe unit gave none. ``problem``: why the first of them that lacks does. ``identity``: of the
    hardware that the store knows under its name; None: none yet."""

    device: Device
    seen: Seen | None = None
    facts: DeviceFacts | None = None
    sensors: Sensors | None = None
    problem: str = ""
    identity: str | None = None


def judge(gathered: Gathered) -> tuple[Item, ...]:
    """A verdict on each thing; after the first that lacks nothing further is known."""
    if gathered.seen is None:
        return (Item("reach", "fail", gathered.problem or "it was not reached"),)
    items = [Item("reach", "pass", f"it answers: {gathered.seen.text('machine')}"), _clock(gathered.seen)]
    if gathered.facts is None:
        return (*items, Item("agent", "fail", gathered.problem or "its agent gave no facts"))
    items += [_agent(gathered.facts), _identity(gathered.facts, gathered.identity)]
    if gathered.sensors is None:
        return (*items, Item("probe", "fail", gathered.problem or "its probe unit gave nothing"))
    items.append(Item("probe", "pass", "a probe unit ran to its end"))
    items.append(_space(gathered.device, gathered.sensors))
    items += _battery(gathered.device, gathered.seen, gathered.facts, gathered.sensors)
    items.append(_temperature(gathered.device, gathered.seen, gathered.sensors))
    return tuple(items)


def passed(items: Sequence[Item]) -> bool:
    """Whether the check passes: nothing fails, and all that is required passes."""
    return all(item.verdict == "pass" or (item.verdict == "ungated" and not item.required) for item in items)


def _clock(seen: Seen) -> Item:
    offset_s = seen.clock_offset_s
    if offset_s is None:
        return Item("clock", "ungated", "its clock cannot be read", required=False)
    detail = f"{offset_s:+d} s against this host's"
    return Item("clock", "pass" if abs(offset_s) <= WRONG_CLOCK_S else "fail", detail)


def _agent(facts: DeviceFacts) -> Item:
    detail = f"{facts.agent}, protocol {facts.protocol}"
    if facts.protocol != PROTOCOL_VERSION:
        return Item("agent", "fail", f"{detail}; this controller speaks {PROTOCOL_VERSION}")
    return Item("agent", "pass", detail)


def _identity(facts: DeviceFacts, known: str | None) -> Item:
    if known is None or facts.identity == known:
        return Item("identity", "pass", facts.identity)
    return Item("identity", "fail", f"it is {facts.identity}, and was {known}")


def _space(device: Device, sensors: Sensors) -> Item:
    least = max(NO_SPACE_BYTES, device.gates.min_free_bytes or 0)
    if sensors.free_bytes is None:
        return Item("space", "ungated", "its free space cannot be read")
    detail = f"{format_bytes(sensors.free_bytes)} free, {format_bytes(least)} wanted"
    return Item("space", "pass" if sensors.free_bytes >= least else "fail", detail)


def _battery(device: Device, seen: Seen, facts: DeviceFacts, sensors: Sensors) -> list[Item]:
    gate = device.gates.min_battery_percent
    percent = sensors.battery_percent
    if percent is None:
        percent = seen.number("battery_percent")
    if percent is None:
        if gate is None and not facts.battery:
            return []  # it runs from the mains
        return [Item("battery", "ungated", "its battery cannot be read")]
    least = LOW_BATTERY_PERCENT if gate is None else gate
    detail = f"{percent} %, {least} % wanted"
    return [Item("battery", "pass" if percent >= least else "fail", detail)]


def _temperature(device: Device, seen: Seen, sensors: Sensors) -> Item:
    gate, status = device.gates.max_temperature_milli_c, seen.number("thermal_status")
    milli_c = sensors.temperature_milli_c
    if milli_c is None:
        return Item("temperature", "ungated", "no temperature can be read", required=gate is not None)
    detail = f"{milli_c / 1000:.1f} °C" + ("" if gate is None else f", at most {gate / 1000:.1f} °C wanted")
    if (status is not None and status > 0) or sensors.throttled:
        return Item("temperature", "fail", f"{detail}; it is held back by heat")
    return Item("temperature", "pass" if gate is None or milli_c <= gate else "fail", detail)
