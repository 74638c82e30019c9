"""Devices that a controller cannot ask wait for their host, or for the controller that can; not for ever."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
from sqlalchemy import update
from sqlalchemy.orm import Session

from db import campaign_work as work
from db.errors import StoreUnreachableError
from db.leases import database_wall_ns
from db.models import CampaignBatchRow, CampaignRunRow
from orchestrator.campaigns import claims
from orchestrator.campaigns.controller import Controller
from orchestrator.farm import Farm
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
