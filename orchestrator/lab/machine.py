"""The machine below a virtual device: namespaces, link, disk and limits; the device's services run in it."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.cgroups import CgroupUnavailableError, launch_prefix
from orchestrator.errors import LabError
from orchestrator.lab import disk, init, limits, link, net
from orchestrator.lab.launch import Launch
from orchestrator.lab.means import unshare_argv
from orchestrator.lab.processes import end, with_variable
from orchestrator.lab.state import DeviceState, Lab, LabState
from orchestrator.processes import ProcessId, alive, kill, machine_boot

MARK = "STIFARM_LAB_DEVICE"
"""Environment variable of every process of a device that has no namespaces: ``<lab id>/<name>``."""

FIRST_UID = 60600
"""User ids of devices made by root. Source: systemd, "Users, Groups, UIDs and GIDs": 60578 to 60705 free."""

UIDS = 100
PHONE_DATA = "data"
"""What of a phone's folder is on its disk."""

_SITES = ("/mnt", "/media", "/srv")
_RUN = Path("/run")


@dataclass(frozen=True)
class Service:
    """A program of a device; its first one ending ends the device."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Around:
    """A device's storage is the folder ``inner`` of ``folder``, which takes its place as a whole."""

    folder: Path
    inner: str


# ------------------------------------------------------------------ places


def site(lab: Lab, state: LabState, name: str) -> str:
    """Where a device's storage is, in its view: outside the lab's folder, which its user may not enter."""
    if state.means.isolation == "none":
        return str(data_folder(lab, name))
    for place in map(Path, _SITES):
        needed = (lab.folder.resolve(), Path(sys.prefix).resolve(), Path(__file__).resolve())
        if place.is_dir() and not any(path.is_relative_to(place) for path in needed):
            return str(place / f"lab-{lab.id}" / name)
    raise LabError(f"None of {', '.join(_SITES)} can be covered in a device's view.", "Make an empty /srv.")


def data_folder(lab: Lab, name: str) -> Path:
    """Storage of a device that has no disk of its own."""
    return lab.device_folder(name) / "data"


def image_file(lab: Lab, name: str) -> Path:
    """The disk of a device that has one."""
    return lab.device_folder(name) / "disk.ext4"


def seen_from_here(lab: Lab, state: LabState, device: DeviceState, path: str) -> Path:
    """A path of a running device as this process reaches it. Raises: LabError when the device is off."""
    if state.means.isolation == "none":
        return Path(path)
    root = site(lab, state, device.name)
    if device.kind == "phone" and not path.startswith(root):
        path = root + path  # its own view begins there
    if not state.means.disk and path.startswith(f"{root}/"):
        return data_folder(lab, device.name) / path.removeprefix(f"{root}/")
    return Path(f"/proc/{require_running(device).pid}/root{path}")


def require_running(device: DeviceState) -> ProcessId:
    """The device's first process. Raises: LabError when it does not run."""
    if device.process is None or not alive(device.process):
        raise LabError(f"{device.name} does not run.", "Start it again: stifarm lab up.")
    return device.process


def owner(state: LabState, device: DeviceState) -> int:
    """A device made by root has an unprivileged user: what runs there can change nothing of this machine."""
    return FIRST_UID + device.index % UIDS if state.means.isolation == "root" else os.geteuid()


def log_file(lab: Lab, name: str) -> Path:
    """What a device and the lab say of its life."""
    return lab.device_folder(name) / "log"


def opened(paths: Sequence[Path], scratch: Path) -> list[list[str]]:
    """Steps that let every user of a device reach ``paths``, whatever folders above them forbid: the closed
    folder is covered by an open one that holds these paths only. ``scratch``: an own folder of the device."""
    real = list(dict.fromkeys(path.resolve() for path in paths))
    closed = {top for path in real if (top := _closed_above(path)) is not None}
    steps: list[list[str]] = []
    for top in sorted(closed):
        inside = [path for path in real if path.is_relative_to(top)]
        needed = [
            path for path in inside if not any(path.is_relative_to(one) for one in inside if one != path)
        ]
        kept = {path: str(scratch / f".open-{number}") for number, path in enumerate(needed)}
        for path, aside in kept.items():
            steps += [["mkdir", "-p", aside], ["mount", "--bind", str(path), aside]]
        steps.append(["mount", "-t", "tmpfs", "-o", "mode=755,size=1m", "lab", str(top)])
        for path, aside in kept.items():
            steps += [["mkdir", "-p", str(path)], ["mount", "--move", aside, str(path)]]
    return steps


def _closed_above(path: Path) -> Path | None:
    """The topmost folder above a path that others may not pass."""
    above = [*reversed(path.parents), path]
    return next((each for each in above if not each.stat().st_mode & stat.S_IXOTH), None)


# ------------------------------------------------------------------ on and off


def start(
    lab: Lab,
    state: LabState,
    device: DeviceState,
    services: Sequence[Service],
    *,
    owner: int,
    steps: Sequence[Sequence[str]] = (),
    around: Around | None = None,
) -> DeviceState:
    """Boot a device that is off: a new boot id, its services. ``owner``: user id of its storage; ``steps``:
    commands run in it before its services; ``around``: what its storage is inside of, if not by itself.
    Raises: LabError; then nothing of it runs."""
    device = lab.update(device.name, boot_id=_new_boot(state))
    try:
        return _start(lab, state, device, services, owner, steps, around)
    except BaseException:
        stop(lab, state, lab.device(device.name))
        raise


def _start(
    lab: Lab,
    state: LabState,
    device: DeviceState,
    services: Sequence[Service],
    owner: int,
    steps: Sequence[Sequence[str]],
    around: Around | None,
) -> DeviceState:
    mounts, number = _storage(lab, state, device, owner, around)
    device, prefix = _enter_groups(lab, state, device, number)
    config = lab.device_folder(device.name) / "init.json"
    mark = f"{lab.id}/{device.name}"
    config.write_text(
        json.dumps(
            {
                "hostname": device.name if state.means.isolation != "none" else None,
                "steps": [*mounts, *_identity(lab, state, device), *map(list, steps)],
                "services": [{"argv": each.argv, "env": {MARK: mark, **each.env}} for each in services],
            }
        )
    )
    argv = (
        *prefix,
        *unshare_argv(state.means.isolation, network=state.means.network),
        *(sys.executable, "-I", "-S", str(init.__file__), str(config)),
    )
    with Launch(argv, log_file(lab, device.name), {MARK: mark}) as launch:
        device = lab.update(device.name, process=launch.process)
        launch.expect("here")
        if state.means.network and state.network is not None:
            net.connect(lab.id, state.network, device.index, launch.process)
        launch.tell()
        launch.expect("ready")
    return device


def stop(lab: Lab, state: LabState, device: DeviceState) -> None:
    """Power off: every process of the device is killed; its storage stays. Raises: LabError."""
    mark = f"{lab.id}/{device.name}"
    bare = state.means.isolation == "none"
    end(device.process, also=(lambda: with_variable(MARK, mark)) if bare else list)
    lab.update(device.name, process=None)
    if state.means.network:
        net.disconnect(lab.id, device.index)
    if state.means.disk:
        disk.detach(image_file(lab, device.name))
    if state.means.groups:
        limits.drop_limits(lab.id, device.name)


# ------------------------------------------------------------------ the cable of devices without a network


def start_link(lab: Lab, device: DeviceState) -> DeviceState:
    """Run the relay of a device, on its port if that is free, else on another. Raises: LabError."""
    if alive(device.link):
        return device
    for port in dict.fromkeys((device.port, 0)):
        write_link(lab, device.model_copy(update={"port": port}))
        config = str(_link_file(lab, device.name))
        argv = (sys.executable, "-I", "-S", str(link.__file__), config)
        with Launch(argv, log_file(lab, device.name), {}) as launch:
            device = lab.update(device.name, link=launch.process)
            launch.expect("here")
            launch.tell()
            try:
                device = lab.update(device.name, port=int(launch.expect("ready")))
            except LabError:
                if port == 0:
                    raise
                continue
        break
    return device


def write_link(lab: Lab, device: DeviceState, *, cut: bool = False, bytes_per_s: int | None = None) -> None:
    """Set what a device's relay does; it takes it at once if it runs."""
    config = {"port": device.port, "backend": device.backend_port, "cut": cut, "bytes_per_s": bytes_per_s}
    path = _link_file(lab, device.name)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(config))
    partial.replace(path)
    if device.link is not None:
        kill(device.link, signal.SIGHUP)


def stop_link(lab: Lab, device: DeviceState) -> None:
    """End a device's relay."""
    end(device.link)
    lab.update(device.name, link=None)


def _link_file(lab: Lab, name: str) -> Path:
    return lab.device_folder(name) / "link.json"


# ------------------------------------------------------------------ inner


def _new_boot(state: LabState) -> str:
    return machine_boot() if state.means.isolation == "none" else str(uuid.uuid4())


def _storage(
    lab: Lab, state: LabState, device: DeviceState, owner: int, around: Around | None
) -> tuple[list[list[str]], str | None]:
    """Steps that put a device's storage in its place, and the number of its disk."""
    place = site(lab, state, device.name)
    folder = data_folder(lab, device.name)
    if around is None and not state.means.disk:
        folder.mkdir(exist_ok=True)
        if os.geteuid() == 0:
            os.chown(folder, owner, owner)
    if state.means.isolation == "none":
        return [], None
    steps = [
        ["mount", "-t", "tmpfs", "-o", "mode=755,size=1m", "lab", str(Path(place).parents[1])],
        ["mkdir", "-p", place],
    ]
    if around is not None or not state.means.disk:
        steps.append(["mount", "--bind", str(folder if around is None else around.folder), place])
    if not state.means.disk:
        return steps, None
    image = image_file(lab, device.name)
    disk.make_image(image, state.disk_bytes, owner)
    loop = disk.attach(image)
    target = place if around is None else f"{place}/{around.inner}"
    # Let go at once: from then on the loop device lives as long as the mount, and that as long as the device.
    steps += [["mount", "-o", "nodev,nosuid", loop, target], ["losetup", "-d", loop]]
    return steps, disk.device_number(loop)


def _identity(lab: Lab, state: LabState, device: DeviceState) -> list[list[str]]:
    """Steps that give a board its own boot id and machine id; a phone's system has its own view of both."""
    if state.means.isolation == "none" or device.kind == "phone":
        return []
    folder = lab.device_folder(device.name)
    (folder / "boot_id").write_text(f"{device.boot_id}\n")
    steps = [["mount", "--bind", str(folder / "boot_id"), "/proc/sys/kernel/random/boot_id"]]
    if Path("/etc/machine-id").exists():
        own = folder / "machine-id"
        if not own.exists():
            own.write_text(f"{uuid.uuid4().hex}\n")
        steps.append(["mount", "--bind", str(own), "/etc/machine-id"])
    return steps


def _enter_groups(
    lab: Lab, state: LabState, device: DeviceState, number: str | None
) -> tuple[DeviceState, tuple[str, ...]]:
    """Limit the device by the kernel where it can; else the agent does, and ``notes`` say why."""
    try:
        if not state.means.groups:
            raise CgroupUnavailableError("; ".join(state.means.reasons))
        groups = limits.set_limits(lab.id, device, number)
    except CgroupUnavailableError as error:
        slowed = device.read_bytes_per_s is not None or device.cpu_share_milli is not None
        notes = (f"slowed by the agent, not by the kernel: {error}",) if slowed else ()
        return lab.update(device.name, groups=None, notes=notes), ()
    return lab.update(device.name, groups=groups[0].mechanism, notes=()), launch_prefix(groups)
