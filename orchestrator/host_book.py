"""What the store knows of lab hosts: written down as they are seen, read when they are away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import structlog

from db.documents import document
from db.errors import StoreUnreachableError
from db.hosts import host_states, list_hosts, note_host
from db.session import Store
from orchestrator.errors import InventoryError, PoolError
from orchestrator.farm import Farm
from orchestrator.hosts import CAP_BYTES, HostOffer, SeenHost, gather
from orchestrator.inventory import Device
from orchestrator.lab_hosts import Cluster, LabHosts
from orchestrator.worker import HostWorker
from sti_runtime.errors import FormatError

_COUNTED_ON = ("present", "away")

_log = structlog.get_logger(__name__)


class Pool(Cluster, Protocol):
    """Where hosts join, with a worker for the controller's own devices: ``ray.pool.RayPool``."""

    def host_worker(self, devices: Sequence[Device]) -> HostWorker: ...


def hosts_of(farm: Farm, pool: Pool) -> LabHosts:
    """The farm's hosts in a pool: present ones, and those that the store knows from before.

    From then on the farm's inventory has the devices of all of them, of those that join later too.
    Raises: InventoryError, StoreError, PoolError.
    """
    own = farm.own_devices
    hosts = LabHosts(
        own,
        pool.host_worker(own),
        pool,
        before=known_offers(farm.store),
        note=lambda seen: note_hosts(farm.store, seen),
        remembered=lambda: remembered_hosts(farm.store),
        changed=lambda found: farm.know(found.devices),
    )
    hosts.farm_devices()
    return hosts


def know_hosts(farm: Farm) -> None:
    """Have the devices of the lab hosts in the farm's inventory, as the store knows them: no host is asked.
    Raises: InventoryError, StoreError."""
    farm.know(gather(farm.own_devices, known_offers(farm.store)).devices)


def note_hosts(store: Store, seen: Sequence[SeenHost]) -> None:
    """Write down what a board says of its hosts. Those it does not name may be another cluster's: of them
    nothing is said. Raises: StoreError."""
    with store.session() as session:
        for host in seen:
            note_host(
                session,
                host.name,
                state=host.state,
                stifarm=host.versions.stifarm,
                protocol=host.versions.protocol,
                offer_json=None if host.offer is None else document(host.offer),
                joined_wall_ns=None if host.offer is None else host.offer.joined_wall_ns,
                refused=host.refused,
            )


def note_seen(store: Store, ask: Callable[[], Sequence[SeenHost]]) -> None:
    """Write down what a board says now. Where it is silent, or the store away, that is told and no more: the
    head node and its hosts go on, and who watches them asks again. Raises: StoreError, for what no waiting
    mends."""
    try:
        note_hosts(store, ask())
    except (PoolError, StoreUnreachableError) as error:
        _log.warning("what is known of the hosts could not be written down", cause=error.what)


def remembered_hosts(store: Store) -> frozenset[str]:
    """The names of the hosts that did not leave and were not forgotten. Raises: StoreError."""
    with store.reader() as session:
        return frozenset(name for name, state in host_states(session).items() if state in _COUNTED_ON)


def known_offers(store: Store) -> list[HostOffer]:
    """What the hosts that did not leave offered when they were last there. Raises: StoreError."""
    offers = []
    with store.reader() as session:
        rows = [(row.name, row.offer_json) for row in list_hosts(session) if row.state in _COUNTED_ON]
    for name, text in rows:
        if text is None:
            continue
        try:
            offer = HostOffer.from_json(text.encode(), source=f"host {name}", cap_bytes=CAP_BYTES)
            offer.devices  # noqa: B018 (validates)
            offers.append(offer)
        except (FormatError, InventoryError) as error:
            # Written by another version; the host announces itself anew when it joins.
            _log.warning("what a host offered is not known any more", host=name, cause=error.what)
    return offers
