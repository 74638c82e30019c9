"""Verbs about bundles: build, show, list."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated

import typer

from db import artifacts
from db.statistics import wilson
from orchestrator.cli.context import BundleOption, JsonOption, TaskOption, farm_of
from orchestrator.cli.output import Steps, emit_json, steps, success, table
from orchestrator.farm import Farm
from orchestrator.library import find_bundle, make_bundle, only_task
from orchestrator.report import percent
from sti_runtime.bundle_build import Sensitivity
from sti_runtime.errors import InputError
from sti_runtime.model_store import Model
from sti_runtime.quantizer import GOBO, CodecName, Quantizer, Refinement
from sti_runtime.shard import FIDELITIES
from sti_runtime.units import NONE, format_bytes

SENSITIVITY_ROWS = 250
"""Labelled rows of the profile split, unless asked otherwise."""

bundle_app = typer.Typer(no_args_is_help=True, help="Shard a model at several fidelities.")


@bundle_app.command("build")
def build(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Model by name or digest.")],
    name: Annotated[str | None, typer.Option("--name", help="What to call it; the model's name.")] = None,
    fidelities: Annotated[
        str, typer.Option("--fidelities", help="Bits per weight to store, comma-separated.")
    ] = ",".join(map(str, FIDELITIES)),
    codec: Annotated[
        CodecName, typer.Option(help="gobo, or fisher: every weight weighed by what the task's loss minds.")
    ] = "gobo",
    task: Annotated[
        str | None, typer.Option("--task", "-t", help="Of codec fisher: the task whose loss is meant.")
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option(min=1, help=f"Of codec fisher: rows of the task's profile split; {SENSITIVITY_ROWS}."),
    ] = None,
    refine: Annotated[
        Refinement | None,
        typer.Option(help="Of codec gobo, centroids: none, l1 (GOBO's), or converged (least squared error)."),
    ] = None,
    outlier_density: Annotated[
        float,
        typer.Option(help="Weights of a lower log-density than this are kept exactly; higher keeps more."),
    ] = GOBO.outlier_log_density_milli / 1000,
    head_bits: Annotated[int, typer.Option(help="32 or 6: how pooler and classifier are stored.")] = 32,
    json: JsonOption = False,
) -> None:
    """Cut a model into shards, quantize each at every fidelity, pack them for devices.

    Example: stifarm bundle build minilm-sst-2
    Closer to the model: stifarm bundle build minilm-sst-2 --refine converged --outlier-density 0
    Closer to the task: stifarm bundle build minilm-sst-2 --codec fisher --task sst-2 --name by-fisher
    """
    quantizer = _quantizer(codec, refine, outlier_density)
    _check_codec_options(codec, task=task, rows=rows, refine=refine)
    if head_bits not in (6, 32):
        raise InputError(f"--head-bits {head_bits} is unknown.", "Choose 32 or 6.")
    wanted = _fidelities(fidelities)
    with farm_of(context) as farm, steps(quiet=json) as bars, bars.step("quantize and pack shards") as bar:
        measured = None if task is None else _measured(farm, bars, task, rows or SENSITIVITY_ROWS)
        bundle = make_bundle(
            farm,
            model,
            name=name,
            fidelities=wanted,
            quantizer=quantizer,
            head_encoding="f32" if head_bits == 32 else "gobo6",
            sensitivity=measured,
            progress=bar,
        )
    if json:
        emit_json({"name": bundle.name, "digest": bundle.digest, "path": str(bundle.bundle.path)})
        return
    size = sum(bundle.bundle.file_sizes().values())
    success(f"bundle {bundle.name} ({bundle.digest[:12]}): {format_bytes(size)}")


@bundle_app.command("show")
def show(context: typer.Context, bundle: BundleOption = None, json: JsonOption = False) -> None:
    """What a bundle holds: regions, sizes, submodels.

    Example: stifarm bundle show --bundle minilm-sst-2
    """
    with farm_of(context, existing=True) as farm:
        found = find_bundle(farm, bundle)
    manifest = found.manifest
    if json:
        emit_json(manifest.model_dump(mode="json"))
        return
    model = manifest.model
    weights = model.layers * (4 * model.hidden**2 + 2 * model.hidden * model.ffn)
    rows = []
    for region in manifest.regions:
        size = sum(version.length for version in region.versions)
        outliers = sum(sum(version.outliers) for version in region.versions)
        rows.append(
            (
                region.file,
                str(region.fidelity),
                format_bytes(size),
                format_bytes(size // len(region.versions)),
                f"{8 * size / weights:.2f}",
                f"{100 * outliers / weights:.2f} %",
            )
        )
    rows += [(data.file, NONE, format_bytes(data.bytes), NONE, NONE, NONE) for data in manifest.files]
    table(
        f"Bundle {found.name} ({found.digest[:12]})",
        ("file", ">bits", ">size", ">a shard", ">stored bits/weight", ">outliers"),
        rows,
        caption=f"made by {manifest.quantizer.made_by}; submodels n×m: "
        + ", ".join(map(str, manifest.submodels[:40])),
    )


@bundle_app.command("score")
def score(
    context: typer.Context, bundle: BundleOption = None, task: TaskOption = None, json: JsonOption = False
) -> None:
    """Accuracy of the whole model with all shards at one fidelity, for each fidelity; on this host.

    Example: stifarm bundle score --bundle minilm-sst2 --task sst-2
    """
    from orchestrator.scoring import score_uniform

    with farm_of(context, existing=True) as farm:
        found = find_bundle(farm, bundle)
        name = only_task(farm, task, found)
        scores = []
        with steps(quiet=json) as bars, bars.step("score every fidelity") as bar:
            for item in score_uniform(farm, found, name):
                scores.append(item)
                bar(len(scores), len(found.manifest.fidelities))
    if json:
        emit_json([item.__dict__ for item in scores])
        return
    rows = []
    for item in scores:
        correct = wilson(item.correct, item.rows)
        interval = f"[{correct.low_ppm / 10_000:.1f}–{correct.high_ppm / 10_000:.1f}]"
        loss = f"{item.loss_nano / 1e9:.4f}"
        rows.append((str(item.fidelity), percent(correct.value_ppm), interval, str(item.rows), loss))
    table(
        f"Bundle {found.name} on {name}, all shards at one fidelity",
        (">bits", ">accuracy", ">[95 %]", ">dev rows", ">loss"),
        rows,
    )


@bundle_app.command("list")
def list_(context: typer.Context, json: JsonOption = False) -> None:
    """List the bundles of this farm.

    Example: stifarm bundle list
    """
    with farm_of(context, existing=True) as farm, farm.store.reader() as session:
        rows = artifacts.list_bundles(session)
    if json:
        emit_json([{"name": r.name, "digest": r.digest, "bytes": r.bytes} for r in rows])
        return
    table(
        "Bundles",
        ("name", "digest", ">size", "model"),
        [(r.name, r.digest[:12], format_bytes(r.bytes), r.model_digest[:12]) for r in rows],
    )


def _check_codec_options(
    codec: CodecName, *, task: str | None, rows: int | None, refine: Refinement | None
) -> None:
    if codec == "fisher" and task is None:
        raise InputError(
            "--codec fisher weighs every weight by what a task's loss minds, and no task is named.",
            "Add --task TASK, one with rows for this model, or take --codec gobo, which needs none.",
        )
    if codec == "fisher" and refine is not None:
        raise InputError(
            f"--refine {refine} is about GOBO's centroids; codec fisher always refines to the end.",
            "Leave --refine out.",
        )
    if codec != "fisher" and (task is not None or rows is not None):
        given = "--task" if task is not None else "--rows"
        raise InputError(
            f"{given} is given, and codec {codec} does not look at a task.",
            f"Leave {given} out, or add --codec fisher.",
        )


def _measured(farm: Farm, bars: Steps, task: str, rows: int) -> Callable[[Model], Sensitivity]:
    """Sensitivities of a model's weights on a task, with a bar over rows when they are measured."""
    from orchestrator.sensitivity import sensitivity_of  # loads PyTorch

    name = only_task(farm, task)
    shown = partial(bars.show, "sensitivity", f"sensitivity of weights to {name}")
    return lambda model: sensitivity_of(farm, model, name, rows=rows, progress=shown)


def _quantizer(codec: CodecName, refinement: Refinement | None, outlier_density: float) -> Quantizer:
    if not -100.0 <= outlier_density <= 100.0:
        raise InputError(
            f"--outlier-density {outlier_density} is not between -100 and 100.",
            "GOBO's is -4; 0 keeps about 1.4 % of weights of deviation 0.02.",
        )
    refined = "converged" if codec == "fisher" else (refinement or GOBO.refinement)
    return Quantizer(refined, round(1000 * outlier_density), codec)


def _fidelities(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdigit() and int(part) in FIDELITIES for part in parts):
        known = ", ".join(map(str, FIDELITIES))
        raise InputError(f"--fidelities {text!r}: each must be one of {known}.", "Write it like 2,4,6,32.")
    return tuple(sorted({int(part) for part in parts}))
