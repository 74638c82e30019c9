"""What every verb needs: settings from the options, the farm, the pool, and how errors become exit codes."""

from __future__ import annotations

import shlex
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from db.devices import device_by_name
from db.quarantine import refuse_quarantined
from orchestrator.cli.output import fail, note, steps, success, warn
from orchestrator.dispatch import Worker
from orchestrator.errors import SelectorError, StableError, ToolchainError
from orchestrator.farm import Farm, controlling, open_farm
from orchestrator.health.selection import relied_on
from orchestrator.host_book import hosts_of, know_hosts
from orchestrator.host_checks import exposed_at
from orchestrator.inventory import Device, load_inventory
from orchestrator.lab_hosts import LabHosts
from orchestrator.matching import select
from orchestrator.settings import Settings, load_settings
from orchestrator.side_by_side import side_by_side
from orchestrator.store_place import absent_store
from orchestrator.toolchain import build_agent, is_built
from sti_runtime.errors import InputError, StifarmError
from sti_runtime.importance_profile import METHODS, Method
from sti_runtime.units import format_ns, parse_bytes, parse_duration_ns

T = TypeVar("T")

OK, FAILED, USAGE, SOME_FAILED = 0, 1, 2, 3
"""Exit codes: done, failed, wrong usage or input, some devices failed."""

LARGEST_SEED = 2**32 - 1
"""Largest seed that every generator used here takes."""


def _note_json(context: typer.Context, value: bool) -> bool:
    context.obj.owes_json = value
    return value


DevicesOption = Annotated[
    str,
    typer.Option("--devices", "-d", help="all, names, label=value, transport:local, !name; comma-separated."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", callback=_note_json, help="Write one JSON document to stdout.")
]
WaitOption = Annotated[
    bool, typer.Option("--wait", help="Wait while another command drives the devices, until it has ended.")
]
BundleOption = Annotated[
    str | None, typer.Option("--bundle", "-b", help="Bundle by name or digest; the newest by default.")
]
TaskOption = Annotated[
    str | None, typer.Option("--task", "-t", help="Task by name; may be left out when there is one only.")
]
PortsOption = Annotated[
    str | None,
    typer.Option("--ports", help="Ports of this machine's node, FIRST-LAST; any free ones by default."),
]
AgainOption = Annotated[bool, typer.Option("--again", help="Measure again what the store already holds.")]


@dataclass
class Options:
    """The options before the verb, and what the end of the command depends on."""

    home: Path | None = None
    inventory: Path | None = None
    db_url: str | None = None
    interrupted: str = "run the same command again to go on where it was"
    """What is true, and what to do, after Ctrl-C; a verb that is not gone on with says its own."""
    owes_json: bool = False
    """Whether a document was asked for and not written yet: then an error is one, too."""

    def settings(self) -> Settings:
        """Settings of this call. Raises: InputError."""
        return load_settings(home=self.home, inventory=self.inventory, db_url=self.db_url)

    def again(self, verb: str) -> str:
        """A command for the same farm. (A store's URL, which may hold a password, is left out.)"""
        given = (("--home", self.home), ("--inventory", self.inventory))
        options = [word for name, path in given if path is not None for word in (name, str(path))]
        return f"{shlex.join(['stifarm', *options])} {verb}"


@contextmanager
def farm_of(
    context: typer.Context, *, for_devices: bool = False, existing: bool = False, wait_s: float = 0
) -> Iterator[Farm]:
    """The farm that the options name, its store waited for ``wait_s``; ``for_devices``: an inventory that is
    missing or invalid is refused before anything else is looked at; ``existing``: so is a given store that
    does not exist, which else is made, and that is said."""
    options = context.obj
    assert isinstance(options, Options)
    settings = options.settings()
    if for_devices:
        load_inventory(settings.inventory)
    made = absent_store(settings, existing=existing)
    with open_farm(settings, wait_s=wait_s) as farm:
        if made is not None:
            note(f"{made} is a new store")
        yield farm


@dataclass
class Session:
    """A farm with its Ray pool started and the chosen devices' worker. ``left_out``: why devices that were
    asked for are not among ``devices``; it has been said, and is for the verb's document and exit code."""

    farm: Farm
    devices: tuple[Device, ...]
    worker: Worker
    pool: Any
    hosts: LabHosts | None = None
    left_out: tuple[StableError, ...] = ()


@contextmanager
def driving(
    farm: Farm,
    selector: str,
    *,
    listen: str | None = None,
    ports: str | None = None,
    quarantined: bool = False,
    measures: bool = False,
    wait: bool = False,
    patient: bool = False,
) -> Iterator[Session]:
    """Start Ray and the worker of the chosen devices; one such command at a time per home.

    ``listen``: run the farm's head node there, with these ``ports``, for hosts to join: then there may be no
    device yet. Devices in quarantine that are not named are left out (``Session.left_out``), unless
    ``quarantined``; ``measures``: those that are named, too, for they get no job. ``wait``: until another
    command that drives devices has ended; ``patient``: as ``controlling``. Raises: SelectorError,
    InventoryError, HostError, QuarantinedError before anything is started; ControllerBusyError, PoolError,
    ResourceError, StoreError.
    """
    from orchestrator.ray.access import token_source
    from orchestrator.ray.board import Endpoint
    from orchestrator.ray.head import running_head
    from orchestrator.ray.nodes import Ports
    from orchestrator.ray.pool import RayPool

    endpoint = None if listen is None else Endpoint.parse(listen)
    given = None if ports is None else Ports.parse(ports)
    know_hosts(farm)
    if listen is None and running_head(farm.settings) is None:  # else hosts may join, or have joined unseen
        chosen = select(farm.inventory.devices, selector)
        if not quarantined:
            require_relied_on(farm, chosen, selector, measures=measures)
    waits = _say_who_is_waited_for if wait else None
    with (
        controlling(farm, waits=waits, patient=patient),
        starting(lambda: RayPool(farm.settings, listen=endpoint, ports=given)) as pool,
    ):
        # Every device of all hosts: accuracy may be measured on one that was not chosen.
        hosts = hosts_of(farm, pool)
        note(f"controller up in {pool.start_seconds:.1f} s (Ray, token authentication on)")
        if listen is not None:
            tell_how_to_join(pool.address, token_source(farm.settings.ray_token))
        for name, why in hosts.farm_devices().refused.items():
            warn(f"{name}: {why}")
        known = farm.inventory.devices
        devices = () if listen is not None and not known else select(known, selector)
        left_out: tuple[StableError, ...] = ()
        if devices and not quarantined:
            devices, left_out = without_quarantined(farm, devices, selector, measures=measures)
        build_agents(hosts.worker, [device for device in devices if hosts.is_own(device.name)], farm.stop)
        yield Session(farm, devices, hosts.worker, pool, hosts, left_out)


def starting(start: Callable[[], T]) -> T:
    """What ``start`` gives, said before: it takes long on a small machine."""
    note("… starting the controller (Ray)")
    return start()


def _say_who_is_waited_for(busy: str) -> None:
    note(f"… waits. {busy}")


def tell_how_to_join(address: str, token: str) -> None:
    """What to do on another machine, once a head node is up; and who else can reach it."""
    success(f"lab hosts can join at {address} (Ray, token authentication on)")
    note(f"  the token is in {token}; on another machine:")
    note(f"    mkdir -p .stifarm && scp {socket.gethostname()}:{token} .stifarm/ray_token")
    note(f"    stifarm host join {address}")
    for finding in exposed_at(address.rpartition(":")[0]):
        warn(f"{finding.subject}: {finding.text}. {finding.remedy}")


def require_relied_on(
    farm: Farm, devices: Sequence[Device], selector: str, *, measures: bool = False
) -> tuple[tuple[Device, ...], Mapping[str, str]]:
    """As ``relied_on``. Raises: SelectorError when none is left; QuarantinedError for one that is named."""
    kept, causes = relied_on(farm, devices, selector, named_too=measures)
    if kept:
        return kept, causes
    if [device.name for device in devices] == [selector]:
        with farm.store.reader() as session:
            refuse_quarantined(session, device_by_name(session, selector).id)
    raise SelectorError(
        f"The device selector {selector!r} selects only devices in quarantine.",
        "See their health: stifarm devices check; or release one: stifarm devices release DEVICE.",
    )


def without_quarantined(
    farm: Farm, devices: Sequence[Device], selector: str, *, measures: bool = False
) -> tuple[tuple[Device, ...], tuple[StableError, ...]]:
    """(the chosen devices that the farm relies on or, unless it ``measures``, that are named; why each of the
    others is left out); the latter are told, too. Raises: as ``require_relied_on``."""
    kept, causes = require_relied_on(farm, devices, selector, measures=measures)
    left_out = tuple(
        StableError(
            f"it is left out, for it is in quarantine: {cause.rstrip('.')}.",
            f"See its health: stifarm devices check {name}; or release it: stifarm devices release {name}.",
            device=name,
        )
        for name, cause in causes.items()
    )
    for error in left_out:
        fail(error)
    return kept, left_out


def build_agents(worker: Worker, devices: Sequence[Device], stop: threading.Event) -> None:
    """Build, with a bar, what the devices will need and is not built yet.

    The worker would build it too, but in silence; what fails here fails there, where it is told of the
    device that it concerns.
    """

    def architecture_of(device: Device) -> str | None:
        with suppress(StifarmError):
            return worker.architecture(device.name)
        return None

    native = [[device] for device in devices if device.native]
    answers = side_by_side(native, architecture_of, stop)
    for architecture in sorted({answer for _, answer in answers if answer is not None}):
        with suppress(ToolchainError):
            if not is_built(architecture):
                with steps() as bars, bars.step(f"build the agent for {architecture}") as bar:
                    build_agent(architecture, progress=bar)


def parse_targets(texts: Sequence[str]) -> list[int]:
    """Target latencies in ns from "100ms,200ms" or repeated options. Raises: InputError."""
    parts = [part.strip() for text in texts for part in text.split(",") if part.strip()]
    if not parts:
        raise InputError("No target latency was given.", "Give one or more: --target 100ms,200ms.")
    try:
        targets = [parse_duration_ns(part) for part in parts]
    except InputError as error:
        raise InputError(f"--target: {error.what}", error.remedy) from error
    if min(targets) <= 0:
        raise InputError("--target: no latency can be 0.", "Give one or more: --target 100ms,200ms.")
    return sorted(set(targets))


def parse_size(text: str, option: str) -> int:
    """A size option. Raises: InputError naming the option."""
    try:
        return parse_bytes(text)
    except InputError as error:
        raise InputError(f"{option}: {error.what}", error.remedy) from error


def since(began: float) -> str:
    """Elapsed time for people; ``began`` is from time.monotonic()."""
    return format_ns(int((time.monotonic() - began) * 1e9))


def method_of(word: str | None) -> Method | None:
    """An importance method by its name. Raises: InputError."""
    for known in METHODS:
        if word == known:
            return known
    if word is not None:
        raise InputError(f"There is no importance method {word!r}.", f"There is: {', '.join(METHODS)}.")
    return None
