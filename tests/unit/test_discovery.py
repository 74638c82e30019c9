"""What an adb server lists, matched with an inventory, and the entries for what it lacks."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from orchestrator.discovery import Found, entries_for, how_to_end, matched, servers_of
from orchestrator.inventory import Device, parse_inventory
from orchestrator.transports.adb_server import parse_devices
from orchestrator.transports.adb_socket import ServerAddress

USUAL = ServerAddress("127.0.0.1", 6000)
LAB = ServerAddress("127.0.0.1", 6001)
ENVIRONMENT = {"ANDROID_ADB_SERVER_PORT": "6000"}
LISTED = """\
0A111FDD device usb:1-1 product:panther model:Pixel_7 device:panther transport_id:1
0B222FDD device usb:1-2 product:panther model:Pixel_7 device:panther transport_id:2
R58M12 unauthorized usb:1-3 transport_id:3
???????????? no permissions (missing udev rules?); see [https://example.org]
192.168.1.5:5555 device product:x model:SM_G991B device:x transport_id:4
emulator-5554 device product:sdk model:sdk_gphone64 device:emu transport_id:5
"""


def inventory(*devices: str) -> tuple[Device, ...]:
    text = "version: 1\ndevices:\n" + "".join(f"  - {{{device}}}\n" for device in devices)
    return parse_inventory(text.encode(), Path("inventory.yaml")).devices


KNOWN = inventory(
    "name: mine, transport: adb, serial: 0A111FDD",
    "name: tablet, transport: adb, address: 192.168.1.5",
    'name: other, transport: adb, serial: 0B222FDD, adb_server: "127.0.0.1:6001"',
    "name: pixel-7, transport: local",
)


def found(devices: tuple[Device, ...] = KNOWN) -> list[Found]:
    return matched(USUAL, parse_devices(LISTED), devices, ENVIRONMENT)


def test_devices_are_known_by_serial_or_address_at_their_server() -> None:
    assert [one.name for one in found()] == ["mine", None, None, None, "tablet", None]
    assert servers_of(KNOWN, ENVIRONMENT) == (USUAL, LAB)
    assert servers_of((), ENVIRONMENT) == (USUAL,)


def test_what_cannot_be_used_says_why_and_what_to_do() -> None:
    mine, _, unauthorized, closed, *_ = found()
    assert (mine.what, mine.remedy) == ("", "")
    assert "not authorized" in unauthorized.what
    assert "Allow USB debugging" in unauthorized.remedy
    assert "USB port" in closed.what
    assert "udev" in closed.remedy


def test_entries_are_an_inventory_as_they_stand() -> None:
    entries = entries_for(found(()), ["pixel-7"], USUAL)
    pasted = parse_inventory(("version: 1\ndevices:\n" + "\n".join(entries.values())).encode(), Path("i"))
    assert [device.name for device in pasted.devices] == [
        "pixel-7-2",
        "pixel-7-3",
        "sm-g991b",
        "sdk-gphone64",
    ]
    assert [device.serial for device in pasted.devices] == ["0A111FDD", "0B222FDD", None, "emulator-5554"]
    assert pasted.devices[2].address == "192.168.1.5:5555"
    assert {device.labels["kind"] for device in pasted.devices} == {"phone"}
    assert [device.emulated for device in pasted.devices] == [False, False, False, True]
    assert all(device.gates.max_temperature_milli_c == 40_000 for device in pasted.devices)
    assert matched(USUAL, parse_devices(LISTED), pasted.devices, ENVIRONMENT)[0].name == "pixel-7-2"


def test_only_what_is_new_and_ready_gets_an_entry_with_its_server() -> None:
    entries = entries_for(matched(LAB, parse_devices(LISTED), KNOWN, ENVIRONMENT), (), USUAL)
    assert [one.serial for one in entries] == ["0A111FDD", "192.168.1.5:5555", "emulator-5554"]
    assert all('adb_server: "127.0.0.1:6001"' in entry for entry in entries.values())


def test_how_to_end_a_server_can_be_typed_without_an_adb_on_the_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("ADBUTILS_ADB_PATH", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    *_, program, option, port, verb = shlex.split(how_to_end(USUAL))
    assert (option, port, verb) == ("-P", "6000", "kill-server")
    assert os.access(program, os.X_OK)
    assert Path(program).is_absolute()
    adb = tmp_path / "adb"
    adb.write_text("")
    adb.chmod(0o755)
    assert how_to_end(USUAL).endswith(": adb -P 6000 kill-server")
    assert how_to_end(ServerAddress("127.0.0.1", 5037)).endswith(": adb kill-server")
