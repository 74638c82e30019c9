"""devices check: the health of devices, which is also what ends a quarantine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from db.quarantine import PASSES_TO_RELEASE
from orchestrator.cli.context import DevicesOption, JsonOption, driving, farm_of
from orchestrator.cli.output import emit_json, fail, listing, note, success, warn
from orchestrator.cli.over_devices import finish, on_each
from orchestrator.errors import StableError
from orchestrator.health.check import Checked, check_device
from orchestrator.health.recovery import recover
from orchestrator.inventory import Device
from sti_runtime.errors import StifarmError

_MARKS = {"pass": "✓", "ungated": "!", "fail": "✗"}


def check(
    context: typer.Context,
    devices: DevicesOption = "all",
    recover_: Annotated[
        bool, typer.Option("--recover", help="Try to get back a device that is not well, step by step.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Check the health of devices, those in quarantine too: reach, agent, identity, a probe, and sensors.

    Passing 3 checks in a row ends a quarantine. Exit code 1 or 3 when devices are not well.
    Example: stifarm devices check --devices all
    """
    with farm_of(context) as farm, driving(farm, devices, quarantined=True) as session:

        def one(device: Device) -> Checked:
            checked = check_device(farm, session.worker, device)
            if recover_ and not checked.passed and checked.known:
                recover(
                    farm,
                    session.worker,
                    device,
                    _cause(checked),
                    in_reach=lambda name: session.hosts is None or session.hosts.in_reach(name),
                )
                checked = check_device(farm, session.worker, device)
            return checked

        answers = on_each(session, "check", one, quiet=json)
    found = [answer for _, answer in answers if isinstance(answer, Checked)]
    if json:
        emit_json([_document(checked) for checked in found])
    errors: list[StifarmError | None] = []
    for device, answer in answers:
        if isinstance(answer, StifarmError):
            fail(answer)
            errors.append(answer)
            continue
        if not json:
            listing(
                f"Health of {device.name}",
                [(_MARKS[item.verdict], item.item, item.detail, "") for item in answer.items],
            )
        if answer.released:
            success(f"{device.name} is out of quarantine")
        elif answer.quarantined is not None:
            warn(still_held(answer))
        errors.append(None if answer.passed else _unwell(answer))
    well = sum(error is None for error in errors)
    note(f"{well} of {len(errors)} devices are well")
    finish(errors)


def still_held(checked: Checked) -> str:
    """How far a device in quarantine is from its release."""
    left = PASSES_TO_RELEASE - checked.passes
    return (
        f"{checked.device} stays in quarantine: {checked.passes} of {PASSES_TO_RELEASE} checks in a row "
        f"passed, {left} more {'releases' if left == 1 else 'release'} it; why it is there: "
        f"{checked.quarantined}"
    )


def _cause(checked: Checked) -> str:
    return "; ".join(f"{item.item}: {item.detail}" for item in checked.items if item.verdict != "pass")


def _unwell(checked: Checked) -> StifarmError:
    return StableError(_cause(checked), device=checked.device)


def _document(checked: Checked) -> dict[str, object]:
    return {
        "device": checked.device,
        "passed": checked.passed,
        "released": checked.released,
        "quarantine": {
            "cause": checked.quarantined,
            "passes": checked.passes,
            "passes_to_release": PASSES_TO_RELEASE,
        }
        if checked.quarantined is not None
        else None,
        "job": checked.job_id,
        "results": [asdict(item) for item in checked.items],
    }
