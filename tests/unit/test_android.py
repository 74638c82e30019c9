"""What Android's programs print becomes values; what is faked, absent or nonsense does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent import android
from agent.facts import zones
from agent.identity import machine_identity
from agent.sensors import read_sensors
from sti_runtime.android import AndroidBattery, own_serial, parse_battery, parse_thermal
from tests.android_root import PIXEL, android_root, captured
from tests.unit.test_sensors import write


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("6", AndroidBattery(57, 29_500, True, "good")),
        ("10", AndroidBattery(18, 46_100, False, "overheated")),
        ("14", AndroidBattery(91, 27_300, True, "good")),
        ("14_stopped", None),
        ("14_without", None),
    ],
)
def test_batteries(name: str, expected: AndroidBattery | None) -> None:
    assert parse_battery(captured(f"dumpsys_battery_{name}")) == expected


@pytest.mark.parametrize(
    ("level", "scale", "percent"),
    [("91", "100", 91), ("128", "255", 50), ("101", "100", None), ("x", "100", None), ("5", "0", None)],
)
def test_a_level_is_a_share_of_its_scale(level: str, scale: str, percent: int | None) -> None:
    found = parse_battery(f"present: true\nlevel: {level}\nscale: {scale}\ntemperature: 0\n")
    assert found is not None
    assert (found.percent, found.temperature_milli_c) == (percent, None)


def test_thermal_services() -> None:
    hot = parse_thermal(captured("dumpsys_thermalservice_10"))
    assert hot.status == 2
    assert dict(hot.zones) == {
        "CPU0": 61_300, "CPU7": 63_700, "battery": 46_100, "skin-therm": 44_600, "npu": None
    }  # fmt: skip
    cool = parse_thermal(captured("dumpsys_thermalservice_14"))
    assert cool.status == 0
    assert ("VIRTUAL-SKIN", 29_512) in cool.zones
    assert ("TPU", None) in cool.zones
    for name in ("14_not_ready", "14_overridden"):
        assert parse_thermal(captured(f"dumpsys_thermalservice_{name}")).status is None
    assert parse_thermal(captured("dumpsys_thermalservice_14_not_ready")).zones == ()


@pytest.mark.parametrize("value", ["", "unknown", "0000000000000000", "0123456789ABCDEF", " \n"])
def test_a_serial_that_others_share_is_none(value: str) -> None:
    assert own_serial(value) is None


def test_a_phone_is_known_by_its_serial(tmp_path: Path) -> None:
    plain = write(tmp_path / "etc", {"machine-id": "a" * 32})
    root = android_root(tmp_path / "phone")
    phone, source = machine_identity(sys=tmp_path, proc=tmp_path, etc=plain, android=root)
    assert source == "android-serial"
    boot = android_root(tmp_path / "boot", serial="unknown", boot_serial="38071FDJH00000")
    assert machine_identity(sys=tmp_path, proc=tmp_path, etc=plain, android=boot)[0] == phone
    nameless = android_root(tmp_path / "nameless", serial="")
    board, source = machine_identity(sys=tmp_path, proc=tmp_path, etc=plain, android=nameless)
    assert (source, board != phone) == ("machine-id", True)
    assert machine_identity(sys=tmp_path, proc=tmp_path, etc=plain, android=tmp_path)[0] == board


def test_sensors_are_completed_by_the_services(tmp_path: Path) -> None:
    bare = read_sensors(tmp_path, sys=tmp_path, proc=tmp_path)
    assert android.complete(bare, tmp_path) == bare
    full = android.complete(bare, android_root(tmp_path / "phone"))
    assert (full.temperature_milli_c, full.throttled, full.battery_percent) == (38_000, False, 91)
    old = android.complete(bare, android_root(tmp_path / "old", battery="dumpsys_battery_6", thermal=""))
    assert (old.temperature_milli_c, old.throttled, old.battery_percent) == (29_500, None, 57)
    silent = android.complete(bare, android_root(tmp_path / "silent", battery="", thermal=""))
    assert silent == bare


def test_zones_of_the_kernel_go_before_those_of_the_service(tmp_path: Path) -> None:
    root = android_root(tmp_path / "phone")
    assert ("BIG", 38_000) in zones(tmp_path, root)
    sys = write(
        tmp_path / "sys",
        {"class/thermal/thermal_zone0/temp": "41200", "class/thermal/thermal_zone0/type": "cpu"},
    )
    assert zones(sys, root) == (("cpu", 41_200),)


def test_a_program_that_hangs_or_fails_says_nothing(tmp_path: Path) -> None:
    root = android_root(tmp_path / "phone")
    assert android.android_property("ro.build.fingerprint", root) == PIXEL
    assert android.android_property("ro.none", root) is None
    (root / "system/bin/getprop").write_text("#!/bin/sh\necho x; exit 1\n")
    assert android.android_property("ro.build.fingerprint", root) is None
    (root / "system/bin/getprop").write_text("not a program")
    assert android.android_property("ro.build.fingerprint", root) is None
