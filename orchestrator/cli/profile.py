"""The verb profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
from orchestrator.cli.output import Bar, emit_json, table, warn
from orchestrator.cli.over_devices import each_device, failed_json, finish
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
        with driving(farm, devices, measures=again) as session:
            done, failed = profile_all(session, work, again=again, quiet=json)
            failed |= {error.device: error for error in session.left_out}
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
            + [failed_json(name, error) for name, error in failed.items()]
        )
    else:
        show_profiles(done, known, failed)
    finish([*failed.values(), *[None for _ in done]])


def profile_all(
    session: Session, work: Work, *, again: bool = False, quiet: bool = False
) -> tuple[list[measure.Profiled], dict[str, StifarmError]]:
    """Profile every chosen device: (profiles, errors by device); what fails is told and stops no other."""

    def one(ready: ReadyDevice, bar: Bar) -> measure.Profiled:
        return measure.profile_device(session.farm, session.worker, ready, work, again=again, advance=bar)

    return each_device(session, work, "profile", one, quiet=quiet)


def show_profiles(
    done: Sequence[measure.Profiled], bundle: KnownBundle, failed: Mapping[str, StifarmError]
) -> None:
    """The table of device profiles, with why each of the others has none; what to do about unfit ones."""
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
        [
            *(report.profile_row(item.device, item.profile, sizes) for item in done),
            *(report.no_profile_row(name, error) for name, error in failed.items()),
        ],
    )
    for item in done:
        if item.profile.unfit:
            warn(report.unfit_advice(item.device))
