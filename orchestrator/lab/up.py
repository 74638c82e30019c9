"""Bringing the lab up, looking at it, taking it down."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import LabError
from orchestrator.lab import board, devices, machine, net
from orchestrator.lab.disk import DISK_BYTES
from orchestrator.lab.inventory_file import inventory_text
from orchestrator.lab.means import find_means
from orchestrator.lab.state import DeviceState, Kind, Lab, LabState
from sti_runtime.errors import InputError

DEFAULT_COUNT = 2
Tell = Callable[[str, int, int], None]
"""Told (what is under way, steps done, steps in all)."""


@dataclass(frozen=True)
class Upped:
    """What ``up`` did: the lab, its devices, and which of them it started."""

    lab: Lab
    state: LabState
    devices: tuple[DeviceState, ...]
    started: tuple[str, ...]


def up(
    folder: Path,
    *,
    boards: int | None = None,
    phones: int | None = None,
    disk_bytes: int = DISK_BYTES,
    tell: Tell = lambda what, done, total: None,
) -> Upped:
    """Start the lab, or what of it does not run; counts of None: as it has them, else DEFAULT_COUNT.

    Interrupted or failed, it takes down again what it started. Raises: LabError, InputError.
    """
    lab = Lab(folder.absolute())
    _check_folder(lab)
    with lab.changing():
        new = not lab.state_file.exists()
        began: list[DeviceState] = []
        try:
            state = _lab_state(lab, disk_bytes)
            wanted = _wanted(lab, state, {"board": boards, "phone": phones})
            tell("keys and network", 0, len(wanted) + 1)
            state = devices.prepare(lab, state, wanted)
            for done, device in enumerate(wanted, 1):
                tell(device.name, done, len(wanted) + 1)
                if not devices.runs(device):
                    began.append(lab.save_device(device))
                    with lab.changing_device(device.name):
                        devices.start(lab, state, device)
            tell("inventory", len(wanted) + 1, len(wanted) + 1)
            found = lab.devices()
            lab.known_hosts.write_text(
                "".join(board.host_key_lines(lab, device) for device in found if device.kind == "board")
            )
            lab.inventory.write_text(inventory_text(lab, state, found))
        except BaseException:
            if new:
                _take_down(lab, keep=False)
            else:
                for device in began:
                    with lab.changing_device(device.name):
                        devices.stop(lab, lab.state(), lab.device(device.name))
            raise
    return Upped(lab, state, found, tuple(device.name for device in began))


def down(folder: Path, *, keep: bool = False) -> tuple[str, ...]:
    """Stop everything and remove every trace; ``keep``: all but the files, which say what faults are open.
    Returns the devices there were.

    Raises: InputError when there is no lab; LabError when something does not end.
    """
    lab = Lab(folder.absolute())
    lab.state()
    with lab.changing():
        names = tuple(device.name for device in lab.devices())
        _take_down(lab, keep=keep)
    return names


def _take_down(lab: Lab, *, keep: bool) -> None:
    if lab.state_file.exists():
        state = lab.state()
        for device in lab.devices():
            with lab.changing_device(device.name):
                devices.stop(lab, state, device)
                machine.stop_link(lab, device)
        devices.stop_shared(lab, state)
        if state.network is not None:
            net.give_back(state.network)
    if not keep:
        lab.remove()


def _check_folder(lab: Lab) -> None:
    """A lab takes a folder of its own, for ``down`` removes it. Raises: InputError."""
    there = lab.folder
    if (
        there.is_dir()
        and not lab.state_file.exists()
        and any(each.name != "lab.lock" for each in there.iterdir())
    ):
        raise InputError(f"{there} holds something else than a lab.", "Choose another folder: --dir.")
    if there.exists() and not there.is_dir():
        raise InputError(f"{there} is not a folder.", "Choose another one: --dir.")
    if there.resolve().is_relative_to("/run"):
        raise InputError("A lab cannot be below /run.", "Choose a folder on a disk: --dir.")


def _lab_state(lab: Lab, disk_bytes: int) -> LabState:
    """The lab's state; of a new lab, written before anything is made but its network, which has its name."""
    means = find_means(lab.id)
    if lab.state_file.exists():
        state = lab.state()
        if state.means.isolation != means.isolation:
            raise LabError(
                f"The lab in {lab.folder} was brought up with other rights ({state.means.isolation}, not "
                f"{means.isolation}).",
                "Go on as the user who did, or take it down as that user and bring it up anew.",
            )
        if state.network is not None:
            net.claim(state.network)
        return state
    network = None
    if means.network:
        network = net.choose_network(lab.id)
    state = LabState(
        format="stifarm-lab",
        version=1,
        id=lab.id,
        means=means,
        network=network,
        disk_bytes=disk_bytes,
    )
    lab.save(state)
    if network is not None:
        net.claim(network)
    return state


def _wanted(lab: Lab, state: LabState, counts: dict[Kind, int | None]) -> list[DeviceState]:
    """Every device that is to run, those there are with their state. Raises: InputError."""
    there = {device.name: device for device in lab.devices()}
    indices = _free_indices({device.index for device in there.values()})
    wanted: list[DeviceState] = []
    for kind, count in counts.items():
        have = sum(device.kind == kind for device in there.values())
        if count is None:
            count = have or (0 if there else DEFAULT_COUNT)
        if count < have:
            raise InputError(
                f"The lab has {have} {kind}s, more than {count}.",
                f"Take it down first: stifarm lab down{lab.option}.",
            )
        for number in range(1, count + 1):
            name = f"{kind}-{number}"
            wanted.append(there.get(name) or devices.new(lab, state, kind, number, next(indices)))
    if len(wanted) > net.DEVICES:
        raise InputError(f"A lab has at most {net.DEVICES} devices.", "Ask for fewer.")
    return wanted


def _free_indices(used: set[int]) -> Iterator[int]:
    return (index for index in range(10_000) if index not in used)
