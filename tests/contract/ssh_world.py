"""The contract's ssh worlds: a real sshd on this machine, with its sftp server and without; dropbear."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from tests.contract.transport_worlds import World
from tests.dropbear import Dropbear
from tests.ssh_server import SshServer


@contextmanager
def ssh_world(folder: Path) -> Iterator[World]:
    """OpenSSH."""
    with _world(SshServer(folder / "sshd")) as made:
        yield made


@contextmanager
def ssh_without_sftp_world(folder: Path) -> Iterator[World]:
    """OpenSSH without an sftp server: files go through commands."""
    with _world(SshServer(folder / "sshd", {"Subsystem": ""})) as made:
        yield made


@contextmanager
def dropbear_world(folder: Path) -> Iterator[World]:
    """Dropbear, which has no sftp server of its own."""
    with _world(Dropbear(folder / "dropbear")) as made:
        yield made


@contextmanager
def _world(server: SshServer) -> Iterator[World]:
    server.start()
    try:
        scratch = server.folder.parent / "device"
        scratch.mkdir()
        yield World(server.fields(), PurePosixPath(scratch))
    finally:
        server.stop()
