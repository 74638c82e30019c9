"""Queries about runs of plans and what their contents are worth: accuracy. Latency: ``db.measured``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, ScalarSelect, Select, bindparam, select
from sqlalchemy.orm import Session

from db.artifacts import is_drawn, newest_of_splits
from db.documents import parse
from db.json_rows import json_rows
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
    was neither trained nor planned on, nor is a draw. ``task_data_digest``: on exactly these data, of
    whatever split; without it, data that were replaced since may answer.
    """
    conditions = [TaskDataRow.task == task]
    if task_data_digest is not None:
        conditions.append(TaskDataRow.digest == task_data_digest)
    if split is not None:
        conditions.append(TaskDataRow.split == split)
    elif task_data_digest is None:
        conditions.append(TaskDataRow.split.not_in(SEEN_SPLITS))
    found = session.execute(_evaluations().where(*conditions), {"content": content_digest}).all()
    if split is None and task_data_digest is None:
        found = [each for each in found if not is_drawn(each.split)]
    return _newest_accuracy(found, engine)


class _Evaluation(NamedTuple):
    """Task data, with one evaluation of a content on them: all of it None where there is none."""

    split: str
    task_data_digest: str
    tokenizer_digest: str | None
    created_wall_ns: int
    id: int | None
    engine: str
    correct: int
    rows: int
    loss_nano: int
    wall_ns: int

    @property
    def digest(self) -> str:
        """Of the task data."""
        return self.task_data_digest


def evaluations_listed(content_digest: ColumnElement[str], task: ColumnElement[str]) -> ScalarSelect[str]:
    """Of an enclosing query's columns: a content's evaluations on each data of its task, for
    ``accuracy_listed``."""
    # Of tables and not of their classes: plan queries wait for it.
    evaluations, of_task = EvaluationRow.__table__.alias(), TaskDataRow.__table__.alias()
    row, data = evaluations.c, of_task.c
    evaluated = (row.task_data_digest == data.digest) & (row.content_digest == content_digest)
    of_data = (data.split, data.digest, data.tokenizer_digest, data.created_wall_ns)
    of_row = (row.id, row.engine, row.correct, row.rows, row.loss_nano, row.wall_ns)
    return (
        select(json_rows(*of_data, *of_row))
        .select_from(of_task.outerjoin(evaluations, evaluated))
        .where(data.task == task)
        .scalar_subquery()
    )


def accuracy_listed(
    listed: str | None, *, tokenizer: str | None, engine: str, split: str | None = None
) -> Accuracy | None:
    """As ``accuracy_of``, on the newest data that a model of ``tokenizer`` (None: not known) can read."""
    found = [_Evaluation(*each) for each in parse(listed or "[]")]
    newest_first = sorted(found, key=lambda each: -each.created_wall_ns)
    newest = newest_of_splits(newest_first, tokenizer)
    chosen = {
        digest
        for name, digest in newest.items()
        if (name not in SEEN_SPLITS and not is_drawn(name) if split is None else name == split)
    }
    evaluated = [each for each in found if each.id is not None and each.task_data_digest in chosen]
    return _newest_accuracy(sorted(evaluated, key=lambda each: -(each.id or 0)), engine)


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


def _newest_accuracy(evaluations: Sequence[Any], engine: str | None) -> Accuracy | None:
    found = [each for each in evaluations if engine is None or computes_alike(each.engine, engine)]
    if not found:
        return None
    best = next((each for each in found if each.engine == engine), found[0])
    correct = wilson(best.correct, best.rows)
    return Accuracy(correct, best.loss_nano, best.task_data_digest, best.split, best.wall_ns)
