"""Verbs about devices: list, discover, probe, clean, take-over; those of holding and check join them."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import typer

from db.devices import latest_facts, list_devices
from db.documents import parse
from db.models import DeviceRow
from orchestrator import fleet
from orchestrator.beside import known_devices
from orchestrator.cli.check import check
from orchestrator.cli.context import (
    FAILED,
    DevicesOption,
    JsonOption,
    Session,
    WaitOption,
    driving,
    farm_of,
)
from orchestrator.cli.discover import discover
from orchestrator.cli.holding import holdings, quarantine_, release, reserve_, unreserve_
from orchestrator.cli.output import emit_json, fail, success, table, warn
from orchestrator.cli.over_devices import failed_json, finish, on_each
from orchestrator.device_facts.seen import Seen
from orchestrator.dispatch import lose_attempts
from orchestrator.doctor import slowed
from orchestrator.farm import ControllerBusyError, Farm
from orchestrator.hosts import OWN
from orchestrator.inventory import Device
from orchestrator.listed import listed_devices
from orchestrator.matching import select
from orchestrator.report import format_age, hardware
from sti_runtime.device_facts import DeviceFacts
from sti_runtime.errors import StifarmError
from sti_runtime.units import NONE, format_bytes

T = TypeVar("T")

devices_app = typer.Typer(no_args_is_help=True, help="The devices of the inventory.")
devices_app.command("discover")(discover)
devices_app.command("check")(check)
devices_app.command("reserve")(reserve_)
devices_app.command("unreserve")(unreserve_)
devices_app.command("quarantine")(quarantine_)
devices_app.command("release")(release)


@devices_app.command("list")
def list_(context: typer.Context, json: JsonOption = False) -> None:
    """List the devices of inventory and hosts: how each is slowed, its hardware when last seen, its holder.

    Example: stifarm devices list
    """
    with farm_of(context, existing=True) as farm:
        with farm.store.reader() as session:
            rows = {row.name: row for row in list_devices(session)}
            latest = {name: latest_facts(session, row.id) for name, row in rows.items()}
            seen = {name: parse(row.facts_json).get("host_seen") for name, row in latest.items() if row}
        found = listed_devices(farm)
        held = holdings(farm)

    def known(device: Device) -> DeviceRow | None:
        row = rows.get(device.name)
        return row if row is not None and found.is_row(device, row) else None

    for name, why in found.refused.items():
        warn(f"{name}: {why}")
    if json:
        emit_json(
            [
                {
                    "name": device.name,
                    "host": host,
                    "transport": device.transport,
                    "engine": device.engine,
                    "emulated": device.emulated,
                    "labels": dict(device.labels),
                    "identity": row.identity if row else None,
                    "seen": seen.get(device.name) if row else None,
                    **held.json(device.name),
                }
                for device, host in found.listed
                for row in [known(device)]
            ]
        )
        return
    on_hosts = any(host != OWN for _, host in found.listed)
    table(
        f"Devices of {farm.settings.inventory.name}{' and of the lab hosts' if on_hosts else ''}",
        (
            "device",
            *(["host"] if on_hosts else []),
            *("transport", "engine", "emulated", "labels", "hardware", "identity", "held"),
        ),
        [
            (
                device.name,
                *(["the controller" if host == OWN else host] if on_hosts else []),
                device.transport,
                device.engine,
                emulated(device),
                " ".join(f"{key}={value}" for key, value in device.labels.items()),
                hardware((seen.get(device.name) if row else None) or {}),
                row.identity if row else "not seen yet",
                held.text(device.name),
            )
            for device, host in found.listed
            for row in [known(device)]
        ],
    )


def emulated(device: Device) -> str:
    """Whether a device is a real one, else how it is slowed."""
    if device.transport == "fake":
        return "fake"
    return "no" if device.emulate is None else slowed(device.emulate)


@devices_app.command("probe")
def probe(
    context: typer.Context, devices: DevicesOption = "all", wait: WaitOption = False, json: JsonOption = False
) -> None:
    """Read devices' facts (CPU, memory, storage, OS) into the store; settle which hardware a name means.

    While another command drives devices none is asked, and the store's own facts are shown (exit code 1).
    Example: stifarm devices probe --devices all
    """
    with farm_of(context) as farm:
        try:
            with driving(farm, devices, quarantined=True, wait=wait) as session:
                found, failed = _probe_all(farm, session, quiet=json)
        except ControllerBusyError as busy:
            _show_known(farm, select(farm.inventory.devices, devices), quiet=json)
            again = context.obj.again(f"devices probe --devices {shlex.quote(devices)} --wait")
            fail(ControllerBusyError(f"{busy.what} No device was asked.", f"When it has ended: {again}"))
            raise typer.Exit(FAILED) from busy
    if json:
        emit_json(
            [
                {
                    "name": device.name,
                    "emulated": device.emulated,
                    **facts.model_dump(mode="json"),
                    "host_seen": dict(seen.values),
                }
                for device, facts, seen in found
            ]
            + [failed_json(device.name, error) for device, error in failed]
        )
    elif found:
        table(
            "Facts",
            FACT_COLUMNS,
            [
                fact_cells(device, facts.model_dump(mode="json"), hardware(seen.stable()))
                for device, facts, seen in found
            ],
        )
    finish([*(error for _, error in failed), *[None for _ in found]])


FACT_COLUMNS = (
    "device", "hardware", "CPU", ">cores", ">memory", "storage", "direct IO", "OS", "kernel", "virtual",
    "emulated",
)  # fmt: skip


def fact_cells(device: Device, facts: Mapping[str, Any], what: str) -> list[str]:
    """A device's facts under ``FACT_COLUMNS``; ``what``: its hardware."""
    storage, memory_bytes = facts["storage"], facts.get("memory_bytes")
    return [
        device.name,
        what,
        facts.get("cpu_model") or "unknown",
        str(len(facts["cpus"])),
        "unknown" if memory_bytes is None else format_bytes(memory_bytes),
        f"{storage.get('filesystem') or '?'} on {storage.get('block_device') or '?'}",
        storage["direct_io"],
        facts.get("os_build") or "unknown",
        facts["kernel"],
        {True: "yes", False: "no", None: "unknown"}[facts.get("virtual_machine")],
        emulated(device),
    ]


def _show_known(farm: Farm, devices: Sequence[Device], *, quiet: bool) -> None:
    """What the store knows of devices, and who holds them; ``quiet``: as one JSON document."""
    known, held = known_devices(farm), holdings(farm)
    if quiet:
        emit_json(
            [
                {
                    "name": device.name,
                    "emulated": device.emulated,
                    **(known[device.name].facts if device.name in known else {}),
                    "seen_ns_ago": known[device.name].age_ns if device.name in known else None,
                    **held.json(device.name),
                }
                for device in devices
            ]
        )
        return
    table(
        "Facts that the store has",
        (*FACT_COLUMNS, "last seen", "held"),
        [
            [
                *fact_cells(device, one.facts, hardware(one.facts.get("host_seen") or {})),
                f"{format_age(one.age_ns)} ago",
                held.text(device.name),
            ]
            if one is not None
            else [device.name, *[NONE] * (len(FACT_COLUMNS) - 1), "never", held.text(device.name)]
            for device in devices
            for one in [known.get(device.name)]
        ],
    )


Probed = tuple[Device, DeviceFacts, Seen]


def _probe_all(
    farm: Farm, session: Session, *, quiet: bool
) -> tuple[list[Probed], list[tuple[Device, StifarmError]]]:
    """Facts read side by side, registered in the order of the devices."""

    def read(device: Device) -> tuple[DeviceFacts, Seen]:
        return session.worker.facts(device.name), session.worker.look(device.name)

    found: list[Probed] = []
    failed: list[tuple[Device, StifarmError]] = []
    for device, answer in on_each(session, "probe", read, quiet=quiet):
        try:
            if isinstance(answer, StifarmError):
                raise answer
            facts, seen = answer
            fleet.register_facts(farm, session.worker, device, facts, seen=seen, replaced=True)
            found.append((device, facts, seen))
        except StifarmError as error:
            fail(error)
            failed.append((device, error))
    return found, failed


@devices_app.command("clean")
def clean(context: typer.Context, devices: DevicesOption, json: JsonOption = False) -> None:
    """Remove everything of ours from devices: bundles, task rows, jobs, journals.

    What is in the store stays. Example: stifarm devices clean --devices board-slow-io
    """
    with farm_of(context) as farm, driving(farm, devices, quarantined=True) as session:

        def clean_one(device: Device) -> dict[str, Any]:
            device_id = fleet.device_to_clean(farm, session.worker, device)
            with fleet.leased(farm, device_id) as lease:
                answer = session.worker.clean(device.name, lease)
            lose_attempts(farm.store, device.name)
            return {"device": device.name, **answer}

        cleaned = on_each(session, "clean", clean_one, quiet=json)
    _tell(cleaned, "clean", quiet=json)
    if json:
        emit_json([_document(device, answer) for device, answer in cleaned])
    finish([answer if isinstance(answer, StifarmError) else None for _, answer in cleaned])


def _document(device: Device, answer: T | StifarmError) -> T | dict[str, str]:
    return failed_json(device.name, answer) if isinstance(answer, StifarmError) else answer


def _tell(answers: Sequence[tuple[Device, object]], done: str, *, quiet: bool) -> None:
    """A line for each device, in their order."""
    for device, answer in answers:
        if isinstance(answer, StifarmError):
            fail(answer)
        elif not quiet:
            success(f"{device.name}: {done}")


@devices_app.command("take-over")
def take_over(context: typer.Context, devices: DevicesOption, json: JsonOption = False) -> None:
    """Make this farm the owner of devices that belonged to another one.

    The other farm's jobs there end before their next unit, and its commands are refused from now on.
    Example: stifarm devices take-over --devices phone-a
    """
    with farm_of(context) as farm, driving(farm, devices, quarantined=True) as session:

        def take(device: Device) -> str:
            device_id, _ = fleet.probe_device(farm, session.worker, device)
            with fleet.leased(farm, device_id) as lease:
                session.worker.take_over(device.name, lease)
            return device.name

        taken = on_each(session, "take over", take, quiet=json)
    _tell(taken, "belongs to this farm", quiet=json)
    if json:
        emit_json([_document(device, answer) for device, answer in taken])
    finish([answer if isinstance(answer, StifarmError) else None for _, answer in taken])
