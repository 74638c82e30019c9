"""lab up, status, fault, down: virtual boards and phones on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.context import JsonOption, parse_size
from orchestrator.cli.output import emit_json, note, steps, success, table, warn
from orchestrator.lab import fault as faults
from orchestrator.lab import up as lab_up
from orchestrator.lab.disk import DISK_BYTES
from orchestrator.lab.means import readable_path
from orchestrator.lab.state import DEFAULT_FOLDER, FaultKind, Lab
from orchestrator.lab.status import device_states
from sti_runtime.errors import InputError
from sti_runtime.units import many, parse_duration_ns

lab_app = typer.Typer(
    no_args_is_help=True, help="A virtual lab: boards and phones on this machine, without hardware."
)

RESTORE = "restore"

DirOption = Annotated[Path, typer.Option("--dir", help="The lab's folder; lab down removes it.")]


@lab_app.command("up")
def up(
    context: typer.Context,
    boards: Annotated[int | None, typer.Option(min=0, help="Virtual boards (ssh); 2 in a new lab.")] = None,
    phones: Annotated[int | None, typer.Option(min=0, help="Virtual phones (adb); 2 in a new lab.")] = None,
    disk: Annotated[
        str | None, typer.Option(help="Size of a device's disk, where it has its own; 2GiB.")
    ] = None,
    folder: DirOption = DEFAULT_FOLDER,
    json: JsonOption = False,
) -> None:
    """Start virtual boards and phones and write an inventory for them. Again: what died is started again.

    Example: stifarm lab up --boards 2 --phones 2
    """
    disk_bytes = DISK_BYTES if disk is None else parse_size(disk, "--disk")
    lab = Lab(folder.absolute())
    new = not lab.state_file.exists()
    try:
        with steps(quiet=json) as bars:
            upped = lab_up.up(
                folder,
                boards=boards,
                phones=phones,
                disk_bytes=disk_bytes,
                tell=lambda what, done, total: bars.show("lab", f"lab: {what}", done, total),
            )
    except KeyboardInterrupt:
        context.obj.interrupted = _left(lab, new=new)
        raise
    inventory = readable_path(upped.lab.inventory)
    if json:
        emit_json(
            {
                "folder": str(upped.lab.folder),
                "inventory": str(upped.lab.inventory),
                "isolation": upped.state.means.isolation,
                "started": list(upped.started),
                "devices": device_states(upped.lab),
            }
        )
        return
    success(f"lab up: {many(len(upped.devices), 'device')}, {len(upped.started)} of them started now")
    for reason in upped.state.means.reasons:
        warn(reason)
    note(f"  next: stifarm --inventory {inventory} demo")


def _left(lab: Lab, *, new: bool) -> str:
    """What an interrupted lab up left behind."""
    if not new:
        return "what it had started was stopped again, what ran before runs"
    if not lab.folder.exists():
        return "everything that it had made was removed again"
    return f"not everything that it had made is removed yet: stifarm lab down{lab.option}"


@lab_app.command("status")
def status(folder: DirOption = DEFAULT_FOLDER, json: JsonOption = False) -> None:
    """Show the lab's devices: state, address, boot id, limits, faults.

    Example: stifarm lab status
    """
    lab = Lab(folder.absolute())
    state = lab.state()
    found = device_states(lab)
    if json:
        means = state.means.model_dump(mode="json")
        emit_json(
            {"folder": str(lab.folder), "inventory": str(lab.inventory), "means": means, "devices": found}
        )
        return
    table(
        f"Lab {lab.id} in {readable_path(lab.folder)}",
        ["device", "state", "address", "boot id", "limits", "faults"],
        [
            [
                each["name"],
                each["state"],
                each["address"],
                (each["boot_id"] or "")[:8],
                each["limits"],
                ", ".join(f"{active['fault']} (began {active['since_s']} s ago)" for active in each["faults"])
                or "none",
            ]
            for each in found
        ],
    )
    for each in found:
        for reason in each["notes"]:
            note(f"  {each['name']}: {reason}")


@lab_app.command("down")
def down(
    context: typer.Context,
    keep: Annotated[bool, typer.Option("--keep", help="Stop everything, keep the files.")] = False,
    folder: DirOption = DEFAULT_FOLDER,
    json: JsonOption = False,
) -> None:
    """Stop the lab and remove everything of it: processes, links, limits, and its folder with what is in it.

    Example: stifarm lab down
    """
    context.obj.interrupted = "the lab is not all taken down; run the same command again"
    names = lab_up.down(folder, keep=keep)
    if json:
        emit_json({"folder": str(folder.absolute()), "devices": list(names), "kept": keep})
    else:
        kept = f"; its files stay in {readable_path(folder.absolute())}" if keep else ""
        success(f"lab down: {many(len(names), 'device')} stopped, nothing of them runs any more{kept}")


@lab_app.command("fault")
def fault(
    context: typer.Context,
    device: Annotated[str, typer.Argument(help="A device of the lab.")],
    kind: Annotated[str, typer.Argument(metavar="FAULT", help=f"{', '.join(faults.KINDS)}, or {RESTORE}.")],
    duration: Annotated[str | None, typer.Option("--for", help="End it after this time: 5s, 2min.")] = None,
    ending: Annotated[bool, typer.Option("--restore", help="End this fault instead of starting it.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Chooses the byte that corrupt flips.")] = 0,
    folder: DirOption = DEFAULT_FOLDER,
    json: JsonOption = False,
) -> None:
    """Inject a fault into a device of the lab, or end it; without --for it stays until it is ended.

    Example: stifarm lab fault board-1 cut --for 5s
    """
    lab = Lab(folder.absolute())
    if kind == RESTORE or ending:
        ended = faults.restore(lab, device, None if kind == RESTORE else faults.parse_kind(kind))
        _tell(
            json,
            device,
            "ended",
            list(ended),
            f"{device}: ended {', '.join(ended) or 'nothing, it had no such fault'}",
        )
        return
    chosen = faults.parse_kind(kind)
    limit_s = _duration_s(duration, chosen)
    context.obj.interrupted = f"{device} has no fault {chosen} any more"
    if limit_s is None:
        faults.inject(lab, device, chosen, seed=seed)
        _tell(json, device, "active", [chosen], f"{device}: {chosen}")
        if not json:
            note(f"  end it: stifarm lab fault {device} {RESTORE}{lab.option}")
        return
    with steps(quiet=json) as bars, bars.step(f"{device}: {chosen} for {limit_s:g} s"):
        faults.hold(lab, device, chosen, limit_s, seed=seed)
    _tell(json, device, "ended", [chosen], f"{device}: {chosen}, over after {limit_s:g} s")


def _duration_s(text: str | None, kind: FaultKind) -> float | None:
    if text is None:
        return faults.DEFAULT_S.get(kind)
    try:
        return parse_duration_ns(text) / 1e9
    except InputError as error:
        raise InputError(f"--for: {error.what}", error.remedy) from error


def _tell(json: bool, device: str, what: str, kinds: list[FaultKind], text: str) -> None:
    if json:
        emit_json({"device": device, what: kinds})
    else:
        success(text)
