"""Lab hosts: what each announces when it joins, whether it may, and which devices the hosts have together.

An announcement is a document on the controller's board. Hosts and controller must be of one version of
stifarm, of the agents' protocol, of Ray and of Python: they hand each other objects of all four.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

from pydantic import StringConstraints

from orchestrator.errors import HostError, InventoryError
from orchestrator.inventory import Device, parse_inventory
from orchestrator.settings import Settings
from sti_runtime.errors import FormatError
from sti_runtime.journal_format import PROTOCOL_VERSION
from sti_runtime.records import NonNegative, Positive, Record

CAP_BYTES = 2 << 20
"""Longest announcement: an inventory and little more."""

OWN = "local"
"""How the devices of the controller's own inventory are said to hang: on itself."""

RENAME = "Rename it in one of their inventories; then join again."
"""What is to be done about a name that two hosts give."""

HOST_NAME = r"^[a-z0-9][a-z0-9_.-]{0,63}$"
HostName = Annotated[str, StringConstraints(pattern=HOST_NAME)]


class Versions(Record):
    """What two processes must have in common. ``python``: major and minor."""

    stifarm: str
    protocol: int
    ray: str
    python: str

    @classmethod
    def own(cls) -> Versions:
        """Those of this process."""
        major, minor, _ = platform.python_version_tuple()
        return cls(
            stifarm=version("stifarm"),
            protocol=PROTOCOL_VERSION,
            ray=version("ray"),
            python=f"{major}.{minor}",
        )

    def difference(self, other: Versions) -> str:
        """What differs, this side first; empty when nothing does."""
        pairs = ((name, getattr(self, name), getattr(other, name)) for name in type(self).model_fields)
        return ", ".join(f"{name} {mine} against {theirs}" for name, mine, theirs in pairs if mine != theirs)


class Announcement(Record):
    """What the controller says of itself. ``started_wall_ns`` tells a restarted one from the one before."""

    format: Literal["stifarm-controller"]
    version: Literal[1]
    versions: Versions
    machine: str
    started_wall_ns: Positive


class HostOffer(Record):
    """What a host says when it joins. ``name`` is its name in the farm, ``machine`` that of the computer.

    ``node``: its Ray node, hexadecimal; another with every join. ``inventory_text`` is what the file
    ``inventory`` held then; ``home``: its own state folder. ``left_wall_ns``: when it left, 0 before.
    """

    format: Literal["stifarm-host"]
    version: Literal[1]
    versions: Versions
    name: HostName
    machine: str
    address: str
    pid: Positive
    node: str
    joined_wall_ns: Positive
    home: str
    inventory: str
    inventory_text: str
    cache_bytes: Positive
    left_wall_ns: NonNegative

    @cached_property
    def devices(self) -> tuple[Device, ...]:
        """The devices that hang on this host. Raises: InventoryError naming it."""
        return _devices(self.name, self.inventory, self.inventory_text)

    @property
    def settings(self) -> Settings:
        """Where things are on the host; it has no store."""
        return Settings(home=Path(self.home), inventory=Path(self.inventory), db_url="")


@lru_cache(maxsize=256)
def _devices(host: str, inventory: str, text: str) -> tuple[Device, ...]:
    # The board is read every second; hundreds of devices take as long to parse.
    found = parse_inventory(text.encode(), Path(f"{host}:{inventory}")).devices
    return tuple(replace(device, host=host) for device in found)


HostState = Literal["present", "away", "left", "refused"]
"""present: joined, its node lives; away: gone without a word; left: by ``host leave``; refused: see why."""


@dataclass(frozen=True)
class SeenHost:
    """One host as the board has it. ``offer`` None: it is refused, and ``refused`` says why."""

    name: str
    versions: Versions
    offer: HostOffer | None
    state: HostState
    refused: str = ""


def require_same(controller: Versions, own: Versions, address: str) -> None:
    """What a host checks before it joins. Raises: HostError."""
    difference = own.difference(controller)
    if difference:
        raise HostError(
            f"This host cannot join the controller at {address}: {difference}.",
            f"Install stifarm {controller.stifarm} with ray {controller.ray} for Python {controller.python} "
            "here, or update the controller.",
        )


def read_announcement(data: bytes, address: str) -> Announcement:
    """The controller's announcement. Raises: HostError for another version, FormatError."""
    require_same(_versions(data), Versions.own(), address)
    return Announcement.from_json(data, source=f"the announcement at {address}", cap_bytes=CAP_BYTES)


def read_offer(name: str, data: bytes, alive: frozenset[str]) -> SeenHost:
    """A host as its announcement says, or refused: for its version, or an inventory that is not valid.

    ``alive``: the nodes that are.
    """
    versions = _versions(data)
    difference = Versions.own().difference(versions)
    if difference:
        why = f"{difference} (the controller's first); install the controller's version there and join again."
        return SeenHost(name, versions, None, "refused", why)
    try:
        offer = HostOffer.from_json(data, source=f"host {name}", cap_bytes=CAP_BYTES)
        offer.devices  # noqa: B018 (validates)
    except (InventoryError, FormatError) as error:
        return SeenHost(name, versions, None, "refused", str(error))
    if offer.left_wall_ns:
        return SeenHost(name, versions, offer, "left")
    return SeenHost(name, versions, offer, "present" if offer.node in alive else "away")


def _versions(data: bytes) -> Versions:
    """The versions in an announcement of any version; what is not there reads "none"."""
    try:
        found = json.loads(data)["versions"]
        texts = {name: str(found[name])[:40] for name in ("stifarm", "ray", "python")}
        return Versions(protocol=int(found["protocol"]), **texts)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return Versions(stifarm="none", protocol=0, ray="none", python="none")


# ------------------------------------------------------------------ all devices of the farm


@dataclass(frozen=True)
class FarmDevices:
    """The devices of all hosts. ``hosts``: where each hangs; ``refused``: why a name is nobody's."""

    devices: tuple[Device, ...]
    hosts: Mapping[str, str]
    refused: Mapping[str, str]


def gather(own: Sequence[Device], offers: Iterable[HostOffer]) -> FarmDevices:
    """All devices: the controller's own first, then by host. A name that two of them give is refused."""
    by_host = {offer.name: offer.devices for offer in sorted(offers, key=lambda offer: offer.name)}
    everything = [*own, *(device for devices in by_host.values() for device in devices)]
    named: dict[str, list[str]] = {}
    for device in own:
        named.setdefault(device.name, []).append(OWN)
    for host, devices in by_host.items():
        for device in devices:
            named.setdefault(device.name, []).append(host)
    refused = {
        name: f"two hosts name it: {' and '.join(_called(host) for host in hosts)}."
        for name, hosts in named.items()
        if len(hosts) > 1
    }
    kept = tuple(device for device in everything if device.name not in refused)
    return FarmDevices(kept, {device.name: named[device.name][0] for device in kept}, refused)


def _called(host: str) -> str:
    return "the controller itself" if host == OWN else host
