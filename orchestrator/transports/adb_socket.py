"""A connection to an adb server: requests, their answers, and bytes after them. No recovery, no device names.

adbutils has such a connection too, but one that starts a server by itself (with an adb client, which kills a
running server of another version) and waits without a limit.

Source: AOSP packages/modules/adb, docs/dev/overview.md and services.md: a request is four hexadecimal digits
of length and its bytes; the answer ``OKAY``, or ``FAIL`` and a text with its length in four digits.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from dataclasses import dataclass
from types import TracebackType

from sti_runtime.errors import StifarmError

REQUEST_CAP_BYTES = 0xFFFF
_CONNECT_S = 5.0


@dataclass(frozen=True)
class ServerAddress:
    """Where an adb server listens."""

    host: str
    port: int

    @property
    def local(self) -> bool:
        """Whether it would run on this machine."""
        return self.host in ("127.0.0.1", "localhost", "::1")

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class RefusalError(StifarmError):
    """The server answered ``FAIL``; ``what`` is its text."""


class ProtocolError(StifarmError):
    """The other side does not speak the protocol."""


class RequestError(StifarmError):
    """What is to be asked is no request: it is too long."""


class AdbSocket:
    """One connection. Every wait has a limit; ``OSError`` (``TimeoutError`` among them) and ``EOFError`` are
    those of the link."""

    def __init__(self, address: ServerAddress, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self.socket = socket.create_connection(
            (address.host, address.port), max(0.001, min(timeout_s, _CONNECT_S))
        )
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.settimeout(max(0.001, timeout_s))

    def limit(self, timeout_s: float) -> None:
        """How long each wait from now on may take."""
        self._timeout_s = timeout_s
        self.socket.settimeout(max(0.001, timeout_s))

    def request(self, service: bytes) -> None:
        """Ask for a service and wait for ``OKAY``.

        Raises: RequestError, RefusalError, ProtocolError, OSError, EOFError.
        """
        if len(service) > REQUEST_CAP_BYTES:
            raise RequestError(
                f"a request to an adb server has {REQUEST_CAP_BYTES} bytes at most, not {len(service)}."
            )
        self.send(b"%04x" % len(service) + service)
        status = self.exactly(4)
        if status == b"FAIL":
            raise RefusalError(self.block().decode(errors="replace").strip()[:500])
        if status != b"OKAY":
            raise ProtocolError(f"it answers {status!r} instead of OKAY or FAIL.")

    def block(self) -> bytes:
        """A text with its length before it."""
        digits = self.exactly(4)
        try:
            length = int(digits, 16)
        except ValueError as error:
            raise ProtocolError(f"it answers {digits!r} where a length belongs.") from error
        return self.exactly(length)

    def send(self, data: bytes | memoryview) -> None:
        """Send all of it."""
        self.socket.sendall(data)

    def some(self, limit: int) -> bytes:
        """What has come, at most ``limit`` bytes; empty at the end."""
        return self.socket.recv(limit)

    def exactly(self, count: int) -> bytes:
        """``count`` bytes: a few, for all are kept. A sender that trickles them has the limit of one wait."""
        deadline = time.monotonic() + self._timeout_s
        data = bytearray()
        while len(data) < count:
            if time.monotonic() > deadline:
                raise TimeoutError("timed out")
            block = self.socket.recv(min(count - len(data), 1 << 16))
            if not block:
                raise EOFError("the connection was closed")
            data += block
        return bytes(data)

    def readable(self, timeout_s: float) -> bool:
        """Whether something has come, or the end has, within that time."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return bool(poll.poll(max(0, timeout_s) * 1000))

    def hang_up(self) -> None:
        """End the connection now; threads that wait in it wake up."""
        with contextlib.suppress(OSError):  # the other side was faster
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection; no other thread uses it any more."""
        self.hang_up()
        self.socket.close()

    def __enter__(self) -> AdbSocket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
