"""What the lab keeps on disk, so that any later process finds everything that belongs to it.

Layout below the lab's folder::

    lab.json           the lab: id, what the machine allows, its network
    lab.lock           held while the lab is brought up or taken down
    key, known_hosts   the host's side of ssh to the boards     inventory.yaml   the devices for stifarm
    adb/               the adb server of the lab: its home, keys and log
    devices/<name>/    one device: device.json (state), lock, log, its files and disk

Everything is written down before it is made (names and addresses follow from the lab's id and the device's
number) or before it goes on (a process waits until its id is in ``device.json``).
"""

from __future__ import annotations

import fcntl
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from orchestrator.errors import LabError, near
from orchestrator.lab.means import Means, readable_path
from orchestrator.processes import ProcessId
from sti_runtime.errors import InputError
from sti_runtime.records import Count, Index, NonNegative, Positive, Record, sha256_hex

FaultKind = Literal["cut", "reboot", "full-disk", "slow", "throttle", "unauthorized", "corrupt", "lie"]
Kind = Literal["board", "phone"]
Name = Annotated[str, Field(pattern=r"^[a-z]+-[0-9]{1,3}$")]
DEFAULT_FOLDER = Path(".stifarm-lab")


class ActiveFault(Record):
    """A fault that was injected and not undone yet. ``undo``: what its end needs."""

    kind: FaultKind
    since_wall_ns: NonNegative
    undo: dict[str, str]


class DeviceState(Record):
    """One virtual device. ``process``: its first; ``link``: the relay that is its cable where it has no
    network of its own. ``address``, ``port``: where it is reached; ``backend_port``: where it listens behind
    its relay. ``workdir``: in its own view. ``groups``: the limits by control groups, ``lab-cgroup-…``, or
    None: the agent slows it, ``notes`` say why. A device with an active ``reboot`` is off for the moment."""

    name: Name
    kind: Kind
    index: Index
    process: ProcessId | None = None
    link: ProcessId | None = None
    address: str
    port: Index
    backend_port: Index = 0
    user: str = ""
    workdir: str
    boot_id: str = ""
    read_bytes_per_s: Positive | None = None
    cpu_share_milli: Count | None = None
    groups: Literal["cgroup-v1", "cgroup-v2"] | None = None
    notes: tuple[str, ...] = ()
    faults: tuple[ActiveFault, ...] = ()

    def without(self, kind: FaultKind) -> tuple[ActiveFault, ...]:
        """Its other active faults."""
        return tuple(fault for fault in self.faults if fault.kind != kind)

    def fault(self, kind: FaultKind) -> ActiveFault | None:
        """The active fault of a kind."""
        return next((fault for fault in self.faults if fault.kind == kind), None)


class AdbServerState(Record):
    """The lab's own adb server, on a loopback port."""

    process: ProcessId | None
    port: Index


class LabState(Record):
    """The lab as a whole. ``network``: the first three numbers of its addresses, where it has links."""

    format: Literal["stifarm-lab"]
    version: Literal[1]
    id: Annotated[str, Field(pattern=r"^[0-9a-f]{6}$")]
    means: Means
    network: str | None
    disk_bytes: Positive
    adb: AdbServerState | None = None


@dataclass(frozen=True)
class Lab:
    """A lab's folder; absolute."""

    folder: Path

    @property
    def id(self) -> str:
        """Of the folder: what the lab's links, groups and marks are named after."""
        return sha256_hex(b"stifarm lab\0" + os.fsencode(self.folder.resolve()))[:6]

    @property
    def option(self) -> str:
        """What a command line needs to mean this lab, a blank before it; empty where it is the usual one."""
        if self.folder == DEFAULT_FOLDER.absolute():
            return ""
        return f" --dir {shlex.quote(readable_path(self.folder))}"

    @property
    def state_file(self) -> Path:
        """What makes a folder a lab's."""
        return self.folder / "lab.json"

    @property
    def inventory(self) -> Path:
        """The inventory that ``up`` writes."""
        return self.folder / "inventory.yaml"

    @property
    def key(self) -> Path:
        """The private key that the boards accept."""
        return self.folder / "key"

    @property
    def known_hosts(self) -> Path:
        """The boards' host keys."""
        return self.folder / "known_hosts"

    @property
    def adb_home(self) -> Path:
        """Home of the lab's adb server."""
        return self.folder / "adb"

    def device_folder(self, name: str) -> Path:
        """Where a device's files are."""
        return self.folder / "devices" / name

    def state(self) -> LabState:
        """Raises: InputError when there is no lab, FormatError when its file is damaged."""
        if not self.state_file.exists():
            raise InputError(
                f"There is no lab in {readable_path(self.folder)}.",
                f"Name its folder by --dir, or bring one up there: stifarm lab up{self.option}.",
            )
        return LabState.read(self.state_file)

    def save(self, state: LabState) -> None:
        """Keep the lab's state."""
        _write(self.state_file, state.to_json())

    def devices(self) -> tuple[DeviceState, ...]:
        """Every device that was begun, boards first."""
        found = [DeviceState.read(path) for path in (self.folder / "devices").glob("*/device.json")]
        return tuple(sorted(found, key=lambda device: (device.kind, device.index)))

    def device(self, name: str) -> DeviceState:
        """Raises: InputError for an unknown name."""
        for device in self.devices():
            if device.name == name:
                return device
        raise InputError(f"The lab has no device {name!r}.", near(name, [d.name for d in self.devices()]))

    def save_device(self, device: DeviceState) -> DeviceState:
        """Keep a device's state and return it."""
        folder = self.device_folder(device.name)
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / "device.json", device.to_json())
        return device

    def update(self, name: str, **changes: object) -> DeviceState:
        """Change fields of a device's state."""
        return self.save_device(self.device(name).model_copy(update=changes))

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the lab while it is brought up or taken down. Raises: LabError when another process does."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with _locked(self.folder / "lab.lock", wait=False):
            yield

    @contextmanager
    def changing_device(self, name: str) -> Iterator[None]:
        """Hold one device while its processes or faults change. Raises: InputError for an unknown name."""
        self.device(name)
        with _locked(self.device_folder(name) / "lock", wait=True):
            yield

    def remove(self) -> None:
        """Remove the lab's folder with all that is in it."""
        shutil.rmtree(self.folder)


@contextmanager
def _locked(path: Path, *, wait: bool) -> Iterator[None]:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise LabError(
                f"Another command is changing the lab in {path.parent}.", "Wait until it is done."
            ) from error
        yield
    finally:
        os.close(handle)


def _write(path: Path, data: bytes) -> None:
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    partial.replace(path)
