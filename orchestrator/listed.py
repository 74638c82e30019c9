"""Every device that the inventory lists or a lab host offers, as the store has these: no host is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sqlalchemy.orm import Session

from db.clock import utc_text
from db.devices import find_device
from db.hosts import list_hosts
from db.models import DeviceRow
from orchestrator.errors import SelectorError, StableError
from orchestrator.farm import Farm
from orchestrator.host_book import known_offers
from orchestrator.hosts import OWN, RENAME, gather
from orchestrator.inventory import Device
from orchestrator.matching import select


@dataclass(frozen=True)
class ListedDevices:
    """The inventory's own devices first, then by host, those of hosts that are away too.

    ``listed``: (device, the lab host that it hangs on; ``OWN``: the controller itself). A name that two of
    them give is there twice; ``refused`` says why it gets no jobs.
    """

    listed: tuple[tuple[Device, str], ...]
    refused: Mapping[str, str]

    @property
    def devices(self) -> tuple[Device, ...]:
        """Each name once: the store knows a device by it, wherever it hangs."""
        by_name: dict[str, Device] = {}
        for device, _ in self.listed:
            by_name.setdefault(device.name, device)
        return tuple(by_name.values())

    def is_row(self, device: Device, row: DeviceRow) -> bool:
        """Whether the store's device of this name is this one: of two that bear it, the one on its host."""
        return device.name not in self.refused or row.host == device.host

    def require_one(self, device: Device) -> None:
        """Raises: StableError when two hosts give a device of this name."""
        if device.name in self.refused:
            raise StableError(self.refused[device.name], RENAME, device=device.name)


def listed_devices(farm: Farm) -> ListedDevices:
    """Raises: InventoryError, InputError, StoreError."""
    offers = sorted(known_offers(farm.store), key=lambda offer: offer.name)
    listed = [(device, OWN) for device in farm.own_devices]
    listed += [(device, offer.name) for offer in offers for device in offer.devices]
    return ListedDevices(tuple(listed), gather(farm.own_devices, offers).refused)


def select_listed(farm: Farm, selector: str) -> tuple[Device, ...]:
    """The listed devices that a selector names.

    Raises: SelectorError, which says of a device that is listed no more where it was last; as
    ``listed_devices``.
    """
    devices = listed_devices(farm).devices
    names = {device.name for device in devices}
    words = [term.strip().removeprefix("!").strip() for term in selector.split(",")]
    with farm.store.reader() as session:
        for word in words:
            gone = None if word in names else find_device(session, name=word)
            if gone is not None:
                raise _gone(session, gone)
    return select(devices, selector)


def _gone(session: Session, device: DeviceRow) -> SelectorError:
    """What to say of a device that the store knows and nobody lists."""
    seen = utc_text(device.last_seen_wall_ns)
    if device.host in (None, OWN):
        return SelectorError(
            f"{device.name} is in no inventory now: it was last seen at {seen}, on the controller itself.",
            "List it in the inventory again.",
        )
    whose = {
        "present": ", whose inventory lists it no more",
        "away": ", whose inventory lists it no more",
        "left": ", which has left the farm",
        "refused": ", which is refused",
    }
    state = next((row.state for row in list_hosts(session) if row.name == device.host), "")
    return SelectorError(
        f"{device.name} is in no inventory now: it was last seen at {seen}, on host {device.host}"
        f"{whose.get(state, '')}.",
        f"See stifarm host list; it is back when {device.host} joins with it in its inventory.",
    )
