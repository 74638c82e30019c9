"""One farm, opened: settings, inventory, store, and one controller at a time per home.

The controller lock makes a second command that would drive devices wait its turn with a clear error,
instead of taking the first one's leases away.
"""

from __future__ import annotations

import fcntl
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from db.session import Store, open_store
from orchestrator.inventory import Device, Inventory, load_inventory
from orchestrator.settings import Settings
from sti_runtime.errors import ResourceError, StifarmError


class ControllerBusyError(StifarmError):
    """Another command of this farm is driving devices."""


@dataclass
class Farm:
    """What every verb works with. The inventory is read when it is first asked for."""

    settings: Settings
    store: Store
    stop: threading.Event = field(default_factory=threading.Event)
    """Set when the person pressed Ctrl-C: threads that drive jobs then ask the agents to stop."""
    registering: threading.Lock = field(default_factory=threading.Lock)
    """Held while a device is registered: two new names of one device must see each other."""

    @cached_property
    def inventory(self) -> Inventory:
        """The validated inventory. Raises: InventoryError, InputError."""
        return load_inventory(self.settings.inventory)

    @cached_property
    def own_devices(self) -> tuple[Device, ...]:
        """The devices that the inventory file lists. Raises: InventoryError."""
        return load_inventory(self.settings.inventory).devices

    def know(self, devices: Sequence[Device]) -> None:
        """From now on the inventory has these devices: the file's and those of lab hosts."""
        self.inventory = replace(self.inventory, devices=tuple(devices))

    @property
    def owner(self) -> str:
        """Who holds the leases of this farm: stable over restarts, so that a killed controller's
        successor goes on with its attempts."""
        return f"{socket.gethostname()}:{self.settings.home}"

    def stopped_by(self, stop: threading.Event) -> Farm:
        """The same farm for one piece of work that ``stop`` ends."""
        part = replace(self, stop=stop)
        part.inventory = self.inventory
        return part


@contextmanager
def open_farm(settings: Settings) -> Iterator[Farm]:
    """Open the home and the store. Raises: ResourceError, StoreError, InputError."""
    make_folder(settings.home)
    with open_store(settings.db_url) as store:
        yield Farm(settings, store)


@contextmanager
def controlling(farm: Farm) -> Iterator[None]:
    """Be the one controller of this home. Raises: ControllerBusyError naming the other's process."""
    path = farm.settings.home / "controller.lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            other = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
            raise ControllerBusyError(
                f"Another stifarm command (process {other}) is driving the devices of {farm.settings.home}.",
                "Wait until it ends, or stop it; then run this command again.",
            ) from error
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(fd)


def make_folder(path: Path) -> None:
    """Create a folder of the home. Raises: ResourceError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResourceError(
            f"{path} cannot be created: {error.strerror}.",
            "Set STIFARM_HOME to a folder that this user may write to.",
        ) from error
