"""A device's own disk: an ext4 file system in a file, on a loop device whose reads the kernel can limit."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

from orchestrator.errors import LabError
from orchestrator.lab.means import command

DISK_BYTES = 2 << 30
"""Size of a device's disk; the file takes only what is written."""

_GONE_LIMIT_S = 30.0
_FILL_STEP_BYTES = 64 << 10


def make_image(path: Path, size_bytes: int, owner: int) -> None:
    """Make the file system, unless it is there. Raises: LabError."""
    if path.exists():
        return
    partial = path.with_suffix(".partial")
    with partial.open("wb") as stream:
        stream.truncate(size_bytes)
    command(
        ["mkfs.ext4", "-q", "-F", "-m", "0", "-E", f"root_owner={owner}:{owner}", str(partial)],
        f"no file system can be made in {path}",
    )
    partial.replace(path)


def attach(image: Path) -> str:
    """The loop device of an image, direct where the storage below allows it. Raises: LabError."""
    detach(image)
    what = f"no loop device can be had for {image}"
    base = ["losetup", "--find", "--show"]
    try:
        return command([*base, "--direct-io=on", str(image)], what).decode().strip()
    except LabError:
        detach(image)
    return command([*base, str(image)], what).decode().strip()


def loops(image: Path) -> list[str]:
    """Loop devices that hold an image."""
    text = command(["losetup", "-j", str(image), "-O", "NAME", "-n"], "loop devices cannot be listed")
    return text.decode().split()


def detach(image: Path) -> None:
    """Let the loop devices of an image go and wait until they are: a namespace that ended unmounts a little
    later. Raises: LabError."""
    deadline = time.monotonic() + _GONE_LIMIT_S
    while image.exists() and (held := loops(image)):
        for device in held:
            try:
                command(["losetup", "-d", device], f"{device} cannot be let go")
            except LabError as error:
                if time.monotonic() > deadline:
                    raise
                if "No such device" not in error.what:
                    continue
        if time.monotonic() > deadline:
            raise LabError(f"{', '.join(held)} still holds {image}.", "Unmount it, then try again.")
        time.sleep(0.02)


def device_number(loop: str) -> str:
    """ "major:minor" of a loop device."""
    number = os.stat(loop).st_rdev  # noqa: PTH116 - of the device itself
    return f"{os.major(number)}:{os.minor(number)}"


def fill(folder: Path, name: str) -> Path:
    """Take all space of the file system below ``folder`` with one file; returns it. Raises: LabError."""
    path = folder / name
    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        size, step = 0, max(_FILL_STEP_BYTES, os.fstatvfs(handle).f_bavail * os.fstatvfs(handle).f_frsize)
        while step >= _FILL_STEP_BYTES:
            try:
                os.posix_fallocate(handle, size, step)
                size += step
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise LabError(f"{path} cannot be made: {error.strerror}.") from error
                step //= 2
    finally:
        os.close(handle)
    return path
