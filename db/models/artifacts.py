"""What is measured: models, tasks and their data, bundles. Content-addressed by digest."""

from __future__ import annotations

from sqlalchemy import ForeignKey, String
from sqlalchemy.orm import Mapped, mapped_column

from db.models.base import Base, Sha, Word


class ModelRow(Base):
    """A model folder of the host. ``name`` is what users call it; the newest of a name is current."""

    __tablename__ = "models"

    digest: Mapped[Sha] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(200), index=True)
    source: Mapped[str]
    family: Mapped[Word]
    layers: Mapped[int]
    heads: Mapped[int]
    hidden: Mapped[int]
    untrained: Mapped[bool]
    info_json: Mapped[str]
    created_wall_ns: Mapped[int]


class TaskRow(Base):
    """A task: columns, labels, metric."""

    __tablename__ = "tasks"

    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    spec_json: Mapped[str]
    spec_digest: Mapped[Sha]
    created_wall_ns: Mapped[int]


class TaskDataRow(Base):
    """Tokenised rows of one split of a task. ``split`` as the dataset names it: train, profile, dev, …

    The newest of a task and split is current. ``tokenizer_digest``: what made them; NULL: not known.
    """

    __tablename__ = "task_data"

    digest: Mapped[Sha] = mapped_column(primary_key=True)
    task: Mapped[str] = mapped_column(ForeignKey("tasks.name"), index=True)
    split: Mapped[Word]
    rows: Mapped[int]
    sequence_length: Mapped[int]
    tokenizer_digest: Mapped[Sha | None]
    created_wall_ns: Mapped[int]


class BundleRow(Base):
    """A built bundle. ``bytes`` counts all files. The newest of a name is current, others are stale."""

    __tablename__ = "bundles"

    digest: Mapped[Sha] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(200), index=True)
    model_digest: Mapped[Sha] = mapped_column(ForeignKey("models.digest"), index=True)
    bytes: Mapped[int]
    untrained: Mapped[bool]
    manifest_json: Mapped[str]
    created_wall_ns: Mapped[int]
