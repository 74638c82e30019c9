"""Which of the chosen devices the farm relies on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from db.devices import list_devices
from db.quarantine import quarantines
from orchestrator.farm import Farm
from orchestrator.inventory import Device


def relied_on(
    farm: Farm, devices: Sequence[Device], selector: str, *, named_too: bool = False
) -> tuple[tuple[Device, ...], Mapping[str, str]]:
    """(devices to work with, the others with the cause of their quarantine). Who is named stays, unless
    ``named_too``: a verb then works with it, or refuses with the cause."""
    with farm.store.reader() as session:
        held = quarantines(session)
        causes = {row.name: held[row.id].cause for row in list_devices(session) if row.id in held}
    named = set() if named_too else {term.strip() for term in selector.split(",")}
    left_out = {
        device.name: causes[device.name]
        for device in devices
        if device.name in causes and device.name not in named
    }
    return tuple(device for device in devices if device.name not in left_out), left_out
