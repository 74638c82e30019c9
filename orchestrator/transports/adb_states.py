"""What the state in which an adb server lists a device means, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass

READY = "device"


@dataclass(frozen=True)
class Trouble:
    """Why a device cannot be used. ``passing``: waiting may help."""

    what: str
    remedy: str
    passing: bool = False


NO_PERMISSION = Trouble(
    "this user may not open the device's USB port.",
    "Install Android's udev rules (on Debian: apt install android-sdk-platform-tools-common), join"
    " the group plugdev, plug the device in again, and restart the adb server.",
)
_UNAUTHORIZED = Trouble(
    "the device has not authorized this computer.",
    "Unlock it and accept the question 'Allow USB debugging?'; if none appears, revoke"
    " authorizations in its developer options and plug it in again.",
)


def trouble_of(state: str) -> Trouble | None:
    """What is wrong with a device in that state; None for one that is ready."""
    if state == READY:
        return None
    if state == "unauthorized":
        return _UNAUTHORIZED
    if state.startswith("no permissions"):
        return NO_PERMISSION
    if state in ("offline", "connecting", "authorizing", "detached"):
        return Trouble(f"the device is {state}.", "Wait, or unplug it and plug it in again.", passing=True)
    return Trouble(f"the device is in state {state[:40]!r}.", "Boot it into Android.")
