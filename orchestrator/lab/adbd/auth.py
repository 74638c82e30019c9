"""Authorisation: a host signs a token with its key, and the phone has a list of keys it trusts.

The list holds one line per key: base64 of Android's own layout of an RSA public key, a space, a comment.
Source: packages/modules/adb, protocol.txt; system/core/libcrypto_utils/android_pubkey.cpp.
"""

from __future__ import annotations

import base64
import binascii
import os
import struct
from dataclasses import dataclass
from pathlib import Path

TOKEN_BYTES = 20
KEYS_CAP_BYTES = 1 << 20
OFFER_CAP_BYTES = 2048
"""The longest public key with its comment that is taken down."""

_MODULUS_BYTES = 256
_KEY = struct.Struct(f"<II{_MODULUS_BYTES}s{_MODULUS_BYTES}sI")
# DigestInfo of SHA-1. Source: RFC 8017, 9.2, notes.
_SHA1_INFO = bytes.fromhex("3021300906052b0e03021a05000414")
_PADDED = b"\x00\x01" + b"\xff" * (_MODULUS_BYTES - 3 - len(_SHA1_INFO) - TOKEN_BYTES) + b"\x00" + _SHA1_INFO


@dataclass(frozen=True)
class PublicKey:
    """An RSA key of 2048 bits."""

    modulus: int
    exponent: int

    def signed(self, token: bytes, signature: bytes) -> bool:
        """Whether ``signature`` is this key's (PKCS #1 1.5, the token in the place of a SHA-1)."""
        number = int.from_bytes(signature, "big")
        if len(signature) != _MODULUS_BYTES or number >= self.modulus:
            return False
        return pow(number, self.exponent, self.modulus).to_bytes(_MODULUS_BYTES, "big") == _PADDED + token


def parse_key(line: str) -> PublicKey | None:
    """A key from a line of the list, or from what a host offers; None when it is none."""
    words = line.split()
    try:
        data = base64.b64decode(words[0], validate=True) if words else b""
    except (binascii.Error, ValueError):
        return None
    if len(data) != _KEY.size:
        return None
    length, _, modulus, _, exponent = _KEY.unpack(data)
    number = int.from_bytes(modulus, "little")
    if (
        length * 4 != _MODULUS_BYTES
        or number.bit_length() != _MODULUS_BYTES * 8
        or exponent not in (3, 65537)
    ):
        return None
    return PublicKey(number, exponent)


def trusted_keys(path: Path) -> tuple[PublicKey, ...]:
    """The keys of a list; lines that are none are skipped, a missing list is empty."""
    try:
        with path.open("rb") as stream:
            text = stream.read(KEYS_CAP_BYTES).decode(errors="replace")
    except OSError:
        return ()
    return tuple(filter(None, map(parse_key, text.splitlines())))


def offered_line(payload: bytes) -> str | None:
    """The line of a host's offered key, for the list; None when it is no key."""
    text = payload[:OFFER_CAP_BYTES].split(b"\0")[0].decode(errors="replace")
    words = "".join(letter if letter.isprintable() else " " for letter in text).split()
    return " ".join(words) if len(payload) <= OFFER_CAP_BYTES and parse_key(text) is not None else None


def add_line(path: Path, line: str) -> None:
    """Append a key's line to a list unless it is there; the list stays within its cap."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = path.read_text(errors="replace").splitlines() if path.exists() else []
    if line in known or sum(map(len, known)) + len(line) > KEYS_CAP_BYTES // 2:
        return
    replacement = path.with_name(f"{path.name}.new")
    replacement.write_text("\n".join([*known, line]) + "\n")
    replacement.replace(path)


def new_token() -> bytes:
    """What a host is to sign."""
    return os.urandom(TOKEN_BYTES)
