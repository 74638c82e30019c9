"""``devices discover`` and ``doctor`` over a real adb server and a virtual phone that is plugged in."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli import main
from orchestrator.inventory import load_inventory
from orchestrator.lab import phone
from orchestrator.lab.phone import PhoneSpec, RunningPhone
from orchestrator.transports import connect
from tests.adb_side import Server, free_port

EMPTY = "version: 1\ndevices:\n  - {name: desk, transport: local}\n"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    started = Server(tmp_path / "server")
    yield started
    started.kill()


@pytest.fixture
def virt(tmp_path: Path) -> Iterator[RunningPhone]:
    """A phone that asks before it lets a computer in."""
    yield phone.start(PhoneSpec("virt", "SERIAL-virt", secure=True), tmp_path / "virt")
    phone.stop(tmp_path / "virt")


@dataclass(frozen=True)
class Said:
    """How a command ended and what it wrote."""

    code: int
    stdout: str
    stderr: str


class Desk:
    """The command line, in this process, with an inventory and an adb server of the test's own."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.inventory = folder / "inventory.yaml"
        self.inventory.write_text(EMPTY)
        self._capsys = capsys

    def run(self, *words: str) -> Said:
        """A command with its output."""
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(words)
        code, said = ended.value.code, self._capsys.readouterr()
        return Said(code if isinstance(code, int) else 0, said.out, said.err)

    def documents(self, *words: str) -> Any:
        """What a command says with --json."""
        done = self.run(*words, "--json")
        assert done.stdout, done.stderr
        return json.loads(done.stdout)


@pytest.fixture
def desk_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[[int], Desk]]:
    """Makes the desk of the adb server at a port; logging is afterwards as it was."""
    handlers = list(logging.getLogger().handlers)

    def make(port: int) -> Desk:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(port))
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
        return Desk(tmp_path, capsys)

    yield make
    logging.getLogger().handlers[:] = handlers


def wait_for(server: Server, state: str, limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while [one.state for one in server.asked().devices()] != [state]:
        assert time.monotonic() < deadline, server.asked().devices()
        time.sleep(0.05)


def test_a_phone_from_plugging_it_in_to_its_inventory_entry(
    server: Server, virt: RunningPhone, desk_at: Callable[[int], Desk]
) -> None:
    desk = desk_at(server.port)
    serial = f"{virt.address}:{virt.port}"
    server.asked().ask(f"host:connect:{serial}", 60)
    wait_for(server, "unauthorized")
    (one,) = desk.documents("devices", "discover")
    assert (one["serial"], one["state"], one["device"], one["entry"]) == (serial, "unauthorized", None, None)
    assert "Allow USB debugging" in one["remedy"]
    named = about_phones(desk)
    assert [finding["state"] for finding in named] == ["note"]
    assert "not in the inventory: the device has not authorized" in named[0]["text"]

    phone.authorize(virt.folder)
    wait_for(server, "device")
    assert "devices discover" in about_phones(desk)[0]["remedy"]
    (one,) = desk.documents("devices", "discover")
    assert one["model"]
    shown = desk.run("devices", "discover")
    assert shown.stdout.rstrip().endswith(one["entry"].rstrip())
    assert "transport: ssh" in shown.stderr
    desk.inventory.write_text(EMPTY + one["entry"])
    (pasted,) = (each for each in load_inventory(desk.inventory).devices if each.transport == "adb")
    (one,) = desk.documents("devices", "discover")
    assert (one["device"], one["entry"]) == (pasted.name, None)
    assert about_phones(desk) == []

    desk.inventory.write_text(EMPTY + one_with_server(pasted.name, serial, server.address))
    (pasted,) = (each for each in load_inventory(desk.inventory).devices if each.transport == "adb")
    transport = connect(pasted)
    assert transport.run(["echo", "here"], timeout_s=60).stdout == b"here\n"
    transport.close()
    phone.unauthorize(virt.folder)
    wait_for(server, "unauthorized")
    (trouble,) = about_phones(desk)
    assert (trouble["subject"], trouble["state"]) == (pasted.name, "problem")


def one_with_server(name: str, serial: str, server: str) -> str:
    return f'  - {{name: {name}, transport: adb, address: "{serial}", adb_server: "{server}"}}\n'


def about_phones(desk: Desk) -> list[dict[str, str]]:
    """What doctor says that is not about this host."""
    of_host = ("store", "inventory", "compiler", "Ray", "disk", "adb", "ssh agent")
    return [finding for finding in desk.documents("doctor") if finding["subject"] not in of_host]


def test_without_a_phone_it_says_what_to_check(server: Server, desk_at: Callable[[int], Desk]) -> None:
    done = desk_at(server.port).run("devices", "discover")
    assert (done.code, done.stdout) == (0, "")
    for word in ("Developer options", "cable", "udev", "transport: ssh"):
        assert word in done.stderr


def test_doctor_starts_no_server(tmp_path: Path, desk_at: Callable[[int], Desk]) -> None:
    port = free_port()
    desk = desk_at(port)
    desk.inventory.write_text(EMPTY + "  - {name: mine, transport: adb, serial: A1}\n")
    (adb,) = (finding for finding in desk.documents("doctor") if finding["subject"] == "adb")
    assert (adb["state"], adb["text"]) == (
        "ok",
        f"no server at 127.0.0.1:{port}; one is started when a device needs it",
    )
    assert not (tmp_path / "state").exists()
