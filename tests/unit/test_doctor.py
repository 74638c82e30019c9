"""Doctor's findings, from what was gathered: each state of a device has its text and its remedy."""

# ruff: noqa: E501 - a table of states, one a line
from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.cli.devices import emulated
from orchestrator.device_facts.android_facts import ANDROID_FACTS
from orchestrator.device_facts.seen import Seen, System
from orchestrator.device_facts.table import Value
from orchestrator.doctor import Examined, Finding, findings_of, same_hardware
from orchestrator.errors import AgentError, StableError
from orchestrator.host_checks import host_findings
from orchestrator.inventory import Device, parse_inventory
from sti_runtime.device_facts import DeviceFacts, StorageFacts, ThermalZone
from sti_runtime.errors import StifarmError
from sti_runtime.messages import Gates

GOOD: dict[str, Value] = {
    "model": "Pixel 8", "manufacturer": "Google", "soc": "Tensor G3", "os": "14", "api_level": 34,
    "machine": "aarch64", "write_problem": None, "noexec": False, "read_only": False, "free_bytes": 50 << 30,
    "governors": ("performance",), "battery_percent": 90, "battery_health": "good", "plugged": True,
    "battery_faked": False, "thermal_status": 0, "stay_awake": True, "awake": True,
}  # fmt: skip
DEVICE = parse_inventory(
    b"version: 1\ndevices: [{name: dut, transport: local}]", Path("inventory.yaml")
).devices[0]
STORAGE = StorageFacts(
    path="/w", filesystem="f2fs", block_device="dm-5", rotational=False, total_bytes=100, free_bytes=50,
    direct_io="works",
)  # fmt: skip
FACTS = DeviceFacts(
    format="stifarm-facts", version=1, identity="a" * 16, identity_source="android-serial", emulated_spool=False,
    boot_id="b", wall_ns=0, agent="agent 1", agent_digest="c" * 64, protocol=1, engines=("native", "native-int8"),
    cpu_model="Cortex-X3", architecture="aarch64", cpus=(0, 1), cpu_features=(), current_khz=(), min_khz=(),
    max_khz=(), governors=(), memory_bytes=None, storage=STORAGE, os_build=None, kernel="Linux", libc=None,
    python=None, torch=None, gpus=(), thermal_zones=(ThermalZone(name="cpu", temperature_milli_c=30_000),),
    battery=True, virtual_machine=None, notes=(),
)  # fmt: skip


def examined(
    *,
    system: System = "android",
    clock_offset_s: int | None = 0,
    facts: DeviceFacts | None = FACTS,
    error: StifarmError | None = None,
    device: Device = DEVICE,
    **changes: Value,
) -> Examined:
    """A phone with nothing wrong, but for the changes."""
    return Examined(device, Seen(system, "/w", GOOD | changes, clock_offset_s), facts, error)


def worries(one: Examined) -> list[Finding]:
    return [finding for finding in findings_of(one) if finding.state != "ok"]


def test_a_good_phone_has_no_findings_but_good_ones() -> None:
    assert worries(examined()) == []
    texts = [finding.text for finding in findings_of(examined())]
    assert texts == [
        "reached: Google Pixel 8 Tensor G3, Android 14 (API 34)",
        "agent agent 1 runs: Cortex-X3, 2 CPUs",
    ]


@pytest.mark.parametrize(
    ("emulate", "said"),
    [
        ("{mechanism: lab}", "emulated (not slowed)"),
        ("{read_bandwidth: 3MB/s, cpu_share: 0.5}", "emulated (reads 3 MB/s, CPU 50 %)"),
    ],
)
def test_an_emulated_device_says_so_wherever_it_is_shown(emulate: str, said: str) -> None:
    text = f"version: 1\ndevices: [{{name: dut, transport: local, emulate: {emulate}}}]"
    device = parse_inventory(text.encode(), Path("inventory.yaml")).devices[0]
    assert findings_of(examined(device=device))[0].text.endswith(f", {said}")
    assert f"emulated ({emulated(device)})" == said
    assert emulated(DEVICE) == "no"


def test_a_device_that_is_not_reached_is_one_finding() -> None:
    error = StableError("it is unauthorized.", "Unlock it and allow this computer.", device="dut")
    found = findings_of(Examined(DEVICE, None, None, error))
    assert found == [Finding("dut", "problem", "it is unauthorized.", "Unlock it and allow this computer.")]


def test_an_agent_that_does_not_run_is_found_beside_what_was_seen() -> None:
    error = AgentError("its agent does not run.", "See why.", device="dut")
    found = worries(examined(facts=None, error=error, free_bytes=1 << 20))
    assert [finding.state for finding in found] == ["problem", "problem"]
    assert found[0].text == "its agent does not run."


@pytest.mark.parametrize(
    ("changes", "state", "text", "remedy"),
    [
        ({"write_problem": "Permission denied"}, "problem", "nothing can be written to /w: Permission", "workdir"),
        ({"write_problem": "x", "read_only": True}, "problem", "mounted read-only", "workdir"),
        ({"noexec": True}, "problem", "/w is mounted noexec", "exec"),
        ({"free_bytes": 1 << 20}, "problem", "1.05 MB free", "Free some space"),
        ({"free_bytes": 500 << 20}, "note", "524 MB free", "Free some space"),
        ({"clock_offset_s": -10 * 365 * 86_400}, "problem", "3650 days behind", "Date & time"),
        ({"clock_offset_s": 7 * 365 * 86_400, "system": "linux"}, "problem", "2555 days ahead of", "timedatectl"),
        ({"clock_offset_s": 600}, "note", "10 minutes ahead of", "Date & time"),
        ({"governors": ("schedutil",)}, "note", "clocks follow the load (governor schedutil)", "performance"),
        ({"battery_percent": 12, "plugged": False}, "note", "battery at 12 %, not plugged in", "Charge"),
        ({"battery_health": "overheated"}, "note", "its battery says of itself: overheated", "cool"),
        ({"battery_faked": True}, "note", "held at what somebody set", "dumpsys battery reset"),
        ({"thermal_status": 3}, "note", "throttled by heat now (severe)", "cool"),
        ({"stay_awake": False, "awake": False}, "note", "asleep while measuring; its screen is off", "Stay awake"),
        ({"facts": FACTS.model_copy(update={"engines": ()})}, "problem", "its agent has no native engine (it has: none).", "engine"),
        (
            {"facts": FACTS.model_copy(update={"storage": STORAGE.model_copy(update={"direct_io": "refused"})})},
            "note", "direct IO below /w (f2fs): refused", "ext4",
        ),
        ({"facts": FACTS.model_copy(update={"notes": ("virtual machine: so",)})}, "note", "virtual machine: so", ""),
    ],
)  # fmt: skip
def test_one_thing_wrong_is_one_finding(changes: dict[str, Any], state: str, text: str, remedy: str) -> None:
    found = worries(examined(**changes))
    assert [finding.state for finding in found] == [state], found
    assert text in found[0].text
    assert remedy in found[0].remedy


def test_noexec_does_not_matter_to_an_agent_in_python() -> None:
    torch = replace(DEVICE, engine="torch")
    facts = FACTS.model_copy(update={"engines": ("torch",)})
    assert worries(examined(device=torch, facts=facts, noexec=True)) == []
    assert "Install PyTorch" in worries(examined(device=torch))[0].remedy


def test_a_gate_without_a_sensor_is_told_only_where_it_is_asked() -> None:
    blind = FACTS.model_copy(update={"thermal_zones": (), "battery": False})
    assert worries(examined(facts=blind)) == []
    gates = Gates(
        max_temperature_milli_c=40_000, min_battery_percent=30, max_load_milli=None, min_free_bytes=None,
        wait_limit_s=1,
    )  # fmt: skip
    found = worries(examined(facts=blind, device=replace(DEVICE, gates=gates)))
    assert len(found) == 2
    assert all("ungated" in finding.text for finding in found)
    assert worries(examined(device=replace(DEVICE, gates=gates))) == []


def test_two_names_of_one_device_are_found() -> None:
    twin = replace(DEVICE, name="twin", line=9)
    other = FACTS.model_copy(update={"identity": "b" * 16})
    found = same_hardware([examined(), examined(device=twin), examined(device=twin, facts=other)])
    assert [finding.subject for finding in found] == ["dut = twin"]
    assert "lines 2 (dut) and 9 (twin)" in found[0].text
    assert (
        same_hardware([examined(), examined(device=twin, facts=other), Examined(twin, None, None, None)])
        == []
    )


def test_this_host_can_build_and_says_what_of_adb_and_ssh_is_there(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    nowhere = {"ANDROID_ADB_SERVER_PORT": port}
    found = {finding.subject: finding for finding in host_findings(tmp_path, [DEVICE], nowhere)}
    assert set(found) == {"compiler", "Ray", "disk"}
    assert (found["compiler"].state, found["Ray"].state) == ("ok", "ok")
    phone, board = replace(DEVICE, transport="adb"), replace(DEVICE, transport="ssh")
    stale = {**nowhere, "SSH_AUTH_SOCK": str(tmp_path / "gone")}
    found = {finding.subject: finding for finding in host_findings(tmp_path, [phone, board], stale)}
    assert found["ssh agent"].state == "note"
    found = {finding.subject: finding for finding in host_findings(tmp_path, [phone, board], nowhere)}
    assert "one is started" in found["adb"].text
    assert "none" in found["ssh agent"].text


def test_every_fact_that_doctor_looks_at_is_read() -> None:
    assert set(GOOD) <= {fact.name for fact in ANDROID_FACTS}
