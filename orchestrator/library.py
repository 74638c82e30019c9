"""Models, tasks and bundles of the home: making them, naming them, registering them in the store.

Nothing here loads PyTorch until a checkpoint is imported; training is in ``orchestrator.train``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from db import artifacts
from db.models import BundleRow, ModelRow
from orchestrator.farm import Farm
from sti_runtime.bundle import Bundle
from sti_runtime.bundle_build import Sensitivity, build_bundle
from sti_runtime.bundle_files import HeadEncoding
from sti_runtime.errors import InputError
from sti_runtime.manifest import Manifest
from sti_runtime.model_store import Model, load_model, save_model
from sti_runtime.quantizer import GOBO, Quantizer
from sti_runtime.shard import FIDELITIES
from sti_runtime.task_data import TaskData, load_task_data, store_task_data
from sti_runtime.tasks import Example, TaskSpec, build_task_data, read_tsv, split_profile

_log = structlog.get_logger(__name__)

PROFILE_ROWS = 500
"""Rows held out of train for the importance profile, unless asked otherwise."""

PROFILE_SPLIT, DEV_SPLIT = "profile", "dev"


@dataclass(frozen=True)
class TaskFiles:
    """Where a task's rows come from. ``profile_rows`` are held out of train, for importance only."""

    spec: TaskSpec
    train: Path
    dev: Path
    profile_rows: int
    seed: int


@dataclass(frozen=True)
class Splits:
    """A task's tokenized rows."""

    train: TaskData
    profile: TaskData
    dev: TaskData


@dataclass(frozen=True)
class KnownBundle:
    """A bundle of the home: its name, its opened files and the model it was made of."""

    name: str
    bundle: Bundle
    model_digest: str

    @property
    def manifest(self) -> Manifest:
        """The bundle's manifest."""
        return self.bundle.manifest

    @property
    def digest(self) -> str:
        """The bundle's digest."""
        return self.bundle.digest


# ------------------------------------------------------------------ models


def import_model(farm: Farm, source: str, *, name: str | None, revision: str | None) -> tuple[str, Model]:
    """Import a checkpoint folder or hub id as a model called ``name``; (name, model).

    Raises: CheckpointError, HubUnreachableError, ResourceError.
    """
    # Slow to load (PyTorch, the hub's client) and needed by this verb only.
    from orchestrator.hub import fetch_checkpoint
    from sti_runtime.checkpoint import import_checkpoint

    folder = fetch_checkpoint(source, farm.settings.home / "hub", revision=revision)
    model = import_checkpoint(folder, source=source if folder != Path(source).expanduser() else folder.name)
    chosen = name or Path(source).name
    register_model(farm, model, chosen)
    return chosen, model


def register_model(farm: Farm, model: Model, name: str) -> Path:
    """Keep a model in the home and the store under ``name``."""
    path = save_model(model, farm.settings.home)
    info = model.info
    with farm.store.session() as session:
        artifacts.save_model(
            session,
            digest=model.digest,
            name=name,
            source=info.source,
            config=info.config,
            untrained=info.untrained,
            info=info,
        )
    return path


def find_model(farm: Farm, name: str) -> tuple[ModelRow, Model]:
    """A model by name or digest. Raises: InputError, FormatError."""
    with farm.store.reader() as session:
        row = artifacts.find_model(session, name)
    return row, load_model(farm.settings.models / row.digest)


# ------------------------------------------------------------------ tasks


def tokenizer_of(model: Model, name: str) -> bytes:
    """The model's tokenizer. Raises: InputError when it has none."""
    if model.tokenizer_json is None:
        raise InputError(
            f"Model {name} has no tokenizer, so text cannot be turned into tokens for it.",
            "Import it again with its tokenizer files beside config.json.",
        )
    return model.tokenizer_json


def read_task(files: TaskFiles) -> tuple[list[Example], list[Example], list[Example]]:
    """(train, profile, dev) examples; dev rows that also stand in train are logged. Raises: DatasetError."""
    train, profile = split_profile(read_tsv(files.train, files.spec), files.profile_rows, files.seed)
    dev = read_tsv(files.dev, files.spec)
    seen = {(example.text, example.pair) for example in (*train, *profile)}
    leaked = sum((example.text, example.pair) in seen for example in dev)
    if leaked:
        _log.warning(
            "dev rows also stand in the train file: their accuracy flatters",
            rows=leaked,
            of=len(dev),
            file=str(files.dev),
        )
    return train, profile, dev


def tokenize_splits(
    spec: TaskSpec, examples: tuple[Sequence[Example], Sequence[Example], Sequence[Example]], model: Model
) -> Splits:
    """Tokenize train, profile and dev for a model. Raises: DatasetError, InputError."""
    tokenizer = tokenizer_of(model, model.info.source)

    def data(rows: Sequence[Example], split: str) -> TaskData:
        return build_task_data(rows, spec, split, config=model.config, tokenizer_json=tokenizer)

    train, profile, dev = examples
    return Splits(data(train, "train"), data(profile, PROFILE_SPLIT), data(dev, DEV_SPLIT))


def register_task(farm: Farm, spec: TaskSpec, splits: Splits) -> None:
    """Keep a task's profile and dev rows in the home and the store."""
    with farm.store.session() as session:
        artifacts.save_task(session, spec, name=spec.name)
        for data in (splits.profile, splits.dev):
            path = store_task_data(data, farm.settings.tasks)
            artifacts.save_task_data(
                session,
                digest=path.stem,
                task=spec.name,
                split=data.info.split,
                rows=data.rows,
                sequence_length=data.tokens,
                tokenizer_digest=data.info.tokenizer,
            )


def task_rows(farm: Farm, task: str, split: str, model: Model) -> tuple[str, TaskData]:
    """(digest, rows) of the newest data of a split that were tokenized with this model's tokenizer.

    Raises: InputError when there are none.
    """
    with farm.store.reader() as session:
        artifacts.find_task(session, task)
        rows = artifacts.task_data(session, task, split)
    for row in rows:
        data = load_task_data(farm.settings.tasks / f"{row.digest}.safetensors")
        if data.info.tokenizer == model.info.tokenizer_digest:
            return row.digest, data
    raise InputError(
        f"Task {task} has no {split} rows tokenized for model {model.info.source}.",
        "Add them: stifarm task add TASK --model MODEL --train FILE --dev FILE.",
    )


def only_task(farm: Farm, task: str | None, bundle: KnownBundle | None = None) -> str:
    """The task asked for, else the only one there is, of those with rows for ``bundle``'s model if given.

    Raises: InputError.
    """
    with farm.store.reader() as session:
        if task is not None:
            return artifacts.find_task(session, task.lower()).name
        names = [row.name for row in artifacts.list_tasks(session)]
        if len(names) > 1 and bundle is not None:
            fitting = [name for name in names if artifacts.newest_task_data(session, name, bundle.digest)]
            names = fitting or names
    if len(names) == 1:
        return names[0]
    known = ", ".join(names) or "none yet"
    raise InputError(f"Which task? The store knows: {known}.", "Name one with --task.")


# ------------------------------------------------------------------ bundles


def make_bundle(
    farm: Farm,
    model_name: str,
    *,
    name: str | None,
    fidelities: tuple[int, ...] = FIDELITIES,
    quantizer: Quantizer = GOBO,
    head_encoding: HeadEncoding = "f32",
    sensitivity: Callable[[Model], Sensitivity] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> KnownBundle:
    """Build (or find) the bundle of a model and register it. Raises: InputError, ResourceError.

    ``sensitivity``: of the model's weights, for the codec that asks for it (``orchestrator.sensitivity``).
    """
    row, model = find_model(farm, model_name)
    path = build_bundle(
        model.config,
        model.tensors,
        model_digest=model.digest,
        submodels=model.info.submodels,
        untrained=model.info.untrained,
        out_root=farm.settings.bundles,
        fidelities=fidelities,
        quantizer=quantizer,
        head_encoding=head_encoding,
        sensitivity=None if sensitivity is None else sensitivity(model),
        progress=progress,
    )
    bundle = Bundle.open(path)
    chosen = name or row.name
    with farm.store.session() as session:
        artifacts.save_bundle(session, bundle.manifest, name=chosen)
    return KnownBundle(chosen, bundle, model.digest)


def find_bundle(farm: Farm, name: str | None) -> KnownBundle:
    """A bundle by name or digest; without a name the newest. Raises: InputError, FormatError."""
    with farm.store.reader() as session:
        row: BundleRow
        if name is not None:
            row = artifacts.find_bundle(session, name)
        else:
            rows = artifacts.list_bundles(session)
            if not rows:
                raise InputError(
                    f"There is no bundle yet in the state folder {farm.settings.home}.",
                    "Make one: stifarm bundle build MODEL (or run stifarm demo). Another folder: --home,"
                    " or --inventory, beside which it is.",
                )
            row = rows[0]
    return KnownBundle(row.name, Bundle.open(farm.settings.bundles / row.digest), row.model_digest)


def model_of(farm: Farm, bundle: KnownBundle) -> Model:
    """The model a bundle was made of. Raises: FormatError."""
    return load_model(farm.settings.models / bundle.model_digest)
