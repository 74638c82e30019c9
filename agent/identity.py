"""Who this device is: hardware identity, boot, and the agent's own version and digest."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Literal

from agent.android import ROOT, android_serial, is_android
from agent.sensors import PROC, SYS, read_text
from agent.spool import Spool, write_atomic
from sti_runtime.errors import InputError

AGENT_NAME = "stifarm-agent-torch"
_SALT = b"stifarm device identity v1\0"
_ETC = Path("/etc")
IdentitySource = Literal["android-serial", "device-tree-serial", "machine-id", "mac-address"]


def machine_identity(
    *, sys: Path = SYS, proc: Path = PROC, etc: Path = _ETC, android: Path = ROOT
) -> tuple[str, IdentitySource]:
    """16 hex digits of a salted hash of the first there is: serial of an Android device, board serial,
    machine id, MAC address.

    The raw value never leaves the device. All read the same with and without root.
    Raises: InputError if the device has none of them.
    Source: machine-id(5), "a cryptographic, keyed hash function" for application-specific ids.
    """
    phone = android_serial(android) if is_android(android) else None
    if phone is not None:
        return _hashed(phone), "android-serial"
    serial = (read_text(proc / "device-tree/serial-number") or "").strip("\0 \n")
    if serial.strip("0"):
        return _hashed(serial), "device-tree-serial"
    machine_id = read_text(etc / "machine-id") or ""
    if len(machine_id) == 32:
        return _hashed(machine_id), "machine-id"
    for card in sorted(sys.glob("class/net/*")):
        address = read_text(card / "address") or ""
        if (card / "device").exists() and address.replace(":", "").strip("0"):
            return _hashed(address), "mac-address"
    raise InputError(
        "This device has no identity that an unprivileged user can read: no board serial, no "
        "/etc/machine-id, no network card.",
        "Create /etc/machine-id (systemd-machine-id-setup or dbus-uuidgen).",
    )


def _hashed(raw: str) -> str:
    return hashlib.sha256(_SALT + raw.encode()).hexdigest()[:16]


def mark_emulated(spool: Spool) -> None:
    """Mark the spool as an emulated device's, so that several on one machine have identities of their own.

    The id is derived from the spool's path, so a device cleaned and set up again stays the same device.
    """
    if not spool.device_id.exists():
        digest = hashlib.sha256(_SALT + str(spool.root.resolve()).encode()).hexdigest()
        write_atomic(spool.device_id, digest[:12].encode())


def emulated_id(spool: Spool) -> str | None:
    """The mark in the spool; None for a real device. Raises: InputError if it is damaged."""
    if not spool.device_id.exists():
        return None
    text = read_text(spool.device_id) or ""
    if len(text) != 12 or not set(text) <= set("0123456789abcdef"):
        raise InputError(
            f"{spool.device_id}: not a device id of ours.", "Remove the file and probe the device again."
        )
    return text


def device_identity(spool: Spool) -> tuple[str, IdentitySource]:
    """``<machine>`` for a real device, ``<machine>/<emulated id>`` for an emulated one."""
    machine, source = machine_identity()
    mark = emulated_id(spool)
    return (machine if mark is None else f"{machine}/{mark}"), source


def boot_id(proc: Path = PROC) -> str:
    """The kernel's id of this boot. Raises: InputError where the kernel does not tell."""
    text = read_text(proc / "sys/kernel/random/boot_id")
    if not text:
        raise InputError("/proc/sys/kernel/random/boot_id cannot be read.", "Mount /proc for this user.")
    return text[:64]


@cache
def agent_digest() -> str:
    """SHA-256 over the agent's source: for each file its path, a zero byte, its SHA-256, a newline."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    files = [path for package in ("agent", "sti_runtime") for path in (root / package).rglob("*.py")]
    for path in sorted(files, key=lambda p: p.relative_to(root).as_posix()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(root).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


@cache
def agent_version() -> str:
    """Name and version, as in ``stifarm-agent-torch 0.1.0``."""
    from importlib import metadata

    try:
        return f"{AGENT_NAME} {metadata.version('stifarm')}"
    except metadata.PackageNotFoundError:
        return f"{AGENT_NAME} {agent_digest()[:12]}"
