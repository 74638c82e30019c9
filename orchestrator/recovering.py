"""The steps of the recovery ladder as a lab host takes them; each ends with whether the device answers."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from typing import Literal

import structlog

from orchestrator.errors import DeviceError, LinkError, StableError
from orchestrator.inventory import Device
from orchestrator.tailing import await_boot
from orchestrator.transports.adb import AdbTransport
from orchestrator.transports.base import Transport

ANSWER_S = 20.0
BACK_LIMIT_S = 300.0
"""So long may a reboot take."""

_COMMAND_S = 120.0
_PAUSE_S = 0.5
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_REBOOT = (
    'for by in "" "sudo -n"; do\n'
    "  if command -v systemctl >/dev/null 2>&1; then $by systemctl reboot && exit 0; fi\n"
    "  $by reboot && exit 0\n"
    "done 2>&1\n"
    "exit 1"
)
"""Asked of a board: as this user where polkit permits it, else by sudo without a password."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Stepped:
    """What a step came to. recovered: the device answers; failed: it does not; skipped: it cannot be done."""

    outcome: Literal["recovered", "failed", "skipped"]
    detail: str


def reconnect(transport: Transport) -> Stepped:
    """Give all connections back and ask the device something over new ones; over adb the server connects
    anew, too."""
    transport.close()
    if isinstance(transport, AdbTransport):
        try:
            transport.reconnect()
        except DeviceError as error:
            _log.info("the adb server did not reconnect", device=transport.device, cause=error.what)
    return _answers(transport)


def fresh_server(transport: Transport) -> Stepped:
    """Replace the adb server, if it is one that we started."""
    if not isinstance(transport, AdbTransport):
        return Stepped("skipped", "it is not reached through a server")
    transport.close()
    if not transport.replace_server():
        return Stepped("skipped", "the adb server is not one that stifarm started: it is left alone")
    return _answers(transport, within_s=ANSWER_S)


def reboot(device: Device, transport: Transport, *, limit_s: float = BACK_LIMIT_S) -> Stepped:
    """Restart the device and wait until it is back with another boot id."""
    if not device.recovery.reboot:
        return Stepped("skipped", "its inventory does not allow a reboot")
    before = _boot_id(transport)
    try:
        if device.recovery.reboot_command:
            _run_here(device)
        elif isinstance(transport, AdbTransport):
            transport.reboot()
        elif device.transport == "ssh":
            _ask_to_reboot(transport)
        else:
            return Stepped("skipped", f"a device over {device.transport} is not rebooted")
    except StableError as error:
        return Stepped("failed", error.what.removeprefix(f"{device.name}: "))
    except LinkError as error:
        # The link may go before the answer comes: whether it restarts shows below, if it was there before.
        if before is None:
            return Stepped("failed", error.what.removeprefix(f"{device.name}: "))
    transport.close()
    return _back(transport, before, limit_s)


# ------------------------------------------------------------------ inner


def _answers(transport: Transport, within_s: float = 0.0) -> Stepped:
    deadline = time.monotonic() + within_s
    while True:
        try:
            if transport.run(["sh", "-c", "echo here"], timeout_s=ANSWER_S).ok:
                return Stepped("recovered", "it answers")
            problem = "its shell runs no command"
        except DeviceError as error:
            problem = error.what.removeprefix(f"{transport.device}: ")
        if time.monotonic() > deadline:
            return Stepped("failed", problem)
        time.sleep(_PAUSE_S)


def _boot_id(transport: Transport) -> str | None:
    """Which boot the device is in; None when it does not answer."""
    try:
        said = transport.run(["cat", _BOOT_ID], timeout_s=ANSWER_S)
    except DeviceError:
        return None
    return said.stdout.decode(errors="replace").strip() if said.ok else None


def _back(transport: Transport, before: str | None, limit_s: float) -> Stepped:
    """Wait for another boot; where it is not known which it was, for any answer."""
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        now = _boot_id(transport)
        if now is not None and now != before:
            try:
                await_boot(transport)
            except DeviceError as error:
                _log.info("gone again while it boots", device=transport.device, cause=error.what)
                continue
            return Stepped("recovered", "it has rebooted")
        time.sleep(_PAUSE_S)
    return Stepped("failed", f"it was not back within {limit_s:.0f} s")


def _ask_to_reboot(transport: Transport) -> None:
    """Raises: StableError when no way is permitted; LinkError when it is gone before it answers."""
    said = transport.run(["sh", "-c", _REBOOT], timeout_s=ANSWER_S)
    if not said.ok:
        raise StableError(
            f"its user may not reboot it: {said.error_text(200) or said.exit_code}.",
            "Permit systemctl reboot to it (polkit or sudo), or name a reboot_command in the inventory.",
            device=transport.device,
        )


def _run_here(device: Device) -> None:
    """Run the inventory's command on this host. Raises: StableError."""
    argv = device.recovery.reboot_command
    remedy = "Correct reboot_command in the inventory."
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=_COMMAND_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        what = (
            f"not done within {_COMMAND_S:.0f} s" if isinstance(error, subprocess.TimeoutExpired) else error
        )
        raise StableError(
            f"its reboot_command {argv[0]} failed: {what}.", remedy, device=device.name
        ) from error
    if done.returncode != 0:
        raise StableError(
            f"its reboot_command {argv[0]} ended with {done.returncode}.", remedy, device=device.name
        )
