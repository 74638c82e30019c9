"""A fact is a command and a pure parser; all facts of a device are read in one round trip.

A new quirk of a device costs a captured output (tests/data/facts) and at most a line of a parser. A parser
gives None for what cannot be read; it never guesses.
"""

from __future__ import annotations

import re
import shlex
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Value = str | int | bool | tuple[str, ...] | None
"""What a fact can be; None: not readable there. Texts are cut at ``TEXT_CHARS``."""

TEXT_CHARS = 200
OUTPUT_CHARS = 1 << 18
"""Longest output of a command that a parser gets to see: several times that of a phone with a thousand
properties. What is longer was not read."""

WORKDIR = "{workdir}"
"""Stands in an ``argv`` for the device's work folder."""


@dataclass(frozen=True)
class Fact:
    """One thing to know of a device. ``parse`` gets the command's output and makes a value of it.

    ``volatile``: it changes from minute to minute, so a change says nothing of the device.
    """

    name: str
    argv: tuple[str, ...]
    parse: Callable[[str], Value]
    volatile: bool = False


def script_of(facts: Sequence[Fact], workdir: str, mark: str) -> str:
    """A shell script that runs each distinct command once, what it printed between two lines with ``mark``.

    It runs in the oldest shells of Android: it needs ``echo`` and nothing else. Commands get no input and a
    failing one stops no other; errors are not part of an output.
    """
    lines = []
    for number, argv in enumerate(commands_of(facts)):
        command = shlex.join(workdir if part == WORKDIR else part for part in argv)
        lines += [f"echo {mark} {number}", f"{command} </dev/null 2>/dev/null", "echo", f"echo {mark} end"]
    return "\n".join(lines)


def commands_of(facts: Sequence[Fact]) -> tuple[tuple[str, ...], ...]:
    """The distinct commands, in the order of their first use."""
    return tuple(dict.fromkeys(fact.argv for fact in facts))


def values_of(facts: Sequence[Fact], output: str, mark: str) -> dict[str, Value]:
    """The value of each fact, from what its script printed; of a command of which nothing came back, or more
    than OUTPUT_CHARS, its facts are those of no output."""
    outputs = _outputs(output, mark)
    numbers = {argv: number for number, argv in enumerate(commands_of(facts))}
    return {fact.name: _cut(fact.parse(outputs.get(numbers[fact.argv], ""))) for fact in facts}


def _outputs(output: str, mark: str) -> dict[int, str]:
    """What each command printed, by its number; in one pass: a device may begin outputs and end none."""
    begin = re.compile(rf"^{mark} ([0-9]{{1,8}})\r?\n", re.MULTILINE)
    end = re.compile(rf"^{mark} end\r?$", re.MULTILINE)
    found: dict[int, str] = {}
    at = 0
    while (first := begin.search(output, at)) and (last := end.search(output, first.end())):
        text = output[first.end() : last.start()].replace("\r\n", "\n")
        found[int(first[1])] = text if len(text) <= OUTPUT_CHARS else ""
        at = last.end()
    return found


def new_mark() -> str:
    """A word that no device prints by itself."""
    return f"stifarm-{uuid.uuid4().hex}"


def stable_of(facts: Sequence[Fact], values: Mapping[str, Value]) -> dict[str, Value]:
    """The values that change only when the device does."""
    return {fact.name: values.get(fact.name) for fact in facts if not fact.volatile}


def _cut(value: Value) -> Value:
    """A device is not trusted: texts and lists have a limit, numbers fit the store."""
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**63 else None
    if isinstance(value, str):
        return value[:TEXT_CHARS].replace("\0", "") or None
    return tuple(part[:TEXT_CHARS].replace("\0", "") for part in value[:32])
