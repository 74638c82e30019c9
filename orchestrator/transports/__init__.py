"""The registry of transports. A new one is a file in this package and a line in ``TRANSPORTS``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, cast

from orchestrator.transports.base import Transport

if TYPE_CHECKING:
    from orchestrator.inventory import Device

Factory = Callable[["Device"], Transport]


@dataclass(frozen=True)
class TransportKind:
    """A way to reach a device: ``module`` has a function ``connect(device)``, imported when first used.

    ``one_of``: inventory fields of which a device gives exactly one; ``options``: fields that it may give.
    ``server``: whether it goes through one that may be started anew (``Transport.replace_server``);
    ``reboots``: whether a device over it may be restarted.
    """

    module: str
    one_of: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    server: bool = False
    reboots: bool = True

    @property
    def fields(self) -> tuple[str, ...]:
        """Every field of its own."""
        return self.one_of + self.options


TRANSPORTS: Mapping[str, TransportKind] = {
    "local": TransportKind("orchestrator.transports.local", reboots=False),
    "adb": TransportKind(
        "orchestrator.transports.adb", one_of=("serial", "address"), options=("adb_server",), server=True
    ),
    "ssh": TransportKind(
        "orchestrator.transports.ssh", one_of=("address",), options=("key_file", "known_hosts")
    ),
    "fake": TransportKind("orchestrator.transports.fake_device", options=("fake",), reboots=False),
}


def connect(device: Device) -> Transport:
    """The transport of a device of a validated inventory; nothing is sent before it is first used."""
    factory = cast(Factory, import_module(TRANSPORTS[device.transport].module).connect)
    return factory(device)
