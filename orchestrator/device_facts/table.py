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
    """The value of each fact, from what its script printed; None where nothing of it came back."""
    found = re.findall(rf"^{mark} (\d+)\r?\n(.*?)^{mark} end\r?$", output, re.MULTILINE | re.DOTALL)
    outputs = {int(number): text.replace("\r\n", "\n") for number, text in found if len(number) < 9}
    numbers = {argv: number for number, argv in enumerate(commands_of(facts))}
    return {fact.name: _cut(fact.parse(outputs.get(numbers[fact.argv], ""))) for fact in facts}


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
