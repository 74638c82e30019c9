"""Campaigns on real agents: what is asked is measured once, whatever happens to the controller."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from db.campaign_samples import found_in
from orchestrator.farm import Farm
from orchestrator.worker import HostWorker
from tests.campaign_world import (
    begin,
    campaign,
    cells,
    kinds_and_states,
    run_state,
    work_off,
    write_devices,
)
from tests.farm_world import fill, job_states, open_world, require_storage

MATRIX = """
name: small
kinds: [health, profile, execute, evaluate]
targets: [1ns, 100s, 5 of whole-model compute]
preload: [10kB]
working: 1MB
policies: [sti, preload-2]
requests: 4
"""


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Farm]:
    write_devices(tmp_path, "desk", "shelf")
    with open_world(tmp_path) as opened:
        yield opened


@pytest.fixture
def worker(farm: Farm) -> Iterator[HostWorker]:
    made = HostWorker(farm.settings, farm.inventory.devices)
    yield made
    made.close()


@pytest.mark.slow
def test_a_campaign_measures_what_its_matrix_asks(farm: Farm, worker: HostWorker, tmp_path: Path) -> None:
    require_storage(tmp_path)
    fill(farm)
    run_id = begin(farm, campaign(MATRIX.replace("preload-2", "preload-6")))
    work_off(farm, worker)
    for batch, cell in cells(farm, run_id):
        print(batch.number, batch.device, batch.kind, cell.state, cell.cause, cell.target, cell.target_ns)
    assert kinds_and_states(farm, run_id) == Counter()
    assert run_state(farm, run_id) == "done"
