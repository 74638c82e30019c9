"""One stream of a connection: bytes both ways, with a window each way.

A peer may have one packet in flight until it is acknowledged. Ours are held back until the peer has
acknowledged the last; the peer's are acknowledged as soon as they are queued, up to a bound, so that the
link and the disk work at the same time.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator

from orchestrator.lab.adbd.packets import CLSE, OKAY, WRTE, ProtocolError

QUEUE_BYTES = 1 << 20
"""Bytes of a peer that wait for a service before the peer has to wait."""

Buffer = bytes | bytearray | memoryview
Send = Callable[[int, int, int, Buffer], None]


class StreamClosedError(Exception):
    """The peer, or the connection, has closed the stream."""


class Stream:
    """A stream by its two ids. ``deliver``, ``acknowledged`` and ``peer_closed`` are the connection's; the
    rest is the service's. Reading and writing may go on in two threads."""

    def __init__(self, send: Send, local: int, remote: int, payload_bytes: int) -> None:
        self.local = local
        self.remote = remote
        self.payload_bytes = payload_bytes
        self._send = send
        self._changed = threading.Condition()
        self._queue: deque[memoryview] = deque()
        self._queued = 0
        self._owes_okay = False
        self._in_flight = False
        self._closed = False
        self._on_close: Callable[[], None] | None = None

    # ---------------------------------------------------------- connection

    def deliver(self, payload: memoryview) -> None:
        """Queue what the peer wrote. Raises: ProtocolError when it did not wait for its acknowledgement."""
        with self._changed:
            if self._closed:
                return
            if self._owes_okay:
                raise ProtocolError("a packet before the last one was acknowledged")
            self._queue.append(payload)
            self._queued += len(payload)
            self._owes_okay = self._queued > QUEUE_BYTES
            late = self._owes_okay
            self._changed.notify_all()
        if not late:
            self._send(OKAY, self.local, self.remote, b"")

    def acknowledged(self) -> None:
        """The peer took our last packet."""
        with self._changed:
            self._in_flight = False
            self._changed.notify_all()

    def peer_closed(self) -> None:
        """Nothing can be written any more; what was received can still be read."""
        with self._changed:
            self._closed = True
            called, self._on_close = self._on_close, None
            self._changed.notify_all()
            if called is not None:
                called()

    # ------------------------------------------------------------- service

    @property
    def closed(self) -> bool:
        """Whether the stream has been closed by either side."""
        with self._changed:
            return self._closed

    def when_closed(self, call: Callable[[], None]) -> None:
        """Have ``call`` called once, when the peer closes; at once if it has. Never after ``close``.

        It is called with the stream locked and must not wait.
        """
        with self._changed:
            if self._closed:
                call()
            else:
                self._on_close = call

    def read(self) -> memoryview:
        """What the peer wrote next; empty at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            if not self._queue:
                return memoryview(b"")
            payload = self._queue.popleft()
            self._queued -= len(payload)
            late = self._owes_okay and self._queued <= QUEUE_BYTES and not self._closed
            if late:
                self._owes_okay = False
        if late:
            self._send(OKAY, self.local, self.remote, b"")
        return payload

    def write(self, data: Buffer) -> None:
        """Send bytes; returns when the last packet of them is on its way. ``data`` may be used again then.

        Raises: StreamClosedError.
        """
        view = memoryview(data)
        for start in range(0, len(view), self.payload_bytes):
            with self._changed:
                self._changed.wait_for(lambda: self._closed or not self._in_flight)
                if self._closed:
                    raise StreamClosedError
                self._in_flight = True
            self._send(WRTE, self.local, self.remote, view[start : start + self.payload_bytes])

    def close(self) -> None:
        """Tell the peer that the service has ended, unless the stream is closed already."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._on_close = None
            self._changed.notify_all()
        self._send(CLSE, self.local, self.remote, b"")


class ExactReader:
    """Reads a stream by counted bytes. Raises: StreamClosedError where it ends too early."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._left = memoryview(b"")

    def pieces(self, count: int) -> Iterator[memoryview]:
        """The next ``count`` bytes as they came, uncopied."""
        while count:
            if not self._left:
                self._left = self._stream.read()
                if not self._left:
                    raise StreamClosedError
            piece, self._left = self._left[:count], self._left[count:]
            count -= len(piece)
            yield piece

    def exactly(self, count: int) -> bytes:
        """The next ``count`` bytes in one piece."""
        if len(self._left) >= count:
            piece, self._left = self._left[:count], self._left[count:]
            return bytes(piece)
        return b"".join(self.pieces(count))
