"""Gates: conditions checked before timed units. They fail closed.

A gate that is asked and whose sensor cannot be read gives "ungated", never "pass": the unit runs and its
result says so. A gate that stays shut for the whole wait limit gives "fail", and the unit does not run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from agent.errors import GateError
from sti_runtime.messages import Gates, GateVerdict, Sensors

SETTLED_MILLI_C = 500
POLL_S = 2.0
"""A device that had to cool is stable when two readings POLL_S apart differ by less than this."""


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


def check_gates(gates: Gates, now: Sensors, previous: Sensors | None = None) -> tuple[GateVerdict, ...]:
    """A verdict for each gate that is asked.

    ``previous``: the reading before, when the gates have been shut: the temperature must then also have
    settled (SETTLED_MILLI_C), so that a unit does not start on the way down.
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
        if open_ and rule.name == "temperature" and previous is not None:
            before = previous.temperature_milli_c
            if before is not None and abs(before - reading) >= SETTLED_MILLI_C:
                open_, detail = False, f"{detail}, but was {before}{rule.unit} a moment ago"
        verdicts.append(GateVerdict(gate=rule.name, verdict="pass" if open_ else "fail", detail=detail))
    return tuple(verdicts)


def shut(verdicts: tuple[GateVerdict, ...]) -> tuple[GateVerdict, ...]:
    """The verdicts that keep a unit from running."""
    return tuple(v for v in verdicts if v.verdict == "fail")


def gate_error(verdicts: tuple[GateVerdict, ...], waited_s: float, gates: Gates) -> GateError:
    """The error for gates that stayed shut."""
    causes = "; ".join(f"{v.gate}: {v.detail}" for v in shut(verdicts))
    return GateError(
        f"Gates stayed shut for {waited_s:.0f} s (limit {gates.wait_limit_s} s): {causes}.",
        "Let the device cool, charge or become idle, or change its gates in the inventory.",
    )
