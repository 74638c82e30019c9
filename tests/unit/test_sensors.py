"""Sensors and facts, from captured kernel files; what cannot be read is None, never a guess."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent import facts
from agent.identity import emulated_id, machine_identity, mark_emulated
from agent.sensors import battery_percent, has_battery, parse_cpu_list, parse_load_milli, read_sensors
from agent.spool import Spool
from sti_runtime.device_facts import DeviceFacts
from sti_runtime.errors import InputError

PI_4 = "".join(
    f"processor\t: {n}\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd evtstrm crc32 cpuid\n"
    "CPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: 0xd08\n\n"
    for n in range(4)
)
BIG_LITTLE = "".join(
    f"processor\t: {n}\nCPU part\t: {p}\n\n" for n, p in enumerate(["0xd05"] * 4 + ["0xd0b"] * 4)
)
JETSON = (
    "processor\t: 0\nmodel name\t: ARMv8 Processor rev 1\nFeatures\t: fp asimd asimddp\nCPU part\t: 0xd42\n"
)
VM = "model name\t: AMD EPYC\ncpu MHz\t\t: 2596.152\nflags\t\t: fpu sse4_2 hypervisor avx2 fma\n"
MOUNTS = """\
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
30 27 0:27 / /data rw - f2fs /dev/block/dm-5 rw
31 30 0:28 / /data/local\\040tmp rw - tmpfs tmpfs rw
broken line
"""


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_phone_s_sensors(tmp_path: Path) -> None:
    sys = write(
        tmp_path / "sys",
        {
            "class/thermal/thermal_zone0/temp": "41200\n",
            "class/thermal/thermal_zone0/type": "cpu-0\n",
            "class/thermal/thermal_zone1/temp": "-2147483648\n",
            "class/thermal/thermal_zone2/temp": "38000\n",
            "class/thermal/cooling_device0/type": "thermal-cpufreq-0\n",
            "class/thermal/cooling_device0/cur_state": "2\n",
            "class/power_supply/mouse/type": "Battery\n",
            "class/power_supply/mouse/scope": "Device\n",
            "class/power_supply/mouse/capacity": "3\n",
            "class/power_supply/battery/type": "Battery\n",
            "class/power_supply/battery/capacity": "77\n",
            "devices/system/cpu/online": "0-1\n",
            "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1800000\n",
            "devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "2400000\n",
        },
    )
    proc = write(
        tmp_path / "proc",
        {"loadavg": "0.52 0.58 0.59 1/389 4\n", "meminfo": "MemTotal: 9 kB\nMemAvailable: 4 kB\n"},
    )
    found = read_sensors(tmp_path, sys=sys, proc=proc)
    assert (found.temperature_milli_c, found.cpu_khz, found.load_milli) == (41200, (1800000, 2400000), 520)
    assert (found.available_memory_bytes, found.battery_percent, found.throttled) == (4096, 77, True)
    assert found.free_bytes is not None


def test_nothing_readable_is_none_throughout(tmp_path: Path) -> None:
    found = read_sensors(tmp_path / "absent", sys=tmp_path, proc=tmp_path)
    assert (found.temperature_milli_c, found.cpu_khz, found.load_milli) == (None, (), None)
    assert (found.available_memory_bytes, found.free_bytes, found.battery_percent) == (None, None, None)
    assert found.throttled is None


def test_a_clock_that_one_cpu_hides_is_not_reported_for_the_others(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"devices/system/cpu/online": "0-1", "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1800000"},
    )
    assert read_sensors(tmp_path, sys=tmp_path, proc=tmp_path).cpu_khz == ()


def test_a_battery_that_cannot_be_read_is_there_but_unknown(tmp_path: Path) -> None:
    write(tmp_path, {"class/power_supply/BAT0/type": "Battery", "class/power_supply/BAT0/capacity": "101"})
    assert (has_battery(tmp_path), battery_percent(tmp_path)) == (True, None)


def test_parsers_of_single_lines() -> None:
    assert parse_cpu_list("0-3,6") == (0, 1, 2, 3, 6)
    assert [parse_cpu_list(text) for text in ("", "a", "3-1", "0-4096", "-1")] == [()] * 5
    assert [parse_load_milli(text) for text in ("", "x", "inf")] == [None] * 3


@pytest.mark.parametrize(
    ("cpuinfo", "model"),
    [
        (PI_4, "4× Cortex-A72"),
        (BIG_LITTLE, "4× Cortex-A55 + 4× Cortex-A76"),
        (JETSON, "1× Cortex-A78AE"),
        (VM, "AMD EPYC"),
        ("CPU part\t: 0xfff\n", "1× part 0xfff"),
        ("", None),
    ],
)
def test_cpu_model(cpuinfo: str, model: str | None) -> None:
    assert facts.parse_cpu_model(cpuinfo) == model


def test_features_clocks_and_virtual_machine() -> None:
    assert facts.parse_cpu_features(VM) == ("sse4_2", "avx2", "fma")
    assert facts.parse_cpu_features(JETSON) == ("asimd", "asimddp")
    assert facts.parse_clocks_khz(VM) == (2596152,)
    assert facts.parse_virtual(VM, [])
    assert facts.parse_virtual(JETSON, ["QEMU"])
    assert not facts.parse_virtual(PI_4, ["", ""])


def test_mounts_and_os_release() -> None:
    assert facts.parse_mount(MOUNTS, "/data/local tmp/spool") == ("tmpfs", "tmpfs")
    assert facts.parse_mount(MOUNTS, "/data/x") == ("f2fs", "/dev/block/dm-5")
    assert facts.parse_mount(MOUNTS, "/database") == ("ext4", "/dev/vda")
    assert facts.parse_mount("", "/") is None
    assert facts.parse_os_release('NAME=x\nPRETTY_NAME="Debian 12"\n') == "Debian 12"
    assert facts.parse_os_release("NAME=Yocto\nBUILD_ID=7\n") == "Yocto (7)"
    assert facts.parse_os_release("") is None


def test_identity_prefers_the_board_and_hides_the_raw_value(tmp_path: Path) -> None:
    etc = write(tmp_path / "etc", {"machine-id": "3d1219c7c4c5404aaa1f6d2a48adfda4\n"})
    proc = write(tmp_path / "proc", {"device-tree/serial-number": "10000000abcdef01\0"})
    board, source = machine_identity(sys=tmp_path, proc=proc, etc=etc)
    assert source == "device-tree-serial"
    other, source = machine_identity(sys=tmp_path, proc=tmp_path, etc=etc)
    assert source == "machine-id"
    assert board != other
    assert len(board) == 16
    assert "abcdef01" not in board
    with pytest.raises(InputError, match="machine-id"):
        machine_identity(sys=tmp_path, proc=tmp_path, etc=tmp_path)


def test_two_emulated_devices_of_one_machine_differ_and_a_real_one_has_no_mark(tmp_path: Path) -> None:
    spools = [Spool.open(tmp_path / name) for name in ("a", "b", "real")]
    mark_emulated(spools[0])
    mark_emulated(spools[1])
    mark = emulated_id(spools[0])
    mark_emulated(spools[0])
    assert emulated_id(spools[0]) == mark
    assert mark != emulated_id(spools[1])
    assert emulated_id(spools[2]) is None
    spools[1].device_id.write_text("../../../etc")
    with pytest.raises(InputError, match="not a device id"):
        emulated_id(spools[1])


def test_facts_of_this_machine_are_complete_and_valid(tmp_path: Path) -> None:
    spool = Spool.open(tmp_path / "spool")
    found = facts.read_facts(spool)
    assert DeviceFacts.from_json(found.to_json(), source="facts") == found
    assert found.cpus
    assert found.memory_bytes is not None
    assert found.storage.total_bytes > 0
    assert found.architecture == os.uname().machine
    assert not [path for path in spool.root.iterdir() if path.name.startswith(".")]
