"""Devices that a controller cannot ask wait for their host, or for the controller that can; not for ever."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from db import campaign_work as work
from db.errors import StoreUnreachableError
from db.leases import database_wall_ns
from db.models import CampaignBatchRow, CampaignRunRow, DeviceFailureRow, HealthCheckRow, RecoveryStepRow
from db.quarantine import quarantine_of
from orchestrator.campaigns import claims
from orchestrator.campaigns.controller import Controller
from orchestrator.campaigns.steps import perform
from orchestrator.device_facts.seen import Seen
from orchestrator.errors import HostAwayError, LinkError
from orchestrator.farm import Farm
from orchestrator.fleet import probe_device
from orchestrator.health.failing import BUDGET, note_failure
from orchestrator.recovering import Stepped
from orchestrator.worker import HostWorker
from tests.campaign_world import (
    begin,
    campaign,
    cells,
    kinds_and_states,
    means_of,
    run_state,
    work_off,
    write_devices,
)
from tests.farm_world import open_world

HEALTH = "name: health\nkinds: [health]\ndevices: {}\n"
LONG_NS = 1000 * 10**9


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Farm]:
    write_devices(tmp_path)
    with open_world(tmp_path) as opened:
        yield opened


def look(farm: Farm, worker: HostWorker, in_reach: Callable[[str], bool], looks: int = 2) -> None:
    """Let a controller that has some devices in reach look at the store so often."""
    looked = count(1)
    means = replace(means_of(farm, worker), in_reach=in_reach)
    Controller(means).run(lambda idle: next(looked) >= looks)


def nothing(_device: str) -> bool:
    """Every host is away."""
    return False


def long_ago(session: Session) -> None:
    """Every open run began a while ago, and what was claimed was claimed then."""
    then = database_wall_ns(session) - LONG_NS
    session.execute(update(CampaignRunRow).values(due_wall_ns=then, started_wall_ns=then))
    batches = update(CampaignBatchRow).where(CampaignBatchRow.state == "running")
    session.execute(batches.values(claimed_until_wall_ns=then, started_wall_ns=then))


def test_a_device_whose_host_is_away_is_waited_for(farm: Farm, worker: HostWorker) -> None:
    run_id = begin(farm, campaign(HEALTH.format("desk")))
    look(farm, worker, nothing)
    ((batch, cell),) = cells(farm, run_id)
    assert (batch.state, batch.tries, cell.state) == ("queued", 0, "queued")
    work_off(farm, worker)
    assert run_state(farm, run_id) == "done"


def test_it_is_given_up_when_nothing_happens_there(farm: Farm, worker: HostWorker) -> None:
    run_id = begin(farm, campaign(HEALTH.format("all")))
    begun, _ = cells(farm, run_id)[0]
    with farm.store.session() as session:
        assert work.claim(session, begun.id, "another controller, which died")
        long_ago(session)
    look(farm, worker, nothing)
    assert kinds_and_states(farm, run_id) == {("health", "failed"): 2}
    assert all("its host has been away" in (cell.cause or "") for _, cell in cells(farm, run_id))
    assert run_state(farm, run_id) == "failed"


def test_another_controller_may_have_it_in_reach(farm: Farm, worker: HostWorker) -> None:
    run_id = begin(farm, campaign(HEALTH.format("all")))
    (theirs, _), (waiting, _) = cells(farm, run_id)
    with farm.store.session() as session:
        long_ago(session)
        assert work.claim(session, theirs.id, "another controller, which works")
    look(farm, worker, nothing)
    states = {batch.id: cell.state for batch, cell in cells(farm, run_id)}
    assert states == {theirs.id: "running", waiting.id: "queued"}


def test_a_claim_of_this_controller_on_a_device_that_went_away_ends(farm: Farm, worker: HostWorker) -> None:
    run_id = begin(farm, campaign(HEALTH.format("desk")))
    ((batch, _),) = cells(farm, run_id)
    with farm.store.session() as session:
        assert work.claim(session, batch.id, farm.owner)
        long_ago(session)
    farm.know([device for device in farm.inventory.devices if device.name != "desk"])
    look(farm, worker, lambda device: True)
    ((_, cell),) = cells(farm, run_id)
    assert cell.state == "failed"
    assert "not in the inventory" in (cell.cause or "")
    assert run_state(farm, run_id) == "failed"


def test_a_store_that_was_away_is_no_failed_try(farm: Farm, worker: HostWorker) -> None:
    run_id = begin(farm, campaign(HEALTH.format("desk")))
    ((row, _),) = cells(farm, run_id)
    batch = claims.claimed(farm, row.id)
    assert batch is not None
    claims.settle(means_of(farm, worker), batch, {}, StoreUnreachableError("The store is away.", "Start it."))
    ((after, cell),) = cells(farm, run_id)
    assert (after.state, after.tries, cell.state) == ("queued", 0, "queued")


class DyingHost(HostWorker):
    """A lab host that dies when its device is asked something: at the first look, or on the ladder."""

    def __init__(self, farm: Farm, dies_at: str) -> None:
        super().__init__(farm.settings, farm.inventory.devices)
        self.dies_at, self.there = dies_at, True

    def look(self, name: str) -> Seen:
        """The device is silent, as of a host that goes down, or the host is gone already."""
        if self.there and self.dies_at == "look":
            self.there = False
        if not self.there:
            raise HostAwayError("host bench1 is out of reach.", device=name)
        if self.dies_at == "quarantine":
            self.there = False
        raise LinkError("no route to it.", device=name)

    def recover(self, name: str, step: str) -> Stepped:
        """The host is gone in the middle of it."""
        self.there = False
        raise HostAwayError("host bench1 is out of reach.", device=name)


@pytest.mark.parametrize("dies_at", ["look", "ladder", "quarantine"])
def test_a_host_that_dies_under_a_health_check_is_no_fault_of_the_device(
    farm: Farm, worker: HostWorker, dies_at: str
) -> None:
    device_id, _ = probe_device(farm, worker, farm.inventory.devices[0])
    run_id = begin(farm, campaign(HEALTH.format("desk")))
    dying = DyingHost(farm, dies_at)

    def given_back() -> bool:
        ((batch, _),) = cells(farm, run_id)
        return batch.started_wall_ns is not None and batch.state == "queued"

    means = replace(means_of(farm, dying), in_reach=lambda device: dying.there)
    Controller(means).run(lambda idle: given_back())
    dying.close()
    ((batch, cell),) = cells(farm, run_id)
    assert (batch.tries, cell.state, dying.there) == (0, "queued", False)
    with farm.store.session() as session:
        assert quarantine_of(session, device_id) is None
        for counted in (RecoveryStepRow, DeviceFailureRow, HealthCheckRow):
            found = session.scalar(select(func.count()).select_from(counted))
            assert found == (dies_at != "look" and counted is HealthCheckRow), counted
        session.execute(update(CampaignBatchRow).values(not_before_wall_ns=0))
    work_off(farm, worker)  # it is back
    assert run_state(farm, run_id) == "done"


def test_a_worker_that_fails_on_a_host_that_is_there_is_tried_only_so_often(
    farm: Farm, worker: HostWorker
) -> None:
    run_id = begin(farm, campaign(HEALTH.format("desk")))
    away = HostAwayError("host bench1 is out of reach.", device="desk")
    for tries in range(claims.TRIES):
        ((row, cell),) = cells(farm, run_id)
        assert (row.tries, cell.state) == (tries, "queued")
        batch = claims.claimed(farm, row.id)
        assert batch is not None
        claims.settle(means_of(farm, worker), batch, {}, away)
    ((_, cell),) = cells(farm, run_id)
    assert cell.state == "failed"


def test_a_device_that_left_the_inventory_after_the_claim_waits_until_it_is_back(
    farm: Farm, worker: HostWorker
) -> None:
    run_id = begin(farm, campaign(HEALTH.format("desk")))
    ((row, _),) = cells(farm, run_id)
    batch = claims.claimed(farm, row.id)
    assert batch is not None
    farm.inventory = replace(farm.inventory, devices=())
    means = replace(means_of(farm, worker), in_reach=lambda device: False)
    with pytest.raises(HostAwayError, match="no longer in the inventory") as left:
        perform(means, batch, lambda known: None)
    claims.settle(means, batch, {}, left.value)
    ((after, cell),) = cells(farm, run_id)
    assert (after.tries, cell.state) == (0, "queued")


def test_a_device_whose_host_was_away_let_no_job_down(farm: Farm, worker: HostWorker) -> None:
    device_id, _ = probe_device(farm, worker, farm.inventory.devices[0])
    for _ in range(BUDGET.failures + 1):
        note_failure(farm.store, device_id, HostAwayError("it is away.", device="desk"), job_id=None)
    with farm.store.reader() as session:
        assert quarantine_of(session, device_id) is None
        assert session.scalar(select(func.count()).select_from(DeviceFailureRow)) == 0
