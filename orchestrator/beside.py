"""What can be known of devices while another command drives them; the store is not changed.

A device that is in use, or shares its machine with one that is, is not touched, for something may be timed
there; of it the store tells what was last seen. The others are looked at without their agent (the work folder
is made where it is missing). Leases are read once: a job that begins meanwhile has a look beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from db.clock import database_wall_ns, utc_text
from db.devices import latest_facts, list_devices
from db.documents import parse
from db.reservations import Held, holders
from orchestrator.device_facts.seen import Seen
from orchestrator.farm import Farm
from orchestrator.inventory import Device
from orchestrator.side_by_side import side_by_side
from orchestrator.worker import HostWorker
from sti_runtime.errors import StifarmError


@dataclass(frozen=True)
class Known:
    """What the store knows of a device. ``facts``: as ``fleet.stable_facts`` keeps them, with ``host_seen``;
    ``age_ns``: since it was last seen."""

    facts: Mapping[str, Any]
    age_ns: int


@dataclass(frozen=True)
class Beside:
    """A device beside another command's work. ``why``: it was not looked at for this reason; "": it was, and
    ``seen`` is what was found, or ``error`` why nothing was. ``known`` None: the store does not know it."""

    device: Device
    why: str
    seen: Seen | None
    error: StifarmError | None
    known: Known | None


def look_beside(farm: Farm, devices: Sequence[Device]) -> list[Beside]:
    """The devices, in their order: looked at where that disturbs nothing. Raises: StoreError."""
    known, held = _from_store(farm)
    why = {device.name: _untouched(farm, device, held) for device in devices}
    free = [device for device in devices if not why[device.name]]
    worker = HostWorker(farm.settings, free)

    def look(device: Device) -> Seen | StifarmError:
        try:
            return worker.look(device.name)
        except StifarmError as error:
            return error

    try:
        found = {d.name: answer for d, answer in side_by_side([[d] for d in free], look, farm.stop)}
    finally:
        worker.close()
    answers = [(device, found.get(device.name)) for device in devices]
    return [
        Beside(
            device,
            why[device.name],
            answer if isinstance(answer, Seen) else None,
            answer if isinstance(answer, StifarmError) else None,
            known.get(device.name),
        )
        for device, answer in answers
    ]


def known_devices(farm: Farm) -> Mapping[str, Known]:
    """What the store knows, by device. Raises: StoreError."""
    return _from_store(farm)[0]


def _from_store(farm: Farm) -> tuple[dict[str, Known], dict[str, Held]]:
    with farm.store.reader() as session:
        now, held = database_wall_ns(session), holders(session)
        rows = list_devices(session)
        newest = [(row, latest_facts(session, row.id)) for row in rows]
        return (
            {
                row.name: Known(parse(facts.facts_json), max(0, now - row.last_seen_wall_ns))
                for row, facts in newest
                if facts is not None
            },
            {row.name: held[row.id] for row in rows if row.id in held},
        )


def _untouched(farm: Farm, device: Device, held: Mapping[str, Held]) -> str:
    """Why a device is not looked at; "": it can be."""
    if all(device.name != own.name for own in farm.own_devices):
        return f"it hangs on lab host {device.host}, which the other command asks"
    own_lock = farm.settings.machine_lock
    machine = device.shared_machine(own_lock)
    for other in (device, *farm.inventory.devices):
        lease = held.get(other.name, Held())
        if lease.lease_owner is None:
            continue
        if other.name == device.name:
            until = utc_text(lease.lease_until_wall_ns or 0)
            return f"it is in use by {lease.lease_owner}, whose lease runs until {until}"
        if machine is not None and machine == other.shared_machine(own_lock):
            return f"{other.name}, which shares its machine, is in use"
    return ""
