"""JSON, numbers and digests in C: as Python reads, spells and computes them."""

from __future__ import annotations

import hashlib
import json
import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest

from sti_runtime.records import canonical_json
from tests.native.document_mutations import refused_by_c_alone, spelled_otherwise
from tests.native.formats_probe import Ask, formats_probe


@pytest.fixture(scope="module")
def ask() -> Ask:
    return formats_probe()


JSON_TEXTS = (
    b"0", b"-0", b"01", b"1.", b".5", b"1e", b"1e5", b"1E+05", b"-", b"+1", b"0x1", b"1e999", b"-1e-999",
    b"NaN", b"Infinity", b"9223372036854775807", b"9223372036854775808", b"-9223372036854775808",
    b"-9223372036854775809", b"1.0", b"1.00", b"100000000000000000000.0", b"1e22", b"1e+22", b"0.0001",
    b"1e-05", b"0.00001", b"-0.0", b'""', b'"\\u0041"', b'"\\u00e9"', b'"\\u001f"', b'"\\u001F"',
    b'"\\u0008"', b'"\\b"', b'"\\/"', b'"/"', b'"\\u007f"', b'"\\ud83d\\ude00"', b'"\\ud83d"',
    b'"\\ude00"', b'"\\ud83d\\u0041"', b'"\\ud83dx"', b'"\\x"', b'"\\u12"', b'"', b'"\\', b'"\\u',
    b'"a\x00"', b'"\x1f"', b'"\x7f"', "\"é€😀\"".encode(), b'"\xc0\x80"', b'"\xed\xa0\x80"',
    b'"\xf4\x90\x80\x80"', b'"\xe0\x80\x80"', b'"\xc3"', b'"\xc3', b'"\xff"', b"[]", b"[ ]", b"[1,]",
    b"[1 2]", b"[,]", b"[1", b"{}", b"{ }", b'{"a":1}', b'{"a":1,}', b'{"a" :1}', b'{"a":1 }',
    b'{"b":1,"a":2}', b'{"a":1,"a":2}', b'{"\\u0061":1,"a":2}', '{"é":1,"z":2}'.encode(),
    '{"z":1,"é":2}'.encode(), '{"\uffff":1,"😀":2}'.encode(), b'{"a"}', b'{"a":}', b"{a:1}", b"{1:1}",
    b'{"":0}', b"true", b"True", b"tru", b"truex", b"null", b"nul", b"false", b"", b" ",
    b"\xef\xbb\xbf1", b"1 ", b" 1", b"1 1", b"1\x00", b"\x001", b"// x\n1", b"'a'", b"[[[]]]",
    b"[" * 64 + b"]" * 64, b"[" * 64, b'{"a":' * 64 + b"1" + b"}" * 64,
    b"123456789012345678901234567890", b"0.1", b"1.5e300", b"2.2250738585072014e-308", b"5e-324",
    b"4.9e-324", b"1.7976931348623157e+308", b"1" + b"0" * 400, b"0." + b"3" * 2000,
)  # fmt: skip


def test_json(ask: Ask) -> None:
    """Taken where Python takes it, canonical where Python would write it so, written as Python does."""
    for data, answer in zip(JSON_TEXTS, ask("json", JSON_TEXTS), strict=True):
        try:
            text = data.decode()
            value = json.loads(text, parse_constant=lambda word: float("x" + word))
            text.encode("utf-8")
            canonical = canonical_json(value)
        except ValueError as error:
            infinite = "Out of range float" in str(error)
            assert infinite or answer.error == "FormatError", (data, answer)
            continue
        if refused_by_c_alone(data) and b"\\u0000" not in data:
            assert answer.error == "FormatError", data
            continue
        assert answer.error == "", (data, answer)
        assert answer.lines == [str(int(canonical == data)), canonical.decode()], data
    nested = [b"[" * 65 + b"]" * 65, b'{"a":' * 65 + b"1" + b"}" * 65]
    assert [a.error for a in ask("json", nested)] == ["FormatError"] * 2


def test_json_of_many_shapes(ask: Ask) -> None:
    """Random values, wide and deep, with keys in any order and strings of any character."""
    rng = random.Random(9)

    def text() -> str:
        planes = (0x20, 0x7F, 0x7FF, 0xD7FF, 0xFFFF, 0x10FFFF)
        codes = (rng.randrange(1, rng.choice(planes) + 1) for _ in range(rng.randrange(8)))
        return "".join(chr(c) for c in codes if not 0xD800 <= c < 0xE000)

    def value(depth: int) -> Any:
        kind = rng.randrange(9 if depth < 5 else 6)
        if kind < 6:
            number = rng.choice((rng.randrange(-(2**63), 2**63), rng.randrange(-9, 9)))
            return (None, rng.random() < 0.5, number, rng.uniform(-1e6, 1e6), text(), rng.random() * 1e-9)[
                kind
            ]
        if kind == 6:
            return [value(depth + 1) for _ in range(rng.randrange(6))]
        return {text(): value(depth + 1) for _ in range(rng.choice((0, 3, 70 if depth > 3 else 5)))}

    values = [value(0) for _ in range(300)]
    spelled = [(spelled_otherwise(rng, v), v) for v in values] + [(canonical_json(v), v) for v in values]
    for (data, expected), answer in zip(spelled, ask("json", [data for data, _ in spelled]), strict=True):
        canonical = canonical_json(expected)
        assert "\n".join(answer.lines) == f"{int(data == canonical)}\n{canonical.decode()}"


def test_numbers_are_spelled_as_python_spells_them(ask: Ask) -> None:
    rng = random.Random(10)
    values = [
        0.0,
        -0.0,
        0.1,
        1.0,
        5.0,
        1e-12,
        1e15,
        1e16,
        1e17,
        123456789012345680.0,
        1e22,
        1e23,
        9007199254740993.0,
    ]
    values += [2.0**power for power in range(-1074, 1024)] + [
        5e-324,
        2.2250738585072009e-308,
        1.7976931348623157e308,
    ]
    values += [np.nextafter(2.0**power, 0.0) for power in range(-1070, 1024, 7)]
    values += [10.0**power for power in range(-320, 309)] + [-(10.0**power) / 3 for power in range(-320, 309)]
    values += [struct.unpack("<d", rng.randbytes(8))[0] for _ in range(60000)]
    values += [float(np.float32(rng.gauss(0, 1))) for _ in range(20000)]
    values += [round(rng.uniform(0, 1000), rng.randrange(10)) for _ in range(20000)]
    values = [float(v) for v in values if np.isfinite(v)]
    (answer,) = ask("numbers", [struct.pack(f"<{len(values)}d", *values)])
    different = [(v, c) for v, c in zip(values, answer.lines, strict=False) if repr(v) != c]
    assert not different
    assert len(answer.lines) == len(values) + 1


def test_digests(ask: Ask) -> None:
    rng = random.Random(11)
    documents = [rng.randbytes(size) for size in (*range(200), 1000, 4095, 4096, 100_000)]
    for data, answer in zip(documents, ask("digests", documents), strict=True):
        sha = hashlib.sha256(data).hexdigest()
        assert answer.lines == [sha, sha, f"{zlib.crc32(data):08x}"]


def test_bytes_that_are_not_text_become_replacement_characters(ask: Ask) -> None:
    rng = random.Random(13)
    lead = b'\x00\x1f a"\\\x7f\x80\xbf\xc0\xc2\xdf\xe0\xed\xef\xf0\xf4\xf5\xff\x9f\xa0\x8f\x90'
    documents = [bytes(rng.choices(lead, k=rng.randrange(12))) for _ in range(3000)]
    answers = ask("text", documents)
    expected = [canonical_json(data.decode(errors="replace")).decode() for data in documents]
    assert ["\n".join(answer.lines) for answer in answers] == expected


@pytest.mark.parametrize("character", ["x", "é", "€", "😀"])
def test_words_that_are_too_long_end_at_a_whole_character(ask: Ask, character: str) -> None:
    documents = [("a" * start + character * 2100).encode() for start in range(4)]
    for data, answer in zip(documents, ask("words", documents), strict=True):
        assert answer.lines == [data[:1999].decode(errors="ignore")] * 2
