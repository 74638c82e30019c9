"""Packets of the adb protocol: six little-endian words, then the payload. Pure functions over bytes.

Source: packages/modules/adb, protocol.txt.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

HEADER_BYTES = 24
VERSION_CHECKSUM = 0x01000000
"""The first protocol: every payload has a checksum."""
VERSION = 0x01000001
"""The protocol whose two sides, once they have agreed on it, leave checksums out."""
PAYLOAD_CAP_BYTES = 1 << 20
"""The longest payload that any adb sends."""
PAYLOAD_LEAST_BYTES = 4096
"""What every adb can take, and the longest payload before the two sides have agreed on more."""

TOKEN, SIGNATURE, PUBLIC_KEY = 1, 2, 3
"""First argument of AUTH."""

_HEADER = struct.Struct("<6I")


def _command(name: bytes) -> int:
    return int.from_bytes(name, "little")


CNXN, AUTH, OPEN, OKAY, WRTE, CLSE, STLS = map(
    _command, (b"CNXN", b"AUTH", b"OPEN", b"OKAY", b"WRTE", b"CLSE", b"STLS")
)
_COMMANDS = frozenset({CNXN, AUTH, OPEN, OKAY, WRTE, CLSE, STLS})


class ProtocolError(Exception):
    """The other side does not speak the protocol; the connection ends."""


@dataclass(frozen=True)
class Header:
    """A packet's first 24 bytes, checked; ``length``: bytes of payload that follow."""

    command: int
    arg0: int
    arg1: int
    length: int
    checksum: int


def parse_header(data: bytes | bytearray | memoryview, *, cap_bytes: int = PAYLOAD_CAP_BYTES) -> Header:
    """A header from its 24 bytes.

    Raises: ProtocolError when it is none, or promises more than ``cap_bytes`` of payload.
    """
    if len(data) != HEADER_BYTES:
        raise ProtocolError(f"a header of {len(data)} bytes")
    command, arg0, arg1, length, checksum, magic = _HEADER.unpack(data)
    if magic != command ^ 0xFFFFFFFF:
        raise ProtocolError("a header whose magic does not match its command")
    if command not in _COMMANDS:
        raise ProtocolError(f"an unknown command {command:#010x}")
    if length > cap_bytes:
        raise ProtocolError(f"a payload of {length} bytes where {cap_bytes} are allowed")
    return Header(command, arg0, arg1, length, checksum)


def pack_header(command: int, arg0: int, arg1: int, length: int, checksum: int) -> bytes:
    """The 24 bytes of a header."""
    return _HEADER.pack(command, arg0, arg1, length, checksum, command ^ 0xFFFFFFFF)


def checksum_of(payload: bytes | bytearray | memoryview) -> int:
    """What the protocol calls its crc: the sum of the payload's bytes."""
    return sum(payload) & 0xFFFFFFFF


def agree(version: int, payload_bytes: int, *, own_version: int, own_payload_bytes: int) -> tuple[int, int]:
    """(version, longest payload) that both sides know.

    Raises: ProtocolError when the other side is older than any adb.
    """
    if version < VERSION_CHECKSUM or payload_bytes < PAYLOAD_LEAST_BYTES:
        raise ProtocolError(f"version {version:#x} with payloads of {payload_bytes} bytes")
    return min(version, own_version), min(payload_bytes, own_payload_bytes)
