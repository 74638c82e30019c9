"""Health checks of this machine: kept as rows, told by the verb, and what ends a quarantine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from db.quarantine import PASSES_TO_RELEASE, begin_quarantine, latest_check, quarantine_of
from orchestrator import fleet
from orchestrator.cli.check import still_held
from orchestrator.device_facts.seen import Seen
from orchestrator.errors import LinkError
from orchestrator.farm import Farm
from orchestrator.health.check import check_device
from orchestrator.health.kinds import HEALTH
from orchestrator.worker import HostWorker
from sti_runtime.messages import Gates
from tests.farm_world import DESK, job_folders, open_world, write_inventory


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Farm]:
    write_inventory(tmp_path, DESK)
    with open_world(tmp_path) as opened:
        yield opened


class LostWorker(HostWorker):
    """A host's worker whose device nobody can reach."""

    def look(self, name: str) -> Seen:
        """Always fails."""
        raise LinkError("no route to it.", "Check its cable.", device=name)


def test_checks_passed_in_a_row_end_a_quarantine_and_a_lost_device_starts_over(farm: Farm) -> None:
    device = farm.inventory.devices[0]
    worker = HostWorker(farm.settings, [device])
    assert check_device(farm, LostWorker(farm.settings, [device]), device).known is False
    device_id, _ = fleet.probe_device(farm, worker, device)
    with farm.store.session() as session:
        begin_quarantine(session, device_id, "it vanished")
    lost = check_device(farm, LostWorker(farm.settings, [device]), device)
    assert [(item.item, item.detail) for item in lost.items] == [("reach", "no route to it.")]
    checks = [check_device(farm, worker, device) for _ in range(PASSES_TO_RELEASE)]
    assert [check.passed for check in checks] == [True] * PASSES_TO_RELEASE, checks[0]
    assert [check.released for check in checks] == [False] * (PASSES_TO_RELEASE - 1) + [True]
    assert [check.passes for check in (lost, *checks)] == [*range(PASSES_TO_RELEASE), 0]
    held = "desk stays in quarantine: {} of 3 checks in a row passed, {} it; why it is there: it vanished"
    assert [still_held(check) for check in (lost, checks[1])] == [
        held.format(0, "3 more release"),
        held.format(2, "1 more releases"),
    ]
    assert [check.quarantined for check in checks] == ["it vanished", "it vanished", None]
    assert len({check.job_id for check in checks}) == PASSES_TO_RELEASE
    assert len(job_folders(farm.settings.home.parent, "desk", HEALTH)) == PASSES_TO_RELEASE
    with farm.store.reader() as session:
        assert quarantine_of(session, device_id) is None
        found = latest_check(session, device_id)
    assert found is not None
    assert found[0].job_id == checks[-1].job_id
    assert {row.item: row.verdict for row in found[1]}["probe"] == "pass"


def test_a_gate_that_cannot_be_met_fails_the_check(farm: Farm) -> None:
    wanted = Gates(
        max_temperature_milli_c=None,
        min_battery_percent=None,
        max_load_milli=None,
        min_free_bytes=1 << 60,
        wait_limit_s=0,
    )
    device = replace(farm.inventory.devices[0], gates=wanted)
    checked = check_device(farm, HostWorker(farm.settings, [device]), device)
    assert {item.item: item.verdict for item in checked.items}["space"] == "fail"
    assert not checked.passed
