"""Damaged JSON documents: changes to their structure and to their bytes, the same ones from the same seed."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

from sti_runtime.records import canonical_json

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 4, 32, 1.0, 2.0, 0.5, -0.0, 1e300,
    2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 10**30,
    "", "a", "native-int8", "-a", "A", "resident.bin", "../x", "a/b", "\n", "\0", "é",
    "0" * 63, "0" * 64, "0" * 65, "é" * 64, "é" * 65, "😀" * 200, "x" * 201, "f" * 64, "F" * 64,
    [], {}, [0], [[]], {"a": 1},
)  # fmt: skip
"""What a field can be replaced by: edges of every range and of every string length."""

ODD_BYTES = b'{}[],:"\\ \n\t\x00\x1f\x7f\x80\xc3\xed\xff019-+.eEtfn/u'


def _places(document: Any) -> list[tuple[Any, Any]]:
    """Every (container, key or index) of a document."""
    found: list[tuple[Any, Any]] = []
    if isinstance(document, dict | list):
        for key, value in document.items() if isinstance(document, dict) else enumerate(document):
            found.append((document, key))
            found.extend(_places(value))
    return found


def _pick(rng: random.Random, document: Any) -> tuple[Any, Any]:
    """A place: often one near the root, which a document has few of."""
    container, key = document, None
    while isinstance(container, dict | list) and container:
        key = rng.choice(sorted(container)) if isinstance(container, dict) else rng.randrange(len(container))
        inner = container[key]
        if not isinstance(inner, dict | list) or not inner or rng.random() < 0.3:
            break
        container = inner
    return container, key


def _change_value(rng: random.Random, value: Any) -> Any:
    if isinstance(value, bool) or rng.random() < 0.4:
        return rng.choice(ODD_VALUES)
    if isinstance(value, int):
        return value + rng.choice((-4096, -64, -8, -1, 1, 8, 64, 4096, value, -value, -2 * value))
    if isinstance(value, str) and value:
        at = rng.randrange(len(value))
        return value[:at] + rng.choice(("", "0", "g", "A", "-", "é", "\n", value)) + value[at + 1 :]
    return rng.choice(ODD_VALUES)


def _change_once(rng: random.Random, document: Any) -> None:
    container, key = _pick(rng, document)
    if key is None:
        return
    kind = rng.random()
    if isinstance(container, list) and kind < 0.5:
        other = rng.randrange(len(container))
        if kind < 0.1:
            del container[key]
        elif kind < 0.2:
            container.insert(other, copy.deepcopy(container[key]))
        elif kind < 0.3:
            container[key], container[other] = container[other], container[key]
        elif kind < 0.4:
            container.append(rng.choice(ODD_VALUES))
        else:
            del container[other:]
    elif isinstance(container, dict) and kind < 0.1:
        del container[key]
    elif isinstance(container, dict) and kind < 0.2:
        container[rng.choice(("extra", "", "\0", key.upper(), key + " "))] = container[key]
    elif isinstance(container, dict) and kind < 0.3:
        container[key] = copy.deepcopy(container[rng.choice(sorted(container))])
    else:
        container[key] = _change_value(rng, container[key])


def changed_structure(rng: random.Random, document: Any) -> bytes:
    """Canonical JSON of ``document`` (left as it is) after one to three changes."""
    changed = copy.deepcopy(document)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _change_once(rng, changed)
    return canonical_json(changed)


def changed_bytes(rng: random.Random, data: bytes) -> bytes:
    """``data`` with one to three bytes changed, removed, inserted, or a run of it doubled or dropped."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.choice((1, 1, 1, 1, 2, 8, 100)))
        middle = rng.choice(
            (b"", bytes([rng.choice(ODD_BYTES)]), bytes([rng.randrange(256)]), data[at:end] * 2)
        )
        keep_tail = rng.random() < 0.97
        data = data[:at] + middle + (data[end if rng.random() < 0.7 else at :] if keep_tail else b"")
    return data


def spelled_otherwise(rng: random.Random, document: Any) -> bytes:
    """The same document, not in canonical form: white space, escapes, another order of keys."""
    if isinstance(document, dict):
        order = rng.sample(sorted(document), len(document))
        document = {key: document[key] for key in order}
    indent = rng.choice((None, None, 1, "\t"))
    text = json.dumps(document, indent=indent, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.5:
        text = rng.choice((" ", "\n", "\r\n\t")) + text + rng.choice((" ", "\n"))
    return text.encode()


def refused_by_c_alone(data: bytes) -> bool:
    """A key twice, or U+0000 in a string."""

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) != len(keys) or "\0" in "".join(keys):
            raise LookupError
        return dict(pairs)

    def has_nul(value: Any) -> bool:
        if isinstance(value, dict | list):
            return any(has_nul(v) for v in (value.values() if isinstance(value, dict) else value))
        return isinstance(value, str) and "\0" in value

    try:
        return has_nul(json.loads(data, object_pairs_hook=members))
    except LookupError:
        return True
    except ValueError:
        return False
