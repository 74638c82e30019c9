"""AOSP's daemon behind a real adb server: worlds of the transport contract."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from tests.adb_side import Daemon, OlderDevices, Server
from tests.contract.transport_worlds import World


@contextmanager
def aosp_world(folder: Path) -> Iterator[World]:
    """The daemon has shell protocol 2 and stat 2, no compression; it shares this machine's files."""
    with _sides(folder) as (daemon, server):
        yield _world(folder, daemon, server.address)


@contextmanager
def aosp_exec_world(folder: Path) -> Iterator[World]:
    """The same daemon, its newer features hidden: a phone before Android 7, reached over ``exec:``."""
    with _sides(folder) as (daemon, server):
        older = OlderDevices(server, ("shell_v2", "stat_v2"))
        try:
            yield _world(folder, daemon, older.address)
        finally:
            older.close()


@contextmanager
def _sides(folder: Path) -> Iterator[tuple[Daemon, Server]]:
    daemon = Daemon(folder / "daemon")
    try:
        server = Server(folder / "server")
        try:
            yield daemon, server
        finally:
            server.kill()
    finally:
        daemon.kill()


def _world(folder: Path, daemon: Daemon, server_address: str) -> World:
    (folder / "device").mkdir()
    fields = f'transport: adb, address: "{daemon.address}", adb_server: "{server_address}"'
    return World(fields, PurePosixPath(folder / "device"))
