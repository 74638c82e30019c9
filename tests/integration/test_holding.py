"""Devices that a person or the farm holds back: jobs stop and go on, failures have a budget, lists tell."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from db.devices import list_devices
from db.errors import DeviceReservedError, QuarantinedError
from db.quarantine import begin_quarantine, end_quarantine, quarantine_of
from db.reservations import reserve, unreserve
from orchestrator import dispatch
from orchestrator.cli.context import FAILED, OK, SOME_FAILED, USAGE, without_quarantined
from orchestrator.dispatch import run_job
from orchestrator.errors import SelectorError, StableError
from orchestrator.farm import Farm
from orchestrator.health.failing import BUDGET
from orchestrator.health.selection import relied_on
from orchestrator.worker import HostWorker
from sti_runtime.messages import Job
from tests.farm_world import (
    DESK,
    attempts_of,
    machine_of,
    open_world,
    probe_request,
    stored_records,
    write_inventory,
)
from tests.unit.test_cli_input import Run, refusal, run  # noqa: F401 - a fixture

HOUR_NS = 3600 * 10**9
UNITS = 6
OTHER = "{name: other, transport: local, threads: 1, labels: {kind: computer}}"


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Farm]:
    write_inventory(tmp_path, DESK)
    with open_world(tmp_path) as opened:
        yield opened


def test_a_job_stops_for_a_person_and_goes_on_after(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "LEASE_TTL_NS", 10**9)  # looked at four times in that time
    worker = HostWorker(farm.settings, farm.inventory.devices)
    request = probe_request(farm, worker, UNITS)
    done: list[int] = []
    with machine_of(farm.settings.home.parent) as machine:

        def let_through_and_reserve() -> None:
            machine.let_through(lambda: any(done), "a unit")
            with farm.store.session() as session:
                reserve(session, request.device_id, holder="ann", reason=None, length_ns=HOUR_NS)

        person = threading.Thread(target=let_through_and_reserve)
        person.start()
        with pytest.raises(DeviceReservedError, match="desk is reserved by ann"):
            run_job(farm.store, worker, farm.owner, request, advance=lambda units, *_: done.append(units))
        person.join()
        assert 0 < max(done) < UNITS
    with pytest.raises(DeviceReservedError):
        run_job(farm.store, worker, farm.owner, request)
    with farm.store.session() as session:
        unreserve(session, request.device_id)
    outcome = run_job(farm.store, worker, farm.owner, request)
    assert outcome.complete
    assert attempts_of(farm, outcome.job_id) == [(1, "done")]
    units = [record.payload.type for record in stored_records(farm, outcome.job_id, 1)]
    assert units.count("result") == UNITS


class BrokenWorker(HostWorker):
    """A host's worker whose device refuses every job."""

    def start_job(self, name: str, job: Job) -> bool:
        """Always fails."""
        raise StableError("its storage fails.", "Replace it.", device=name)


def test_a_device_that_fails_again_and_again_is_put_in_quarantine(farm: Farm) -> None:
    worker = BrokenWorker(farm.settings, farm.inventory.devices)
    request = probe_request(farm, worker, 1)
    for _ in range(BUDGET.failures + 1):
        with farm.store.reader() as session:
            assert quarantine_of(session, request.device_id) is None
        with pytest.raises(StableError, match="its storage fails"):
            run_job(farm.store, worker, farm.owner, request)
    with pytest.raises(QuarantinedError, match=r"it failed 3 times within 6 h; .* its storage fails"):
        run_job(farm.store, worker, farm.owner, request)
    kept, left_out = relied_on(farm, farm.inventory.devices, "all")
    assert (kept, list(left_out)) == ((), ["desk"])
    assert relied_on(farm, farm.inventory.devices, "desk")[0] == farm.inventory.devices
    with farm.store.session() as session:
        end_quarantine(session, request.device_id, "released by ann")
    good = HostWorker(farm.settings, farm.inventory.devices)
    assert run_job(farm.store, good, farm.owner, request).complete


def test_the_verbs_say_who_holds_what(tmp_path: Path, run: Run) -> None:  # noqa: F811
    write_inventory(tmp_path, DESK, OTHER)
    with open_world(tmp_path) as farm:
        probe_request(farm, HostWorker(farm.settings, farm.inventory.devices), 1)
    said = run(tmp_path, "devices", "reserve", "desk", "--for", "4h", "--reason", "its fan", "--by", "ann")
    assert said.code == OK
    assert "desk: reserved by ann until " in said.err
    assert run(tmp_path, "devices", "reserve", "all", "--for", "4h", "--by", "ann").code == SOME_FAILED
    what, remedy = refusal(run(tmp_path, "devices", "reserve", "desk", "--for", "1h", "--by", "bob"), FAILED)
    assert "desk is reserved by ann until" in what
    assert "ask ann" in remedy
    for length in ("soon", "0h", "9000h"):
        assert "--for" in refusal(run(tmp_path, "devices", "reserve", "desk", "--for", length), USAGE)[0]
    run(tmp_path, "devices", "quarantine", "desk", "--cause", "it swells")
    listed = {row["name"]: row for row in json.loads(run(tmp_path, "devices", "list", "--json").out)}
    assert listed["desk"]["reservation"]["holder"] == "ann"
    assert listed["desk"]["quarantine"]["cause"] == "it swells"
    assert listed["other"]["reservation"] is None
    shown = run(tmp_path, "devices", "list").out
    assert "reserved by ann until" in shown
    assert "0/3 checks passed: it swells" in shown
    assert "free" in shown
    assert run(tmp_path, "devices", "unreserve", "desk").code == OK
    released = json.loads(run(tmp_path, "devices", "release", "desk", "--json").out)
    assert released == [{"device": "desk", "released": True}]
    listed = {row["name"]: row for row in json.loads(run(tmp_path, "devices", "list", "--json").out)}
    assert listed["desk"]["reservation"] is None
    assert listed["desk"]["quarantine"] is None


def test_what_selects_only_devices_in_quarantine_is_refused_before_anything_starts(
    tmp_path: Path,
) -> None:
    write_inventory(tmp_path, DESK)
    with open_world(tmp_path) as farm:
        probe_request(farm, HostWorker(farm.settings, farm.inventory.devices), 1)
        with farm.store.session() as session:
            begin_quarantine(session, list_devices(session)[0].id, "it swells")
    with open_world(tmp_path) as farm, pytest.raises(SelectorError, match="only devices in quarantine"):
        without_quarantined(farm, farm.inventory.devices, "all")
    write_inventory(tmp_path, DESK, OTHER)
    with open_world(tmp_path) as farm:
        kept, (left_out,) = without_quarantined(farm, farm.inventory.devices, "all")
        assert ([device.name for device in kept], left_out.device) == (["other"], "desk")
        assert without_quarantined(farm, farm.inventory.devices, "desk,other") == (farm.inventory.devices, ())
