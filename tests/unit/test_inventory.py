"""The inventory: what is read, and every mistake with its line."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import InventoryError
from orchestrator.inventory import (
    CAP_BYTES,
    Device,
    EmulateSpec,
    RecoverySpec,
    load_inventory,
    parse_inventory,
)
from orchestrator.prepare import Prepare
from orchestrator.transports.fake_agent import FakeSpec
from sti_runtime.errors import InputError

SHIPPED = Path(__file__).resolve().parents[2] / "inventory.yaml"
PATH = Path("inventory.yaml")

HEAD = "version: 1\ndevices:\n"
FULL = """\
version: 1
devices:
  - name: desk.a_1
    transport: ssh
    address: lab@192.0.2.7:2222
    key_file: keys/board
    known_hosts: /lab/known_hosts
    machine_lock: /run/lock/rack-1
    host: lab2
    workdir: /data/farm
    engine: torch
    cpus: [2, 3]
    threads: 4
    labels: {room: "12", soc: sm8550}
    gates: {max_temperature_c: 42.5, min_battery_percent: 30, max_load: 0.5, min_free: 200MB, wait_limit_s: 5}
    prepare: {stay_awake: true, governor: performance, idle: shallow}
    emulate: {read_bandwidth: 4MB/s, cpu_share: 0.25, mechanism: agent}
    recovery: {reboot: true, reboot_command: [uhubctl, -a, cycle]}
  - {name: bare, transport: local}
"""
FAKE = "{name: f, transport: fake, fake: {job: 20s, delay: 2ms, link_faults: 0.001, deaths: 0.25, seed: 7}}"


def problems(text: str) -> list[tuple[int, str]]:
    with pytest.raises(InventoryError) as caught:
        parse_inventory(text.encode(), PATH)
    for problem in caught.value.problems:
        assert f"inventory.yaml:{problem.line}: {problem.what}" in str(caught.value)
    return [(problem.line, problem.what) for problem in caught.value.problems]


def test_every_field_is_read() -> None:
    device = parse_inventory(FULL.encode(), PATH).devices[0]
    assert (device.name, device.transport, device.address) == ("desk.a_1", "ssh", "lab@192.0.2.7:2222")
    assert device.key_file == PATH.absolute().parent / "keys/board"
    assert device.known_hosts == Path("/lab/known_hosts")
    assert device.shared_machine(Path("/this/one")) == "/run/lock/rack-1"
    assert (device.host, device.workdir, device.engine) == ("lab2", "/data/farm", "torch")
    assert (device.cpus, device.threads, device.line) == ((2, 3), 4, 3)
    assert device.labels == {"room": "12", "soc": "sm8550"}
    gates = device.gates
    assert (gates.max_temperature_milli_c, gates.min_battery_percent, gates.max_load_milli) == (
        42_500,
        30,
        500,
    )
    assert (gates.min_free_bytes, gates.wait_limit_s) == (200_000_000, 5)
    assert device.prepare == Prepare(stay_awake=True, governor="performance", shallow_idle=True)
    assert device.emulate == EmulateSpec(4_000_000, 250, "agent")
    assert device.recovery == RecoverySpec(reboot=True, reboot_command=("uhubctl", "-a", "cycle"))
    assert (device.emulated, device.native) == (True, False)


def test_defaults() -> None:
    device = parse_inventory(FULL.encode(), PATH).devices[1]
    assert (device.host, device.workdir, device.engine, device.cpus, device.threads) == (
        "local",
        None,
        "native",
        (),
        None,
    )
    assert device.labels == {}
    assert device.prepare.settings == ()
    assert device.recovery == RecoverySpec()
    assert (device.gates.max_temperature_milli_c, device.gates.min_free_bytes) == (None, None)
    assert (device.emulated, device.native) == (False, True)
    assert device.shared_machine(Path("/this/one")) == "/this/one"


def test_clocks_that_a_device_must_have() -> None:
    text = """
version: 1
devices:
  - name: a
    transport: local
    gates: {clocks: {governor: performance, min: 1.8GHz, max: 2400MHz}}
"""
    gates = parse_inventory(text.encode(), Path("inventory.yaml")).devices[0].gates
    assert (gates.governor, gates.min_khz, gates.max_khz) == ("performance", 1_800_000, 2_400_000)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ("transport: adb", "a device over adb gives serial or address."),
        (
            "transport: adb, serial: X1, address: h:5555",
            "a device over adb gives serial or address, not both.",
        ),
        ("transport: ssh", "a device over ssh gives address."),
        ("transport: local, serial: X1", "serial is for transport adb; this device has local."),
        (
            "transport: ssh, address: h, adb_server: h:1",
            "adb_server is for transport adb; this device has ssh.",
        ),
        ("transport: adb, serial: X1, key_file: k", "key_file is for transport ssh; this device has adb."),
        ("transport: ssh, address: 'h:99999'", "address must be host:port"),
        ("transport: ssh, address: '-oProxyCommand=x'", "address must be host:port"),
        ("transport: adb, serial: '-s x'", "serial '-s x' is no serial"),
        ("transport: local, machine_lock: lock", "machine_lock must be an absolute path"),
        ("transport: local, emulate: {mechanism: lab, cpu_share: 1}", "must limit something"),
        ("transport: local, prepare: {governor: ../x}", "governor must be the kernel's name of one"),
        ("transport: local, recovery: {reboot: true}", "a device over local is not rebooted"),
        ("transport: fake, recovery: {reboot: true}", "a device over fake is not rebooted"),
        (
            "transport: ssh, address: h, recovery: {reboot_command: [x]}",
            "does not allow it: say reboot: true",
        ),
        ("transport: ssh, address: h, recovery: {reboot: true, reboot_command: x y}", "list of arguments"),
        ("transport: local, prepare: {stay_awake: 'true'}", "stay_awake must be true or false, not 'true'."),
        ("transport: local, prepare: {idle: deep}", "idle 'deep' is unknown."),
        ("transport: local, prepare: {awake: true}", "prepare has an unknown key 'awake'."),
    ],
)
def test_a_mistake_in_the_fields_of_a_device(fields: str, what: str) -> None:
    ((line, said),) = problems(HEAD + f"  - {{name: a, {fields}}}\n")
    assert (line, what in said) == (3, True), said


def test_a_virtual_device_at_full_speed_is_emulated_and_not_limited() -> None:
    text = HEAD + "  - {name: a, transport: adb, serial: emulator-5554, emulate: {mechanism: lab}}\n"
    device = parse_inventory(text.encode(), PATH).devices[0]
    assert device.emulated
    assert device.emulate is not None
    assert not device.emulate.limited


def test_the_shipped_inventory() -> None:
    inventory = load_inventory(SHIPPED)
    assert [device.name for device in inventory.devices] == [
        "this-machine",
        "board-slow-io",
        "board-slow-cpu",
    ]
    real, slow_io, slow_cpu = inventory.devices
    assert all(device.transport == "local" for device in inventory.devices)
    assert (real.emulated, slow_io.emulated, slow_cpu.emulated) == (False, True, True)
    assert slow_io.emulate is not None
    assert slow_io.emulate.read_bytes_per_s is not None
    assert slow_cpu.emulate is not None
    assert slow_cpu.emulate.cpu_share_milli is not None


def test_a_device_can_travel_to_a_worker() -> None:
    device = parse_inventory(FULL.encode(), PATH).devices[0]
    assert pickle.loads(pickle.dumps(device)) == device
    assert isinstance(hash(device), int)


def device_with(lines: str) -> str:
    return (
        HEAD + "  - name: a\n    transport: local\n" + "".join(f"    {line}\n" for line in lines.splitlines())
    )


@pytest.mark.parametrize(
    ("lines", "line", "what"),
    [
        ("workdr: /x", 5, "unknown key 'workdr'. Did you mean workdir?"),
        ("zzz: 1", 5, "unknown key 'zzz'. There is: adb_server, address,"),
        ("threads: 2\nthreads: 3", 6, "'threads' twice; the first is in line 5"),
        ("threads: two", 5, "threads must be a number, not 'two'"),
        ("threads: 1.5", 5, "must be a whole number"),
        ("threads: 0", 5, "between 1 and 1024"),
        ('threads: "2"', 5, "threads must be a number"),
        ("threads: 1_0", 5, "threads must be a number"),
        ("threads:", 5, "not nothing"),
        ("threads: [1]", 5, "not a list"),
        ("cpus: 3", 5, "a list of CPU numbers"),
        ("cpus: [1, x]", 5, "a CPU number must be a number"),
        ("cpus: [1, 1]", 5, "names a CPU twice"),
        ("engine: tensorflow", 5, "engine 'tensorflow' is unknown"),
        ("labels: [a]", 5, "labels must be a mapping"),
        ("labels: {room: a b}", 5, "label 'a b' is not"),
        ("labels: {'!x': y}", 5, "label '!x' is not"),
        ("workdir: {a: b}", 5, "workdir must be a text"),
        (r'workdir: "/a\nb"', 5, "workdir must be on one line"),
        (r'workdir: "/a\eb"', 5, "workdir must be on one line"),
        ("gates:\n  max_temperature_c: hot", 6, "must be a number (degrees Celsius)"),
        ("gates:\n  max_temperature_c: .nan", 6, "must be a number"),
        ("gates:\n  min_battery_percent: 101", 6, "between 0 and 100"),
        ("gates:\n  min_free: 200 apples", 6, "min_free: '200 apples' is not a size. Write it like"),
        ("gates:\n  min_fre: 200MB", 6, "Did you mean min_free?"),
        ("gates:\n  clocks: {min: 1800}", 6, "min: '1800' has no unit. Write it like 1800MHz."),
        ("gates:\n  clocks: {min: 2GHz, max: 1.8GHz}", 6, "clocks: min is above max."),
        ("gates:\n  clocks: {governor: Fast!}", 6, "governor must be the kernel's name of one"),
        ("gates:\n  clocks: performance", 6, "clocks must"),
        ("emulate:\n  read_bandwidth: 3MB", 6, "read_bandwidth: '3MB' is not a rate. Write it like 20MB/s."),
        ("emulate:\n  read_bandwidth: 0MB/s", 6, "is a rate of zero"),
        ("emulate:\n  cpu_share: 0", 6, "between 0.001 and 1000 (1 is one whole CPU)"),
        ("emulate:\n  cpu_share: 50%", 6, "must be a number"),
        (
            "emulate:\n  mechanism: magic\n  cpu_share: 0.5",
            6,
            "mechanism 'magic' is unknown. There is: agent,",
        ),
        ("emulate: {mechanism: auto}", 5, "must limit something"),
        ("emulate:", 5, "must be a mapping"),
    ],
)
def test_a_mistake_in_a_device(lines: str, line: int, what: str) -> None:
    found = problems(device_with(lines))
    assert len(found) == 1, found
    assert found[0][0] == line
    assert what in found[0][1]


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("", 1, "the file is empty"),
        ("# only a comment\n", 1, "the file is empty"),
        ("- a\n", 1, "the inventory must be a mapping"),
        ("version: 2\ndevices: [{name: a, transport: local}]", 1, "version must be 1, not '2'"),
        ("devices: [{name: a, transport: local}]", 1, "the inventory lacks 'version'"),
        ("version: 1\n", 1, "the inventory lacks 'devices'"),
        ("version: 1\ndevices: []\n", 2, "a list of at least one device"),
        ("version: 1\ndevices: {a: b}\n", 2, "a list of at least one device"),
        ("version: 1\ndevices: [a]\n", 2, "a device must be a mapping"),
        ("version: 1\nversion: 1\ndevices: [{name: a, transport: local}]", 2, "'version' twice"),
        ("version: 1\ndevice: []\ndevices: [{name: a, transport: local}]", 2, "Did you mean devices?"),
        ("version: 1\ndevices:\n  - transport: local\n", 3, "a device lacks 'name'"),
        ("version: 1\ndevices:\n  - name: a\n", 3, "a device lacks 'transport'"),
        ("version: 1\ndevices: [{name: A b, transport: local}]", 2, "name 'A b' is not"),
        ("version: 1\ndevices: [{name: all, transport: local}]", 2, "name 'all' is a selector's word"),
        (
            "version: 1\ndevices: [{name: a, transport: locall}]",
            2,
            "'locall' is unknown. Did you mean local?",
        ),
        ("version: 1\ndevices: [\n", 3, "not valid YAML"),
        ("version: 1\n\tdevices: 1\n", 2, "not valid YAML"),
        ("a: \x00", 1, "not valid YAML"),
        ("version: 1\n? [x]\n: 1\ndevices: [{name: a, transport: local}]", 2, "must be a word"),
    ],
)
def test_a_mistake_in_the_file(text: str, line: int, what: str) -> None:
    found = problems(text)
    assert found[0][0] == line
    assert what in found[0][1]
    assert len(found) == 1, found


def test_two_devices_of_one_name() -> None:
    text = HEAD + "".join(f"  - {{name: {name}, transport: local}}\n" for name in "aba")
    assert problems(text) == [(5, "two devices are called 'a'; the first in line 3.")]


def test_all_mistakes_are_reported_at_once_in_the_order_of_lines() -> None:
    text = (
        "version: 7\n"
        "devices:\n"
        "  - name: a\n"
        "    transport: pigeon\n"
        "    threads: none\n"
        "  - name: a\n"
        "    transport: local\n"
        "    emulate: {read_bandwidth: fast}\n"
        "extra: 1\n"
    )
    assert [line for line, _ in problems(text)] == [1, 4, 5, 6, 8, 9]


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(InventoryError, match="not valid YAML"):
        parse_inventory(b"version: \xff\xfe\xff", PATH)


def test_a_missing_and_an_overlong_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no inventory"):
        load_inventory(tmp_path / "inventory.yaml")
    (tmp_path / "long.yaml").write_bytes(b"#" * (CAP_BYTES + 1))
    with pytest.raises(InventoryError, match="longer than"):
        load_inventory(tmp_path / "long.yaml")
    with pytest.raises(InputError, match="cannot be read"):
        load_inventory(tmp_path)


def test_an_expansion_bomb_is_refused_quickly() -> None:
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]
    assert len(problems("\n".join(lines))) == 62


def taken_or_reported(data: bytes) -> tuple[Device, ...] | None:
    try:
        return parse_inventory(data, PATH).devices
    except InventoryError as error:
        return None if error.problems else ()


@given(st.text(max_size=200))
def test_any_text_is_an_inventory_or_an_inventory_error(text: str) -> None:
    assert taken_or_reported(text.encode("utf-8", "surrogatepass")) != ()


ANY_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ("name", "transport", "cpus", "labels", "gates", "emulate", "threads", "workdir")


@given(ANY_VALUE, st.sampled_from(FIELDS))
def test_any_value_of_a_field_is_taken_or_reported(value: object, field: str) -> None:
    entry = {"name": "a", "transport": "local", field: value}
    data = json.dumps({"version": 1, "devices": [entry]}).encode()
    assert taken_or_reported(data) != ()


def test_a_fake_device_says_how_it_behaves() -> None:
    device = parse_inventory(f"version: 1\ndevices: [{FAKE}]".encode(), PATH).devices[0]
    assert device.fake == FakeSpec(20 * 10**9, 2 * 10**6, 1000, 250_000, 7)
    assert device.emulated
    wrong = "version: 1\ndevices: [{name: f, transport: local, fake: {deaths: 2}}]"
    assert problems(wrong) == [(2, "f: deaths must lie between 0 and 1, not 2.")]
    assert problems(wrong.replace("2}", "0.5}")) == [
        (2, "f: fake is for transport fake; this device has local.")
    ]
