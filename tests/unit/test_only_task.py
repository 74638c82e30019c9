"""Which task is meant when none is named: that of the bundle, if only one task has rows for its model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.demo.demo_task import TASK
from orchestrator.library import Splits, only_task, register_task
from sti_runtime.errors import InputError
from tests.farm_world import fill, open_world, tiny_model, tiny_splits, write_inventory


def rows_of(task: str, **changes: str) -> Splits:
    """The rows of the tiny task as another task's; ``changes`` of their info besides."""
    splits = tiny_splits(tiny_model())
    return Splits(
        *(
            replace(data, info=data.info.model_copy(update={"task": task, **changes}))
            for data in (splits.train, splits.profile, splits.dev)
        )
    )


def test_the_task_with_rows_for_the_bundle_s_model_is_meant(tmp_path: Path) -> None:
    write_inventory(tmp_path, "desk")
    with open_world(tmp_path) as farm:
        work = fill(farm)
        assert only_task(farm, None, work.bundle) == TASK.name
        other = TASK.model_copy(update={"name": "other"})
        register_task(farm, other, rows_of("other", tokenizer="f" * 64))
        assert only_task(farm, None, work.bundle) == TASK.name
        with pytest.raises(InputError, match="Which task"):
            only_task(farm, None)
        third = TASK.model_copy(update={"name": "third"})
        register_task(farm, third, rows_of("third"))
        with pytest.raises(InputError, match="Which task"):
            only_task(farm, None, work.bundle)
        assert only_task(farm, "THIRD", work.bundle) == "third"
