"""Requests of sftp: the channel below them, guarded, and many of them under way at once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

import paramiko
from paramiko.channel import Channel
from paramiko.sftp import CMD_DATA, CMD_READ, CMD_STATUS, CMD_WRITE, int64

AHEAD = 64
"""Requests under way: as many as OpenSSH's own client has."""

_READ_BYTES = 1 << 15
_WINDOW_BYTES = 4 << 20
_SPARE_BYTES = 1 << 20
_STALL_S = 60.0


class SessionEndedError(Exception):
    """The session ended, or did not answer in time."""


class Pipe:
    """The channel under an sftp session. Every operation has a limit of time and of bytes to receive."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._until, self._room = 0.0, 0
        self.allow()

    def allow(self, received_bytes: int = 0) -> None:
        """Begin an operation, or a part of one, that may receive so much beside its answers' headers."""
        self._until, self._room = time.monotonic() + _STALL_S, received_bytes + _SPARE_BYTES

    def send(self, data: bytes) -> int:
        """As of a socket."""
        try:
            self._channel.settimeout(self._left())
            return self._channel.send(data)
        except OSError as error:
            raise SessionEndedError(str(error) or "no answer in time") from error

    def recv(self, size: int) -> bytes:
        """As of a socket."""
        try:
            self._channel.settimeout(self._left())
            data = self._channel.recv(size)
        except OSError as error:
            raise SessionEndedError(str(error) or "no answer in time") from error
        if not data:
            raise SessionEndedError("the board's sftp server ended")
        self._room -= len(data)
        if self._room < 0:
            raise paramiko.SFTPError("its answers are longer than what was asked for")
        return data

    def close(self) -> None:
        """As of a socket."""
        self._channel.close()

    def recv_ready(self) -> bool:
        """As of a channel."""
        return self._channel.recv_ready()

    def get_name(self) -> str:
        """As of a channel."""
        return self._channel.get_name()

    def _left(self) -> float:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError("no answer in time")
        return left


class Requests:
    """Requests on one open file of which many are under way, answered in their order (as every server does).

    The library's own way drops the answers to the last writes of a file, and asks for much of it twice.
    """

    def __init__(self, client: paramiko.SFTPClient, pipe: Pipe, file: paramiko.SFTPFile) -> None:
        self._client, self._pipe, self._handle = client, pipe, file.handle
        self._under_way: deque[int] = deque()

    @property
    def waiting(self) -> int:
        """How many have no answer yet."""
        return len(self._under_way)

    def write(self, offset: int, data: bytes) -> None:
        """Ask for data to be written."""
        self._ask(CMD_WRITE, int64(offset), data)

    def read(self, offset: int, size: int) -> None:
        """Ask for data."""
        self._ask(CMD_READ, int64(offset), size)

    def answer(self) -> bytes:
        """Wait for the oldest one's answer: its data, b"" at the end of the file. Raises: OSError."""
        self._pipe.allow(_WINDOW_BYTES)
        try:
            kind, message = self._client._read_response(self._under_way.popleft())  # type: ignore[attr-defined]
        except EOFError:
            return b""
        if kind == CMD_STATUS:
            return b""
        if kind != CMD_DATA:
            raise paramiko.SFTPError(f"an answer of kind {kind}")
        return bytes(message.get_string())

    def _ask(self, *request: object) -> None:
        self._pipe.allow(_WINDOW_BYTES)
        kind, *rest = request
        number = self._client._async_request(type(None), kind, self._handle, *rest)  # type: ignore[attr-defined]
        self._under_way.append(number)


def blocks_of(requests: Requests, file: paramiko.SFTPFile, offset: int, limit: int) -> Iterator[bytes]:
    """At most ``limit`` bytes of a file, in blocks, to its end. The size it states is only where asking ahead
    ends: files of the kernel state none, a journal grows."""
    at, end = offset, offset + limit
    stated, asked = 0, offset
    while at < end:
        while asked < min(end, max(stated, at + 1)) and requests.waiting < AHEAD:
            size = min(_READ_BYTES, end - asked)
            requests.read(asked, size)
            asked += size
        wanted = min(_READ_BYTES, end - at)
        block = requests.answer()[:wanted]
        if not block:
            break
        yield block
        at += len(block)
        if len(block) < wanted:  # the end, or a file of the kernel: what was asked for behind it is elsewhere
            while requests.waiting:
                requests.answer()
            asked = at
        elif at - offset == wanted < limit:
            stated = file.stat().st_size or 0
    while requests.waiting:
        requests.answer()
