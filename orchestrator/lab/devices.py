"""Boards and phones by one set of verbs. Who calls one that changes a device holds that device."""

from __future__ import annotations

from collections.abc import Sequence

from orchestrator.lab import adb_server, board, machine, phones
from orchestrator.lab.follow import follow_faults
from orchestrator.lab.state import DeviceState, Kind, Lab, LabState
from orchestrator.processes import alive


def new(lab: Lab, state: LabState, kind: Kind, number: int, index: int) -> DeviceState:
    """The state of a device that is to be."""
    make = board.new_board if kind == "board" else phones.new_phone
    return make(lab, state, number, index)


def prepare(lab: Lab, state: LabState, wanted: Sequence[DeviceState]) -> LabState:
    """What devices share: keys, and the adb server where there are phones. Raises: LabError."""
    board.make_key(lab.key)
    return adb_server.start(lab, state) if any(device.kind == "phone" for device in wanted) else state


def runs(device: DeviceState) -> bool:
    """Whether it is on, and its cable too where that is a process."""
    return alive(device.process) and (device.link is None or alive(device.link))


def start(lab: Lab, state: LabState, device: DeviceState) -> DeviceState:
    """Boot a device, after ending what is left of it; its link and its limits are as its faults have them.

    Raises: LabError.
    """
    machine.stop(lab, state, device)
    boot = board.start if device.kind == "board" else phones.start
    boot(lab, state, lab.device(device.name))
    device = lab.update(device.name, faults=lab.device(device.name).without("reboot"))
    follow_faults(lab, state, device)
    return device


def stop(lab: Lab, state: LabState, device: DeviceState) -> None:
    """Power a device off; harmless where it is. Raises: LabError."""
    machine.stop(lab, state, device)


def stop_shared(lab: Lab, state: LabState) -> None:
    """End what devices share. Raises: LabError."""
    adb_server.stop(lab, state)
