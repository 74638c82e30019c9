"""The system calls behind a phone's own view of the machine. Each raises OSError with what it tried.

Source: unshare(2), mount(2), pivot_root(2), user_namespaces(7), pid_namespaces(7), prctl(2);
Documentation/admin-guide/binfmt-misc.rst.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER, CLONE_NEWPID = 0x00020000, 0x10000000, 0x20000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT = 1, 2, 4, 8, 32
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
_MNT_DETACH = 2
_PR_SET_PDEATHSIG = 1
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41}

_libc = ctypes.CDLL(None, use_errno=True)

_AARCH64_HEADER = (
    rb"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
    rb":\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
)
"""The first bytes of a 64-bit Arm executable, and which of their bits count."""


def _check(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)


def unshare(flags: int) -> None:
    """Leave the namespaces of ``flags`` for new ones."""
    _check(_libc.unshare(flags), "unshare")


def become(user: int, group: int) -> None:
    """In a new user namespace: be known there under these ids, and nobody else is."""
    outer_user, outer_group = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {outer_user} 1"),
        ("gid_map", f"{group} {outer_group} 1"),
    ):
        Path(f"/proc/self/{name}").write_text(text)


def mount(source: str | Path, target: str | Path, kind: str = "", flags: int = 0, options: str = "") -> None:
    """Mount, or change a mount."""
    result = _libc.mount(
        os.fsencode(source), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), options.encode()
    )
    _check(result, f"mount on {target}")


def bind(source: str | Path, target: str | Path) -> None:
    """Show a file, or a folder with all that is mounted below it, at a second place."""
    mount(source, target, flags=MS_BIND | MS_REC)


def make_read_only(target: Path) -> None:
    """Let nobody write through one mount; its other flags stay, for they may be locked."""
    kept = os.statvfs(target).f_flag & (MS_NOSUID | MS_NODEV | MS_NOEXEC | os.ST_NOATIME | os.ST_NODIRATIME)
    mount("none", target, flags=MS_REMOUNT | MS_BIND | MS_RDONLY | kept)


def change_root(root: Path) -> None:
    """Make a mounted folder the root; the old one is gone for this namespace."""
    os.chdir(root)
    number = _PIVOT_ROOT[platform.machine()]
    _check(_libc.syscall(ctypes.c_long(number), b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount of the old root")
    os.chdir("/")


def die_with_parent() -> None:
    """Be killed when the process that started this one ends."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def run_aarch64_with(emulator: str, binfmt: Path) -> None:
    """Have this user namespace run 64-bit Arm executables; ``binfmt``: a folder to mount its list on."""
    mount("binfmt_misc", binfmt, "binfmt_misc")
    # F: the emulator is opened now, so that it is found whatever root the executable sees.
    rule = b":stifarm-aarch64:M::" + _AARCH64_HEADER + b":" + os.fsencode(emulator) + b":F"
    (binfmt / "register").write_bytes(rule)
