"""What this machine lets the lab use, found by trying: namespaces, links, disks, control groups.

What is missing has its reason, which ``stifarm lab status`` shows and refused faults repeat.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orchestrator.cgroups import (
    CgroupUnavailableError,
    apply_limits,
    cpu_limits,
    remove_groups,
    system_hierarchies,
)
from orchestrator.errors import LabError
from sti_runtime.records import Record

Isolation = Literal["root", "user", "none"]
"""Who may make a device's namespaces: root; any user, inside a user namespace; nobody."""

LIMIT_S = 60

SEPARATE = ("--mount", "--pid", "--fork", "--uts", "--ipc", "--kill-child", "--mount-proc")
"""Namespaces of every isolated device. With its first process the kernel kills all of its processes."""


class Means(Record):
    """What works here. ``network``: links of the lab's own. ``shaping``: a rate on such a link. ``disk``:
    file systems of the lab's own. ``groups``: limits by control groups. ``reasons``: why others do not."""

    isolation: Isolation
    network: bool
    shaping: bool
    disk: bool
    groups: bool
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class _Trial:
    what: str
    argv: Sequence[str]


_VETH = ("link", "add", "trial0", "type", "veth", "peer", "name", "trial1")
_TBF = ("qdisc", "add", "dev", "lo", "root", "tbf", "rate", "1mbit", "burst", "32k", "latency", "100ms")


def find_means(lab_id: str) -> Means:
    """Try what root, else a user, may do. Raises: LabError when unshare or sshd are missing."""
    tool("unshare")
    reasons: list[str] = []
    if os.geteuid() != 0:
        why = "only root has links, disks and control groups for devices"
        probe = _Trial("namespaces of a user", (*unshare_argv("user"), "true"))
        return _means("user" if _works(probe, reasons) else "none", (False,) * 4, [why, *reasons])
    if not _works(_Trial("namespaces", (*unshare_argv("root"), "true")), reasons):
        return _means("none", (False,) * 4, reasons)
    network = _works(_Trial("network", ("unshare", "--net", "ip", *_VETH)), reasons)
    shaping = network and _works(_Trial("slow links", ("unshare", "--net", "tc", *_TBF)), reasons)
    disk = _works(_Trial("disks", ("losetup", "--find")), reasons) and _works(
        _Trial("disks", ("mkfs.ext4", "-V")), reasons
    )
    return _means("root", (network, shaping, disk, _groups(lab_id, reasons)), reasons)


def unshare_argv(isolation: Isolation, *, network: bool = False) -> tuple[str, ...]:
    """argv that, before a command's own, makes it the first process of new namespaces."""
    if isolation == "none":
        return ()
    own = ("--user", "--map-root-user") if isolation == "user" else ()
    return ("unshare", *own, *SEPARATE, *(("--net",) if network else ()), "--")


def tool(name: str) -> str:
    """The path of a program of the system. Raises: LabError naming the package that has it."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin:/usr/local/sbin")
    if found is None:
        package = _PACKAGES.get(name, name)
        raise LabError(
            f"The lab needs {name}, which is not installed.", f"Install the system's package {package}."
        )
    return found


def command(argv: Sequence[str], what: str) -> bytes:
    """Output of a command of the system. Raises: LabError saying ``what`` failed, and why."""
    try:
        done = subprocess.run(
            [tool(argv[0]), *argv[1:]], capture_output=True, stdin=subprocess.DEVNULL, timeout=LIMIT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LabError(f"{what}: {error}") from error
    if done.returncode != 0:
        text = done.stderr.decode(errors="replace").strip() or f"{argv[0]} ended with {done.returncode}"
        raise LabError(f"{what}: {text}.")
    return done.stdout


_PACKAGES = {
    "sshd": "openssh-server",
    "ssh-keygen": "openssh-client",
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "losetup": "util-linux (mount)",
    "mkfs.ext4": "e2fsprogs",
    "ip": "iproute2",
    "tc": "iproute2",
}


def _means(isolation: Isolation, has: tuple[bool, ...], reasons: Sequence[str]) -> Means:
    network, shaping, disk, groups = has
    return Means(
        isolation=isolation,
        network=network,
        shaping=shaping,
        disk=disk,
        groups=groups,
        reasons=tuple(reasons),
    )


def _works(trial: _Trial, reasons: list[str]) -> bool:
    try:
        command(trial.argv, trial.what)
    except LabError as error:
        reasons.append(error.what.rstrip("."))
        return False
    return True


def _groups(lab_id: str, reasons: list[str]) -> bool:
    hierarchies, name = system_hierarchies(), f"lab-{lab_id}-trial"
    try:
        apply_limits([cpu_limits(hierarchies, name, 500)])
        remove_groups(hierarchies, name)
    except CgroupUnavailableError as error:
        reasons.append(f"control groups: {error}")
        return False
    return True


def readable_path(path: Path) -> str:
    """A path for messages: relative to the working folder where it lies below it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
