"""One farm, opened: settings, inventory, store, and one controller at a time per home.

The controller lock makes a second command that would drive devices wait its turn with a clear error,
instead of taking the first one's leases away.
"""

from __future__ import annotations

import fcntl
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import structlog

from db.controllers import Begun, beat, begin_controller, end_controller
from db.errors import StoreFullError
from db.session import Store, open_store
from orchestrator.home_files import lock_file, make_folder, refused
from orchestrator.inventory import Device, Inventory, load_inventory
from orchestrator.patience import patiently
from orchestrator.processes import command
from orchestrator.settings import Settings
from sti_runtime.errors import StifarmError

BEAT_S = 30.0

_WAIT_S = 0.2


class ControllerBusyError(StifarmError):
    """Another command of this farm is driving devices."""


@dataclass
class Farm:
    """What every verb works with. The inventory is read when it is first asked for."""

    settings: Settings
    store: Store
    stop: threading.Event = field(default_factory=threading.Event)
    """Set when the person pressed Ctrl-C: threads that drive jobs then ask the agents to stop."""
    controller: str | None = None
    """The name of the controller that this process is; None while it is none."""
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

    def read_inventory(self) -> bool:
        """Read the inventory file anew; whether it lists other devices than before. Raises: InventoryError,
        InputError; the devices are then as they were."""
        devices = load_inventory(self.settings.inventory).devices
        if devices == self.own_devices:
            return False
        self.own_devices = devices
        return True

    def know(self, devices: Sequence[Device]) -> None:
        """From now on the inventory has these devices: the file's and those of lab hosts."""
        self.inventory = replace(self.inventory, devices=tuple(devices))

    @property
    def owner(self) -> str:
        """Who holds the leases of this farm: this process's controller, which goes on with what a killed one
        of its home held."""
        return self.controller or f"{socket.gethostname()}:{self.settings.home}"

    def stopped_by(self, stop: threading.Event) -> Farm:
        """The same farm for one piece of work that ``stop`` ends."""
        part = replace(self, stop=stop, store=_patient(self.store, stop))
        part.inventory = self.inventory
        return part


@contextmanager
def open_farm(settings: Settings, *, wait_s: float = 0) -> Iterator[Farm]:
    """Open the home and the store, which is waited for ``wait_s`` while it is away. Raises: ResourceError,
    StoreError, InputError."""
    make_folder(settings.home)
    stop = threading.Event()

    def opened() -> Store:
        return open_store(settings.db_url)

    with patiently(opened, limit_s=wait_s) if wait_s else opened() as store:
        yield Farm(settings, _patient(store, stop), stop)


def _patient(store: Store, stop: threading.Event) -> Store:
    """The store, waited for where a transaction begins while it is away, until ``stop``."""
    return replace(store, patience=lambda connect: patiently(connect, stop=stop))


def impatient(store: Store) -> Store:
    """The store for who tries again by itself, or has no time."""
    return replace(store, patience=lambda connect: connect())


@contextmanager
def controlling(
    farm: Farm, *, waits: Callable[[str], None] | None = None, patient: bool = False
) -> Iterator[None]:
    """Be the one controller of this home. ``waits``: another is waited for, and this is told who it is.
    ``patient``: a store whose disk is full is waited for; else whoever gave the command is told at once.

    Raises: ControllerBusyError naming the other's process and command; ResourceError.
    """
    path = farm.settings.home / "controller.lock"
    fd = lock_file(path)
    try:
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                busy = _busy(farm, os.pread(fd, 32, 0).decode(errors="replace").strip())
                if waits is None:
                    raise busy from error
                waits(busy.what)
                waits = _told  # once
            if farm.stop.wait(_WAIT_S):
                raise KeyboardInterrupt
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode(), 0)
        except OSError as error:
            raise refused(error, f"{path} cannot be written") from error
        with _entered(farm, patient=patient):
            yield
    finally:
        os.close(fd)


def _told(_who: str) -> None:
    pass


def _busy(farm: Farm, pid: str) -> ControllerBusyError:
    """Who drives the devices, by what the lock's file says."""
    words = command(int(pid)) if pid.isdigit() else []
    return ControllerBusyError(
        f"Another stifarm command (process {pid or 'unknown'}) is driving the devices of {farm.settings.home}"
        f"{f': {shown_command(words)}' if words else ''}.",
        "Wait until it ends, or stop it; then run this command again.",
    )


def shown_command(words: Sequence[str]) -> str:
    """A process's command line for people: without its interpreter, and without a store's URL, which may hold
    a password."""
    words = list(words)
    if len(words) > 1 and Path(words[0]).name.startswith("python") and not words[1].startswith("-"):
        words = words[1:]
    for place, word in enumerate(words):
        if word.startswith("--db-url"):
            if "=" in word:
                words[place] = "--db-url=…"
            elif place + 1 < len(words):
                words[place + 1] = "…"
    return " ".join([Path(words[0]).name, *words[1:]]) if words else ""


@contextmanager
def _entered(farm: Farm, *, patient: bool) -> Iterator[None]:
    """Be a controller of the store, with a heartbeat, for the length of the block."""
    log = structlog.get_logger(__name__)

    def enter() -> Begun:
        try:
            with farm.store.session() as session:
                return begin_controller(
                    session,
                    host=socket.gethostname(),
                    home=str(farm.settings.home),
                    stifarm=version("stifarm"),
                    pid=os.getpid(),
                )
        except StoreFullError as full:
            full.waited = not patient
            raise

    begun = patiently(enter, stop=farm.stop)
    for name in begun.succeeded:
        log.info("goes on with what a killed controller held", controller=name)
    farm.controller = begun.name
    over = threading.Event()
    beating = threading.Thread(target=_beat, args=(impatient(farm.store), begun.name, over), daemon=True)
    beating.start()
    try:
        yield
    finally:
        over.set()
        beating.join()
        farm.controller = None
        try:
            with impatient(farm.store).session() as session:
                end_controller(session, begun.name)
        except StifarmError as error:
            log.warning("the store does not know that this controller ended", cause=error.what)


def _beat(store: Store, name: str, over: threading.Event) -> None:
    """Say until ``over`` that the controller lives. A store that is away is tried again."""
    log = structlog.get_logger(__name__)
    while not over.wait(BEAT_S):
        try:
            with store.session() as session:
                kept = beat(session, name)
        except StifarmError as error:
            log.warning("the store does not know that this controller lives", cause=error.what)
            continue
        if not kept:
            log.warning("this controller was silent and given up; others went on with its work")
