"""Verbs about devices: list, probe, clean; doctor."""

from __future__ import annotations

from dataclasses import dataclass

import typer

from db.devices import list_devices
from orchestrator import fleet
from orchestrator.cli.context import DevicesOption, JsonOption, Session, driving, farm_of
from orchestrator.cli.output import emit_json, fail, note, success, table
from orchestrator.cli.over_devices import finish
from orchestrator.dispatch import lose_attempts
from orchestrator.farm import Farm
from orchestrator.inventory import Device
from sti_runtime.device_facts import DeviceFacts
from sti_runtime.errors import StifarmError
from sti_runtime.units import format_bytes, format_rate

devices_app = typer.Typer(no_args_is_help=True, help="The devices of the inventory.")


@devices_app.command("list")
def list_(context: typer.Context, json: JsonOption = False) -> None:
    """List the inventory's devices, how each is slowed, and the hardware last seen under its name.

    Example: stifarm devices list
    """
    with farm_of(context) as farm:
        with farm.store.reader() as session:
            known = {row.name: row for row in list_devices(session)}
        devices = farm.inventory.devices
    if json:
        emit_json(
            [
                {
                    "name": device.name,
                    "transport": device.transport,
                    "engine": device.engine,
                    "emulated": device.emulated,
                    "labels": dict(device.labels),
                    "identity": known[device.name].identity if device.name in known else None,
                }
                for device in devices
            ]
        )
        return
    table(
        f"Devices of {farm.settings.inventory.name}",
        ("device", "transport", "engine", "slowed to", "labels", "identity"),
        [
            (
                device.name,
                device.transport,
                device.engine,
                slowed(device),
                " ".join(f"{key}={value}" for key, value in device.labels.items()),
                known[device.name].identity if device.name in known else "not seen yet",
            )
            for device in devices
        ],
    )


def slowed(device: Device) -> str:
    """How the inventory wants a device slowed."""
    spec = device.emulate
    if spec is None:
        return "–"
    parts = []
    if spec.read_bytes_per_s is not None:
        parts.append(f"reads {format_rate(spec.read_bytes_per_s)}")
    if spec.cpu_share_milli is not None:
        parts.append(f"CPU {spec.cpu_share_milli / 10:g} %")
    return ", ".join(parts)


@devices_app.command("probe")
def probe(context: typer.Context, devices: DevicesOption = "all", json: JsonOption = False) -> None:
    """Read devices' facts (CPU, memory, storage, OS) into the store.

    Example: stifarm devices probe --devices all
    """
    with farm_of(context) as farm, driving(farm, devices) as session:
        found, errors = _probe_all(farm, session)
    if json:
        emit_json([facts.model_dump(mode="json") for _, facts in found])
    else:
        table(
            "Facts",
            ("device", "CPU", ">cores", ">memory", "storage", "direct IO", "OS", "kernel", "virtual"),
            [
                (
                    device.name,
                    facts.cpu_model or "unknown",
                    str(len(facts.cpus)),
                    "unknown" if facts.memory_bytes is None else format_bytes(facts.memory_bytes),
                    f"{facts.storage.filesystem or '?'} on {facts.storage.block_device or '?'}",
                    facts.storage.direct_io,
                    facts.os_build or "unknown",
                    facts.kernel,
                    {True: "yes", False: "no", None: "unknown"}[facts.virtual_machine],
                )
                for device, facts in found
            ],
        )
    finish([*errors, *[None for _ in found]])


def _probe_all(farm: Farm, session: Session) -> tuple[list[tuple[Device, DeviceFacts]], list[StifarmError]]:
    found: list[tuple[Device, DeviceFacts]] = []
    errors: list[StifarmError] = []
    for device in session.devices:
        try:
            found.append((device, fleet.probe_device(farm, session.worker, device)[1]))
        except StifarmError as error:
            fail(error)
            errors.append(error)
    return found, errors


@devices_app.command("clean")
def clean(context: typer.Context, devices: DevicesOption, json: JsonOption = False) -> None:
    """Remove everything of ours from devices: bundles, task rows, jobs, journals.

    What is in the store stays. Example: stifarm devices clean --devices board-slow-io
    """
    errors: list[StifarmError | None] = []
    answers = []
    with farm_of(context) as farm, driving(farm, devices) as session:
        for device in session.devices:
            try:
                device_id, _ = fleet.probe_device(farm, session.worker, device)
                with fleet.leased(farm, device_id) as lease:
                    answer = session.worker.clean(device.name, lease)
                answers.append({"device": device.name, **answer})
                lose_attempts(farm.store, device.name)
                errors.append(None)
                if not json:
                    success(f"{device.name}: clean")
            except StifarmError as error:
                fail(error)
                errors.append(error)
    if json:
        emit_json(answers)
    finish(errors)


# ------------------------------------------------------------------ doctor


@dataclass(frozen=True)
class Finding:
    """One thing looked at. ``state``: ok, note or problem."""

    subject: str
    state: str
    text: str
    remedy: str = ""


def doctor(context: typer.Context, devices: DevicesOption = "all", json: JsonOption = False) -> None:
    """Say for this host and every device what works, what does not, and how to mend it.

    Example: stifarm doctor
    """
    with farm_of(context) as farm:
        findings = [Finding("store", "ok", farm.store.url)]
        inventory = farm.inventory
        findings.append(
            Finding("inventory", "ok", f"{farm.settings.inventory}: {len(inventory.devices)} devices")
        )
        with driving(farm, devices) as session:
            findings.append(
                Finding(
                    "Ray", "ok", f"started in {session.pool_start_seconds:.1f} s, token authentication on"
                )
            )
            for device in session.devices:
                findings += _device_findings(farm, session, device)
    if json:
        emit_json([finding.__dict__ for finding in findings])
    else:
        marks = {"ok": "✓", "note": "!", "problem": "✗"}
        table(
            "Doctor",
            ("", "subject", "finding", "what to do"),
            [(marks[f.state], f.subject, f.text, f.remedy) for f in findings],
        )
    problems = [f for f in findings if f.state == "problem"]
    note(f"{len(problems)} problems" if problems else "no problems")
    raise typer.Exit(1 if problems else 0)


def _device_findings(farm: Farm, session: Session, device: Device) -> list[Finding]:
    try:
        _, facts = fleet.probe_device(farm, session.worker, device)
    except StifarmError as error:
        return [Finding(device.name, "problem", error.what, error.remedy)]
    found = [
        Finding(
            device.name,
            "ok",
            ", ".join(
                [
                    facts.cpu_model or facts.architecture,
                    f"{len(facts.cpus)} CPUs",
                    *facts.gpus,
                    f"agent {facts.agent}",
                ]
            ),
        )
    ]
    if facts.torch is None and not device.native:
        found.append(
            Finding(device.name, "problem", "no PyTorch for the torch engine", "Install torch there.")
        )
    if facts.storage.direct_io != "works":
        found.append(
            Finding(
                device.name,
                "note",
                f"direct IO below {facts.storage.path}: {facts.storage.direct_io}",
                "Cold reads then rest on evicting the page cache and are checked by bytes read; "
                "a workdir on ext4, xfs or f2fs is better.",
            )
        )
    if facts.storage.free_bytes < 1 << 30:
        found.append(
            Finding(
                device.name,
                "note",
                f"{format_bytes(facts.storage.free_bytes)} free below {facts.storage.path}",
                "Free some space or set another workdir in the inventory.",
            )
        )
    found += [Finding(device.name, "note", text) for text in facts.notes]
    return found
