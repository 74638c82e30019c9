"""The registry of transports. A new one is a file in this package and a line in ``TRANSPORTS``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from orchestrator.transports.base import Transport
from orchestrator.transports.local import LocalTransport

if TYPE_CHECKING:
    from orchestrator.inventory import Device

Factory = Callable[["Device"], Transport]

TRANSPORTS: Mapping[str, Factory] = {
    "local": lambda device: LocalTransport(device.name),
}


def connect(device: Device) -> Transport:
    """The transport of a device of a validated inventory."""
    return TRANSPORTS[device.transport](device)
