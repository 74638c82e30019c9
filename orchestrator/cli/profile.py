"""The verb profile."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from orchestrator import measure, report
from orchestrator.cli.context import (
    AgainOption,
    BundleOption,
    DevicesOption,
    JsonOption,
    Session,
    TaskOption,
    driving,
    farm_of,
)
from orchestrator.cli.output import Bar, emit_json, table
from orchestrator.cli.over_devices import each_device, failures_json, finish
from orchestrator.fleet import ReadyDevice
from orchestrator.library import KnownBundle, find_bundle, only_task
from orchestrator.measure import Work
from sti_runtime.errors import StifarmError


def profile(
    context: typer.Context,
    devices: DevicesOption = "all",
    bundle: BundleOption = None,
    task: TaskOption = None,
    again: AgainOption = False,
    json: JsonOption = False,
) -> None:
    """Measure how fast devices read and compute a bundle, and fit their latency profiles.

    Example: stifarm profile --devices all
    """
    with farm_of(context, for_devices=True) as farm:
        known = find_bundle(farm, bundle)
        work = Work.of(farm, known, only_task(farm, task, known))
        with driving(farm, devices) as session:
            done, errors = profile_all(session, work, again=again, quiet=json)
            errors += session.left_out
    if json:
        emit_json(
            [
                {
                    "device": p.device,
                    "ran": p.ran,
                    "digest": p.profile.digest,
                    **p.profile.model_dump(mode="json"),
                }
                for p in done
            ]
            + failures_json(errors)
        )
    else:
        show_profiles(done, known)
    finish([*errors, *[None for _ in done]])


def profile_all(
    session: Session, work: Work, *, again: bool = False, quiet: bool = False
) -> tuple[list[measure.Profiled], list[StifarmError]]:
    """Profile every chosen device; what fails is reported and stops no other."""

    def one(ready: ReadyDevice, bar: Bar) -> measure.Profiled:
        return measure.profile_device(session.farm, session.worker, ready, work, again=again, advance=bar)

    return each_device(session, work, "profile", one, quiet=quiet)


def show_profiles(done: Sequence[measure.Profiled], bundle: KnownBundle) -> None:
    """The table of device profiles."""
    manifest = bundle.manifest
    sizes = [
        manifest.shard_version(0, 0, k).length
        for k in (
            manifest.fidelities[0],
            manifest.fidelities[len(manifest.fidelities) // 2],
            manifest.fidelities[-1],
        )
    ]
    table(
        "Device profiles (p95 figures, as planning uses them)",
        report.PROFILE_COLUMNS,
        [report.profile_row(item.device, item.profile, sizes) for item in done],
    )
