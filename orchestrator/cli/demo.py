"""init and demo: a first inventory, and the main job on a task and a model of the project's own."""

from __future__ import annotations

import shlex
import shutil
import time
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.context import JsonOption, Options, driving, farm_of, since
from orchestrator.cli.deploy import show_deployed
from orchestrator.cli.importance import importance_step
from orchestrator.cli.output import emit_json, note, steps, success
from orchestrator.cli.over_devices import deploy_all, finish
from orchestrator.cli.plan import evaluate_all, questions, show_plans, stored_answers
from orchestrator.cli.profile import profile_all, show_profiles
from orchestrator.demo.demo_model import load_demo_model
from orchestrator.demo.demo_task import TASK, demo_splits
from orchestrator.farm import Farm
from orchestrator.library import KnownBundle, make_bundle, register_model, register_task, tokenize_splits
from orchestrator.measure import RunSettings, Work
from orchestrator.report import plan_json
from sti_runtime.errors import InputError, ResourceError, StifarmError

NAME = "demo"
TARGETS = "60ms,120ms,240ms"
PRELOAD, WORKING = "128KiB", "1MiB"
REQUESTS = 20
TEMPLATE = Path(__file__).parents[1] / "demo" / "inventory.yaml"


def init(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Where the farm's inventory and state shall live.")] = Path(),
) -> None:
    """Write a first inventory.yaml: this machine and two emulated boards.

    Example: stifarm init my-farm
    """
    target = folder / "inventory.yaml"
    if target.exists():
        raise InputError(f"{target} is there already.", "Edit it, or choose another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(TEMPLATE, target)
    except OSError as error:
        raise ResourceError(
            f"{target} cannot be written: {error.strerror}.", "Choose another folder."
        ) from error
    success(f"{target} written")
    there = folder.resolve() == Path.cwd().resolve()
    note(f"  next: {'' if there else f'cd {shlex.quote(str(folder))} && '}stifarm demo")


def demo(context: typer.Context, json: JsonOption = False) -> None:
    """Run the main job, end to end, on a small task and model that stifarm ships.

    Model, bundle, deploy, importance, profiles, plans at three target latencies, timed runs, accuracy:
    over every device of the inventory. A second run measures nothing again.
    Example: stifarm demo
    """
    began = time.monotonic()
    options = context.obj
    assert isinstance(options, Options)
    with farm_of(context) as farm:
        errors = run_demo(farm, quiet=json)
    note(
        f"demo done in {since(began)}, from its model to its plans, installing not counted;"
        f" ask again with: {options.again('plans query --emulated --target 120ms')}"
    )
    finish(errors)


def run_demo(farm: Farm, *, quiet: bool) -> list[StifarmError | None]:
    """The steps of the demo over an opened farm; what failed on single devices."""
    bundle = prepare(farm, quiet=quiet)
    work = Work.of(farm, bundle, TASK.name)
    asked = questions([TARGETS], PRELOAD, WORKING, "sti")
    with driving(farm, "all") as session:
        deployed = deploy_all(session, work, quiet=quiet)
        importance_step(farm, session.pool, bundle, TASK.name, rows=10_000, quiet=quiet)
        profiles, failed = profile_all(session, work, quiet=quiet)
        evaluated = evaluate_all(session, work, asked, RunSettings(requests=REQUESTS), quiet=quiet)
    answers = evaluated.answers
    shown = stored_answers(farm, answers, TASK.name)
    if quiet:
        emit_json([plan_json(answer) for answer in shown])
    else:
        show_deployed(deployed)
        show_profiles(profiles, bundle, failed)
        title = f"Plans of every device for task {TASK.name} (warm requests, from the store)"
        show_plans(title, shown, answers, advise=False)
    return [*(item.error for item in deployed), *failed.values(), *evaluated.errors]


def prepare(farm: Farm, *, quiet: bool) -> KnownBundle:
    """Register the demo's model, rows and bundle; what is there already is kept."""
    with steps(quiet=quiet) as bars:
        with bars.step("demo model and task", 2) as bar:
            model = load_demo_model()
            register_model(farm, model, NAME)
            bar(1, 2)
            splits = demo_splits()
            register_task(
                farm, TASK, tokenize_splits(TASK, (splits.train[:1], splits.profile, splits.dev), model)
            )
            bar(2, 2)
        with bars.step("quantize and pack shards") as bar:
            bundle = make_bundle(farm, NAME, name=NAME, progress=bar)
    success(f"bundle {bundle.name} ({bundle.digest[:12]})")
    return bundle
