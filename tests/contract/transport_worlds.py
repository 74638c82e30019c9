"""The worlds that the transport contract runs in: a device side, and what a test may see of it.

A world is a way to reach a device and the device itself, a real one: a daemon that runs on this machine. To
add one, write a context manager ``make(folder) -> World`` in a module of its own (``folder``: a fresh folder
of this host for keys, logs and the device's files) and name it in ``WORLDS``. Where something that it needs
is missing, it skips with the reason. Commands of the contract use only ``sh`` and what toybox and coreutils
both have.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from itertools import count
from pathlib import Path, PurePosixPath
from typing import cast

WORLDS: Mapping[str, str] = {
    "local": "tests.contract.transport_worlds:local_world",
    "ssh": "tests.contract.ssh_world:ssh_world",
    "ssh-without-sftp": "tests.contract.ssh_world:ssh_without_sftp_world",
    "ssh-dropbear": "tests.contract.ssh_world:dropbear_world",
    "adb-aosp": "tests.contract.adb_world:aosp_world",
    "adb-exec": "tests.contract.adb_world:aosp_exec_world",
    "adb-lab": "tests.contract.adb_lab_world:modern_world",
    "adb-lab-old": "tests.contract.adb_lab_world:old_world",
}
"""Name of the world to ``module:function`` of its maker."""


class World:
    """A device called "under-test" whose processes and files can be looked at from this host.

    ``fields``: what its entry of the inventory says beside its name, in YAML's flow style. ``root``: the
    device's files as this host sees them ("/" where the device shares the host's files); ``scratch``: the
    device's folder for tests, which exists. A device with process numbers of its own overrides ``alive``,
    ``kill`` and ``session``.
    """

    keeps_partial = False
    """Whether an interrupted push leaves its beginning, in a hidden file, to go on from."""

    def __init__(self, fields: str, scratch: PurePosixPath, root: Path = Path("/")) -> None:
        self.inventory_text = f"version: 1\ndevices: [{{name: under-test, {fields}}}]"
        self._scratch, self._root = scratch, root
        self._numbers = count(1)

    def new_folder(self) -> PurePosixPath:
        """A new empty folder on the device."""
        folder = self._scratch / f"test-{next(self._numbers)}"
        self.seen(folder).mkdir(mode=0o777)
        self.seen(folder).chmod(0o777)
        return folder

    def seen(self, path: PurePosixPath | str) -> Path:
        """A file of the device as this host sees it."""
        return self._root / str(path).lstrip("/")

    def alive(self, pid: int) -> bool:
        """Whether a process of the device runs (a zombie does not)."""
        try:
            return stat_fields(pid)[0] != "Z"
        except FileNotFoundError:
            return False

    def gone(self, pid: int) -> bool:
        """Whether nothing is left of a process, not even a zombie."""
        return not Path(f"/proc/{pid}").exists()

    def session(self, pid: int) -> int:
        """The session of a process of the device."""
        return int(stat_fields(pid)[3])

    def kill(self, pid: int) -> None:
        """End a process of the device at once."""
        os.kill(pid, 9)


def stat_fields(pid: int) -> list[str]:
    """Fields of a process from its state on. Source: proc_pid_stat(5)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except ProcessLookupError as error:  # it went while being read
        raise FileNotFoundError(str(error)) from error


def make_world(name: str, folder: Path) -> AbstractContextManager[World]:
    """The world of that name, in a ``with`` block."""
    module, _, function = WORLDS[name].partition(":")
    maker = cast(Callable[[Path], AbstractContextManager[World]], getattr(import_module(module), function))
    return maker(folder)


@contextmanager
def local_world(folder: Path) -> Iterator[World]:
    """This machine."""
    yield World("transport: local", PurePosixPath(folder))
