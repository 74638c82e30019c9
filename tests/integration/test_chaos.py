"""The main job, and a fleet, under a few random faults; ``make chaos`` is the long run of the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import chaos
from tests.chaos_fleet import run as fleet
from tests.farm_world import require_storage
from tests.ssh_server import sshd_program

FAULTS = 10
SEED = 3496
"""Its first faults are of every kind. One that cannot be had at the moment is refused, and another comes."""


@pytest.mark.slow
def test_nothing_is_lost_doubled_or_changed_under_faults(tmp_path: Path) -> None:
    require_storage(tmp_path)
    sshd_program()  # the lab's boards are logged in to
    found = chaos.run(tmp_path, faults=FAULTS, seed=SEED, boards=1, phones=1)
    assert sum(found["faults"].values()) == FAULTS
    assert {"cut", "reboot", "adb-server-kill"} <= set(found["faults"])
    assert found["records"] > 0


@pytest.mark.slow
def test_a_fleet_loses_and_doubles_nothing_under_faults(tmp_path: Path) -> None:
    """Database, host and controller are killed in turn while the first campaigns run."""
    require_storage(tmp_path)
    found = fleet.run(
        tmp_path,
        store="postgresql",
        seed=1849,
        faults=4,
        hosts=1,
        devices=1,
        boards=0,
        longest_pause_s=5,
        campaigns=("alive", "speeds"),
        damaged=False,  # that the audit tells of damage: test_audit.py, and make chaos
    )
    assert set(found["faults"]) == {"database-kill", "host-kill", "controller-kill", "backend-kill"}
    assert found["records"] > 0
