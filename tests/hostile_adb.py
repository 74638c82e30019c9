"""An adb server whose device is hostile: it speaks the protocol as far as it needs to be listened to."""

from __future__ import annotations

import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

Serve = Callable[[socket.socket], None]
"""What happens on a connection after its service was accepted."""

SHELL = b"shell,v2,raw:"

FEATURES = b"shell_v2,stat_v2"


def endless(data: bytes) -> Serve:
    """The same bytes for ever."""

    def serve(client: socket.socket) -> None:
        block = data * max(1, (1 << 16) // len(data))
        while True:
            client.sendall(block)

    return serve


def says(data: bytes) -> Serve:
    """These bytes, and then the end."""
    return lambda client: client.sendall(data)


def sync(stat: bytes, file: Serve) -> Serve:
    """A file service that answers every stat, and every file, in one way."""

    def serve(client: socket.socket) -> None:
        while True:
            letters, length = exactly(client, 4), int.from_bytes(exactly(client, 4), "little")
            exactly(client, length)
            if letters in (b"STAT", b"STA2"):
                client.sendall(stat)
            elif letters == b"RCV2":
                exactly(client, 8)
                file(client)
            else:
                file(client)

    return serve


def execute(client: socket.socket, script: bytes) -> None:
    """Run it here, and answer in packets of shell protocol 2."""
    done = subprocess.run(["sh", "-c", script], capture_output=True, check=False, start_new_session=True)
    for kind, block in ((1, done.stdout), (2, done.stderr), (3, bytes([max(0, done.returncode)]))):
        client.sendall(struct.pack("<BI", kind, len(block)) + block)


def exactly(source: socket.socket, count: int) -> bytes:
    """So many bytes. Raises: EOFError."""
    data = b""
    while len(data) < count:
        block = source.recv(count - len(data))
        if not block:
            raise EOFError
        data += block
    return data


@contextmanager
def hostile_adb(
    services: Mapping[bytes, Serve],
    *,
    features: bytes = FEATURES,
    devices: bytes | None = None,
    executes: bool = False,
) -> Iterator[str]:
    """The address of such a server. ``services``: by how they begin; others end at once. ``devices``: what it
    lists, where it says that the device is not there. ``executes``: whether it runs commands, here."""

    def serve(client: socket.socket) -> None:
        with client:
            try:
                while True:
                    asked = exactly(client, int(exactly(client, 4), 16))
                    if asked.startswith(b"host:devices") and devices is not None:
                        client.sendall(b"OKAY%04x" % len(devices) + devices)
                    elif devices is not None:
                        client.sendall(b"FAIL0010device not found")
                    elif asked.endswith(b":features"):
                        client.sendall(b"OKAY%04x" % len(features) + features)
                    elif asked.startswith(b"host:transport:"):
                        client.sendall(b"OKAY")
                    else:
                        client.sendall(b"OKAY")
                        if executes and asked.startswith(SHELL):
                            execute(client, asked.removeprefix(SHELL))
                        for name, service in services.items():
                            if asked.startswith(name):
                                service(client)
                        return
            except (OSError, EOFError):
                return  # we were hung up on

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
