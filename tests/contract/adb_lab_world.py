"""The lab's own phones behind a real adb server: worlds of the transport contract."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from orchestrator.lab import phone
from orchestrator.lab.phone import PhoneSpec, RunningPhone
from tests.adb_side import Server
from tests.contract.transport_worlds import World


class PhoneWorld(World):
    """A phone whose processes have numbers of their own."""

    def __init__(self, fields: str, running: RunningPhone) -> None:
        scratch = PurePosixPath(running.workdir) / "contract"
        super().__init__(fields, scratch, Path("/") if running.plain else running.folder)
        self._processes = f"/proc/{running.first.pid}/ns/pid"
        self.seen(scratch).mkdir(exist_ok=True)

    def alive(self, pid: int) -> bool:
        here = self._here(pid)
        return here is not None and super().alive(here)

    def gone(self, pid: int) -> bool:
        return self._here(pid) is None

    def session(self, pid: int) -> int:
        here = self._here(pid)
        if here is None:
            raise FileNotFoundError(pid)
        return int(numbers(here)["NSsid"][-1])

    def kill(self, pid: int) -> None:
        here = self._here(pid)
        if here is None:
            raise ProcessLookupError(pid)
        os.kill(here, 9)

    def _here(self, pid: int) -> int | None:
        """This machine's number of a process of the phone. Source: proc_pid_status(5)."""
        namespace = Path(self._processes).readlink()
        for entry in Path("/proc").iterdir():
            try:
                if not entry.name.isdigit() or numbers(int(entry.name))["NSpid"][-1] != str(pid):
                    continue
                if (entry / "ns/pid").readlink() == namespace:
                    return int(entry.name)
            except OSError:  # it went while being read; a zombie has no namespaces to show
                continue
        return None


def numbers(pid: int) -> dict[str, list[str]]:
    """Fields of a process's status by name."""
    lines = (line.partition(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: value.split() or [""] for name, _, value in lines}


@contextmanager
def modern_world(folder: Path) -> Iterator[World]:
    """A phone of today: exit codes, second file service, compression as far as it is installed."""
    with _phone(folder, PhoneSpec("modern", "CONTRACT-1")) as made:
        yield made


@contextmanager
def old_world(folder: Path) -> Iterator[World]:
    """A phone before Android 7: no exit codes, one output, first file service, checksums."""
    with _phone(folder, PhoneSpec("old", "CONTRACT-2", api=23, features="old")) as made:
        yield made


@contextmanager
def _phone(folder: Path, spec: PhoneSpec) -> Iterator[World]:
    running = phone.start(spec, folder / "phone")
    try:
        server = Server(folder / "server")
        try:
            fields = f'transport: adb, address: "{running.endpoint}", adb_server: "{server.address}"'
            yield PhoneWorld(fields, running)
        finally:
            server.kill()
    finally:
        phone.stop(running.folder)
