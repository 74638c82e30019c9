"""Fewer dev rows than a task has: a seeded draw, kept as task data of its own.

Accuracy costs rows × plans. A draw is the same for the same task data, seed and number, and that of fewer
rows is part of that of more; an accuracy on it has the interval that its rows give, and is not one on the
whole split.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from db import artifacts
from orchestrator.farm import Farm
from orchestrator.library import DEV_SPLIT, task_rows
from sti_runtime.model_store import Model
from sti_runtime.task_data import TaskData, store_task_data


@dataclass(frozen=True)
class Draw:
    """At most ``rows`` of a task's dev rows, drawn by ``seed``."""

    rows: int
    seed: int

    @property
    def split(self) -> str:
        """What the split of the drawn rows is called."""
        return artifacts.drawn_split(DEV_SPLIT, self.rows, self.seed)

    def of(self, data: TaskData) -> TaskData:
        """The drawn rows, in their order; ``data`` itself when it has no more."""
        if data.rows <= self.rows:
            return data
        order = np.random.Generator(np.random.PCG64(self.seed)).permutation(data.rows)
        kept = np.sort(order[: self.rows])
        return TaskData(
            data.info.model_copy(update={"split": self.split}),
            data.input_ids[kept],
            data.token_types[kept],
            data.lengths[kept],
            data.labels[kept],
        )


def dev_rows(farm: Farm, task: str, model: Model, draw: Draw | None) -> tuple[str, TaskData]:
    """(digest, rows): a task's dev rows for a model, or a draw of them, which the home and the store keep.

    Raises: InputError when there are none, ResourceError.
    """
    digest, data = task_rows(farm, task, DEV_SPLIT, model)
    drawn = data if draw is None else draw.of(data)
    if drawn is data:
        return digest, data
    path = store_task_data(drawn, farm.settings.tasks)
    with farm.store.reader() as session:
        known = artifacts.task_data(session, task, drawn.info.split)
        if any(row.digest == path.stem for row in known):
            return path.stem, drawn
    with farm.store.session() as session:
        artifacts.save_task_data(
            session,
            digest=path.stem,
            task=task,
            split=drawn.info.split,
            rows=drawn.rows,
            sequence_length=drawn.tokens,
            tokenizer_digest=drawn.info.tokenizer,
        )
    return path.stem, drawn
