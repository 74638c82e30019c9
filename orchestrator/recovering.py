"""The steps of the recovery ladder as a lab host takes them; each ends with whether the device answers."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass
from typing import Literal

import structlog

from orchestrator.errors import DeviceError, StableError, TransientError
from orchestrator.inventory import Device
from orchestrator.tailing import await_boot
from orchestrator.transports import TRANSPORTS
from orchestrator.transports.base import Transport

ANSWER_S = 20.0
BACK_LIMIT_S = 300.0
"""So long may a reboot take."""

_COMMAND_S = 120.0
_PAUSE_S = 0.5
_BOOT_ID = "/proc/sys/kernel/random/boot_id"

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Stepped:
    """What a step came to. recovered: the device answers; failed: it does not; skipped: it cannot be done."""

    outcome: Literal["recovered", "failed", "skipped"]
    detail: str


def reconnect(transport: Transport) -> Stepped:
    """Give all connections back and ask the device something over new ones."""
    try:
        transport.reconnect()
    except DeviceError as error:
        _log.info("its server did not reconnect", device=transport.device, cause=error.what)
    return _answers(transport)


def fresh_server(transport: Transport) -> Stepped:
    """Replace the server between host and device, if it is one that we started."""
    transport.close()
    try:
        replaced = transport.replace_server()
    except DeviceError as error:
        return _failed(error, transport.device)
    if not replaced:
        return Stepped("skipped", "there is no server that stifarm started: no other is touched")
    return _answers(transport, within_s=ANSWER_S)


def reboot(device: Device, transport: Transport, *, limit_s: float = BACK_LIMIT_S) -> Stepped:
    """Restart the device and wait until it is back with another boot id."""
    if not device.recovery.reboot:
        return Stepped("skipped", "its inventory does not allow a reboot")
    before = _boot_id(transport)
    try:
        if device.recovery.reboot_command:
            _run_here(device)
        elif TRANSPORTS[device.transport].reboots:
            transport.reboot()
        else:
            return Stepped("skipped", f"a device over {device.transport} is not rebooted")
    except StableError as error:
        return _failed(error, device.name)
    except TransientError as error:
        # The link may go before the answer comes: whether it restarts shows below, if it was there before.
        if before is None:
            return _failed(error, device.name)
    transport.close()
    return _back(transport, before, limit_s)


# ------------------------------------------------------------------ inner


def _failed(error: DeviceError, device: str) -> Stepped:
    return Stepped("failed", error.what.removeprefix(f"{device}: "))


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
