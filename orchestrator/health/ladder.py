"""The recovery ladder: what to try next for a device that is not well. Pure, from rows to a step.

reconnect → fresh adb server (one that we started) → reboot (where the inventory allows it) → quarantine. Each
rung has a budget of tries within a window; one that is used up, or that cannot be had, is passed over. So a
device that comes back and fails again climbs higher each time, and one that is well for a window starts over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from orchestrator.transports import TRANSPORTS

Step = Literal["reconnect", "fresh-server", "reboot", "quarantine"]
LADDER: tuple[Step, ...] = ("reconnect", "fresh-server", "reboot")
"""In order; above the last is quarantine."""


@dataclass(frozen=True)
class Past:
    """A step that was taken."""

    step: str
    outcome: str
    wall_ns: int


@dataclass(frozen=True)
class Budgets:
    """How often each rung is tried within ``window_ns``."""

    tries: Mapping[Step, int] = field(
        default_factory=lambda: {"reconnect": 2, "fresh-server": 1, "reboot": 1}
    )
    window_ns: int = 6 * 3600 * 10**9


@dataclass(frozen=True)
class Reachable:
    """How a device hangs on its host: what decides which rungs there are for it."""

    transport: str
    may_reboot: bool


@dataclass(frozen=True)
class Next:
    """The step to take, and why the rungs below it are passed over."""

    step: Step
    why: str
    passed_over: tuple[tuple[Step, str], ...] = ()


def next_step(past: Sequence[Past], now_wall_ns: int, device: Reachable, budgets: Budgets) -> Next:
    """The lowest rung that there is for the device and whose budget within the window is not used up.

    A step that was skipped (it turned out that it could not be done) uses its rung up for the window.
    """
    recent = [each for each in past if now_wall_ns - each.wall_ns < budgets.window_ns]
    passed_over: list[tuple[Step, str]] = []
    for step in LADDER:
        lacks = _lacks(step, device)
        taken = [each for each in recent if each.step == step]
        budget = budgets.tries.get(step, 0)
        if lacks:
            passed_over.append((step, lacks))
        elif any(each.outcome == "skipped" for each in taken):
            passed_over.append((step, "it cannot be done here"))
        elif len(taken) >= budget:
            passed_over.append((step, f"tried {len(taken)} times within {budgets.window_ns / 3.6e12:g} h"))
        else:
            return Next(step, f"try {len(taken) + 1} of {budget}", tuple(passed_over))
    return Next("quarantine", "nothing is left to try", tuple(passed_over))


def _lacks(step: Step, device: Reachable) -> str:
    """Why there is no such rung for the device; empty: there is."""
    kind = TRANSPORTS[device.transport]
    if step == "fresh-server" and not kind.server:
        return f"there is no server to a device over {device.transport}"
    if step == "reboot" and not kind.reboots:
        return f"a device over {device.transport} is not rebooted"
    if step == "reboot" and not device.may_reboot:
        return "its inventory does not allow a reboot"
    return ""
