"""Facts of devices from captured output of theirs; tables, script and parsers."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from orchestrator.device_facts.android_facts import (
    ANDROID_FACTS,
    parse_awake,
    parse_properties,
    parse_root,
    parse_stay_awake,
)
from orchestrator.device_facts.linux_facts import (
    LINUX_FACTS,
    meminfo_bytes,
    mount_of,
    parse_cpu,
    parse_epoch_s,
    parse_free_bytes,
    parse_governors,
    parse_limit_bytes,
    parse_line,
    parse_soc,
    parse_write_problem,
)
from orchestrator.device_facts.seen import Seen, look, seen_of
from orchestrator.device_facts.table import (
    OUTPUT_CHARS,
    Fact,
    Value,
    commands_of,
    script_of,
    stable_of,
    values_of,
)
from orchestrator.errors import StableError
from orchestrator.transports.base import Completed
from orchestrator.transports.fake import FakeTransport
from orchestrator.transports.local import LocalTransport
from tests.android_root import CAPTURED, captured

MARK = "stifarm-mark"
GIB = 1 << 30


def answered(facts: tuple[Fact, ...], answers: Mapping[tuple[str, ...], str]) -> dict[str, Value]:
    """The values when the commands print these answers, and the others nothing."""
    output = "".join(
        f"{MARK} {number}\n{answers.get(argv, '')}\n{MARK} end\n"
        for number, argv in enumerate(commands_of(facts))
    )
    return values_of(facts, output, MARK)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "pixel8_api34",
            ("Pixel 8", "Google", "Tensor G3", "14", 34, ("arm64-v8a",), "38071FDJH00000"),
        ),
        (
            "galaxy_s23_api33",
            (
                "SM-S911B",
                "samsung",
                "SM8550",
                "13",
                33,
                ("arm64-v8a", "armeabi-v7a", "armeabi"),
                "RFCW000000X",
            ),
        ),
        (
            "nexus5_api23",
            ("Nexus 5", "LGE", "msm8974", "6.0.1", 23, ("armeabi-v7a", "armeabi"), "0a1b2c3d00000000"),
        ),
    ],
)
def test_phones(name: str, expected: tuple[Value, ...]) -> None:
    text = captured(f"getprop_{name}")
    values = answered(ANDROID_FACTS, {("getprop",): text})
    names = ("model", "manufacturer", "soc", "os", "api_level", "abis", "serial")
    assert tuple(values[key] for key in names) == expected
    assert str(values["build"]).endswith("release-keys")
    assert values["battery_percent"] is None
    crlf = answered(ANDROID_FACTS, {("getprop",): text.replace("\n", "\r\n")})
    assert crlf["model"] == values["model"]  # old adb daemons translate line ends


def test_a_property_s_value_may_have_lines() -> None:
    properties = parse_properties(captured("getprop_galaxy_s23_api33"))
    assert properties["persist.vendor.radio.note"] == "first line\nsecond line"


def test_battery_and_heat_of_a_phone() -> None:
    values = answered(
        ANDROID_FACTS,
        {
            ("dumpsys", "battery"): captured("dumpsys_battery_10"),
            ("dumpsys", "thermalservice"): captured("dumpsys_thermalservice_10"),
        },
    )
    names = ("battery_percent", "battery_milli_c", "battery_health", "plugged", "battery_faked")
    assert tuple(values[key] for key in names) == (18, 46_100, "overheated", False, False)
    assert values["thermal_status"] == 2
    assert not set(stable_of(ANDROID_FACTS, values)) & {*names, "thermal_status", "stay_awake", "clock_s"}


@pytest.mark.parametrize(
    ("text", "expected"), [("0\n", False), ("7\n", True), ("null\n", None), ("", None), ("Error", None)]
)
def test_stay_awake(text: str, expected: bool | None) -> None:
    assert parse_stay_awake(text) is expected


def test_wakefulness_and_root() -> None:
    assert parse_awake(captured("dumpsys_power_awake")) is True
    assert parse_awake(captured("dumpsys_power_dozing")) is False
    assert parse_awake("") is None
    assert parse_root("uid=2000(shell) gid=2000(shell) groups=1004(input)\n") is None
    assert parse_root("uid=2000(shell) gid=2000(shell)\n/system/xbin/su\n") == "su"
    assert parse_root("uid=0(root) gid=0(root)\n/sbin/su\n") == "adbd"


@pytest.mark.parametrize(
    ("name", "free"),
    [
        ("toybox", 51_447_680 * 1024),
        ("coreutils", 23_458_664 * 1024),
        ("long_name", 100_000_000 * 1024),
        ("api23", int(9.5 * GIB)),
    ],
)
def test_free_space(name: str, free: int) -> None:
    assert parse_free_bytes(captured(f"df_{name}")) == free


def test_free_space_that_is_not_said() -> None:
    assert parse_free_bytes("df: /data: Permission denied\n") is None
    assert parse_free_bytes("") is None


def test_boards() -> None:
    assert parse_line(captured("model_pi5")) == "Raspberry Pi 5 Model B Rev 1.0"
    assert parse_soc(captured("compatible_pi5")) == "brcm,bcm2712"
    assert parse_line(captured("model_jetson") + "\n") == (
        "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    )
    assert parse_soc(captured("compatible_jetson") + "\n") == "nvidia,tegra234"
    assert parse_soc("\n") is None
    values = answered(
        LINUX_FACTS, {fact.argv: captured("os_release_jetson") for fact in LINUX_FACTS if fact.name == "os"}
    )
    assert values["os"] == "Ubuntu 22.04.4 LTS"
    assert (values["model"], values["soc"], values["governors"]) == (None, None, ())


@pytest.mark.parametrize(
    ("name", "cpu"),
    [
        ("aarch64_pi5", "Raspberry Pi 5 Model B Rev 1.0"),
        ("armv7_nexus5", "Qualcomm MSM 8974 HAMMERHEAD (Flattened Device Tree)"),
        ("x86_64", "Intel(R) N100"),
    ],
)
def test_cpus(name: str, cpu: str) -> None:
    assert parse_cpu(captured(f"cpuinfo_{name}")) == cpu


def test_memory_swap_and_limits() -> None:
    assert meminfo_bytes(captured("meminfo"), "MemTotal") == 8_249_088 * 1024
    assert meminfo_bytes(captured("meminfo"), "SwapTotal") == 524_272 * 1024
    assert meminfo_bytes(captured("meminfo_without_swap"), "SwapTotal") == 0
    assert meminfo_bytes("", "MemTotal") is None
    assert parse_limit_bytes("max\n") is None
    assert parse_limit_bytes("9223372036854771712\n") is None
    assert parse_limit_bytes("536870912\n") == 512 << 20


def test_governors_and_clock() -> None:
    assert parse_governors(captured("governors_walt")) == ("schedutil", "walt")
    assert parse_governors(captured("governors_fixed")) == ("performance",)
    assert parse_epoch_s("1700000000\n") == 1_700_000_000
    assert parse_epoch_s("+%s") is None


@pytest.mark.parametrize(
    ("path", "filesystem", "option"),
    [
        ("/home/pi/farm", "ext4", "noatime"),
        ("/tmp/farm", "tmpfs", "noexec"),
        ("/media/my disk/farm", "exfat", "nosuid"),
        ("/boot/firmware", "vfat", "ro"),
    ],
)
def test_the_mount_of_a_folder(path: str, filesystem: str, option: str) -> None:
    mount = mount_of(f"{path}\n{captured('mounts_pi5')}")
    assert mount is not None
    assert mount[0] == filesystem
    assert option in mount[1]


def test_a_folder_that_is_not_there_has_no_mount() -> None:
    assert mount_of("") is None
    assert parse_write_problem("mkdir: '/x': Read-only file system\n") == "mkdir: '/x': Read-only file system"
    assert parse_write_problem("writable\n") is None


# ------------------------------------------------------------------ the script


def test_every_command_runs_once_and_a_failing_one_stops_no_other(tmp_path: Path) -> None:
    folder = tmp_path / 'it\'s a "folder"; $(exit)'
    folder.mkdir()
    facts = (
        Fact("a", ("sh", "-c", "echo one; exit 3"), parse_line),
        Fact("b", ("false",), parse_line),
        Fact("c", ("sh", "-c", 'printf %s "$1"', "sh", "{workdir}"), parse_line),
        Fact("d", ("sh", "-c", "echo one; exit 3"), lambda text: text.count("one")),
        Fact("e", ("cat",), lambda text: text.strip() == ""),
        Fact("f", ("no-such-program",), parse_line),
    )
    script = script_of(facts, str(folder), MARK)
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert values_of(facts, done.stdout, MARK) == {
        "a": "one", "b": None, "c": str(folder), "d": 1, "e": True, "f": None
    }  # fmt: skip
    assert len(commands_of(facts)) == 5


def test_what_a_device_says_is_cut() -> None:
    facts = (
        Fact("text", ("a",), lambda text: text),
        Fact("list", ("a",), lambda text: tuple(text.split())),
        Fact("number", ("a",), lambda _: 2**63),
    )
    values = answered(facts, {("a",): "x " * 9000})
    assert len(str(values["text"])) <= 200
    assert len(values["list"] if isinstance(values["list"], tuple) else ()) == 32
    assert values["number"] is None
    assert values_of(facts, f"{MARK} 0\nno end", MARK)["text"] is None
    assert values_of(facts, f"{MARK} {'9' * 5000}\n{MARK} end\n", MARK)["text"] is None


def test_what_is_too_long_was_not_read() -> None:
    long = captured("getprop_pixel8_api34") + "[z]: [" + "z" * OUTPUT_CHARS + "]\n"
    values = answered(ANDROID_FACTS, {("getprop",): long, ("uname", "-m"): "aarch64\n"})
    assert (values["model"], values["machine"]) == (None, "aarch64")


@pytest.mark.parametrize(
    "absurd",
    ["9" * 400, "9" * 5000, "1" + "0" * 308 + "G", "-" + "9" * 400, "9" * 17, "9e999", "²", "0.9." * 99],
)
def test_an_absurd_number_is_none_of_a_device(absurd: str) -> None:
    """In every place where one was captured, and where none belongs."""
    texts = [re.sub(r"[0-9]+", lambda _: absurd, captured(path.stem)) for path in CAPTURED.glob("*.txt")]
    texts.append(f"Filesystem Size Used Free Blksize\n/data 9G 9G {absurd}G 4096\n")
    for text in texts:
        for facts in (ANDROID_FACTS, LINUX_FACTS):
            values = answered(facts, dict.fromkeys(commands_of(facts), text))
            for value in values.values():
                assert not isinstance(value, int) or abs(value) < 2**63
    assert parse_free_bytes(texts[-1]) is None


_HOSTILE = """
import resource
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
from orchestrator.device_facts.android_facts import ANDROID_FACTS, parse_properties
from orchestrator.device_facts.seen import seen_of
from orchestrator.device_facts.table import commands_of

MARK, FOUR_MB = "stifarm-" + "0" * 32, 4 << 20
lines = "[a]: [\\n" * (FOUR_MB // 7)
assert parse_properties(lines) == {}
assert list(parse_properties(lines + "]\\n")) == ["a"]
begun = f"{MARK} android\\n" + f"{MARK} 0\\n" * (FOUR_MB // 43)
assert seen_of(begun, MARK, "/w", 0.0, device="x").values["model"] is None
for at in range(len(commands_of(ANDROID_FACTS))):
    for piece in ("[a]: [\\n", "1 ", "1\\n", "\\t\\n", "mWakefulness=", "/", ": ", "PRETTY_NAME=", "9"):
        text = piece * ((1 << 17) // len(piece))
        seen_of(f"{MARK} android\\n{MARK} {at}\\n{text}\\n{MARK} end\\n", MARK, "/w", 0.0, device="x")
        seen_of(f"{MARK} linux\\n{MARK} {at}\\n{text}\\n{MARK} end\\n", MARK, "/w", 0.0, device="x")
"""


def test_what_a_hostile_device_says_is_read_in_one_pass() -> None:
    """What takes quadratic time takes hours of these sizes: the process is ended before."""
    done = subprocess.run(
        [sys.executable, "-c", _HOSTILE], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr


def test_this_machine_is_looked_at_in_one_round_trip(tmp_path: Path) -> None:
    seen = look(LocalTransport("here"), str(tmp_path / "work"))
    assert (tmp_path / "work").is_dir()
    assert not list((tmp_path / "work").iterdir())
    assert seen.system == "linux"
    assert seen.values["write_problem"] is None
    assert seen.values["machine"]
    assert (seen.number("memory_bytes") or 0) > 0
    assert (seen.number("free_bytes") or 0) > 0
    assert seen.clock_offset_s is not None
    assert abs(seen.clock_offset_s) <= 60
    assert seen.stable()["system"] == "linux"


def test_a_clock_years_off_is_seen() -> None:
    number = commands_of(LINUX_FACTS).index(("date", "+%s"))
    output = f"{MARK} linux\n{MARK} {number}\n1000000\n\n{MARK} end\n"
    assert seen_of(output, MARK, "/w", 1_000_000_000.0, device="x").clock_offset_s == -999_000_000


def test_a_device_without_a_shell_is_an_error(tmp_path: Path) -> None:
    def silent(argv: tuple[str, ...], _env: Mapping[str, str]) -> Completed:
        return Completed(argv, 127, b"Welcome!\n", b"", truncated=False)

    with pytest.raises(StableError, match=r"ran no script of ours; it said 'Welcome!"):
        look(FakeTransport(tmp_path, silent), "/w")


def test_facts_for_people() -> None:
    seen = Seen("linux", "/w", {"os": "Debian", "governors": ("a", "b"), "n": 3, "flag": True}, None)
    assert (seen.text("os"), seen.text("governors"), seen.text("none")) == ("Debian", "a, b", "unknown")
    assert (seen.number("n"), seen.number("flag"), seen.words("os")) == (3, None, ())
