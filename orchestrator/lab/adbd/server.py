"""The daemon: listens, and serves every host that connects in a thread of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable

from orchestrator.lab.adbd.connection import Connection, Service, Trust
from orchestrator.lab.adbd.features import Offer
from orchestrator.lab.adbd.packets import ProtocolError

CONNECTIONS_CAP = 32
"""Hosts at a time; more are turned away."""

_TRUST_PAUSE_S = 0.2
_BUFFER_BYTES = 4 << 20

_log = logging.getLogger(__name__)


def listen(address: str, port: int) -> socket.socket:
    """A listening socket; port 0: one that is free. Raises: OSError."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Inherited by the connections; the window is agreed on before they are ours.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        listener.bind((address, port))
        listener.listen(CONNECTIONS_CAP)
    except OSError:
        listener.close()
        raise
    return listener


class Server:
    """Serves a listening socket for ever; ``find`` and the rest as ``Connection`` has it."""

    def __init__(
        self, offer: Offer, banner: bytes, trust: Trust, find: Callable[[bytes], Service | None]
    ) -> None:
        self._offer = offer
        self._banner = banner
        self._trust = trust
        self._find = find
        self._connections: set[Connection] = set()
        self._lock = threading.Lock()

    def serve(self, listener: socket.socket) -> None:
        """Accept connections until the process ends. Raises: OSError."""
        if self._trust.required:
            threading.Thread(target=self._watch_trust, daemon=True).start()
        while True:
            link, peer = listener.accept()
            with self._lock:
                full = len(self._connections) >= CONNECTIONS_CAP
            if full:
                _log.warning("turned %s away: %d hosts are connected", peer[0], CONNECTIONS_CAP)
                link.close()
                continue
            threading.Thread(target=self._serve_link, args=(link, peer[0]), daemon=True).start()

    def _serve_link(self, link: socket.socket, peer: str) -> None:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection = Connection(link, self._offer, self._banner, self._trust, self._find)
        with self._lock:
            self._connections.add(connection)
        try:
            connection.serve()
        except ProtocolError as error:
            _log.warning("cut %s off: it sent %s", peer, error)
        finally:
            with self._lock:
                self._connections.discard(connection)

    def _watch_trust(self) -> None:
        """Tell the connections when the list of trusted keys has changed."""
        seen = self._trust_stamp()
        while True:
            time.sleep(_TRUST_PAUSE_S)
            stamp = self._trust_stamp()
            if stamp == seen:
                continue
            seen = stamp
            with self._lock:
                connections = tuple(self._connections)
            for connection in connections:
                connection.trust_changed()

    def _trust_stamp(self) -> tuple[int, int, int] | None:
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(self._trust.keys)  # noqa: PTH116 - five times a second
            return status.st_ino, status.st_mtime_ns, status.st_size
        return None
