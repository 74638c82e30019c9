"""Gates: conditions checked before timed units. They fail closed.

A gate that is asked and whose sensor cannot be read gives "ungated", never "pass": the unit runs and its
result says so. A gate that stays shut for the whole wait limit gives "fail", and the unit does not run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from agent import clocks
from agent.clocks import ClockDomain
from agent.errors import GateError
from sti_runtime.messages import Gates, GateVerdict, Sensors

POLL_S = 2.0
"""How long is waited before a gate that is shut is looked at again."""
SETTLED_MILLI_C = 500
"""A device is stable when two readings at least POLL_S apart differ by less than this."""
KEPT_S = 60.0
"""A reading older than this when a unit's turn comes says nothing of whether the device is stable."""


@dataclass(frozen=True)
class _Rule:
    """One gate: its limit in ``Gates``, its reading in ``Sensors``; ``sign`` +1 is an upper limit."""

    name: str
    limit: Callable[[Gates], int | None]
    reading: Callable[[Sensors], int | None]
    sign: int
    unit: str


_RULES = (
    _Rule("temperature", lambda g: g.max_temperature_milli_c, lambda s: s.temperature_milli_c, 1, "m°C"),
    _Rule("battery", lambda g: g.min_battery_percent, lambda s: s.battery_percent, -1, "%"),
    _Rule("load", lambda g: g.max_load_milli, lambda s: s.load_milli, 1, "/1000"),
    _Rule("free-space", lambda g: g.min_free_bytes, lambda s: s.free_bytes, -1, " bytes"),
)


@dataclass(frozen=True)
class Settling:
    """What the readings so far say of whether the temperature is stable.

    ``milli_c``, ``at_ns``: the reading that the next one is compared with, and its time. ``settled``: it is
    stable. ``was_milli_c``: what it was before it last moved; None when it has not.
    """

    milli_c: int
    at_ns: int
    settled: bool
    was_milli_c: int | None


def settle(before: Settling | None, now: Sensors, at_ns: int) -> Settling | None:
    """``before`` with one more reading. What was read less than POLL_S ago keeps its verdict unless the
    temperature has moved since, so that units that follow each other need no pause of their own."""
    milli_c = now.temperature_milli_c
    if milli_c is None:
        return before
    if before is None:
        return Settling(milli_c, at_ns, settled=False, was_milli_c=None)
    if abs(before.milli_c - milli_c) >= SETTLED_MILLI_C:
        return Settling(milli_c, at_ns, settled=False, was_milli_c=before.milli_c)
    if at_ns - before.at_ns >= POLL_S * 1e9:
        return Settling(milli_c, at_ns, settled=True, was_milli_c=None)
    return before


def recent(settling: Settling | None, at_ns: int) -> Settling | None:
    """``settling``, if its reading is of the last KEPT_S."""
    return settling if settling is not None and at_ns - settling.at_ns <= KEPT_S * 1e9 else None


def check_gates(
    gates: Gates, now: Sensors, settling: Settling | None, domains: Sequence[ClockDomain] = ()
) -> tuple[GateVerdict, ...]:
    """A verdict for each gate that is asked; ``settling`` includes ``now``, ``domains`` are those of the CPUs
    used.

    The temperature must not only be low enough but stable, so that a unit does not start on the way down
    or up.
    """
    verdicts = []
    for rule in _RULES:
        limit, reading = rule.limit(gates), rule.reading(now)
        if limit is None:
            continue
        if reading is None:
            detail = f"no {rule.name} sensor can be read; wanted {'<=' if rule.sign > 0 else '>='} {limit}"
            verdicts.append(GateVerdict(gate=rule.name, verdict="ungated", detail=detail + rule.unit))
            continue
        open_ = rule.sign * reading <= rule.sign * limit
        relation = {(1, True): "<=", (1, False): ">", (-1, True): ">=", (-1, False): "<"}[rule.sign, open_]
        detail = f"{reading}{rule.unit} {relation} {limit}{rule.unit}"
        if open_ and rule.name == "temperature" and not (settling and settling.settled):
            open_, detail = False, f"{detail}, {_unsettled(settling)}"
        verdicts.append(GateVerdict(gate=rule.name, verdict="pass" if open_ else "fail", detail=detail))
    if clocks.asked(gates):
        verdicts.append(clocks.judge_clocks(gates, domains))
    return tuple(verdicts)


def _unsettled(settling: Settling | None) -> str:
    """Why the temperature does not count as stable."""
    was = None if settling is None else settling.was_milli_c
    if settling is None or was is None:
        return f"stable or not shows in {POLL_S:.0f} s"
    return f"{'warming' if settling.milli_c > was else 'cooling'}: was {was}m°C a moment ago"


def shut(verdicts: tuple[GateVerdict, ...]) -> tuple[GateVerdict, ...]:
    """The verdicts that keep a unit from running."""
    return tuple(v for v in verdicts if v.verdict == "fail")


def gate_error(verdicts: tuple[GateVerdict, ...], waited_s: float, gates: Gates) -> GateError:
    """The error for gates that stayed shut."""
    causes = "; ".join(f"{v.gate}: {v.detail}" for v in shut(verdicts))
    return GateError(
        f"Gates stayed shut for {waited_s:.0f} s (limit {gates.wait_limit_s} s): {causes}.",
        "Let the device cool, charge or become idle, set its clocks, or change its gates in the inventory.",
    )
