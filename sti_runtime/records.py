"""What every file format of ours has in common: strict frozen models, canonical JSON, digests.

A record is a pydantic model that is frozen, refuses unknown fields and does not coerce types.
Its digest is the SHA-256 of its canonical JSON (UTF-8, sorted keys, no white space), so that two
programs that agree on the values agree on the digest. Formats whose digests are compared across
languages (plans, device profiles, importance profiles) therefore hold integers, never floats.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from sti_runtime.errors import FormatError, StifarmError

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""A SHA-256 in lower-case hexadecimal."""

NonNegative = Annotated[int, Field(ge=0, lt=2**63)]
Positive = Annotated[int, Field(gt=0, lt=2**63)]
Integer = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Index = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(gt=0, lt=2**31)]

DEFAULT_CAP_BYTES = 16 << 20


def canonical_json(value: Any) -> bytes:
    """Serialise plain data to canonical JSON bytes (sorted keys, no white space, no NaN)."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def sha256_hex(data: bytes | memoryview) -> str:
    """SHA-256 of ``data`` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def _newer(problems: list[ErrorDetails]) -> ErrorDetails | None:
    """The first ``version`` above the known one, if no other ``format`` stands beside it."""
    strange = {problem["loc"][:-1] for problem in problems if problem["loc"][-1:] == ("format",)}
    for problem in problems:
        place, name = problem["loc"][:-1], problem["loc"][-1:]
        if name == ("version",) and problem["type"] == "literal_error" and place not in strange:
            stated = problem["input"]
            if type(stated) is int and stated > int(problem["ctx"]["expected"]):
                return problem
    return None


class Record(BaseModel):
    """Base of every stored or transmitted structure."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def to_json(self) -> bytes:
        """Canonical JSON of this record."""
        return canonical_json(self.model_dump(mode="json"))

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON."""
        return sha256_hex(self.to_json())

    @classmethod
    def from_json(
        cls,
        data: bytes,
        *,
        source: str,
        cap_bytes: int = DEFAULT_CAP_BYTES,
        newer: type[StifarmError] = FormatError,
    ) -> Self:
        """Parse and validate one record.

        Raises: FormatError naming ``source``, the field and the cause; also when ``data`` is
        longer than ``cap_bytes``. ``newer``, whatever else is wrong, when it is of a newer version.
        """
        if len(data) > cap_bytes:
            raise FormatError(
                f"{source}: {len(data)} bytes, more than the {cap_bytes} a {cls.__name__} may have.",
                "It is damaged or not one of ours; make it again.",
            )
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            problems = error.errors(include_url=False)
            version = _newer(problems)
            if version is not None:
                raise cls._newer_version(version, source, newer) from error
            first = problems[0]
            where = ".".join(str(part) for part in first["loc"]) or "the whole file"
            raise FormatError(
                f"{source}: not a valid {cls.__name__}: {where}: {first['msg']}.",
                "It is damaged, edited or written by another version; make it again.",
            ) from error

    @classmethod
    def _newer_version(cls, problem: ErrorDetails, source: str, newer: type[StifarmError]) -> StifarmError:
        """The error for a newer version of this record, ``newer``, or of one inside it."""
        inside, own = problem["loc"][:-1], cls.model_fields.get("format")
        named = cls.__name__ if own is None else str(get_args(own.annotation)[0]).removeprefix("stifarm-")
        return (FormatError if inside else newer)(
            f"{source}: {inside[-1] if inside else named} version {problem['input']}, "
            f"this stifarm knows {problem['ctx']['expected']}.",
            "Update the agent or stifarm, whichever says this, or make it again with this version.",
        )

    @classmethod
    def read(cls, path: Path, *, cap_bytes: int = DEFAULT_CAP_BYTES) -> Self:
        """Read a record from a file, never more than ``cap_bytes`` + 1 bytes of it.

        Raises: FormatError if it is missing, unreadable or malformed.
        """
        try:
            with path.open("rb") as stream:
                data = stream.read(cap_bytes + 1)
        except OSError as error:
            raise FormatError(
                f"{path}: cannot be read: {error.strerror}.",
                "See that it is there and that this user may read it.",
            ) from error
        return cls.from_json(data, source=str(path), cap_bytes=cap_bytes)
