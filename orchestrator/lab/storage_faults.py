"""Faults on a device's storage: no space, a damaged chunk, an agent that lies."""

from __future__ import annotations

import os
import random
from pathlib import Path

from orchestrator.errors import LabError
from orchestrator.lab import disk, machine
from orchestrator.lab.state import DeviceState, Lab, LabState

FILLER = ".stifarm-lab-full"
TRUE = ".true"
"""Where the device's real agent lies while another stands in its place."""

LIAR = """\
#!/bin/sh
# Put here by stifarm lab fault: answers for the agent beside it, wrongly.
case "$1" in
version|run) exec "$0.true" "$@" ;;
esac
"$0.true" "$@" | sed -e 's/"memory_bytes":[0-9]*/"memory_bytes":-1/' \\
  -e 's/"state":"[a-z]*"/"state":"intact"/' -e 's/"damaged":[^]]*\\]/"damaged":[]/'
"""
"""It states the true agent's digest, so that it passes for it, and runs jobs; its other answers are lies: a
negative memory, every state ``intact``."""


def fill(lab: Lab, state: LabState, device: DeviceState, seed: int) -> dict[str, str]:
    """Take all free space of the device's disk."""
    folder = _disk_folder(lab, state, device)
    status = os.statvfs(folder)
    if status.f_blocks * status.f_frsize > state.disk_bytes:
        raise LabError(f"{folder} is on no disk of the lab's and is not filled.")
    disk.fill(folder, FILLER)
    return {}


def free(lab: Lab, state: LabState, device: DeviceState, undo: dict[str, str]) -> None:
    """Give the space back."""
    (_disk_folder(lab, state, device) / FILLER).unlink(missing_ok=True)


def _disk_folder(lab: Lab, state: LabState, device: DeviceState) -> Path:
    """Where a running device's own disk is mounted, as this process reaches it."""
    place = machine.site(lab, state, device.name)
    inner = f"/{machine.PHONE_DATA}" if device.kind == "phone" else ""
    return machine.seen_from_here(lab, state, device, f"{place}{inner}")


def corrupt(lab: Lab, state: LabState, device: DeviceState, seed: int) -> dict[str, str]:
    """Flip one byte of a deployed bundle's file. Raises: LabError when nothing is deployed."""
    workdir = machine.seen_from_here(lab, state, device, device.workdir)
    files = sorted(path for path in workdir.glob("bundles/*/*") if path.is_file() and not path.is_symlink())
    chosen = [path for path in files if path.name != "manifest.json" and path.stat().st_size > 0]
    if not chosen:
        raise LabError(f"{device.name} has nothing to corrupt.", "Deploy a bundle to it first.")
    choice = random.Random(seed)
    path = choice.choice(chosen)
    offset = choice.randrange(path.stat().st_size)
    flipped = _flip(path, offset)
    return {"path": str(path.relative_to(workdir)), "offset": str(offset), "byte": str(flipped)}


def mend(lab: Lab, state: LabState, device: DeviceState, undo: dict[str, str]) -> None:
    """Flip the byte back, unless the file has been replaced or removed since."""
    if not undo:
        return
    path = machine.seen_from_here(lab, state, device, device.workdir) / undo["path"]
    offset = int(undo["offset"])
    if path.exists() and _byte(path, offset) == int(undo["byte"]):
        _flip(path, offset)


def replace_agent(lab: Lab, state: LabState, device: DeviceState, seed: int) -> dict[str, str]:
    """Put a liar in the place of the device's agent. Raises: LabError when there is none."""
    folder = machine.seen_from_here(lab, state, device, device.workdir) / "bin"
    agents = sorted(path for path in folder.glob("stifarm-agent-*") if "." not in path.name)
    if not agents:
        raise LabError(f"{device.name} has no agent yet.", "Deploy to it first, or probe it.")
    for path in agents:
        owner = path.stat()
        path.rename(path.with_name(path.name + TRUE))
        path.write_text(LIAR)
        path.chmod(0o755)
        if os.geteuid() == 0:
            os.chown(path, owner.st_uid, owner.st_gid)
    return {}


def put_agent_back(lab: Lab, state: LabState, device: DeviceState, undo: dict[str, str]) -> None:
    """Put the true agents back; one that was pushed meanwhile stays."""
    folder = machine.seen_from_here(lab, state, device, device.workdir) / "bin"
    for true in folder.glob(f"*{TRUE}"):
        standing = true.with_name(true.name.removesuffix(TRUE))
        if not standing.exists() or _is_liar(standing):
            true.rename(standing)
        else:
            true.unlink()


def _is_liar(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(LIAR)) == LIAR.encode()


def _byte(path: Path, offset: int) -> int:
    with path.open("rb") as stream:
        stream.seek(offset)
        data = stream.read(1)
    return data[0] if data else -1


def _flip(path: Path, offset: int) -> int:
    """Invert the lowest bit of a byte in place; returns the byte that is there now."""
    flipped = _byte(path, offset) ^ 1
    handle = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(handle, bytes([flipped]), offset)
        os.fsync(handle)
    finally:
        os.close(handle)
    return flipped
