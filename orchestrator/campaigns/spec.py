"""What a campaign asks for: the matrix of docs/campaigns.md, validated, with its quantities parsed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from db.campaign_work import REQUESTS
from orchestrator.drawn import Draw
from orchestrator.errors import near
from sti_runtime.errors import UnitsError
from sti_runtime.messages import EngineName, RequestKind
from sti_runtime.plan import Policy
from sti_runtime.policies import POLICIES
from sti_runtime.records import Record
from sti_runtime.units import lacks_unit, parse_bytes, parse_duration_ns

CellKind = Literal["health", "importance", "profile", "execute", "evaluate"]

PLANNED: tuple[CellKind, ...] = ("execute", "evaluate")
"""Kinds that run plans, and so have a T, a |S| and a policy."""

PPM = 1_000_000
_SHARE = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,6})?)\s+of\s+whole-model\s+compute")
_TARGET_EXAMPLE = "Write it like {} or 0.5 of whole-model compute."
_SHARD_SHARE = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,4})?)\s*%\s+of\s+32-bit\s+shards")
_PRELOAD_EXAMPLE = "Write it like 1MB or 0.6 % of 32-bit shards."
_PINNED = re.compile(r"(?P<bundle>.*\S)\s+for\s+(?P<task>\S+)")


@dataclass(frozen=True)
class Target:
    """A target latency: ``target_ns``, or ``share_ppm`` of what a device takes to compute the whole model."""

    text: str
    target_ns: int | None
    share_ppm: int | None


def parse_target(text: str) -> Target:
    """T of "100ms" or "0.5 of whole-model compute". Raises: UnitsError."""
    text = " ".join(text.split())
    share = _SHARE.fullmatch(text)
    if share is not None:
        share_ppm = round(float(share[1]) * PPM)
        if share_ppm == 0:
            raise UnitsError(f"{text!r} is no time at all.", _TARGET_EXAMPLE.format("100ms"))
        return Target(text, None, share_ppm)
    try:
        target_ns = parse_duration_ns(text)
    except UnitsError as error:
        meant = f"{text}ms" if lacks_unit(text) else "100ms"
        raise UnitsError(error.what, _TARGET_EXAMPLE.format(meant)) from error
    if target_ns == 0:
        raise UnitsError("No latency can be 0.", _TARGET_EXAMPLE.format("100ms"))
    return Target(text, target_ns, None)


@dataclass(frozen=True)
class PreloadSize:
    """A preload buffer: ``bytes_``, or ``share_ppm`` of what the model's shards take at 32 bits."""

    text: str
    bytes_: int | None
    share_ppm: int | None

    def resolved(self, shard_bytes: int) -> int:
        """Its bytes for a model with ``shard_bytes`` of 32-bit shards."""
        return shard_bytes * (self.share_ppm or 0) // PPM if self.bytes_ is None else self.bytes_


def parse_preload(text: str) -> PreloadSize:
    """|S| of "1MB" or "0.6 % of 32-bit shards". Raises: UnitsError."""
    text = " ".join(text.split())
    share = _SHARD_SHARE.fullmatch(text)
    if share is not None:
        share_ppm = round(float(share[1]) * PPM / 100)
        if share_ppm > PPM:
            raise UnitsError(f"{text!r} is more than all of them.", _PRELOAD_EXAMPLE)
        return PreloadSize(text, None, share_ppm) if share_ppm else PreloadSize(text, 0, None)
    try:
        return PreloadSize(text, parse_bytes(text), None)
    except UnitsError as error:
        raise UnitsError(error.what, _PRELOAD_EXAMPLE) from error


def parse_bundle(text: str) -> tuple[str, str | None]:
    """(bundle, the task it is for) of "minilm-rte for rte"; no task where none is named."""
    pinned = _PINNED.fullmatch(text)
    return (text, None) if pinned is None else (pinned["bundle"], pinned["task"])


def _listed(value: Any) -> Any:
    """A single value stands for a list of it; strict validation wants tuples."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def _checked(text: str, parse: Callable[[str], object]) -> str:
    try:
        parse(text)
    except UnitsError as error:
        raise ValueError(str(error)) from error
    return text


Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$")]
Texts = Annotated[tuple[Annotated[str, Field(min_length=1, max_length=200)], ...], BeforeValidator(_listed)]


class CampaignSpec(Record):
    """A campaign as its file says. Without bundles: the newest; without tasks: the only one; without engines:
    each device's own; without importance_rows: the store's profile. ``dev_rows``: so many of a task's dev
    rows at most, a seeded draw; without: all.
    ``deadline``: how long after its due time a run should be over. ``notes``: what readers of its results
    must know, as of its data.
    """

    version: Literal[1]
    name: Name
    devices: Annotated[Texts, Field(min_length=1)] = ("all",)
    bundles: Texts = ()
    tasks: Texts = ()
    kinds: Annotated[tuple[CellKind, ...], Field(min_length=1), BeforeValidator(_listed)]
    targets: Texts = ()
    preload: Annotated[Texts, Field(min_length=1)] = ("1MB",)
    working: str = "4MB"
    policies: Annotated[Texts, Field(min_length=1)] = ("sti",)
    engines: Annotated[tuple[EngineName, ...], BeforeValidator(_listed)] = ()
    repeats: int = Field(default=1, ge=1, le=1000)
    requests: int = Field(default=REQUESTS, ge=1, le=1000)
    request_kind: RequestKind = "warm"
    slack: bool = True
    importance_rows: int | None = Field(
        default=None, ge=1, le=1_000_000, exclude_if=lambda rows: rows is None
    )
    dev_rows: int | None = Field(default=None, ge=1, le=1_000_000, exclude_if=lambda rows: rows is None)
    priority: int = Field(default=10, ge=1, le=100)
    deadline: str | None = None
    seed: int = Field(default=0, ge=0, lt=2**32)
    notes: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=2000)], ...], BeforeValidator(_listed)
    ] = ()

    @property
    def preload_sizes(self) -> tuple[PreloadSize, ...]:
        """The preload buffers, each once."""
        sizes: dict[tuple[int | None, int | None], PreloadSize] = {}
        for size in map(parse_preload, self.preload):
            sizes.setdefault((size.bytes_, size.share_ppm), size)
        return tuple(sizes.values())

    @property
    def working_bytes(self) -> int:
        """The working buffer."""
        return parse_bytes(self.working)

    @property
    def planning_policies(self) -> tuple[Policy, ...]:
        """The policies, in the order of ``POLICIES``."""
        return tuple(name for name in POLICIES if name in self.policies)

    @property
    def draw(self) -> Draw | None:
        """Which dev rows it is about; None: all."""
        return None if self.dev_rows is None else Draw(self.dev_rows, self.seed)

    @property
    def deadline_ns(self) -> int | None:
        """``deadline`` as a duration."""
        return None if self.deadline is None else parse_duration_ns(self.deadline)

    @property
    def planned_kinds(self) -> tuple[CellKind, ...]:
        """Those of its kinds that run plans, in their order."""
        return tuple(kind for kind in PLANNED if kind in self.kinds)

    @field_validator("targets")
    @classmethod
    def _targets(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_checked(" ".join(text.split()), parse_target) for text in texts)

    @field_validator("preload")
    @classmethod
    def _preload(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_checked(" ".join(text.split()), parse_preload) for text in texts)

    @field_validator("working")
    @classmethod
    def _working(cls, text: str) -> str:
        return _checked(text, parse_bytes)

    @field_validator("deadline")
    @classmethod
    def _deadline(cls, text: str | None) -> str | None:
        return None if text is None else _checked(text, parse_duration_ns)

    @field_validator("policies")
    @classmethod
    def _policies(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in POLICIES:
                raise ValueError(f"no policy is called {name!r}. {near(name, POLICIES)}")
        return names

    @field_validator("devices", "bundles", "tasks", "kinds", "targets", "preload", "policies", "engines")
    @classmethod
    def _once(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if values.count(value) > 1:
                raise ValueError(f"{value!r} stands there twice; once is enough")
        return values
