"""Devices made ready: probed, registered in the store, their emulation verified, their content deployed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy.orm import Session

from db.artifacts import list_bundles, list_tasks, task_data
from db.devices import find_device, latest_facts, list_devices, record_facts, register_device, set_agent
from db.documents import parse
from db.leases import LeaseGrant, release_lease, renew_lease
from orchestrator.counterpart import missing_engine, other_protocol, refuse_replaced
from orchestrator.deploy import DeployReport
from orchestrator.device_facts.seen import Seen
from orchestrator.dispatch import LEASE_TTL_NS, Worker, take_lease
from orchestrator.errors import DeviceError, StableError
from orchestrator.farm import Farm
from orchestrator.hosts import OWN
from orchestrator.inventory import Device
from orchestrator.jobs import DeviceTarget
from sti_runtime.device_facts import DeviceFacts
from sti_runtime.errors import StifarmError
from sti_runtime.journal_format import PROTOCOL_VERSION
from sti_runtime.messages import Emulation, Lease

QUEUE_DEPTH = 4
"""Reads in flight on a device: enough to fill one eMMC or virtio queue without starving compute."""

_VOLATILE = {"wall_ns", "thermal_zones"}


@dataclass(frozen=True)
class ReadyDevice:
    """A device that can be given jobs. ``mechanism``: what slows it, "" for a real one."""

    device: Device
    device_id: int
    facts: DeviceFacts
    target: DeviceTarget
    mechanism: str
    reasons: tuple[str, ...]

    @property
    def name(self) -> str:
        """The inventory's name."""
        return self.device.name


def probe_device(farm: Farm, worker: Worker, device: Device) -> tuple[int, DeviceFacts]:
    """Read a device's facts and register both in the store; (row id, facts). Raises: DeviceError."""
    facts = worker.facts(device.name)
    return register_facts(farm, worker, device, facts), facts


def device_to_clean(farm: Farm, worker: Worker, device: Device) -> int:
    """Row id of a device that is to be cleaned; one whose facts cannot be had or believed (its disk is too
    full for an agent, its agent lies) is the one last seen under its name. Raises: DeviceError."""
    try:
        facts = worker.facts(device.name)
    except StableError:
        with farm.store.reader() as session:
            known = next((row.id for row in list_devices(session) if row.name == device.name), None)
        if known is None:
            raise
        return known
    return register_facts(farm, worker, device, facts)


def register_facts(
    farm: Farm,
    worker: Worker,
    device: Device,
    facts: DeviceFacts,
    *,
    seen: Seen | None = None,
    replaced: bool = False,
) -> int:
    """Bring a device and what is known of it into the store; its row id. ``seen`` None: as it was last.

    Raises: StableError for another protocol, other hardware behind the name (unless ``replaced``), two names
    for one device.
    """
    if facts.protocol != PROTOCOL_VERSION:
        raise other_protocol(device.name, str(facts.protocol))
    with farm.registering:
        _refuse_doubles(farm, worker, device, facts)
        return _register(farm, device, facts, seen, replaced=replaced)


def _register(farm: Farm, device: Device, facts: DeviceFacts, seen: Seen | None, *, replaced: bool) -> int:
    with farm.store.session() as session:
        if not replaced:
            _refuse_replaced(session, device, facts)
        row = register_device(
            session,
            identity=facts.identity,
            name=device.name,
            transport=device.transport,
            engine=device.engine,
            emulated=device.emulated,
            host=device.host,
            labels=device.labels,
        )
        set_agent(session, row.id, facts.agent_digest)
        record_facts(
            session,
            row.id,
            {
                **stable_facts(facts),
                "host_seen": _seen_before(session, row.id) if seen is None else seen.stable(),
            },
            boot_id=facts.boot_id,
            os_build=facts.os_build,
            kernel=facts.kernel,
        )
        return row.id


def _refuse_replaced(session: Session, device: Device, facts: DeviceFacts) -> None:
    """Raises: StableError when the store knows other hardware under the device's name."""
    before = find_device(session, name=device.name)
    if before is not None:
        refuse_replaced(device.name, before=before.identity, now=facts.identity)


def _refuse_doubles(farm: Farm, worker: Worker, device: Device, facts: DeviceFacts) -> None:
    """Raises: StableError when another name of the inventory leads to the same device now."""
    with farm.store.reader() as session:
        row = find_device(session, identity=facts.identity)
    known = None if row is None else row.name
    other = next((one for one in farm.inventory.devices if one.name == known), None)
    if other is None or other.name == device.name:
        return
    try:
        same = worker.facts(other.name).identity == facts.identity
    except DeviceError:
        return  # it cannot be asked now: the device may as well have moved to this name
    if same:
        raise StableError(
            f"it is the same device as {other.name} ({facts.identity}): "
            f"{_lines(farm, worker, other, device)} lead to it.",
            "Keep one of the two names.",
            device=device.name,
        )


def _lines(farm: Farm, worker: Worker, one: Device, other: Device) -> str:
    """Where two devices are listed, each in the inventory of its host."""

    def inventory_of(host: str) -> str:
        return farm.settings.inventory.name if host == OWN else f"the inventory of lab host {host}"

    first, second = inventory_of(worker.host(one.name)), inventory_of(worker.host(other.name))
    if first == second:
        return f"lines {one.line} and {other.line} of {first}"
    return f"line {one.line} of {first} and line {other.line} of {second}"


def _seen_before(session: Session, device_id: int) -> Any:
    """What the host saw when it looked last; None when it never did."""
    latest = latest_facts(session, device_id)
    return None if latest is None else parse(latest.facts_json).get("host_seen")


def stable_facts(facts: DeviceFacts) -> dict[str, Any]:
    """Facts without what changes from minute to minute: a new row means that the device changed."""
    kept: dict[str, Any] = facts.model_dump(mode="json", exclude=_VOLATILE)
    kept["storage"].pop("free_bytes", None)
    return kept


def ready_device(farm: Farm, worker: Worker, device: Device, bundle: str) -> ReadyDevice:
    """Probe a device and settle how it is slowed and used; ``bundle`` is deployed there.

    Raises: DeviceError, LeaseHeldError.
    """
    device_id, facts = probe_device(farm, worker, device)
    missing = missing_engine(device, facts)
    if missing is not None:
        raise missing
    resolved = None
    if device.emulate is not None:
        with leased(farm, device_id) as lease:
            resolved = worker.emulation(device.name, lease, bundle)
    emulation = None if resolved is None else resolved.emulation
    target = device_target(farm, device, facts, emulation)
    parts = []
    if emulation is not None and emulation.io_mechanism is not None:
        parts.append(f"read {emulation.io_mechanism}")
    if emulation is not None and emulation.cpu_mechanism is not None:
        parts.append(f"CPU {emulation.cpu_mechanism}")
    return ReadyDevice(
        device=device,
        device_id=device_id,
        facts=facts,
        target=target,
        mechanism=", ".join(parts),
        reasons=() if resolved is None else resolved.reasons,
    )


def device_target(
    farm: Farm, device: Device, facts: DeviceFacts, emulation: Emulation | None
) -> DeviceTarget:
    """What jobs need to know of a device, slowed as ``emulation`` says."""
    return DeviceTarget(
        identity=facts.identity,
        engine=device.engine,
        threads=device.threads or len(device.cpus) or max(1, len(facts.cpus)),
        queue_depth=QUEUE_DEPTH,
        cpus=device.cpus,
        machine_lock=device.shared_machine(farm.settings.machine_lock),
        emulation=emulation,
        gates=device.gates,
        settings=device.prepare.settings,
    )


@dataclass(frozen=True)
class Deployed:
    """What a deploy did to one device, or why it failed."""

    device: str
    reports: tuple[DeployReport, ...]
    error: StifarmError | None


@contextmanager
def leased(farm: Farm, device_id: int) -> Iterator[Lease]:
    """Hold a device for the length of the block, renewed as long as it lasts; its fencing token.

    Raises: LeaseHeldError.
    """
    with farm.store.session() as session:
        grant = take_lease(session, device_id, farm.owner)
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(farm, grant, ended), daemon=True)
    renewing.start()
    try:
        yield Lease(store=farm.store.store_id, counter=grant.counter, takeover=False)
    finally:
        ended.set()
        renewing.join()
        with farm.store.session() as session:
            release_lease(session, grant)


def _renew(farm: Farm, grant: LeaseGrant, ended: threading.Event) -> None:
    """Renew a lease until ``ended``. One that is lost is not fought for: the agent's fence decides."""
    while not ended.wait(LEASE_TTL_NS / 4e9):
        try:
            with farm.store.session() as session:
                renew_lease(session, grant, LEASE_TTL_NS)
        except StifarmError as error:
            structlog.get_logger(__name__).warning("a lease is not renewed", cause=error.what)
            return


def deploy(
    farm: Farm,
    worker: Worker,
    devices: Sequence[Device],
    bundle: Path,
    tasks: Sequence[Path],
    *,
    verify: bool = False,
    done: Callable[[Deployed], None] | None = None,
) -> list[Deployed]:
    """Bring a bundle and task data to devices and remove content that is current nowhere any more; one
    device's failure stops no other. ``verify``: read all of it back there and check its digests. Other
    hardware than the store knows under a name is told at the first question, and gets nothing.
    """
    with farm.store.reader() as session:
        known = {row.name: (row.id, row.identity) for row in list_devices(session)}
    results = []
    for device in devices:
        reports: list[DeployReport] = []
        error: StifarmError | None = None
        try:
            device_id, identity = known.get(device.name) or _probed(farm, worker, device)
            with leased(farm, device_id) as lease:
                reports.extend(worker.deploy(device.name, bundle, tasks, lease, identity))
                if any(not report.already for report in reports):
                    worker.collect(device.name, current_content(farm), lease)
                if verify:
                    worker.verify(device.name, bundle.name)
        except StifarmError as failed:
            error = failed
        results.append(Deployed(device.name, tuple(reports), error))
        if done is not None:
            done(results[-1])
    return results


def _probed(farm: Farm, worker: Worker, device: Device) -> tuple[int, str]:
    device_id, facts = probe_device(farm, worker, device)
    return device_id, facts.identity


def current_content(farm: Farm) -> tuple[str, ...]:
    """Digests that devices may keep: the newest bundle of every name and all task data of the store."""
    with farm.store.reader() as session:
        bundles = {row.name: row.digest for row in reversed(list_bundles(session))}
        rows = [row.digest for task in list_tasks(session) for row in task_data(session, task.name)]
    return (*bundles.values(), *rows)
