"""Documents as the store keeps them: canonical JSON text; and the host's wall clock."""

from __future__ import annotations

import base64
import json
import math
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from sti_runtime.records import Record, canonical_json


def now_wall_ns() -> int:
    """This host's wall clock in ns since the epoch."""
    return time.time_ns()


def document(value: Any) -> str:
    """Canonical JSON text of plain data or of a record."""
    data = value.to_json() if isinstance(value, Record) else canonical_json(value)
    return storable(data.decode())


_NUMBERS = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)


def numbers(value: Sequence[Any] | Mapping[str, Any]) -> str:
    """``document`` of plain data whose texts are the store's own words: nothing has to be replaced."""
    return _NUMBERS.encode(value)


def untrusted_document(record: Record) -> str:
    """Canonical JSON of a record from a device, which may hold NaN or infinities: these become strings."""
    plain = record.model_dump(mode="python")
    try:
        text = canonical_json(plain).decode()
    except ValueError:  # a number that is not finite, or half a character
        return document(_finite(plain))
    # NUL is written as an escape, and only as one.
    return document(_finite(plain)) if "\\u0000" in text else text


def parse(text: str) -> Any:
    """The plain data of a stored document."""
    return json.loads(text)


_PACKED = "zlib:"
"""Begins a packed document; JSON of a record begins with a brace."""


def pack(text: str) -> str:
    """A document in less space; one that is packed stays."""
    if text.startswith(_PACKED):
        return text
    return _PACKED + base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def unpack(text: str) -> str:
    """A document as it was before ``pack``; one that is not packed stays."""
    if not text.startswith(_PACKED):
        return text
    return zlib.decompress(base64.b64decode(text[len(_PACKED) :])).decode()


def storable(text: str) -> str:
    """``text`` without what a text column cannot hold: NUL and lone surrogates become U+FFFD."""
    return text.replace("\x00", "\ufffd").encode("utf-8", "replace").decode()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, str):
        return storable(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
