"""YAML mappings read by tables of fields: typed values, or every problem with its line.

A table has a parser for each field: it gets the reader, the node and the field's name, and returns a value,
or None after it has noted a problem.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import yaml

from orchestrator.errors import Problem, near
from sti_runtime.errors import UnitsError


class NotYamlError(Exception):
    """A text that is not YAML; ``problem`` says where and why."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.what)
        self.problem = problem


def composed(data: bytes) -> yaml.Node | None:
    """The root node of a YAML text, with the lines of all; None for an empty one. Raises: NotYamlError."""
    try:
        return yaml.compose(data, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = f"not valid YAML: {error.problem or error.context}."
        raise NotYamlError(Problem(mark.line + 1 if mark else 1, what)) from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise NotYamlError(Problem(1, f"not valid YAML: {str(error).splitlines()[0]}.")) from error


Parse = Callable[["FieldReader", yaml.Node, str], object]


class FieldReader:
    """Walks the YAML nodes by tables of fields and collects problems instead of stopping at the first.

    ``folder``: what relative paths are relative to.
    """

    def __init__(self, folder: Path) -> None:
        self.problems: list[Problem] = []
        self.folder = folder

    def wrong(self, node: yaml.Node, what: str) -> None:
        """Note a problem at the line of ``node``."""
        self.problems.append(Problem(node.start_mark.line + 1, what))

    def mapping(self, node: yaml.Node, what: str) -> list[tuple[str, yaml.ScalarNode, yaml.Node]]:
        """(key, key node, value node) of a mapping; doubled keys are a problem and dropped."""
        if not isinstance(node, yaml.MappingNode):
            self.wrong(node, f"{what} must be a mapping (key: value), not {describe(node)}.")
            return []
        entries: dict[str, tuple[str, yaml.ScalarNode, yaml.Node]] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.wrong(key, f"a key of {what} must be a word.")
            elif key.value in entries:
                first = entries[key.value][1].start_mark.line + 1
                self.wrong(key, f"{what} has {key.value!r} twice; the first is in line {first}.")
            else:
                entries[key.value] = (key.value, key, value)
        return list(entries.values())

    def fields(self, node: yaml.Node, what: str, table: Mapping[str, Parse]) -> dict[str, object]:
        """Parsed values of a mapping by the parsers of ``table``; unknown keys are a problem."""
        values: dict[str, object] = {}
        for name, key, value in self.mapping(node, what):
            parse = table.get(name)
            if parse is None:
                self.wrong(key, f"{what} has an unknown key {name!r}. {near(name, table)}")
                continue
            parsed = parse(self, value, name)
            if parsed is not None:
                values[name] = parsed
        return values


def describe(node: yaml.Node) -> str:
    """What a node is, for messages."""
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return repr(node.value) if node.value else "nothing"


def keys_of(node: yaml.MappingNode) -> set[str]:
    """The keys of a mapping."""
    return {str(key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)}


def text_of(reader: FieldReader, node: yaml.Node, name: str) -> str | None:
    """One line of text."""
    if not isinstance(node, yaml.ScalarNode) or not node.value:
        reader.wrong(node, f"{name} must be a text, not {describe(node)}.")
        return None
    if not node.value.isprintable():
        reader.wrong(node, f"{name} must be on one line, without control characters, not {node.value!r}.")
        return None
    return str(node.value)


def _number(
    reader: FieldReader, node: yaml.Node, name: str, low: float, high: float, unit: str
) -> float | None:
    # Numbers are matched by hand: YAML would read 1_0 and 0o7 as numbers and .nan as a float.
    text = node.value if isinstance(node, yaml.ScalarNode) and node.style is None else None
    if text is None or re.fullmatch(r"-?[0-9]{1,12}(\.[0-9]{1,9})?", text) is None:
        reader.wrong(node, f"{name} must be a number{unit}, not {describe(node)}.")
        return None
    if not low <= float(text) <= high:
        reader.wrong(node, f"{name} must lie between {low:g} and {high:g}{unit}, not {text}.")
        return None
    return float(text)


def integer(low: int, high: int) -> Parse:
    """A parser of whole numbers."""

    def parse(reader: FieldReader, node: yaml.Node, name: str) -> int | None:
        value = _number(reader, node, name, low, high, "")
        if value is not None and value != int(value):
            reader.wrong(node, f"{name} must be a whole number, not {describe(node)}.")
            return None
        return None if value is None else int(value)

    return parse


def milli(low: float, high: float, unit: str) -> Parse:
    """A parser of numbers, kept in thousandths."""

    def parse(reader: FieldReader, node: yaml.Node, name: str) -> int | None:
        value = _number(reader, node, name, low, high, unit)
        return None if value is None else round(value * 1000)

    return parse


def share(reader: FieldReader, node: yaml.Node, name: str) -> int | None:
    """A number from 0 to 1, in millionths."""
    value = _number(reader, node, name, 0, 1, "")
    return None if value is None else round(value * 1_000_000)


def quantity(parse_text: Callable[[str], int]) -> Parse:
    """A parser of texts with a unit."""

    def parse(reader: FieldReader, node: yaml.Node, name: str) -> int | None:
        text = text_of(reader, node, name)
        try:
            return None if text is None else parse_text(text)
        except UnitsError as error:
            reader.wrong(node, f"{name}: {error}")
            return None

    return parse


def choice(choices: tuple[str, ...]) -> Parse:
    """A parser of one of several words."""

    def parse(reader: FieldReader, node: yaml.Node, name: str) -> str | None:
        text = text_of(reader, node, name)
        if text is not None and text not in choices:
            reader.wrong(node, f"{name} {text!r} is unknown. {near(text, choices)}")
            return None
        return text

    return parse


def truth(reader: FieldReader, node: yaml.Node, name: str) -> bool | None:
    """true or false."""
    if isinstance(node, yaml.ScalarNode) and node.style is None and node.value in ("true", "false"):
        return bool(node.value == "true")
    reader.wrong(node, f"{name} must be true or false, not {describe(node)}.")
    return None
