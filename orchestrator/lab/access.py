"""Taking a device's trust in our key away, and giving it back."""

from __future__ import annotations

import signal
from pathlib import Path

from orchestrator.lab import adb_server, board, machine, phones
from orchestrator.lab.state import DeviceState, Lab, LabState
from orchestrator.processes import descendants, identify, kill

_LISTENER = b"[listener]"


def withdraw_key(lab: Lab, state: LabState, device: DeviceState, seed: int) -> dict[str, str]:
    """The device accepts our key no more and its sessions end; what they started goes on."""
    if device.kind == "phone":
        phones.accepted_keys(lab, state, device).write_text("")  # its daemon sees it and cuts hosts off
        return {}
    board.authorized_keys(lab, device.name).write_text("")
    for pid in descendants(machine.require_running(device).pid):
        found = identify(pid)
        if found is not None and is_session(_command_line(pid)):
            kill(found, signal.SIGKILL)
    return {}


def accept_key(lab: Lab, state: LabState, device: DeviceState, undo: dict[str, str]) -> None:
    """The device accepts our key again."""
    if device.kind == "phone":
        phones.accepted_keys(lab, state, device).write_bytes(adb_server.public_key(lab).read_bytes())
    else:
        board.authorized_keys(lab, device.name).write_text(lab.key.with_suffix(".pub").read_text())


def is_session(command_line: bytes) -> bool:
    """Whether a process is a session of sshd, by the title it gives itself, and not its listener."""
    return command_line.startswith((b"sshd: ", b"sshd-session: ")) and _LISTENER not in command_line


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""
