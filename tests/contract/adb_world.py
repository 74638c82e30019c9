"""AOSP's daemon behind a real adb server: the world "adb-aosp" of the transport contract."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from tests.adb_side import Daemon, Server
from tests.contract.transport_worlds import World


@contextmanager
def aosp_world(folder: Path) -> Iterator[World]:
    """The daemon has shell protocol 2 and stat 2, no compression; it shares this machine's files."""
    daemon = Daemon(folder / "daemon")
    try:
        server = Server(folder / "server")
        try:
            scratch = folder / "device"
            scratch.mkdir()
            fields = f'transport: adb, address: "{daemon.address}", adb_server: "{server.address}"'
            yield World(fields, PurePosixPath(scratch))
        finally:
            server.kill()
    finally:
        daemon.kill()
