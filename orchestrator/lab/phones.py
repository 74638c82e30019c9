"""Virtual phones of the lab: a phone's own system (``userland``) on a machine like a board's."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import sys
import time
from pathlib import Path

from orchestrator.errors import LabError
from orchestrator.lab import adb_server, machine, net
from orchestrator.lab.launch import START_LIMIT_S, log_end
from orchestrator.lab.machine import Around, Service
from orchestrator.lab.state import DeviceState, Lab, LabState
from orchestrator.lab.userland.spec import BOOT_ID_FILE, KEYS, WORKDIR, PhoneSpec, save_spec
from orchestrator.lab.userland.tree import make_tree
from orchestrator.processes import alive

ADB_PORT = 5555
_OWN_BINFMT = (6, 7)
"""First Linux whose user namespaces say themselves what runs foreign executables. Source: its changelog."""

_PACKAGES = Path(__file__).parents[2]
_DATA = ("data/local/tmp", "data/property", "data/misc/adb")


def new_phone(lab: Lab, state: LabState, number: int, index: int) -> DeviceState:
    """The state of a phone that is to be: ``number`` counts phones from 1, ``index`` devices from 0."""
    name = f"phone-{number}"
    own = state.network is not None
    root = machine.data_folder(lab, name) if state.means.isolation == "none" else Path("/")
    return DeviceState(
        name=name,
        kind="phone",
        index=index,
        address=net.device_address(state.network, index) if state.network is not None else "127.0.0.1",
        port=ADB_PORT if own else 0,
        workdir=str(root / WORKDIR / "stifarm"),
    )


def start(lab: Lab, state: LabState, device: DeviceState) -> DeviceState:
    """Boot a phone that is off and wait until its adb daemon listens. Raises: LabError."""
    port = device.port if state.network is not None else adb_server.free_port()
    device = lab.update(device.name, backend_port=port)
    folder, owner = machine.data_folder(lab, device.name), machine.owner(state, device)
    spec = phone_spec(lab, state, device)
    key = adb_server.public_key(lab).read_bytes()
    try:
        folder.mkdir(exist_ok=True)
        make_tree(spec, folder)
        save_spec(spec, port, folder)
        if not state.means.disk and not (folder / KEYS).exists():
            (folder / KEYS).write_bytes(key)
        if os.geteuid() == 0:
            for path in (folder, *(folder / place for place in (*_DATA, "data", "data/local", "sdcard"))):
                os.chown(path, owner, owner)
    except OSError as error:
        raise LabError(f"{device.name}: its folder {folder} cannot be made: {error}.") from error
    place = machine.site(lab, state, device.name)
    device = machine.start(
        lab,
        state,
        device,
        [_service(state, place, owner)],
        owner=owner,
        steps=_steps(lab, state, device, place, owner),
        around=Around(folder, machine.PHONE_DATA),
    )
    _await_daemon(lab, state, device, port)
    device = lab.update(device.name, boot_id=(folder / BOOT_ID_FILE).read_text().strip())
    if state.network is None:
        device = machine.start_link(lab, device)
        machine.write_link(lab, device)
    return device


def phone_spec(lab: Lab, state: LabState, device: DeviceState) -> PhoneSpec:
    """What a phone is: the first is modern; the second runs 64-bit Arm code where this machine can, else it
    is too old for exit codes; then again."""
    address = device.address if state.network is not None else "127.0.0.1"
    serial = f"LAB{lab.id.upper()}{device.index:02d}"
    spec = PhoneSpec(device.name, serial, secure=True, address=address)
    if int(device.name.rpartition("-")[2]) % 2 == 1:
        return spec
    if state.means.isolation != "none" and _runs_aarch64():
        return PhoneSpec(device.name, serial, architecture="aarch64", secure=True, address=address)
    return PhoneSpec(device.name, serial, api=23, features="old", secure=True, address=address)


def accepted_keys(lab: Lab, state: LabState, device: DeviceState) -> Path:
    """The list of keys that a running phone accepts, as this process reaches it."""
    return machine.seen_from_here(lab, state, device, f"{machine.site(lab, state, device.name)}/{KEYS}")


# ------------------------------------------------------------------ inner


def _runs_aarch64() -> bool:
    release = re.match(r"(\d+)\.(\d+)", platform.release())
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    return emulator is not None and release is not None and (int(release[1]), int(release[2])) >= _OWN_BINFMT


def _service(state: LabState, place: str, owner: int) -> Service:
    """The phone's supervisor; of a phone made by root, as an unprivileged user from the beginning."""
    argv: tuple[str, ...] = (sys.executable, "-P", "-m", "orchestrator.lab.userland.supervisor", place)
    if state.means.isolation == "none":
        argv = (*argv, "--plain")
    if state.means.isolation == "root":
        argv = ("setpriv", f"--reuid={owner}", f"--regid={owner}", "--clear-groups", "--", *argv)
    return Service(argv, {"PYTHONPATH": str(_PACKAGES), "HOME": place})


def _steps(lab: Lab, state: LabState, device: DeviceState, place: str, owner: int) -> list[list[str]]:
    """A new disk gets its first folders and the lab's key; Python is made reachable for the phone's user."""
    if state.means.isolation != "root":
        return []
    steps: list[list[str]] = []
    if state.means.disk:
        key, keys = adb_server.public_key(lab), f"{place}/{KEYS}"
        folders = [f"{place}/{name}" for name in _DATA]
        steps += [
            ["mkdir", "-p", *folders],
            ["cp", "-n", str(key), keys],
            ["chown", "-R", f"{owner}:{owner}", f"{place}/data/misc"],
            ["chown", f"{owner}:{owner}", f"{place}/data/local", *folders],
        ]
    return [*steps, *machine.opened((Path(sys.prefix), Path(sys.base_prefix), _PACKAGES), Path(place).parent)]


def _await_daemon(lab: Lab, state: LabState, device: DeviceState, port: int) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    log = machine.log_file(lab, device.name)
    while True:
        try:
            socket.create_connection((device.address, port), timeout=10).close()
            return
        except OSError as error:
            if not alive(device.process) or time.monotonic() > deadline:
                raise LabError(f"{device.name} does not come up.{log_end(log)}", f"See {log}.") from error
        time.sleep(0.05)
