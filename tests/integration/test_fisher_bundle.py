"""A bundle of the codec fisher from the task's own rows to accuracy, through the verbs' functions."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.demo.demo_task import TASK
from orchestrator.farm import Farm
from orchestrator.library import KnownBundle, make_bundle
from orchestrator.scoring import score_uniform
from orchestrator.sensitivity import sensitivity_of
from sti_runtime.errors import InputError
from sti_runtime.manifest import FisherInfo
from sti_runtime.quantizer import FISHER
from tests.farm_world import DESK, NAME, ROWS, fill, open_world, write_inventory


def by_fisher(farm: Farm, rows: int, seen: list[tuple[int, int]]) -> KnownBundle:
    return make_bundle(
        farm,
        NAME,
        name="by-fisher",
        quantizer=FISHER,
        sensitivity=lambda model: sensitivity_of(
            farm, model, TASK.name, rows=rows, progress=lambda done, total: seen.append((done, total))
        ),
    )


def test_a_bundle_is_made_of_a_tasks_profile_rows_once(tmp_path: Path) -> None:
    write_inventory(tmp_path, DESK)
    seen: list[tuple[int, int]] = []
    with open_world(tmp_path) as farm:
        gobo = fill(farm).bundle
        first = by_fisher(farm, 16, seen)
        assert seen[-1] == (16, 16)
        made = first.manifest.quantizer
        assert isinstance(made, FisherInfo)
        assert (made.sensitivity.task, made.sensitivity.rows) == (TASK.name, 16)
        seen.clear()
        assert by_fisher(farm, 16, seen).digest == first.digest != gobo.digest
        assert not seen
        assert by_fisher(farm, 1000, seen).digest != first.digest
        assert seen[-1] == (ROWS, ROWS)
        assert first.bundle.file_sizes() == gobo.bundle.file_sizes()
        scores = list(score_uniform(farm, first, TASK.name))
        assert [score.fidelity for score in scores] == list(first.manifest.fidelities)
        exact = list(score_uniform(farm, gobo, TASK.name))[-1]
        assert scores[-1] == exact


def test_a_task_without_rows_for_the_model_is_refused(tmp_path: Path) -> None:
    write_inventory(tmp_path, DESK)
    with open_world(tmp_path) as farm:
        fill(farm)
        with pytest.raises(InputError, match="no task 'sst-2'"):
            make_bundle(
                farm,
                NAME,
                name=None,
                quantizer=FISHER,
                sensitivity=lambda model: sensitivity_of(farm, model, "sst-2", rows=4),
            )
