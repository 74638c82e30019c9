"""The stores of a fleet under faults: what can go wrong with each, and copies of it to damage on purpose."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil
import pytest
from sqlalchemy import create_engine, text

from db.backup import backup
from db.session import parse_url, sqlite_url, upgrade
from tests.chaos_fleet.faults import POSTGRESQL, SQLITE, Fault, Kind
from tests.contract.postgres_server import (
    UNAVAILABLE,
    Server,
    restartable_server,
    server_binaries,
    unprivileged_user,
)

DISK_BYTES = 256_000_000
START_LIMIT_S = 120.0


class Database(Protocol):
    """A store that can be struck."""

    @property
    def url(self) -> str:
        """The store's."""

    @property
    def kinds(self) -> Mapping[str, Kind]:
        """The faults that it can have."""

    def strike(self, fault: Fault) -> None:
        """One fault, from its beginning to its end."""

    def copy(self) -> str:
        """URL of a copy, made while nobody uses the store."""


@dataclass(frozen=True)
class Postgres:
    """A PostgreSQL server of its own."""

    server: Server

    @property
    def url(self) -> str:
        """The store's."""
        return self.server.template.format(database="farm")

    @property
    def kinds(self) -> Mapping[str, Kind]:
        """Killed, stopped, frozen, or one process of it killed, upon which it restarts itself."""
        return POSTGRESQL

    def strike(self, fault: Fault) -> None:
        """One fault, from its beginning to its end."""
        first = psutil.Process(int((self.server.data / "postmaster.pid").read_text().splitlines()[0]))
        if fault.kind == "backend-kill":
            random.Random(fault.seed).choice(first.children()).kill()
        elif fault.kind == "database-freeze":
            frozen = [first, *first.children()]
            _signal(frozen, signal.SIGSTOP)
            try:
                time.sleep(fault.duration_s)
            finally:
                _signal(frozen, signal.SIGCONT)
        else:
            if fault.kind == "database-kill":
                first.kill()
            else:
                self.server.stop()
            time.sleep(fault.duration_s)
            self._start()

    def copy(self) -> str:
        """URL of a copy, made while nobody uses the store."""
        self._administer("CREATE DATABASE damaged TEMPLATE farm")
        return self.server.template.format(database="damaged")

    def prepare(self) -> None:
        """Make the store."""
        self._administer("CREATE DATABASE farm")
        upgrade(self.url)

    def _administer(self, statement: str) -> None:
        engine = create_engine(
            parse_url(self.server.template.format(database="postgres")), isolation_level="AUTOCOMMIT"
        )
        with engine.connect() as connection:
            connection.execute(text(statement))
        engine.dispose()

    def _start(self) -> None:
        """Start it again; what the killed one left of shared memory is in use for a moment."""
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            try:
                self.server.start()
                return
            except RuntimeError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)


@dataclass(frozen=True)
class Sqlite:
    """A file; ``disk``: on a disk of its own, which can be filled."""

    folder: Path
    disk: bool

    @property
    def url(self) -> str:
        """The store's."""
        return sqlite_url(self.folder / "store.sqlite")

    @property
    def kinds(self) -> Mapping[str, Kind]:
        """Locked by somebody else; its disk full."""
        return SQLITE if self.disk else {"database-lock": SQLITE["database-lock"]}

    def strike(self, fault: Fault) -> None:
        """One fault, from its beginning to its end."""
        if fault.kind == "disk-full":
            with _filled(self.folder / "ballast"):
                time.sleep(fault.duration_s)
        else:
            engine = create_engine(parse_url(self.url), connect_args={"timeout": START_LIMIT_S})
            with engine.connect() as connection:
                connection.exec_driver_sql("BEGIN IMMEDIATE")
                time.sleep(fault.duration_s)
            engine.dispose()

    def copy(self) -> str:
        """URL of a copy, made while nobody uses the store."""
        path = self.folder.parent / "damaged.sqlite"
        backup(self.url, path)
        return sqlite_url(path)


def _signal(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


@contextmanager
def _filled(ballast: Path) -> Iterator[None]:
    """The disk of a file without a byte to spare for the length of the block."""
    try:
        with ballast.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
            while stream.write(bytes(1 << 16)):
                pass
        yield
    finally:
        ballast.unlink()


@contextmanager
def postgres(_root: Path) -> Iterator[Database]:
    """A PostgreSQL server for the length of the block; skips where none is installed."""
    binaries, user = server_binaries(), unprivileged_user()
    if binaries is None or user is None:
        pytest.skip(UNAVAILABLE)
    with restartable_server(binaries, user) as server:
        database = Postgres(server)
        database.prepare()
        yield database


@contextmanager
def sqlite(root: Path) -> Iterator[Database]:
    """A SQLite store for the length of the block; as root on a small disk of its own, in memory."""
    folder = root / "store"
    folder.mkdir()
    disk = os.geteuid() == 0 and _mounted(folder)
    try:
        database = Sqlite(folder, disk)
        upgrade(database.url)
        yield database
    finally:
        if disk:
            shutil.copyfile(folder / "store.sqlite", root / "store.sqlite")  # to be looked at afterwards
            subprocess.run(("umount", "--lazy", folder), check=True)


def _mounted(folder: Path) -> bool:
    argv = ("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", folder)
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


STORES: Mapping[str, Callable[[Path], contextlib.AbstractContextManager[Database]]] = {
    "postgresql": postgres,
    "sqlite": sqlite,
}
