"""The audit of a device tells what the store has lost from what another farm has left there."""

from __future__ import annotations

import random
from pathlib import Path

from db.backup import backup
from db.session import sqlite_url
from orchestrator import fleet
from orchestrator.audit import audit_device
from orchestrator.dispatch import run_job
from orchestrator.farm import open_farm
from orchestrator.settings import load_settings
from tests.chaos import lose_job
from tests.integration.test_device_states import content_of, farm_with, one, probe_request


def test_a_job_that_the_store_has_lost_is_found_and_another_farms_is_foreign(tmp_path: Path) -> None:
    workdir, (bundle, rows) = tmp_path / "device", content_of(tmp_path)
    with farm_with(tmp_path / "first", one("dut", workdir)) as (farm, worker):
        dut = farm.inventory.devices[0]
        assert fleet.deploy(farm, worker, [dut], bundle, rows)[0].error is None
        request = probe_request(fleet.ready_device(farm, worker, dut, bundle.name))
        outcome = run_job(farm.store, worker, farm.owner, request)
        found = audit_device(farm, worker, "dut", request.device_id)
        assert (found.ok, found.journals, found.foreign) == (True, 1, ())

        copy = tmp_path / "lossy.sqlite"
        backup(farm.settings.db_url, copy)
        assert lose_job(copy, random.Random(1)) == outcome.job_id
        environment = {"STIFARM_DB_URL": sqlite_url(copy)}
        with open_farm(load_settings(environ=environment, cwd=tmp_path / "first")) as lossy:
            found = audit_device(lossy, worker, "dut", request.device_id)
        assert (found.ok, found.journals, found.foreign) == (False, 1, ())
        (lost,) = found.audit.discrepancies
        assert (lost.job_id, lost.attempt) == (outcome.job_id, 1)
        assert "not in the store" in lost.what

    with farm_with(tmp_path / "second", one("mine", workdir)) as (second, other):
        device_id, _ = fleet.probe_device(second, other, second.inventory.devices[0])
        found = audit_device(second, other, "mine", device_id)
        assert (found.ok, found.journals, found.foreign) == (True, 0, (f"{outcome.job_id}/1",))
