"""The verb importance: scoring or estimating what each shard is worth to a task, and showing it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from db.importance import importance_profiles, scored_by
from orchestrator.cli.context import (
    OK,
    SOME_FAILED,
    BundleOption,
    JsonOption,
    TaskOption,
    driving,
    farm_of,
    method_of,
    since,
    starting,
)
from orchestrator.cli.heat import heat_map, milli, whole
from orchestrator.cli.output import emit_json, fail, heading, lines, note, steps, styled, success, table, warn
from orchestrator.farm import Farm, controlling
from orchestrator.home_files import write_whole
from orchestrator.library import DEV_SPLIT, KnownBundle, find_bundle, model_of, only_task, task_rows
from orchestrator.measure import IMPORTANCE_ROWS, importance_of
from sti_runtime.errors import InputError
from sti_runtime.importance_profile import METHODS, ImportanceProfile
from sti_runtime.rank_statistics import rank_correlation

GRADIENT_ROWS = 250
"""As IMPORTANCE_ROWS, of an estimate."""

_LISTED = 8

importance_app = typer.Typer(help="What each shard's fidelity is worth to a task.")


@importance_app.callback(invoke_without_command=True)
def importance(
    context: typer.Context,
    bundle: BundleOption = None,
    task: TaskOption = None,
    method: Annotated[
        str,
        typer.Option("--method", "-m", help="exhaustive: score every shard; gradient: estimate in one pass."),
    ] = "exhaustive",
    rows: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Labelled rows of the profile split; {IMPORTANCE_ROWS}, of gradient {GRADIENT_ROWS}.",
        ),
    ] = None,
    devices: Annotated[
        str | None,
        typer.Option("--devices", "-d", help="Let these devices score, not this host (exhaustive only)."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Score every shard's importance to a task, on this host's CPUs through Ray or on devices of the farm.

    Interrupt it at any time: scores already taken are kept, whoever took them.
    Example: stifarm importance --bundle minilm-sst-2 --task sst-2
    Example: stifarm importance --devices all,!desk
    """
    if context.invoked_subcommand is not None:
        return
    if method not in ("exhaustive", "gradient"):
        raise InputError(f"--method {method!r} is unknown.", "Choose exhaustive or gradient.")
    if devices is not None and method == "gradient":
        raise InputError(
            "The gradient method takes a backward pass, which agents do not have.",
            "Leave out --devices, or choose --method exhaustive.",
        )
    from orchestrator.ray.pool import RayPool

    with farm_of(context, for_devices=True) as farm:
        known = find_bundle(farm, bundle)
        name = only_task(farm, task, known)
        task_rows(farm, name, DEV_SPLIT, model_of(farm, known))
        if devices is not None:
            _on_devices(farm, devices, known, name, rows=rows or IMPORTANCE_ROWS, json=json)
        with controlling(farm), starting(lambda: RayPool(farm.settings)) as pool:
            note(f"controller up in {pool.start_seconds:.1f} s (Ray, token authentication on)")
            if method == "gradient":
                profile = estimate_step(farm, pool, known, name, rows=rows or GRADIENT_ROWS, quiet=json)
            else:
                profile = importance_step(farm, pool, known, name, rows=rows or IMPORTANCE_ROWS, quiet=json)
    if json:
        emit_json(profile.model_dump(mode="json"))
    else:
        show_importance(profile)


@importance_app.command("show")
def show(
    context: typer.Context,
    bundle: BundleOption = None,
    task: TaskOption = None,
    method: Annotated[
        str | None,
        typer.Option("--method", "-m", help=f"{', '.join(METHODS)}; the best there is."),
    ] = None,
    png: Annotated[Path | None, typer.Option("--png", help="Write the heat map to this file too.")] = None,
    to: Annotated[
        Path | None, typer.Option("--out", help="Write the profile to this file, as `agent plan` takes it.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Show the importance of shards as a heat map, and how far the methods agree.

    Example: stifarm importance show --task sst-2 --png importance.png
    """
    with farm_of(context, existing=True) as farm:
        known = find_bundle(farm, bundle)
        name = only_task(farm, task, known)
        with farm.store.reader() as session:
            found = importance_profiles(session, known.model_digest, name)
        profile = importance_of(farm, known, name, method_of(method))
        with farm.store.reader() as session:
            by = scored_by(session, profile)
    if png is not None:
        from orchestrator.figures.importance import draw_importance  # loads Matplotlib

        draw_importance(profile, f"{known.name} on {name}", png)
        success(f"{png} written")
    if to is not None:
        write_whole(to, profile.to_json())
        success(f"{to} written")
    if json:
        emit_json(
            {
                "profile": profile.model_dump(mode="json"),
                "ranking": profile.ranking(),
                "scored_by": [{"device": device, "shards": count} for device, count in by.items()],
                "methods": [
                    {
                        "method": other.method,
                        "digest": other.digest,
                        "rows": other.rows,
                        "reliability_ppm": other.reliability_ppm,
                        "rank_correlation": rank_correlation(profile.worth(), other.worth()),
                    }
                    for other in found
                ],
            }
        )
        return
    show_importance(profile)
    if by:
        lines([f"Its shards were {_by(by)}.", ""])
    if len(found) > 1:
        table(
            f"How far the methods rank as {profile.method} does",
            ("method", ">rows", ">split-half reliability", ">rank correlation"),
            [
                (
                    other.method,
                    str(other.rows),
                    f"{other.reliability_ppm / 1e6:.2f}",
                    f"{rank_correlation(profile.worth(), other.worth()):.2f}",
                )
                for other in found
            ],
        )


# ------------------------------------------------------------------ steps and parts


def importance_step(
    farm: Farm, pool: Any, bundle: KnownBundle, task: str, *, rows: int, quiet: bool = False
) -> ImportanceProfile:
    """Score what is missing, with a bar over shards."""
    # Loads PyTorch, which no other verb of this module needs.
    from orchestrator.scoring import score_importance

    began = time.monotonic()
    with steps(quiet=quiet) as bars, bars.step("importance of shards") as bar:
        scored = score_importance(farm, pool, bundle, task, rows=rows, workers=pool.cpus, advance=bar)
    profile = scored.profile
    _warn_at_chance(profile, scored.above_chance)
    success(
        f"importance of {bundle.name} on {task}: {scored.scored} shards scored in {since(began)},"
        f" {profile.layers * profile.slices - scored.scored} were in the store; {_facts(profile)}"
    )
    return profile


def _on_devices(
    farm: Farm, selector: str, bundle: KnownBundle, task: str, *, rows: int, json: bool
) -> NoReturn:
    """Have the chosen devices score what is missing; exits 3 when some of them left off."""
    from orchestrator.scoring_on_devices import score_on_devices  # loads PyTorch

    began = time.monotonic()
    with driving(farm, selector) as session:
        with steps(quiet=json) as bars, bars.step("importance of shards") as bar:
            scored, failed = score_on_devices(
                farm, session.worker, session.devices, bundle, task, rows=rows, advance=bar
            )
        left_out = session.left_out
    for each in failed:
        fail(each.error)
    profile = scored.profile
    _warn_at_chance(profile, scored.above_chance)
    with farm.store.reader() as store:
        by = scored_by(store, profile)
    success(
        f"importance of {bundle.name} on {task}: {scored.scored} shards scored in {since(began)};"
        f" {_facts(profile)}; {_by(by)}"
    )
    if json:
        emit_json(profile.model_dump(mode="json"))
    else:
        show_importance(profile)
    raise typer.Exit(SOME_FAILED if failed or left_out else OK)


def _by(scored: Mapping[str | None, int]) -> str:
    """Who scored how many shards: "scored by desk 3, this host 1"."""
    return "scored by " + ", ".join(f"{device or 'this host'} {count}" for device, count in scored.items())


def estimate_step(
    farm: Farm, pool: Any, bundle: KnownBundle, task: str, *, rows: int, quiet: bool = False
) -> ImportanceProfile:
    """Estimate all shards from one pass."""
    from orchestrator.scoring import estimate_importance  # loads PyTorch

    began = time.monotonic()
    with steps(quiet=quiet) as bars, bars.step("slopes of shards", 1) as bar:
        scored = estimate_importance(farm, pool, bundle, task, rows=rows)
        bar(1, 1)
    profile = scored.profile
    _warn_at_chance(profile, scored.above_chance)
    success(
        f"importance of {bundle.name} on {task}: {scored.scored} shards estimated in {since(began)};"
        f" {_facts(profile)}"
    )
    return profile


def show_importance(profile: ImportanceProfile) -> None:
    """The heat map and the most important shards."""
    by_rows = profile.method == "exhaustive-accuracy"
    estimated = " (estimated)" if profile.method == "gradient" else ""
    heading(
        f"Correct rows of {profile.rows} gained by raising one shard to 32 bits"
        if by_rows
        else f"Loss saved by raising one shard to 32 bits, in milli-nats{estimated}"
    )
    worth = profile.worth()
    shown = [value if by_rows else value / 1e6 for value in worth]
    by_layer = [shown[i : i + profile.slices] for i in range(0, len(shown), profile.slices)]
    styled(
        heat_map(
            [f"layer {layer}" for layer in range(profile.layers)],
            [f"s{index}" for index in range(profile.slices)],
            by_layer,
            write=whole if by_rows else milli,
        )
    )
    best = ", ".join(f"{layer}.{index}" for layer, index in profile.ranking()[:_LISTED])
    lines(["", f"Most important first (layer.slice): {best}", ""])


def _facts(profile: ImportanceProfile) -> str:
    return (
        f"base {profile.base_fidelity} bits,"
        f" {profile.base.correct / profile.rows:.1%} of {profile.rows} rows,"
        f" split-half reliability {profile.reliability_ppm / 1e6:.2f}"
    )


def _warn_at_chance(profile: ImportanceProfile, above: bool) -> None:
    if not above:
        warn("the whole model is at chance at every fidelity below 32 bits: the ranking says little")
