"""A TCP link that a test can cut: it counts what goes to the device, and breaks after so many bytes of it."""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType

_BLOCK_BYTES = 1 << 14


class CutLink:
    """Between a client, at a ``port`` of this machine, and where the device listens.

    What was counted has arrived there, before a cut, too.
    """

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.sent_bytes = self.received_bytes = 0
        self.cut_at_bytes: int | None = None
        """Where ``sent_bytes`` ends the connection that brings it there; once."""

        self.cut_before = b""
        """A text that ends the connection where it first comes, and does not arrive; once."""

        self.stays_cut = False
        """Whether new connections are ended at once, from a cut on."""

        self._ends: list[socket.socket] = []
        self._broken = False
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self) -> CutLink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _shut(self._listener)
        self._listener.close()
        for end in self._ends:
            _shut(end)
            end.close()

    def cut(self) -> None:
        """End every connection now."""
        self._broken = True
        for end in self._ends:
            _shut(end)

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            if self._broken and self.stays_cut:
                client.close()
                continue
            device = socket.create_connection(self._target)
            self._ends += (client, device)
            for source, sink, counted in ((client, device, True), (device, client, False)):
                threading.Thread(target=self._pump, args=(source, sink, counted), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(_BLOCK_BYTES):
                if counted and self.cut_before and self.cut_before in data:
                    self.cut_before, self._broken = b"", True
                    break
                sink.sendall(data)
                if not counted:
                    self.received_bytes += len(data)
                    continue
                self.sent_bytes += len(data)
                if self.cut_at_bytes is not None and self.sent_bytes >= self.cut_at_bytes:
                    self.cut_at_bytes, self._broken = None, True
                    break
        _shut(source)
        _shut(sink)


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is broken already
        end.shutdown(socket.SHUT_RDWR)
