"""The inventory: which devices there are. YAML in, validated ``Device`` records or line-numbered errors out.

Every problem of the file is reported at once. Quantities carry units ("3MB/s", "200MB").
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from orchestrator.errors import InventoryError, Problem
from orchestrator.prepare import Prepare
from orchestrator.transports import TRANSPORTS
from orchestrator.transports.fake_agent import FakeSpec
from orchestrator.yaml_fields import (
    FieldReader,
    NotYamlError,
    Parse,
    choice,
    composed,
    describe,
    integer,
    keys_of,
    milli,
    quantity,
    share,
    text_of,
    truth,
)
from sti_runtime.errors import InputError
from sti_runtime.messages import CPU_NUMBERS, ENGINES, EngineName, Gates
from sti_runtime.units import parse_bytes, parse_duration_ns, parse_khz, parse_rate

VERSION = 1
CAP_BYTES = 1 << 20
"""Longest inventory: far above any real one."""

DEFAULT_WAIT_LIMIT_S = 60
RESERVED_NAMES = frozenset({"all"})
MECHANISMS = ("auto", "cgroup", "agent", "lab", "lab-cgroup-v1", "lab-cgroup-v2")

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_SERIAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:@()/-]{0,127}")
_ENDPOINT = re.compile(
    r"((?P<user>[A-Za-z_][A-Za-z0-9_.-]*)@)?(?P<host>[A-Za-z0-9][A-Za-z0-9_.-]*|\[[0-9A-Fa-f:.]+\])(:(?P<port>[0-9]{1,5}))?"
)
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")

Mechanism = Literal["auto", "cgroup", "agent", "lab", "lab-cgroup-v1", "lab-cgroup-v2"]
"""Who slows a device. ``lab``: nobody, it is virtual all the same; ``lab-cgroup-*``: who made it (``stifarm
lab up``) had the kernel limit it, and the host sets nothing."""


@dataclass(frozen=True)
class EmulateSpec:
    """How a device is slowed; ``None``: that resource is not. ``cpu_share_milli``: thousandths of one CPU.

    With neither rate the device is virtual (mechanism ``lab``): not slowed, but no real one.
    """

    read_bytes_per_s: int | None
    cpu_share_milli: int | None
    mechanism: Mechanism

    @property
    def limited(self) -> bool:
        """Whether a resource is limited."""
        return self.read_bytes_per_s is not None or self.cpu_share_milli is not None


@dataclass(frozen=True)
class RecoverySpec:
    """What may be done to get a device back. ``reboot``: it may be restarted; ``reboot_command``: by this
    program of its lab host (a switched socket, a USB hub), given as arguments; empty: over its link."""

    reboot: bool = False
    reboot_command: tuple[str, ...] = ()


@dataclass(frozen=True)
class Device:
    """One device of the inventory. ``threads`` ``None``: as many as it may use CPUs.

    ``workdir`` ``None``: the transport's default. ``line``: where the inventory says so. ``address``:
    ``[user@]host[:port]``, to an ssh server or an adb daemon; ``serial``: as adb lists it. ``adb_server``:
    ``host:port`` of the adb server to ask. ``key_file`` and ``known_hosts``: of ssh, absolute; ``None``: the
    user's own. ``machine_lock``: the file, on the device, that is locked while something is timed on a
    machine that other devices share. ``fake``: how one of transport fake behaves.
    """

    name: str
    transport: str
    address: str | None
    serial: str | None
    adb_server: str | None
    key_file: Path | None
    known_hosts: Path | None
    machine_lock: str | None
    host: str
    workdir: str | None
    engine: EngineName
    cpus: tuple[int, ...]
    threads: int | None
    gates: Gates
    prepare: Prepare
    emulate: EmulateSpec | None
    line: int
    labels: Mapping[str, str] = field(hash=False)
    recovery: RecoverySpec = RecoverySpec()
    fake: FakeSpec | None = None

    @property
    def emulated(self) -> bool:
        """Whether figures of this device are those of a slowed machine, or of none."""
        return self.emulate is not None or self.transport == "fake"

    def shared_machine(self, own_lock: Path) -> str | None:
        """The lock file of the machine that it shares with other devices; ``own_lock``: this machine's."""
        return str(own_lock) if self.machine_lock is None and self.transport == "local" else self.machine_lock

    @property
    def native(self) -> bool:
        """Whether its agent is the native executable, which the host brings; else one installed there."""
        return self.engine != "torch" and self.transport != "fake"


@dataclass(frozen=True)
class Inventory:
    """A validated inventory: devices in the order of the file, names distinct."""

    path: Path
    version: int
    devices: tuple[Device, ...]


def load_inventory(path: Path) -> Inventory:
    """Read and validate an inventory file. Raises: InventoryError with every problem and its line;
    InputError when there is none to read."""
    try:
        with path.open("rb") as stream:
            data = stream.read(CAP_BYTES + 1)
    except FileNotFoundError as error:
        raise InputError(
            f"There is no inventory {path}.",
            "Write a first one: stifarm init; or name yours: --inventory FILE.",
        ) from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}.", "Name another: --inventory.") from error
    if len(data) > CAP_BYTES:
        raise InventoryError(path, [Problem(1, f"longer than the {CAP_BYTES} bytes an inventory may have.")])
    return parse_inventory(data, path)


def parse_inventory(data: bytes, path: Path) -> Inventory:
    """Validate the bytes of an inventory; ``path`` is for messages. Raises: InventoryError."""
    try:
        root = composed(data)
    except NotYamlError as error:
        raise InventoryError(path, [error.problem]) from error
    if root is None:
        raise InventoryError(path, [Problem(1, "the file is empty; it needs version and devices.")])
    reader = FieldReader(path.absolute().parent)
    inventory = _inventory(reader, root, path)
    if reader.problems or inventory is None:
        raise InventoryError(path, reader.problems)
    return inventory


def _inventory(reader: FieldReader, root: yaml.Node, path: Path) -> Inventory | None:
    """The whole file."""
    values = reader.fields(root, "the inventory", _INVENTORY)
    if not isinstance(root, yaml.MappingNode):
        return None
    for name in _INVENTORY:
        if name not in keys_of(root):
            reader.wrong(root, f"the inventory lacks {name!r}.")
    devices = values.get("devices")
    if "version" not in values or not isinstance(devices, tuple):
        return None
    return Inventory(path=path, version=VERSION, devices=devices)


def _device(reader: FieldReader, node: yaml.Node) -> Device | None:
    """One entry of ``devices``."""
    before = len(reader.problems)
    values = reader.fields(node, "a device", _DEVICE)
    if not isinstance(node, yaml.MappingNode):
        return None
    for name in ("name", "transport"):
        if name not in keys_of(node):
            reader.wrong(node, f"a device lacks {name!r}.")
    if len(reader.problems) == before:
        _addressing(reader, node, values)
    if len(reader.problems) > before:
        if "name" in values:
            mine = [Problem(one.line, f"{values['name']}: {one.what}") for one in reader.problems[before:]]
            reader.problems[before:] = mine
        return None
    defaults: dict[str, object] = {
        "address": None, "serial": None, "adb_server": None, "key_file": None, "known_hosts": None,
        "machine_lock": None, "host": "local", "workdir": None, "engine": "native",
        "cpus": (), "threads": None, "labels": {}, "gates": _gates({}), "prepare": Prepare(),
        "emulate": None,
    }  # fmt: skip
    return Device(**{**defaults, **values}, line=node.start_mark.line + 1)  # type: ignore[arg-type]


def _addressing(reader: FieldReader, node: yaml.Node, values: Mapping[str, object]) -> None:
    """Fields that belong to a way of reaching devices are there exactly for devices reached so."""
    transport = str(values["transport"])
    kind = TRANSPORTS[transport]
    given = [name for name in kind.one_of if name in values]
    if kind.one_of and len(given) != 1:
        wanted = " or ".join(kind.one_of)
        reader.wrong(node, f"a device over {transport} gives {wanted}{', not both' if given else ''}.")
    workdir = values.get("workdir")
    if isinstance(workdir, str) and transport != "local" and not workdir.startswith("/"):
        reader.wrong(node, f"workdir must be an absolute path on the device, not {workdir!r}.")
    recovery = values.get("recovery")
    if not kind.reboots and isinstance(recovery, RecoverySpec) and recovery.reboot:
        reader.wrong(node, f"recovery: a device over {transport} is not rebooted; take reboot out.")
    for other, fields in ((name, each.fields) for name, each in TRANSPORTS.items()):
        for name in fields:
            if name in values and name not in kind.fields:
                reader.wrong(node, f"{name} is for transport {other}; this device has {transport}.")


# ------------------------------------------------------------------ parsers of single values


def _file(reader: FieldReader, node: yaml.Node, name: str) -> Path | None:
    text = text_of(reader, node, name)
    return None if text is None else reader.folder / Path(text).expanduser()


def _absolute(reader: FieldReader, node: yaml.Node, name: str) -> str | None:
    text = text_of(reader, node, name)
    if text is not None and not text.startswith("/"):
        reader.wrong(node, f"{name} must be an absolute path on the device, not {text!r}.")
        return None
    return text


def _endpoint(reader: FieldReader, node: yaml.Node, name: str) -> str | None:
    text = text_of(reader, node, name)
    if text is None:
        return None
    match = _ENDPOINT.fullmatch(text)
    if match is None or (match["port"] is not None and not 0 < int(match["port"]) < 1 << 16):
        reader.wrong(node, f"{name} must be host:port (or user@host:port for ssh), not {text!r}.")
        return None
    return text


def _serial(reader: FieldReader, node: yaml.Node, name: str) -> str | None:
    text = text_of(reader, node, name)
    if text is not None and _SERIAL.fullmatch(text) is None:
        reader.wrong(
            node, f"{name} {text!r} is no serial that adb could list (stifarm devices discover shows them)."
        )
        return None
    return text


def _name(reader: FieldReader, node: yaml.Node, name: str) -> str | None:
    text = text_of(reader, node, name)
    if text is None:
        return None
    if _NAME.fullmatch(text) is None:
        reader.wrong(
            node, f"{name} {text!r} is not 1 to 64 of a-z, 0-9, '.', '_', '-', a letter or digit first."
        )
        return None
    if text in RESERVED_NAMES:
        reader.wrong(node, f"{name} {text!r} is a selector's word; choose another.")
        return None
    return text


def _cpus(reader: FieldReader, node: yaml.Node, name: str) -> tuple[int, ...] | None:
    if not isinstance(node, yaml.SequenceNode):
        reader.wrong(node, f"{name} must be a list of CPU numbers like [0, 1], not {describe(node)}.")
        return None
    values = [integer(0, CPU_NUMBERS - 1)(reader, item, "a CPU number") for item in node.value]
    numbers = tuple(value for value in values if isinstance(value, int))
    if len(set(numbers)) != len(numbers):
        reader.wrong(node, f"{name} names a CPU twice.")
    return numbers


def _labels(reader: FieldReader, node: yaml.Node, name: str) -> dict[str, str]:
    labels: dict[str, str] = {}
    for key, key_node, value in reader.mapping(node, name):
        text = text_of(reader, value, f"label {key}")
        for word, where in ((key, key_node), (text, value)):
            if word is not None and _LABEL.fullmatch(word) is None:
                reader.wrong(where, f"label {word!r} is not 1 to 64 letters, digits, '.', '_' or '-'.")
        if text is not None:
            labels[key] = text
    return labels


def _gates(values: Mapping[str, object]) -> Gates:
    return Gates.model_validate(
        {
            "max_temperature_milli_c": values.get("max_temperature_c"),
            "min_battery_percent": values.get("min_battery_percent"),
            "max_load_milli": values.get("max_load"),
            "min_free_bytes": values.get("min_free"),
            "wait_limit_s": values.get("wait_limit_s", DEFAULT_WAIT_LIMIT_S),
            **_record(values.get("clocks")),
        }
    )


def _parse_gates(reader: FieldReader, node: yaml.Node, name: str) -> Gates:
    return _gates(reader.fields(node, name, _GATES))


def _parse_clocks(reader: FieldReader, node: yaml.Node, name: str) -> dict[str, object] | None:
    values = reader.fields(node, name, _CLOCKS)
    low, high = values.get("min"), values.get("max")
    if isinstance(low, int) and isinstance(high, int) and low > high:
        reader.wrong(node, f"{name}: min is above max.")
        return None
    return {"governor": values.get("governor"), "min_khz": low, "max_khz": high}


def _record(values: object) -> dict[str, object]:
    return values if isinstance(values, dict) else {}


def _governor(reader: FieldReader, node: yaml.Node, name: str) -> str | None:
    text = text_of(reader, node, name)
    if text is not None and re.fullmatch(r"[a-z][a-z0-9_-]{0,31}", text) is None:
        reader.wrong(node, f"{name} must be the kernel's name of one, as performance, not {text!r}.")
        return None
    return text


def _parse_prepare(reader: FieldReader, node: yaml.Node, name: str) -> Prepare:
    values = reader.fields(node, name, _PREPARE)
    return Prepare(
        stay_awake=values.get("stay_awake") is True,
        governor=str(values["governor"]) if "governor" in values else None,
        shallow_idle="idle" in values,
    )


def _arguments(reader: FieldReader, node: yaml.Node, name: str) -> tuple[str, ...] | None:
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        reader.wrong(
            node, f"{name} must be a list of arguments like [uhubctl, -a, cycle], not {describe(node)}."
        )
        return None
    words = [text_of(reader, item, f"an argument of {name}") for item in node.value]
    return tuple(word for word in words if word is not None)


def _parse_recovery(reader: FieldReader, node: yaml.Node, name: str) -> RecoverySpec:
    values = reader.fields(node, name, _RECOVERY)
    command, reboot = values.get("reboot_command"), values.get("reboot") is True
    if command is not None and not reboot:
        reader.wrong(node, f"{name} has a reboot_command and does not allow it: say reboot: true, too.")
    return RecoverySpec(reboot, command if isinstance(command, tuple) else ())


def _parse_fake(reader: FieldReader, node: yaml.Node, name: str) -> FakeSpec | None:
    before = len(reader.problems)
    values = reader.fields(node, name, _FAKE)
    if len(reader.problems) > before:
        return None
    given = {field: values[name] for name, field in _FAKE_FIELDS.items() if name in values}
    return FakeSpec(**given)  # type: ignore[arg-type]


def _parse_emulate(reader: FieldReader, node: yaml.Node, name: str) -> EmulateSpec | None:
    before = len(reader.problems)
    values = reader.fields(node, name, _EMULATE)
    if len(reader.problems) > before:
        return None
    rate, share = values.get("read_bandwidth"), values.get("cpu_share")
    mechanism = values.get("mechanism", "auto")
    if (rate is None and share is None) != (mechanism == "lab"):
        reader.wrong(
            node,
            f"{name} must limit something: read_bandwidth, cpu_share or both"
            " (mechanism lab, for a virtual device at full speed, nothing).",
        )
        return None
    return EmulateSpec(rate, share, mechanism)  # type: ignore[arg-type]


def _parse_devices(reader: FieldReader, node: yaml.Node, name: str) -> tuple[Device, ...] | None:
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        reader.wrong(node, f"{name} must be a list of at least one device, not {describe(node)}.")
        return None
    devices = [_device(reader, item) for item in node.value]
    lines: dict[str, int] = {}
    for item in node.value:  # of the invalid ones too: all problems are reported at once
        for key, value in item.value if isinstance(item, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value == "name" and isinstance(value.value, str):
                if value.value in lines:
                    first = lines[value.value]
                    reader.wrong(value, f"two devices are called {value.value!r}; the first in line {first}.")
                lines.setdefault(value.value, value.start_mark.line + 1)
    return tuple(device for device in devices if device is not None)


def _parse_version(reader: FieldReader, node: yaml.Node, name: str) -> int | None:
    if not isinstance(node, yaml.ScalarNode) or node.value != str(VERSION):
        reader.wrong(node, f"{name} must be {VERSION}, not {describe(node)}; this stifarm knows no other.")
        return None
    return VERSION


_GATES: Mapping[str, Parse] = {
    "max_temperature_c": milli(-50, 200, " (degrees Celsius)"),
    "min_battery_percent": integer(0, 100),
    "max_load": milli(0, 4096, ""),
    "min_free": quantity(parse_bytes),
    "wait_limit_s": integer(0, 86_400),
    "clocks": _parse_clocks,
}
_CLOCKS: Mapping[str, Parse] = {
    "governor": _governor,
    "min": quantity(parse_khz),
    "max": quantity(parse_khz),
}
_EMULATE: Mapping[str, Parse] = {
    "read_bandwidth": quantity(parse_rate),
    "cpu_share": milli(0.001, 1000, " (1 is one whole CPU)"),
    "mechanism": choice(MECHANISMS),
}
_RECOVERY: Mapping[str, Parse] = {"reboot": truth, "reboot_command": _arguments}
_FAKE: Mapping[str, Parse] = {
    "job": quantity(parse_duration_ns),
    "delay": quantity(parse_duration_ns),
    "link_faults": share,
    "deaths": share,
    "seed": integer(0, 2**31 - 1),
}
_FAKE_FIELDS = {
    "job": "job_ns",
    "delay": "delay_ns",
    "link_faults": "link_faults_ppm",
    "deaths": "deaths_ppm",
    "seed": "seed",
}
_PREPARE: Mapping[str, Parse] = {
    "stay_awake": truth,
    "governor": _governor,
    "idle": choice(("shallow",)),
}
_DEVICE: Mapping[str, Parse] = {
    "name": _name,
    "transport": choice(tuple(TRANSPORTS)),
    "address": _endpoint,
    "serial": _serial,
    "adb_server": _endpoint,
    "key_file": _file,
    "known_hosts": _file,
    "machine_lock": _absolute,
    "host": text_of,
    "workdir": text_of,
    "engine": choice(ENGINES),
    "cpus": _cpus,
    "threads": integer(1, 1024),
    "labels": _labels,
    "gates": _parse_gates,
    "prepare": _parse_prepare,
    "recovery": _parse_recovery,
    "emulate": _parse_emulate,
    "fake": _parse_fake,
}
_INVENTORY: Mapping[str, Parse] = {"version": _parse_version, "devices": _parse_devices}
