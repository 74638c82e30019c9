"""Queries about models, tasks, task data and bundles."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeVar

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from db.documents import document, now_wall_ns, parse
from db.errors import StoreError
from db.models import BundleRow, ModelRow, TaskDataRow, TaskRow
from db.upsert import save_new
from sti_runtime.errors import InputError
from sti_runtime.manifest import Manifest
from sti_runtime.model import ModelConfig
from sti_runtime.model_store import ModelInfo
from sti_runtime.records import Record

Named = TypeVar("Named", ModelRow, BundleRow)


def save_model(
    session: Session,
    *,
    digest: str,
    name: str,
    source: str,
    config: ModelConfig,
    untrained: bool,
    info: Record,
) -> None:
    """Register a model folder; saving it again makes it the current one of ``name``."""
    row = {
        "digest": digest,
        "name": name,
        "source": source,
        "family": config.family,
        "layers": config.layers,
        "heads": config.heads,
        "hidden": config.hidden,
        "untrained": untrained,
        "info_json": document(info),
        "created_wall_ns": now_wall_ns(),
    }
    save_new(session, ModelRow, row)
    session.execute(
        update(ModelRow)
        .where(ModelRow.digest == digest)
        .values(name=name, created_wall_ns=row["created_wall_ns"])
    )


def save_task(session: Session, spec: Record, *, name: str) -> None:
    """Register a task or replace its specification (its data are named by digest and stay)."""
    values = {"spec_json": document(spec), "spec_digest": spec.digest}
    save_new(session, TaskRow, {"name": name, "created_wall_ns": now_wall_ns(), **values})
    session.execute(update(TaskRow).where(TaskRow.name == name).values(**values))


def save_task_data(
    session: Session,
    *,
    digest: str,
    task: str,
    split: str,
    rows: int,
    sequence_length: int,
    tokenizer_digest: str | None = None,
) -> None:
    """Register a task data file; registering it again makes it the newest of its task and split.

    ``tokenizer_digest``: of the tokenizer that made it; None when it is not known.
    """
    now = now_wall_ns()
    save_new(
        session,
        TaskDataRow,
        {
            "digest": digest,
            "task": task,
            "split": split,
            "rows": rows,
            "sequence_length": sequence_length,
            "tokenizer_digest": tokenizer_digest,
            "created_wall_ns": now,
        },
    )
    session.execute(update(TaskDataRow).where(TaskDataRow.digest == digest).values(created_wall_ns=now))


def save_bundle(session: Session, manifest: Manifest, *, name: str) -> None:
    """Register a bundle; saving it again makes it the current one of ``name``.

    Raises: StoreError when its model is not registered.
    """
    if session.get(ModelRow, manifest.model_digest) is None:
        raise StoreError(
            f"The store does not know model {manifest.model_digest[:12]} of bundle {manifest.digest[:12]}.",
            "Import the model first: `stifarm model import`.",
        )
    digest, now = manifest.digest, now_wall_ns()
    size = sum(chunk.length for _, chunk in manifest.all_chunks())
    save_new(
        session,
        BundleRow,
        {
            "digest": digest,
            "name": name,
            "model_digest": manifest.model_digest,
            "bytes": size,
            "untrained": manifest.untrained,
            "manifest_json": document(manifest),
            "created_wall_ns": now,
        },
    )
    session.execute(
        update(BundleRow).where(BundleRow.digest == digest).values(name=name, created_wall_ns=now)
    )


def find_model(session: Session, name_or_digest: str) -> ModelRow:
    """The newest model of a name, or the one whose digest starts so. Raises: InputError."""
    return _find(session, ModelRow, name_or_digest, "model", "stifarm model import")


def find_bundle(session: Session, name_or_digest: str) -> BundleRow:
    """The newest bundle of a name, or the one whose digest starts so. Raises: InputError."""
    return _find(session, BundleRow, name_or_digest, "bundle", "stifarm bundle build")


def model_info(session: Session, digest: str) -> ModelInfo:
    """What is known of a model. Raises: InputError when the store does not hold it."""
    row = session.get(ModelRow, digest)
    if row is None:
        raise InputError(f"The store holds no model {digest[:12]}.", "Import or train it again.")
    return ModelInfo.from_json(row.info_json.encode(), source=f"model {digest[:12]}")


def list_models(session: Session) -> Sequence[ModelRow]:
    """All models, newest first."""
    return session.scalars(select(ModelRow).order_by(ModelRow.created_wall_ns.desc())).all()


def list_bundles(session: Session) -> Sequence[BundleRow]:
    """All bundles, newest first."""
    return session.scalars(select(BundleRow).order_by(BundleRow.created_wall_ns.desc())).all()


def bundle_names(session: Session) -> dict[str, str]:
    """Every bundle's name by its digest."""
    return {row.digest: row.name for row in list_bundles(session)}


def bundle_manifest(bundle: BundleRow) -> Manifest:
    """A bundle's manifest."""
    return _manifest(bundle.manifest_json, f"bundle {bundle.digest[:12]}")


@lru_cache(maxsize=16)
def _manifest(text: str, source: str) -> Manifest:
    # Every batch that a device sends is checked against it.
    return Manifest.from_json(text.encode(), source=source)


@dataclass(frozen=True)
class BundleShape:
    """What a device's records are checked against: size of the files, and the model's heads and labels."""

    bytes: int
    heads: int
    labels: int | None


def bundle_shape(session: Session, digest: str) -> BundleShape | None:
    """The shape of a bundle; None when the store does not know it."""
    size = session.scalars(select(BundleRow.bytes).where(BundleRow.digest == digest)).one_or_none()
    if size is None:
        return None
    model = _MODELS.get(digest)
    if model is None:
        if len(_MODELS) == _MODELS_MOST:
            _MODELS.clear()
        model = _MODELS[digest] = bundle_manifest(session.get_one(BundleRow, digest)).model
    labels = None if model.head is None else len(model.head.labels)
    return BundleShape(bytes=size, heads=model.heads, labels=labels)


_MODELS: dict[str, ModelConfig] = {}
"""Of bundles that journals were checked against: what a digest stands for never changes, and is long."""
_MODELS_MOST = 256


def find_task(session: Session, name: str) -> TaskRow:
    """A task by name. Raises: InputError when the store knows none of it."""
    task = session.get(TaskRow, name)
    if task is None:
        known = ", ".join(session.scalars(select(TaskRow.name).order_by(TaskRow.name))) or "none yet"
        raise InputError(f"There is no task {name!r}.", f"Known tasks: {known}.")
    return task


def list_tasks(session: Session) -> Sequence[TaskRow]:
    """All tasks by name."""
    return session.scalars(select(TaskRow).order_by(TaskRow.name)).all()


_DRAWN = "-seed-"


def drawn_split(split: str, rows: int, seed: int) -> str:
    """What a split is called of which only so many rows are kept, drawn by a seed."""
    return f"{split}-{rows}{_DRAWN}{seed}"


def is_drawn(split: str) -> bool:
    """Whether a split is a draw of another one's rows: it answers only who asks for it."""
    return _DRAWN in split


def task_data(session: Session, task: str, split: str | None = None) -> Sequence[TaskDataRow]:
    """A task's data of one split or of all, newest first."""
    query = select(TaskDataRow).where(TaskDataRow.task == task)
    if split is not None:
        query = query.where(TaskDataRow.split == split)
    return session.scalars(query.order_by(TaskDataRow.created_wall_ns.desc())).all()


def newest_task_data(session: Session, task: str, bundle_digest: str) -> dict[str, str]:
    """Digest of a task's newest data of each split, by split.

    Data made by another tokenizer than the bundle's model has are passed over; where either is not
    known, the data count.
    """
    of_model = select(ModelRow.info_json).join(BundleRow, BundleRow.model_digest == ModelRow.digest)
    info = session.scalars(of_model.where(BundleRow.digest == bundle_digest)).one_or_none()
    return newest_of_splits(task_data(session, task), tokenizer_named(info))


class DataOfSplit(Protocol):
    """Task data as ``newest_of_splits`` takes them."""

    @property
    def split(self) -> str:
        """Split."""

    @property
    def digest(self) -> str:
        """Digest of the file."""

    @property
    def tokenizer_digest(self) -> str | None:
        """Of the tokenizer that made them; None: not known."""


def newest_of_splits(
    newest_first: Iterable[TaskDataRow | DataOfSplit], tokenizer: str | None
) -> dict[str, str]:
    """Digest of the newest data of each split, by split; those of another tokenizer are passed over."""
    newest: dict[str, str] = {}
    for row in newest_first:
        if None in (tokenizer, row.tokenizer_digest) or tokenizer == row.tokenizer_digest:
            newest.setdefault(row.split, row.digest)
    return newest


@lru_cache(maxsize=64)
def tokenizer_named(info: str | None) -> str | None:
    """The digest of a model's tokenizer, from its own words (``models.info_json``); None: not known."""
    digest = None if info is None else parse(info).get("tokenizer_digest")
    return digest if isinstance(digest, str) else None


def _find(session: Session, table: type[Named], wanted: str, what: str, verb: str) -> Named:
    newest = select(table).where(table.name == wanted).order_by(table.created_wall_ns.desc()).limit(1)
    named = session.scalars(newest).one_or_none()
    if named is not None:
        return named
    rows = []
    if len(wanted) >= 6:
        rows = list(session.scalars(select(table).where(table.digest.startswith(wanted, autoescape=True))))
    if len(rows) > 1:
        raise InputError(f"{wanted!r} starts the digests of {len(rows)} {what}s.", "Give more of it.")
    if not rows:
        names = session.scalars(select(table.name).distinct().order_by(table.name))
        known = ", ".join(names) or "none yet"
        raise InputError(f"There is no {what} {wanted!r}.", f"Known: {known}. Make one with `{verb}`.")
    return rows[0]
