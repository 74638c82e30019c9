"""A draw of dev rows: seeded, nested, in the rows' order."""

from __future__ import annotations

import numpy as np

from orchestrator.drawn import Draw
from sti_runtime.task_data import TaskData, TaskDataInfo


def data_of(rows: int) -> TaskData:
    """Rows whose only token is their number."""
    numbers = np.arange(rows, dtype=np.int32)
    info = TaskDataInfo(
        format="stifarm-task-data", version=1, task="demo", split="dev", labels=("a", "b"), tokenizer=None
    )
    ones = np.ones(rows, np.int32)
    return TaskData(info, numbers[:, None], np.zeros((rows, 1), np.int32), ones, numbers % 2)


def drawn(rows: int, seed: int) -> list[int]:
    """Numbers of the drawn rows of 50."""
    return [int(number) for number in Draw(rows, seed).of(data_of(50)).input_ids[:, 0]]


def test_a_draw_is_part_of_a_larger_one_and_in_order() -> None:
    small, large = drawn(10, 1), drawn(20, 1)
    assert (len(small), len(large)) == (10, 20)
    assert small == sorted(set(small))
    assert set(small) < set(large)
    assert small == drawn(10, 1) != drawn(10, 2)


def test_a_draw_keeps_rows_whole_and_says_what_it_is() -> None:
    found = Draw(10, 1).of(data_of(50))
    assert (found.labels == found.input_ids[:, 0] % 2).all()
    assert found.info.split == Draw(10, 1).split == "dev-10-seed-1"


def test_data_that_have_no_more_rows_are_taken_whole() -> None:
    data = data_of(50)
    assert Draw(50, 1).of(data) is data
    assert Draw(51, 1).of(data) is data
