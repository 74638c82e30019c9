"""The verbs importance and profile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

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
from orchestrator.cli.output import (
    Bar,
    emit_json,
    note,
    steps,
    success,
    table,
    warn,
)
from orchestrator.cli.over_devices import each_device, failures_json, finish
from orchestrator.farm import Farm, controlling
from orchestrator.fleet import ReadyDevice
from orchestrator.library import DEV_SPLIT, KnownBundle, find_bundle, model_of, only_task, task_rows
from orchestrator.measure import Work
from sti_runtime.errors import StifarmError
from sti_runtime.importance_profile import ImportanceProfile

# ------------------------------------------------------------------ importance


def importance(
    context: typer.Context,
    bundle: BundleOption = None,
    task: TaskOption = None,
    rows: Annotated[int, typer.Option(min=1, help="Labelled rows of the profile split to score on.")] = 500,
    json: JsonOption = False,
) -> None:
    """Score every shard's importance to a task, on this host's CPUs through Ray.

    Interrupt it at any time: scores already taken are kept.
    Example: stifarm importance --bundle minilm-sst-2 --task sst-2
    """
    from orchestrator.ray.pool import RayPool

    with farm_of(context, for_devices=True) as farm:
        known = find_bundle(farm, bundle)
        name = only_task(farm, task, known)
        task_rows(farm, name, DEV_SPLIT, model_of(farm, known))
        with controlling(farm), RayPool(farm.settings) as pool:
            note(f"controller up in {pool.start_seconds:.1f} s (Ray, token authentication on)")
            profile = importance_step(farm, pool, known, name, rows=rows, quiet=json)
    if json:
        emit_json(profile.model_dump(mode="json"))
    else:
        show_importance(profile)


def importance_step(
    farm: Farm, pool: Any, bundle: KnownBundle, task: str, *, rows: int, quiet: bool = False
) -> ImportanceProfile:
    """Score what is missing, with a bar over shards."""
    # Loads PyTorch, which no other verb of this module needs.
    from orchestrator.scoring import score_importance

    with steps(quiet=quiet) as bars, bars.step("importance of shards") as bar:
        scored = score_importance(farm, pool, bundle, task, rows=rows, workers=pool.cpus, advance=bar)
    profile = scored.profile
    if not scored.above_chance:
        warn(f"all shards at {profile.base_fidelity} bits are still at chance: the ranking says little")
    success(
        f"importance of {bundle.name} on {task}: {scored.scored} shards scored,"
        f" {profile.layers * profile.slices - scored.scored} were in the store;"
        f" base {profile.base_fidelity} bits,"
        f" {profile.base.correct / profile.rows:.1%} of {profile.rows} rows,"
        f" split-half reliability {profile.reliability_ppm / 1e6:.2f}"
    )
    return profile


def show_importance(profile: ImportanceProfile) -> None:
    """Loss gain of every shard, in milli-nats."""
    ranking = {shard: rank for rank, shard in enumerate(profile.ranking(), 1)}
    rows = []
    for layer in range(profile.layers):
        cells = [
            f"{profile.gain_nano((layer, s)) / 1e6:+.1f} #{ranking[(layer, s)]}"
            for s in range(profile.slices)
        ]
        rows.append((f"layer {layer}", *cells))
    table(
        "Loss saved by raising one shard to 32 bits, in milli-nats, and its rank",
        ("", *(f">slice {s}" for s in range(profile.slices))),
        rows,
    )


# ------------------------------------------------------------------ device profile


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
