"""The verb deploy."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from orchestrator import fleet
from orchestrator.cli.context import (
    BundleOption,
    DevicesOption,
    JsonOption,
    TaskOption,
    driving,
    farm_of,
    since,
)
from orchestrator.cli.output import (
    emit_json,
    fail,
    note,
    table,
)
from orchestrator.cli.over_devices import deploy_all, finish
from orchestrator.library import find_bundle, only_task
from orchestrator.measure import Work
from sti_runtime.units import NONE, format_bytes


def deploy(
    context: typer.Context,
    devices: DevicesOption = "all",
    bundle: BundleOption = None,
    task: TaskOption = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read everything back on the devices and check its digests.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Bring a bundle and its task's rows to devices; what they have already is not sent again.

    What a device said it has is believed: --verify finds what was damaged on its storage since, and the
    next deploy sends that anew.
    Example: stifarm deploy --devices all
    """
    with farm_of(context, for_devices=True) as farm:
        known = find_bundle(farm, bundle)
        work = Work.of(farm, known, only_task(farm, task, known))
        with driving(farm, devices) as session:
            began = time.monotonic()
            results = deploy_all(session, work, verify=verify, quiet=json)
            note(f"deployed in {since(began)}")
            left_out = [fleet.Deployed(error.device, (), error) for error in session.left_out]
    if json:
        emit_json([_deployed_json(item) for item in [*results, *left_out]])
    else:
        show_deployed([*results, *left_out])
    for item in results:
        if item.error is not None:
            fail(item.error)
    finish([item.error for item in [*results, *left_out]])


def show_deployed(results: Sequence[fleet.Deployed]) -> None:
    """The table of a deploy."""
    rows = []
    for item in results:
        sent, total = sum(r.bytes_sent for r in item.reports), sum(r.bytes_total for r in item.reports)
        if item.error is not None:
            rows.append((item.device, NONE, NONE, "failed"))
        elif all(r.already for r in item.reports):
            rows.append((item.device, "0 B", f"{sum(r.seconds for r in item.reports):.2f} s", "had it all"))
        else:
            seconds = sum(r.seconds for r in item.reports)
            rows.append(
                (item.device, f"{format_bytes(sent)} of {format_bytes(total)}", f"{seconds:.2f} s", "ok")
            )
    table("Deploy", ("device", ">sent", ">time", "result"), rows)


def _deployed_json(item: fleet.Deployed) -> dict[str, Any]:
    return {
        "device": item.device,
        "sent_bytes": sum(r.bytes_sent for r in item.reports),
        "seconds": sum(r.seconds for r in item.reports),
        "already": bool(item.reports) and all(r.already for r in item.reports),
        "error": None if item.error is None else item.error.what,
        "remedy": None if item.error is None else item.error.remedy.strip(),
    }
