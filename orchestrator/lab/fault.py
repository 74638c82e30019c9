"""Faults: injected in kernel, socket or process, never by a hook in the farm's own code; each has an end.

``inject`` and ``restore`` return at once; ``hold`` does both around a wait. What is active stands in the
device's state, so any later process can end it; a device that reboots has its open faults afterwards too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import get_args

from orchestrator.errors import LabError, near
from orchestrator.lab import devices, machine, storage_faults
from orchestrator.lab.access import accept_key, withdraw_key
from orchestrator.lab.follow import follow_faults
from orchestrator.lab.state import ActiveFault, DeviceState, FaultKind, Lab, LabState
from sti_runtime.errors import InputError

KINDS: tuple[FaultKind, ...] = get_args(FaultKind)
DEFAULT_S: Mapping[FaultKind, float] = {"reboot": 2.0}
"""How long a fault lasts when nothing is said: a reboot ends by itself; others wait for ``restore``."""

Undo = dict[str, str]


@dataclass(frozen=True)
class _Way:
    """How a fault is done and undone. ``refusal``: why it cannot be had here, empty where it can."""

    inject: Callable[[Lab, LabState, DeviceState, int], Undo]
    undo: Callable[[Lab, LabState, DeviceState, Undo], None]
    refusal: Callable[[LabState, DeviceState], str] = lambda state, device: ""


def parse_kind(word: str) -> FaultKind:
    """A fault by its name. Raises: InputError."""
    for kind in KINDS:
        if kind == word:
            return kind
    raise InputError(f"There is no fault {word!r}.", near(word, KINDS))


def inject(lab: Lab, name: str, kind: FaultKind, *, seed: int = 0) -> ActiveFault:
    """Start a fault of a device; ``seed`` chooses what is damaged. One of a kind at a time.

    Raises: InputError for an unknown device; LabError when it is refused (with the reason) or fails. Then
    nothing is changed.
    """
    state = lab.state()
    with lab.changing_device(name):
        device = lab.device(name)
        if device.fault(kind) is not None:
            raise LabError(
                f"{name} has the fault {kind} already.",
                f"End it: stifarm lab fault {name} restore{lab.option}.",
            )
        machine.require_running(device)
        way = _WAYS[kind]
        refusal = way.refusal(state, device)
        if refusal:
            raise LabError(f"{name} cannot have the fault {kind}: {refusal}.", "See docs/lab.md.")
        fault = ActiveFault(kind=kind, since_wall_ns=time.time_ns(), undo={})
        # Written down first: whatever becomes of us, it can be undone.
        lab.update(name, faults=(*device.faults, fault))
        try:
            fault = fault.model_copy(update={"undo": way.inject(lab, state, lab.device(name), seed)})
        except BaseException:
            way.undo(lab, state, lab.update(name, faults=lab.device(name).without(kind)), {})
            raise
        lab.update(name, faults=(*lab.device(name).without(kind), fault))
        return fault


def restore(lab: Lab, name: str, kind: FaultKind | None = None) -> tuple[FaultKind, ...]:
    """End faults of a device; those that were active. Raises: InputError, LabError."""
    state = lab.state()
    ended: list[FaultKind] = []
    with lab.changing_device(name):
        active = [fault for fault in lab.device(name).faults if kind in (None, fault.kind)]
        for fault in sorted(active, key=lambda each: each.kind != "reboot"):  # it must run to be mended
            device = lab.device(name)
            if fault.kind not in ("cut", "slow", "reboot"):
                machine.require_running(device)
            device = lab.update(name, faults=device.without(fault.kind))
            try:
                _WAYS[fault.kind].undo(lab, state, device, fault.undo)
            except BaseException:
                lab.update(name, faults=(*lab.device(name).faults, fault))
                raise
            ended.append(fault.kind)
    return tuple(ended)


@contextmanager
def injected(lab: Lab, name: str, kind: FaultKind, *, seed: int = 0) -> Iterator[ActiveFault]:
    """A fault for the length of a block."""
    fault = inject(lab, name, kind, seed=seed)
    try:
        yield fault
    finally:
        restore(lab, name, kind)


def hold(lab: Lab, name: str, kind: FaultKind, duration_s: float, *, seed: int = 0) -> None:
    """Inject a fault, wait, and end it, also when interrupted. Raises: LabError."""
    with injected(lab, name, kind, seed=seed):
        time.sleep(duration_s)


# ------------------------------------------------------------------ the ways


def _follow(lab: Lab, state: LabState, device: DeviceState, seed: int) -> Undo:
    follow_faults(lab, state, device)
    return {}


def _follow_back(lab: Lab, state: LabState, device: DeviceState, undo: Undo) -> None:
    follow_faults(lab, state, device)


def _power_off(lab: Lab, state: LabState, device: DeviceState, seed: int) -> Undo:
    devices.stop(lab, state, device)
    return {}


def _power_on(lab: Lab, state: LabState, device: DeviceState, undo: Undo) -> None:
    if not devices.runs(device):
        devices.start(lab, state, device)


def _no_rate(state: LabState, device: DeviceState) -> str:
    if state.means.network and not state.means.shaping:
        return "; ".join(state.means.reasons) or "this kernel has no rates for links"
    return ""


def _no_group(state: LabState, device: DeviceState) -> str:
    return "" if device.groups is not None else f"it is in no control group ({_why(state)})"


def _no_boot(state: LabState, device: DeviceState) -> str:
    if state.means.isolation == "none":
        return f"without namespaces it has no boot id of its own ({_why(state)})"
    return ""


def _no_disk(state: LabState, device: DeviceState) -> str:
    return (
        ""
        if state.means.disk
        else f"it has no disk of its own, and this machine's is not filled ({_why(state)})"
    )


def _why(state: LabState) -> str:
    return "; ".join(state.means.reasons)


_WAYS: Mapping[FaultKind, _Way] = {
    "cut": _Way(_follow, _follow_back),
    "reboot": _Way(_power_off, _power_on, _no_boot),
    "full-disk": _Way(storage_faults.fill, storage_faults.free, _no_disk),
    "slow": _Way(_follow, _follow_back, _no_rate),
    "throttle": _Way(_follow, _follow_back, _no_group),
    "unauthorized": _Way(withdraw_key, accept_key),
    "corrupt": _Way(storage_faults.corrupt, storage_faults.mend),
    "lie": _Way(storage_faults.replace_agent, storage_faults.put_agent_back),
}
