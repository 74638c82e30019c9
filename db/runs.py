"""Queries about runs of plans and what their contents are worth: accuracy. Latency: ``db.measured``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import Row, Select, bindparam, select
from sqlalchemy.orm import Session

from db.artifacts import newest_of_splits
from db.documents import parse
from db.models import DeviceRow, EvaluationRow, RunRow, TaskDataRow
from db.statistics import Proportion, wilson
from sti_runtime.messages import computes_alike

SEEN_SPLITS = ("train", "profile", "profile-even", "profile-odd")
"""Splits that training or planning has seen: no accuracy is reported from them unless asked."""


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of one content on one task data. ``loss_nano``: mean cross-entropy, nano-nats."""

    correct: Proportion
    loss_nano: int
    task_data_digest: str
    split: str
    wall_ns: int


@dataclass(frozen=True)
class Evaluated:
    """One evaluation: mean cross-entropy in nano-nats over ``rows`` labelled rows; ``device`` by name."""

    rows: int
    correct: int
    loss_nano: int
    device: str


def evaluations_on(
    session: Session, content_digests: Collection[str], task_data_digest: str, *, engine: str
) -> dict[str, Evaluated]:
    """By content, the first evaluation on a task data with an engine that computes like ``engine``."""
    row = EvaluationRow
    query = (
        select(row.content_digest, row.engine, row.rows, row.correct, row.loss_nano, DeviceRow.name)
        .join(DeviceRow, DeviceRow.id == row.device_id)
        .where(row.task_data_digest == task_data_digest, row.content_digest.in_(sorted(content_digests)))
        .order_by(row.id)
    )
    found: dict[str, Evaluated] = {}
    for content, by, rows, correct, loss_nano, device in session.execute(query):
        if computes_alike(by, engine):
            found.setdefault(content, Evaluated(rows, correct, loss_nano, device))
    return found


def runs_of(session: Session, plan_id: int, *, request_kind: str | None = None) -> Sequence[RunRow]:
    """All runs of a plan, newest first."""
    query = select(RunRow).where(RunRow.plan_id == plan_id)
    if request_kind is not None:
        query = query.where(RunRow.request_kind == request_kind)
    return session.scalars(query.order_by(RunRow.id.desc())).all()


def accuracy_of(
    session: Session,
    content_digest: str,
    task: str,
    *,
    engine: str | None = None,
    split: str | None = None,
    task_data_digest: str | None = None,
) -> Accuracy | None:
    """The newest evaluation of a content on a task's data; None when it was never evaluated.

    ``engine``: that engine's evaluation if there is one, else that of one that computes alike (another
    arithmetic has another accuracy); None: any engine's. ``split``: by default any that
    was neither trained nor planned on. ``task_data_digest``: on exactly these data, of whatever split;
    without it, data that were replaced since may answer.
    """
    conditions = [TaskDataRow.task == task]
    if task_data_digest is not None:
        conditions.append(TaskDataRow.digest == task_data_digest)
    if split is not None:
        conditions.append(TaskDataRow.split == split)
    elif task_data_digest is None:
        conditions.append(TaskDataRow.split.not_in(SEEN_SPLITS))
    found = session.execute(_evaluations().where(*conditions), {"content": content_digest})
    return _newest_accuracy(found.all(), engine)


@dataclass(frozen=True, slots=True)
class Content:
    """What an accuracy is asked of: a content with the task it is for, the tokenizer of its model (None: not
    known) and the engine that computes it."""

    digest: str
    task: str
    tokenizer: str | None
    engine: str


def accuracies_of(
    session: Session, contents: Collection[Content], *, split: str | None = None
) -> dict[Content, Accuracy]:
    """As ``accuracy_of``, of many contents, each on its task's newest data that its model can read."""
    data: dict[str, dict[str, Row[Any]]] = {}
    evaluated: dict[str, list[Row[Any]]] = {}
    asked = {
        "tasks": sorted({content.task for content in contents}),
        "contents": sorted({content.digest for content in contents}),
    }
    for row in session.execute(_data_evaluated(), asked).all():
        data.setdefault(row.task, {})[row.task_data_digest] = row
        if row.content_digest is not None:
            evaluated.setdefault(row.content_digest, []).append(row)
    found: dict[Content, Accuracy] = {}
    for content in contents:
        newest = newest_of_splits(data.get(content.task, {}).values(), content.tokenizer)
        chosen = {
            digest
            for name, digest in newest.items()
            if (name not in SEEN_SPLITS if split is None else name == split)
        }
        of_content = [e for e in evaluated.get(content.digest, ()) if e.task_data_digest in chosen]
        of_content.sort(key=lambda each: -each.id)
        accuracy = _newest_accuracy(of_content, content.engine)
        if accuracy is not None:
            found[content] = accuracy
    return found


def predictions_of(
    session: Session, content_digest: str, task_data_digest: str, *, engine: str | None = None
) -> tuple[int, ...] | None:
    """Predicted classes by the first evaluation of a content on a task data, with an engine that computes
    like ``engine`` (None: any); None when there is none.

    One for each labelled row, in the order of the data: rows without a label are not evaluated, so an
    index into the data is one into this tuple only where all rows have labels.
    """
    query = (
        select(EvaluationRow.engine, EvaluationRow.predictions_json)
        .where(
            EvaluationRow.content_digest == content_digest,
            EvaluationRow.task_data_digest == task_data_digest,
        )
        .order_by(EvaluationRow.id)
    )
    for row in session.execute(query):
        if engine is None or computes_alike(row.engine, engine):
            return tuple(int(value) for value in parse(row.predictions_json))
    return None


@cache
def _evaluations() -> Select[*tuple[Any, ...]]:
    """Evaluations of a content, the newest first."""
    row = EvaluationRow
    return (
        select(
            row.engine,
            row.correct,
            row.rows,
            row.loss_nano,
            row.task_data_digest,
            row.wall_ns,
            TaskDataRow.split,
        )
        .join(TaskDataRow, TaskDataRow.digest == row.task_data_digest)
        .where(row.content_digest == bindparam("content"))
        .order_by(row.id.desc())
    )


@cache
def _data_evaluated() -> Select[*tuple[Any, ...]]:
    """Data of tasks, the newest first, each with what contents reached on them."""
    # Of tables and not of their classes: plan queries wait for it.
    row, data = EvaluationRow.__table__.c, TaskDataRow.__table__.c
    of_content = row.content_digest.in_(bindparam("contents", expanding=True))
    figures = ("id", "content_digest", "engine", "correct", "rows", "loss_nano", "wall_ns")
    return (
        select(
            data.task,
            data.split,
            data.digest,
            data.tokenizer_digest,
            data.digest.label("task_data_digest"),
            *(row[name] for name in figures),
        )
        .join_from(
            TaskDataRow.__table__,
            EvaluationRow.__table__,
            (row.task_data_digest == data.digest) & of_content,
            isouter=True,
        )
        .where(data.task.in_(bindparam("tasks", expanding=True)))
        .order_by(data.created_wall_ns.desc())
    )


def _newest_accuracy(evaluations: Sequence[Any], engine: str | None) -> Accuracy | None:
    found = [each for each in evaluations if engine is None or computes_alike(each.engine, engine)]
    if not found:
        return None
    best = next((each for each in found if each.engine == engine), found[0])
    correct = wilson(best.correct, best.rows)
    return Accuracy(correct, best.loss_nano, best.task_data_digest, best.split, best.wall_ns)
