"""Reading a campaign's file: YAML in, a ``CampaignSpec`` or every problem with its line out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from orchestrator.campaigns.spec import CampaignSpec
from orchestrator.errors import CampaignFileError, Problem, near
from orchestrator.yaml_fields import NotYamlError, composed

CAP_BYTES = 1 << 20
"""Longest campaign file: far above any real one."""

_UNITS = {"targets": "ms", "preload": "MB", "working": "MB", "deadline": "h"}
"""Fields of quantities, with the unit that a number alone is likely meant in."""

_Place = tuple[str | int, ...]


def load_campaign(path: Path) -> CampaignSpec:
    """Read and validate a campaign file. Raises: CampaignFileError with every problem and its line."""
    try:
        with path.open("rb") as stream:
            data = stream.read(CAP_BYTES + 1)
    except FileNotFoundError as error:
        raise CampaignFileError(path, [Problem(1, "there is no such campaign file.")]) from error
    except OSError as error:
        raise CampaignFileError(path, [Problem(1, f"cannot be read: {error.strerror}.")]) from error
    if len(data) > CAP_BYTES:
        raise CampaignFileError(path, [Problem(1, f"longer than the {CAP_BYTES} bytes a campaign may have.")])
    return parse_campaign(data, path)


def parse_campaign(data: bytes, path: Path) -> CampaignSpec:
    """Validate the bytes of a campaign file; ``path`` is for messages. Raises: CampaignFileError."""
    try:
        root = composed(data)
        values = yaml.safe_load(data)
    except NotYamlError as error:
        raise CampaignFileError(path, [error.problem]) from error
    except (yaml.YAMLError, ValueError) as error:  # of single values, which the nodes do not show
        raise CampaignFileError(
            path, [Problem(1, f"not valid YAML: {str(error).splitlines()[0]}.")]
        ) from error
    if not isinstance(root, yaml.MappingNode):
        raise CampaignFileError(path, [Problem(1, "a campaign must be a mapping (key: value).")])
    lines: dict[_Place, int] = {}
    problems: list[Problem] = []
    _note_lines(root, (), lines, problems)
    try:
        spec = CampaignSpec.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        problems += [_problem(detail, lines) for detail in error.errors(include_url=False)]
        raise CampaignFileError(path, problems) from error
    if spec.planned_kinds and not spec.targets:
        line = lines.get(("kinds",), 1)
        problems.append(Problem(line, f"kind {spec.planned_kinds[0]} needs targets, as targets: [100ms]."))
    if problems:
        raise CampaignFileError(path, problems)
    return spec


def _note_lines(node: yaml.Node, place: _Place, lines: dict[_Place, int], problems: list[Problem]) -> None:
    lines[place] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*place, str(getattr(key, "value", "")))
            if inner in lines:
                line = key.start_mark.line + 1
                problems.append(Problem(line, f"{inner[-1]!r} stands in line {lines[inner]} already."))
            _note_lines(value, inner, lines, problems)
            lines[inner] = key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            _note_lines(value, (*place, number), lines, problems)


def _problem(detail: ErrorDetails, lines: Mapping[_Place, int]) -> Problem:
    place = tuple(detail["loc"])
    line = next((lines[place[:n]] for n in range(len(place), -1, -1) if place[:n] in lines), 1)
    name = ".".join(str(part) for part in place)
    if detail["type"] == "extra_forbidden":
        return Problem(line, f"there is no field {name!r}. {near(name, CampaignSpec.model_fields)}")
    if detail["type"] == "missing":
        return Problem(line, f"the campaign lacks {name!r}.")
    unit, given = _UNITS.get(str(place[0]) if place else ""), detail.get("input")
    if unit is not None and isinstance(given, (int, float)) and not isinstance(given, bool):
        meant = f" Write it like {given}{unit}." if given >= 0 else ""
        return Problem(line, f"{name}: {given} has no unit.{meant}")
    return Problem(line, f"{name}: {_words(detail)}")


def _words(detail: Mapping[str, Any]) -> str:
    """What pydantic says, as a sentence of ours; with what stands there where that is short."""
    said = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return said if said.endswith((".", "?")) else f"{said}."
    if detail["type"] == "too_short":
        return "it is an empty list; name one at least."
    given = repr(detail.get("input"))
    return f"{said[:1].lower()}{said[1:]}" + (f", not {given}." if len(given) < 60 else ".")
