"""Sensors, gates and the parsers of facts in C, over captured files, against the Python ones."""

from __future__ import annotations

import json
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from agent import android, facts
from agent.clocks import judge_clocks, read_domains
from agent.gates import check_gates, gate_error, settle, shut
from agent.sensors import read_sensors
from agent.watch import Watch
from orchestrator.toolchain import SOURCE_FOLDERS
from sti_runtime.android import own_serial, parse_battery, parse_thermal
from sti_runtime.messages import Gates, Sensors
from tests.android_root import CAPTURED, android_root, captured
from tests.native.sanitized import ENVIRONMENT, build_sanitized
from tests.unit.test_sensors import BIG_LITTLE, JETSON, MOUNTS, PI_4, VM, write
from tests.unit.test_watch import BOARD, CPU, HELD

RUNTIME, AGENT = SOURCE_FOLDERS
BASE = [
    RUNTIME / name for name in ("base.c", "digest.c", "json.c", "json_fields.c", "json_write.c", "threads.c")
]
PHONE = {
    "sys/class/thermal/thermal_zone0/temp": "41200\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-0\n",
    "sys/class/thermal/thermal_zone1/temp": "-2147483648\n",
    "sys/class/thermal/thermal_zone2/temp": "38000\n",
    "sys/class/thermal/thermal_zone10/temp": "0\n",
    "sys/class/thermal/cooling_device0/type": "thermal-cpufreq-0\n",
    "sys/class/thermal/cooling_device0/cur_state": "2\n",
    "sys/class/power_supply/a-mouse/type": "Battery\n",
    "sys/class/power_supply/a-mouse/scope": "Device\n",
    "sys/class/power_supply/a-mouse/capacity": "3\n",
    "sys/class/power_supply/battery/type": "Battery\n",
    "sys/class/power_supply/battery/capacity": "77\n",
    "sys/devices/system/cpu/online": "0-1,4\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "1800000\n",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "2400000\n",
    "sys/devices/system/cpu/cpu4/cpufreq/scaling_cur_freq": "2800000\n",
    "sys/devices/system/cpu/cpufreq/policy4/stats/time_in_state": "500000 7\n2800000 93\n",
    "sys/devices/system/cpu/cpufreq/policy0/stats/time_in_state": "300000 12\nnonsense\n1800000 1000\n",
    "proc/loadavg": "0.52 0.58 0.59 1/389 4\n",
    "proc/meminfo": "MemTotal: 9 kB\nMemAvailable: 4 kB\n",
}


@pytest.fixture(scope="module")
def program() -> str:
    names = (
        "sensors.c",
        "gates.c",
        "clocks.c",
        "kernel_files.c",
        "facts_parse.c",
        "watch.c",
        "android.c",
        "child.c",
    )
    parts = [AGENT / name for name in names]
    program = Path(__file__).with_name("reading_program.c")
    return str(build_sanitized("address,undefined", program, *parts, runtime=BASE))


def said(program: str, *arguments: object, text: str | bytes = "") -> str:
    data = text.encode() if isinstance(text, str) else text
    command = [program, *map(str, arguments)]
    done = subprocess.run(command, input=data, capture_output=True, timeout=120, check=True, env=ENVIRONMENT)
    return done.stdout.decode()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": None},
        {"sys/class/power_supply/battery/capacity": "101"},
        {"sys/class/thermal/cooling_device0/cur_state": "0"},
        {"sys/class/thermal/cooling_device0/type": "fan"},
        {"sys/devices/system/cpu/online": "3-1", "proc/loadavg": "inf", "proc/meminfo": "Mem"},
        {"proc/loadavg": "x", "sys/class/thermal/thermal_zone0/temp": "150001"},
        dict.fromkeys(PHONE),
    ],
)
def test_sensors_are_those_that_python_reads(
    program: str, tmp_path: Path, changes: dict[str, str | None]
) -> None:
    files = {name: text for name, text in (PHONE | changes).items() if text is not None}
    write(tmp_path, files)
    expected = read_sensors(tmp_path, sys=tmp_path / "sys", proc=tmp_path / "proc")
    line = said(program, "sensors", tmp_path, tmp_path).strip()
    found = Sensors.from_json(line.encode(), source="the program")
    assert found.to_json().decode() == line  # canonical
    same: dict[str, Any] = {"wall_ns": 0, "free_bytes": 0}  # taken at two times
    assert found.model_copy(update=same) == expected.model_copy(update=same)
    assert (found.free_bytes is None) == (expected.free_bytes is None)


def test_a_folder_that_is_not_there_has_no_free_bytes(program: str, tmp_path: Path) -> None:
    assert json.loads(said(program, "sensors", tmp_path, tmp_path / "absent"))["free_bytes"] is None


def watched(
    program: str, root: Path, limit: int | None, cpus: tuple[int, ...], moves: Sequence[dict[str, str]]
) -> tuple[list[bool], list[Any]]:
    """What a watch in C says of a sample after each change of the files, and its readings."""
    words = [program, "watch", str(root), "" if limit is None else str(limit), *map(str, cpus)]
    found = []
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        for move in moves:
            write(root, move)
            process.stdin.write("\n")
            process.stdin.flush()
            found.append({"0\n": False, "1\n": True}[process.stdout.readline()])
        process.stdin.close()
        readings = json.loads(process.stdout.read())
    assert process.returncode == 0
    return found, readings


MOVES: list[dict[str, str]] = [{}, *(changes for changes, _ in HELD), {}, BOARD]
ZONES = {f"sys/class/thermal/thermal_zone{n}/temp": str(40_000 + 10 * (n % 7)) for n in range(12)}


@pytest.mark.parametrize("limit", [60_000, None])
@pytest.mark.parametrize("cpus", [(0, 4), (4,), (9,)])
@pytest.mark.parametrize(
    "beginning",
    [
        {},
        ZONES,
        {CPU.format(0, "base_frequency"): "1000000", CPU.format(4, "scaling_governor"): "userspace"},
        {CPU.format(0, "scaling_cur_freq"): "<unknown>", "proc/loadavg": "x"},
        {CPU.format(0, "scaling_max_freq"): "-1", "sys/class/thermal/cooling_device0/cur_state": "1"},
    ],
)
def test_a_watch_says_what_python_s_says(
    program: str, tmp_path: Path, beginning: dict[str, str], cpus: tuple[int, ...], limit: int | None
) -> None:
    ours, theirs = tmp_path / "python", tmp_path / "c"
    for root in (ours, theirs):
        write(root, BOARD | beginning)
    watch = Watch(cpus, limit, sys=ours / "sys", proc=ours / "proc")
    expected = []
    for after, move in enumerate(MOVES, 1):
        write(ours, move)
        expected.append(watch.sampled(after))
    found, readings = watched(program, theirs, limit, cpus, MOVES)
    assert found == expected
    assert readings == [reading.model_dump(mode="json") for reading in watch.readings]


LIMITS = (40_000, 50, 1500, 10**9)


@pytest.mark.parametrize(
    ("readings", "before", "later_ms"),
    [
        ((39_000, 50, 1500, 10**9), None, 0),
        ((39_000, 50, 1500, 10**9), 39_000, 2_000),
        ((39_000, 50, 1500, 10**9), 39_000, 1_999),
        ((40_001, 49, 1501, 10**9 - 1), None, 0),
        ((40_001, 49, 1501, 10**9 - 1), 40_001, 2_000),
        ((None, None, None, None), None, 0),
        ((None, None, None, None), 39_000, 2_000),
        ((39_900, 80, 0, 2**40), 40_500, 2_000),
        ((39_900, 80, 0, 2**40), 40_399, 2_000),
        ((-5_000, 100, 0, 0), 60_000, 2_000),
        ((39_900, 80, 0, 2**40), 39_400, 2_000),
    ],
)
def test_gates_judge_as_python_does(
    program: str, readings: tuple[int | None, ...], before: int | None, later_ms: int
) -> None:
    gates = Gates(
        max_temperature_milli_c=LIMITS[0], min_battery_percent=LIMITS[1], max_load_milli=LIMITS[2],
        min_free_bytes=LIMITS[3], wait_limit_s=3,
    )  # fmt: skip
    now = Sensors(
        wall_ns=1, cpu_khz=(), available_memory_bytes=None, throttled=None, temperature_milli_c=readings[0],
        battery_percent=readings[1], load_milli=readings[2], free_bytes=readings[3],
    )  # fmt: skip
    first = settle(None, now.model_copy(update={"temperature_milli_c": before}), 0)
    expected = check_gates(gates, now, settle(first, now, later_ms * 1_000_000))
    words = ["" if value is None else value for value in (*LIMITS, *readings, before, later_ms)]
    words += ["/", "", "", "", 0]
    verdicts, why = said(program, "gates", *words).split("\n")[:2]
    assert json.loads(verdicts) == [verdict.model_dump() for verdict in expected]
    assert why == (gate_error(expected, 3.4, gates).what if shut(expected) else "")


@pytest.mark.parametrize("cpus", [(0, 4), (4,), (9,)])
@pytest.mark.parametrize(
    ("governor", "low", "high", "changes"),
    [
        ("performance", None, None, {}),
        ("performance", None, None, {CPU.format(4, "scaling_governor"): "schedutil"}),
        ("performance", None, None, {CPU.format(0, "scaling_governor"): ""}),
        ("performance", 1, None, {CPU.format(4, "scaling_max_freq"): "x"}),
        (None, 1_500_000, 2_500_000, {}),
        (None, 3_500_000, None, {}),
        (None, None, 1_000, {CPU.format(0, "scaling_max_freq"): "-1"}),
    ],
)
def test_clocks_judge_as_python_does(
    program: str,
    tmp_path: Path,
    cpus: tuple[int, ...],
    governor: str | None,
    low: int | None,
    high: int | None,
    changes: dict[str, str],
) -> None:
    write(tmp_path, BOARD | changes)
    gates = Gates(
        max_temperature_milli_c=None, min_battery_percent=None, max_load_milli=None, min_free_bytes=None,
        wait_limit_s=3, governor=governor, min_khz=low, max_khz=high,
    )  # fmt: skip
    expected = judge_clocks(gates, read_domains(cpus, tmp_path / "sys"))
    words = ["" if value is None else value for value in (governor, low, high)]
    found = said(program, "gates", *[""] * 4, 1, 1, 1, 1, "", 0, tmp_path, *words, *cpus).split("\n")
    assert json.loads(found[0]) == [expected.model_dump()]


def test_gates_that_are_not_asked_give_no_verdict(program: str) -> None:
    assert said(program, "gates", *[""] * 4, 1, 1, 1, 1, "", 0, "/", "", "", "", 0).strip() == "[]"


@pytest.mark.parametrize("cpuinfo", [PI_4, BIG_LITTLE, JETSON, VM, "CPU part\t: 0xFFF\n", "", "model name\n"])
def test_the_processor_s_name(program: str, cpuinfo: str) -> None:
    assert said(program, "model", text=cpuinfo).strip() == (facts.parse_cpu_model(cpuinfo) or "null")
    clocks = [int(line) for line in said(program, "clocks", text=cpuinfo).split()]
    assert tuple(clocks) == facts.parse_clocks_khz(cpuinfo)


def test_flags_are_found_under_both_names(program: str) -> None:
    assert said(program, "features", text=VM).strip() == "fpu sse4_2 hypervisor avx2 fma"
    assert said(program, "features", text=JETSON).strip() == "fp asimd asimddp"
    assert said(program, "features", text="").strip() == ""


@pytest.mark.parametrize("path", ["/data/local tmp/spool", "/data/x", "/database", "/data", "/"])
@pytest.mark.parametrize("mounts", [MOUNTS, ""])
def test_mounts(program: str, path: str, mounts: str) -> None:
    expected = facts.parse_mount(mounts, path)
    assert said(program, "mount", path, text=mounts).strip() == " ".join(expected or ("null", "null"))


@pytest.mark.parametrize(
    "text", ['NAME=x\nPRETTY_NAME="Debian 12"\n', "NAME=Yocto\nBUILD_ID=7\n", "", "PRETTY_NAME=''\nNAME=a\n"]
)
def test_os_release(program: str, text: str) -> None:
    assert said(program, "os-release", text=text).strip() == (facts.parse_os_release(text) or "null")


def test_what_android_says_of_its_build(program: str) -> None:
    prop = "# begin\nro.build.display.id=AP1A.1\nro.product.x=\nro.build.fingerprint=a/b/c:14/AP1A/1:user\n"
    assert said(program, "build-prop", text=prop).strip() == "a/b/c:14/AP1A/1:user"
    assert said(program, "build-prop", text="ro.build.display.id=AP1A.1\n").strip() == "AP1A.1"
    assert said(program, "build-prop", text="").strip() == "null"


def entry(name: str, value: bytes, length: int | None = None) -> bytes:
    """One property as bionic's property area holds it."""
    serial = (len(value) if length is None else length) << 24
    return struct.pack("<I", serial) + value.ljust(92, b"\0") + name.encode() + b"\0"


@pytest.mark.parametrize(
    ("area", "expected"),
    [
        (bytes(128) + entry("ro.build.fingerprint", b"a/b:14/x:user"), "a/b:14/x:user"),
        (entry("ro.build.fingerprint", b"first"), "first"),
        (bytes(40) + b"ro.build.fingerprint\0" + entry("ro.build.fingerprint", b"later"), "later"),
        (entry("ro.build.fingerprint", b"value", 4), "null"),
        (entry("ro.build.fingerprint", b""), "null"),
        (entry("ro.build.fingerprint", b"x" * 92), "null"),
        (b"ro.build.fingerprint\0", "null"),
        (entry("ro.build.fingerprint", b"cut off")[:-1], "null"),
        (b"", "null"),
    ],
)
def test_a_property_is_found_in_the_shared_area(program: str, area: bytes, expected: str) -> None:
    assert said(program, "property", "ro.build.fingerprint", text=area).strip() == expected


# ------------------------------------------------------------------ Android's services


@pytest.mark.parametrize("name", sorted(path.stem for path in CAPTURED.glob("dumpsys_battery_*.txt")))
def test_a_battery_as_android_tells_it(program: str, name: str) -> None:
    expected = parse_battery(captured(name))
    found = json.loads(said(program, "battery", text=captured(name)))
    values = None if expected is None else (expected.percent, expected.temperature_milli_c)
    assert found == [expected is not None, *(values or (None, None))]


@pytest.mark.parametrize(
    "level", ["128\n  scale: 255", "101\n  scale: 100", "x\n  scale: 100", "1\n  scale: 0"]
)
def test_a_battery_with_odd_values(program: str, level: str) -> None:
    text = f"  present: true\n  level: {level}\n  temperature: -2147483648\n"
    expected = parse_battery(text)
    assert expected is not None
    assert json.loads(said(program, "battery", text=text)) == [True, expected.percent, None]


@pytest.mark.parametrize("name", sorted(path.stem for path in CAPTURED.glob("dumpsys_thermal*.txt")))
def test_temperatures_as_android_tells_them(program: str, name: str) -> None:
    expected = parse_thermal(captured(name))
    found = json.loads(said(program, "thermal", text=captured(name)))
    assert found == [expected.status, *map(list, expected.zones)]


@pytest.mark.parametrize("serial", ["38071FDJH00000", "unknown", "0000", "0123456789ABCDEF", ""])
def test_a_serial_is_one_only_if_it_is_the_device_s_own(program: str, tmp_path: Path, serial: str) -> None:
    android_root(tmp_path / "android", serial=serial)
    assert said(program, "serial", tmp_path).strip() == (own_serial(serial) or "null")


@pytest.mark.parametrize("thermal", ["dumpsys_thermalservice_10", "dumpsys_thermalservice_14_not_ready", ""])
@pytest.mark.parametrize("battery", ["dumpsys_battery_6", ""])
def test_sensors_are_completed_alike(program: str, tmp_path: Path, thermal: str, battery: str) -> None:
    root = android_root(tmp_path / "android", thermal=thermal, battery=battery)
    bare = read_sensors(tmp_path, sys=tmp_path / "sys", proc=tmp_path / "proc")
    found = Sensors.from_json(
        said(program, "complete", tmp_path, tmp_path).strip().encode(), source="sensors"
    )
    expected = android.complete(bare, root)
    for name in ("temperature_milli_c", "throttled", "battery_percent"):
        assert getattr(found, name) == getattr(expected, name)
