"""Verbs about models and tasks: import, train, list, show; task add."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from db import artifacts
from orchestrator.cli.context import LARGEST_SEED, JsonOption, farm_of
from orchestrator.cli.output import Steps, emit_json, lines, note, steps, success, table, warn
from orchestrator.library import (
    PROFILE_ROWS,
    TaskFiles,
    find_model,
    import_model,
    read_task,
    register_task,
    tokenize_splits,
)
from orchestrator.submodel_report import submodel_table
from orchestrator.training_report import measured, training_lines
from sti_runtime.early_stop import NANO, EarlyStop
from sti_runtime.errors import InputError
from sti_runtime.model_store import Model
from sti_runtime.tasks import PRESETS, TaskSpec, user_task

if TYPE_CHECKING:
    from sti_runtime.training import PhaseStatus, Progress

model_app = typer.Typer(no_args_is_help=True, help="Import, train, list and show models.")
task_app = typer.Typer(no_args_is_help=True, help="Tasks: rows to score and to time on.")

TrainOption = Annotated[Path, typer.Option("--train", help="TSV with one header line: rows to train on.")]
DevOption = Annotated[Path, typer.Option("--dev", help="TSV whose rows only report results.")]
NameOfTask = Annotated[str, typer.Argument(help=f"A preset ({', '.join(PRESETS)}) or a name of your own.")]
TextOption = Annotated[
    list[str] | None, typer.Option("--text", help="Text column; twice for pairs. Not for presets.")
]
LabelOption = Annotated[str | None, typer.Option("--label", help="Label column. Not for presets.")]
TokensOption = Annotated[
    int | None, typer.Option("--max-tokens", min=3, help="Sequence length of every row.")
]
RowsOption = Annotated[
    int, typer.Option("--profile-rows", min=1, help="Rows held out of --train for the importance profile.")
]
SeedOption = Annotated[
    int, typer.Option("--seed", min=0, max=LARGEST_SEED, help="Seed of splits, order and initial weights.")
]


@model_app.command("import")
def import_(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="Folder with config.json and model.safetensors, or hub id.")],
    name: Annotated[str | None, typer.Option("--name", help="What to call it here.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    json: JsonOption = False,
) -> None:
    """Import a BERT-family checkpoint (BERT, MiniLM, DistilBERT, RoBERTa).

    Example: stifarm model import ./all-MiniLM-L6-v2 --name minilm
    """
    with farm_of(context) as farm:
        chosen, model = import_model(farm, source, name=name, revision=revision)
    _show(chosen, model, json)


@model_app.command("train")
def train(
    context: typer.Context,
    base: Annotated[str, typer.Argument(help="Imported model to start from.")],
    task: Annotated[str, typer.Option("--task", help=f"A preset ({', '.join(PRESETS)}) or your own name.")],
    train_file: TrainOption,
    dev: DevOption,
    name: Annotated[str | None, typer.Option("--name", help="What to call the result.")] = None,
    text: TextOption = None,
    label: LabelOption = None,
    max_tokens: TokensOption = None,
    profile_rows: RowsOption = PROFILE_ROWS,
    pooling: Annotated[str, typer.Option(help="cls or mean: what the head sees.")] = "mean",
    steps_cap: Annotated[
        int | None, typer.Option("--steps", min=1, help="At most so many steps in each phase (short runs).")
    ] = None,
    elastic_steps: Annotated[
        int | None, typer.Option("--elastic-steps", min=1, help="At most so many in the two elastic phases.")
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each phase.")] = 3,
    batch: Annotated[int, typer.Option(min=1, help="Rows in a step.")] = 32,
    learning_rate: Annotated[float, typer.Option(min=1e-9, max=1.0, help="Peak learning rate.")] = 2e-5,
    elastic: Annotated[bool, typer.Option("--elastic/--no-elastic", help="Train submodels too.")] = True,
    train_rows: Annotated[
        int | None, typer.Option("--train-rows", min=1, help="Train on so many rows, drawn by the seed.")
    ] = None,
    dev_rows: Annotated[
        int | None, typer.Option("--dev-rows", min=1, help="Score submodels on so many, drawn by the seed.")
    ] = None,
    patience: Annotated[
        int,
        typer.Option(min=0, help="End a phase after so many checks without a gain (10 a phase); 0: never."),
    ] = 0,
    stop_by: Annotated[
        str, typer.Option("--stop-by", help="What is checked on the profile rows: loss or accuracy.")
    ] = "loss",
    least_gain: Annotated[
        float, typer.Option("--least-gain", min=0, max=1, help="A gain is more than this (nats, or share).")
    ] = 0.0,
    on: Annotated[str, typer.Option("--on", help="auto, cpu, cuda or cuda:N.")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32 or mixed (CUDA, CPUs with bfloat16).")] = "fp32",
    threads: Annotated[int, typer.Option(min=0, max=1024, help="CPU threads; 0: all.")] = 0,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Put a classification head on a model, fine-tune it and make it elastic (DynaBERT).

    With --patience each phase ends early when the profile rows gain no more, and keeps its best weights.
    Interrupt it at any time: the same command goes on where it was.
    Example: stifarm model train minilm --task sst-2 --train train.tsv --dev dev.tsv
    """
    # Training loads PyTorch, which no other verb of this module needs.
    from orchestrator.train import train_model, training_settings
    from sti_runtime.arithmetic import choose_device, choose_precision
    from sti_runtime.training import TrainSettings

    if pooling not in ("cls", "mean"):
        raise InputError(f"--pooling {pooling!r} is unknown.", "Choose cls or mean.")
    device = choose_device(on)
    rule = _rule(patience, stop_by, least_gain)
    spec = _spec(task, train_file, text, label, max_tokens)
    phase = TrainSettings(
        epochs=epochs,
        batch=batch,
        learning_rate=learning_rate,
        max_steps=steps_cap,
        max_tokens=spec.max_tokens,
        seed=seed,
        threads=threads,
        early_stop=rule,
        device=device,
        precision=choose_precision(precision, device),
    )
    settings = training_settings(phase, elastic_steps)
    if not elastic:
        settings = settings.without_elastic()
    chosen = name or f"{base}-{spec.name}"
    files = TaskFiles(spec, train_file, dev, profile_rows, seed)
    with farm_of(context) as farm, steps(quiet=json) as bars:
        model = train_model(
            farm,
            base,
            files,
            settings,
            name=chosen,
            pooling=pooling,
            train_rows=train_rows,
            dev_rows=dev_rows,
            progress=_phases(bars, rule),
        )
    _show(chosen, model, json)


@model_app.command("list")
def list_(context: typer.Context, json: JsonOption = False) -> None:
    """List the models of this farm.

    Example: stifarm model list
    """
    with farm_of(context, existing=True) as farm, farm.store.reader() as session:
        rows = artifacts.list_models(session)
    if json:
        emit_json([{"name": r.name, "digest": r.digest, "source": r.source} for r in rows])
        return
    table(
        "Models",
        ("name", "digest", "family", ">layers × heads × hidden", "trained", "source"),
        [
            (
                r.name,
                r.digest[:12],
                r.family,
                f"{r.layers} × {r.heads} × {r.hidden}",
                "no" if r.untrained else "yes",
                r.source,
            )
            for r in rows
        ],
    )


@model_app.command()
def show(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="A model's name or the beginning of its digest.")],
    json: JsonOption = False,
) -> None:
    """Show a model: its shape, its submodels' accuracies and how it was trained.

    Example: stifarm model show minilm-sst-2
    """
    with farm_of(context, existing=True) as farm:
        row, model = find_model(farm, name)
    _show(row.name, model, json)


@task_app.command("add")
def add(
    context: typer.Context,
    task: NameOfTask,
    model: Annotated[str, typer.Option("--model", help="Model whose tokenizer makes the rows.")],
    train_file: TrainOption,
    dev: DevOption,
    text: TextOption = None,
    label: LabelOption = None,
    max_tokens: TokensOption = None,
    profile_rows: RowsOption = PROFILE_ROWS,
    seed: SeedOption = 0,
) -> None:
    """Add a task's rows for a model that was trained elsewhere.

    Example: stifarm task add sst-2 --model my-bert --train train.tsv --dev dev.tsv
    """
    spec = _spec(task, train_file, text, label, max_tokens)
    with farm_of(context) as farm:
        _, loaded = find_model(farm, model)
        head = loaded.config.head
        if head is None or len(head.labels) != len(spec.labels):
            has = "no head" if head is None else f"{len(head.labels)} labels"
            raise InputError(
                f"Model {model} has {has}, task {spec.name} has {len(spec.labels)} labels.",
                "Train a head first: stifarm model train.",
            )
        examples = read_task(TaskFiles(spec, train_file, dev, profile_rows, seed))
        register_task(farm, spec, tokenize_splits(spec, examples, loaded))
    success(f"task {spec.name}: {profile_rows} profile rows, {len(examples[2])} dev rows")


def _spec(
    task: str, train_file: Path, text: list[str] | None, label: str | None, max_tokens: int | None
) -> TaskSpec:
    preset = PRESETS.get(task.lower())
    if preset is not None and not text and label is None:
        return preset if max_tokens is None else preset.model_copy(update={"max_tokens": max_tokens})
    if not text or label is None:
        known = ", ".join(PRESETS)
        raise InputError(
            f"Task {task!r} is not a preset ({known}), so its columns must be named.",
            "Give --text COLUMN (twice for pairs) and --label COLUMN.",
        )
    return user_task(
        train_file, name=task.lower(), text_columns=text, label_column=label, max_tokens=max_tokens or 128
    )


def _rule(patience: int, stop_by: str, least_gain: float) -> EarlyStop | None:
    """The rule of early stopping that the options ask for. Raises: InputError."""
    if stop_by not in ("loss", "accuracy"):
        raise InputError(f"--stop-by {stop_by!r} is unknown.", "Choose loss or accuracy.")
    if not patience:
        return None
    return EarlyStop(patience, "accuracy" if stop_by == "accuracy" else "loss", round(least_gain * NANO))


def _phases(bars: Steps, rule: EarlyStop | None) -> Progress:
    """A progress callback that gives each training phase a bar of its own, and a line on how it goes."""
    labels = {
        "fine-tune": "fine-tune the whole model",
        "head importance": "importance of heads and neurons",
        "widths": "elastic training: widths",
        "depths": "elastic training: depths",
        "truncated": "accuracy of submodels as they are",
        "evaluate": "accuracy of every submodel",
    }
    begun: dict[str, tuple[float, int]] = {}
    """When each phase was first told of, and at which step."""

    def progress(status: PhaseStatus) -> None:
        began, first = begun.setdefault(status.phase, (time.monotonic(), status.done))
        left_s = None
        if status.done > first:
            left_s = (time.monotonic() - began) / (status.done - first) * (status.total - status.done)
        label = labels.get(status.phase, status.phase)
        over = status.ended or status.done == status.total
        early = ", ended early" if over and status.done < status.total else ""
        bars.show(
            status.phase,
            f"{label} (loss {status.loss:.3f}{early})",
            status.done,
            status.total,
            "" if over else f"{label}: {detail(status, rule, left_s)}",
        )

    return progress


def detail(status: PhaseStatus, rule: EarlyStop | None, left_s: float | None) -> str:
    """A phase's step, loss, best check, patience and time left, as far as they are known."""
    parts = [f"step {status.done} of {status.total}", f"loss {status.loss:.3f}"]
    if rule is not None and status.patience_left is not None:
        if status.best_nano is not None:
            parts.append(f"best {measured(status.best_nano, rule.measure)} on held-out rows")
        parts.append(f"patience {status.patience_left} of {rule.patience}")
    if left_s is not None:
        parts.append(f"about {timedelta(seconds=round(left_s))} left")
    return ", ".join(parts)


def _show(name: str, model: Model, json: bool) -> None:
    info = model.info
    if json:
        emit_json({"name": name, "digest": model.digest, "info": info.model_dump(mode="json")})
        return
    config = info.config
    success(
        f"model {name} ({model.digest[:12]}): {config.family}, {config.layers} layers × {config.heads} heads"
        f" × {config.hidden}, {'headless' if config.head is None else f'{len(config.head.labels)} labels'}"
    )
    if info.scores:
        columns, rows, caption = submodel_table(info.scores)
        table("Trained submodels at 32 bits", columns, rows, caption=caption)
    lines(training_lines(info.provenance))
    if info.untrained:
        warn("its submodels were never trained as such; plans from it are flagged untrained-submodels")
        note(f"  next: stifarm model train {name} --task TASK --train TSV --dev TSV")
    else:
        note(f"  next: stifarm bundle build {name}")
