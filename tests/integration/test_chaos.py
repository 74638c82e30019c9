"""The main job under a few random faults; ``make chaos`` is the long run of the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import chaos
from tests.farm_world import require_storage

FAULTS = 10
SEED = 7


@pytest.mark.slow
def test_nothing_is_lost_doubled_or_changed_under_faults(tmp_path: Path) -> None:
    require_storage(tmp_path)
    found = chaos.run(tmp_path, faults=FAULTS, seed=SEED, boards=1, phones=1)
    assert sum(found["faults"].values()) == FAULTS
    assert found["records"] > 0
