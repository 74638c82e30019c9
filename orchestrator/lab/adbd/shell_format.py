"""The packets inside a stream of the second shell service: one byte of kind, four of length, the data.

Source: packages/modules/adb, shell_protocol.h.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass

STDIN, STDOUT, STDERR, EXIT, CLOSE_STDIN, WINDOW_SIZE = range(6)
HEAD_BYTES = 5
PACKET_CAP_BYTES = 1 << 20
_HEAD = struct.Struct("<BI")
_WINDOW = re.compile(rb"([0-9]{1,5})x([0-9]{1,5}),([0-9]{1,5})x([0-9]{1,5})\0?")
_TERMINAL = re.compile(r"[A-Za-z0-9._+-]{1,64}")


@dataclass(frozen=True)
class ShellRequest:
    """What a stream's name asks for. ``command`` empty: an interactive shell."""

    command: bytes
    terminal: str
    pty: bool
    packets: bool


def parse_request(name: bytes, *, pty_only: bool, packets_offered: bool) -> ShellRequest | None:
    """The request in ``shell[,v2][,raw|pty][,TERM=…]:COMMAND`` or ``exec:COMMAND``; None when it is none.

    An interactive shell gets a terminal, a command does not, unless the request says or ``pty_only`` has it.
    """
    head, found, command = name.partition(b":")
    service, *options = head.decode(errors="replace").split(",")
    if not found or service not in ("shell", "exec") or (service == "exec" and (options or not command)):
        return None
    pty = service == "shell" and (pty_only or not command)
    packets, terminal = False, "dumb"
    for option in options:
        if option in ("pty", "raw"):
            pty = option == "pty"
        elif option == "v2" and packets_offered:
            packets = True
        elif option.startswith("TERM=") and _TERMINAL.fullmatch(option[5:]):
            terminal = option[5:]
        else:
            return None
    return ShellRequest(command, terminal, pty, packets)


def pack_head(kind: int, length: int) -> bytes:
    """The first five bytes of a packet."""
    return _HEAD.pack(kind, length)


def parse_head(data: bytes) -> tuple[int, int] | None:
    """(kind, length) of a packet; None when it is longer than any may be."""
    kind, length = _HEAD.unpack(data)
    return None if length > PACKET_CAP_BYTES else (kind, length)


def parse_window(data: bytes) -> tuple[int, int, int, int] | None:
    """(rows, columns, width, height) of a terminal; None when malformed."""
    match = _WINDOW.fullmatch(data)
    if match is None:
        return None
    rows, columns, width, height = (min(int(number), 65535) for number in match.groups())
    return rows, columns, width, height
