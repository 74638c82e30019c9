"""A door in a network namespace to a server that listens on its loopback only.

python -m bench.forward HOST PORT TARGET_PORT
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading


def main() -> None:
    """Serve until killed."""
    host, port, target = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    with socket.create_server((host, port), backlog=64) as listener:
        while True:
            client, _ = listener.accept()
            server = socket.create_connection(("127.0.0.1", target))
            for source, sink in ((client, server), (server, client)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 18):
            sink.sendall(data)
    for end in (source, sink):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    main()
