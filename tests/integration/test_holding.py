"""Devices that a person or the farm holds back: jobs stop and go on, failures have a budget, lists tell."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from db.clock import utc_text
from db.devices import device_by_name, list_devices, register_device
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
from orchestrator.host_book import note_hosts
from orchestrator.worker import HostWorker
from sti_runtime.messages import Job
from tests.farm_world import (
    DESK,
    attempts_of,
    fill,
    machine_of,
    open_world,
    probe_request,
    stored_records,
    write_inventory,
    write_task_files,
)
from tests.unit.test_cli_input import Run, refusal, run  # noqa: F401 - a fixture
from tests.unit.test_host_routes import offer, seen

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
        kept, (left_out,) = without_quarantined(farm, farm.inventory.devices, "desk,other", measures=True)
        assert ([device.name for device in kept], left_out.device) == (["other"], "desk")


def test_what_is_to_be_measured_on_a_named_device_in_quarantine_starts_nothing(
    tmp_path: Path,
    run: Run,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_inventory(tmp_path, DESK, OTHER)
    write_task_files(tmp_path)
    with open_world(tmp_path) as farm:
        fill(farm)
        probe_request(farm, HostWorker(farm.settings, farm.inventory.devices), 1)
        with farm.store.session() as session:
            begin_quarantine(session, device_by_name(session, "desk").id, "it swells")
    capsys.readouterr()
    for verb in (("eval", "--target", "1s"), ("profile", "--again")):
        answer = run(tmp_path, *verb, "--devices", "desk")
        what, remedy = refusal(answer, FAILED)
        assert "desk is in quarantine since" in what
        assert "stifarm devices release desk" in remedy
        assert "controller" not in answer.err


# ------------------------------------------------------------------ devices of lab hosts


def register(farm: Farm, name: str, host: str) -> str:
    """A device that was probed once, on that host; when it was seen."""
    with farm.store.session() as session:
        row = register_device(
            session,
            identity=f"cpu-of-{name}",
            name=name,
            transport="local",
            engine="native",
            emulated=False,
            host=host,
        )
        return utc_text(row.last_seen_wall_ns)


def test_devices_of_lab_hosts_are_held_and_listed_whether_these_are_there_or_not(
    tmp_path: Path,
    run: Run,  # noqa: F811
) -> None:
    write_inventory(tmp_path, DESK)
    alone = run(tmp_path, "devices", "list")
    assert "host" not in alone.out
    with open_world(tmp_path) as farm:
        near, far = offer("bench1", "near", "unseen"), offer("bench2", "far", "desk")
        note_hosts(farm.store, [seen(near), seen(far, "away")])
        for name, host in (("desk", "local"), ("near", "bench1"), ("far", "bench2")):
            register(farm, name, host)
    for name in ("near", "far", "desk"):
        said = run(tmp_path, "devices", "reserve", name, "--for", "1h", "--by", "ann")
        assert said.code == OK, said.err
        assert f"{name}: reserved by ann until" in said.err
        assert run(tmp_path, "devices", "quarantine", name, "--cause", "it swells").code == OK
    answer = run(tmp_path, "devices", "list", "--json")
    rows = json.loads(answer.out)
    assert [(row["name"], row["host"], row["reservation"] is not None) for row in rows] == [
        ("desk", "local", True),
        ("near", "bench1", True),
        ("unseen", "bench1", False),
        ("far", "bench2", True),
        ("desk", "bench2", True),
    ]
    assert [row["identity"] for row in rows if row["name"] == "desk"] == ["cpu-of-desk", None]
    assert "desk: two hosts name it: the controller itself and bench2." in answer.err
    shown = run(tmp_path, "devices", "list").out
    assert "Devices of inventory.yaml and of the lab hosts" in shown
    assert "the controller" in shown
    assert "bench2" in shown
    for verb, key in (("unreserve", "was_reserved"), ("release", "released")):
        done = run(tmp_path, "devices", verb, "near,far,desk", "--json")
        assert [row[key] for row in json.loads(done.out)] == [True] * 3
    what, remedy = refusal(run(tmp_path, "devices", "reserve", "unseen", "--for", "1h"), FAILED)
    assert what == "unseen: it was never probed, so the store does not know which hardware its name means."
    assert remedy.startswith("Probe it once, while its host bench1 is joined: stifarm ")
    assert remedy.endswith(" devices probe --devices unseen")


def test_a_device_that_nobody_lists_any_more_is_told_where_it_was(
    tmp_path: Path,
    run: Run,  # noqa: F811
) -> None:
    write_inventory(tmp_path, DESK)
    with open_world(tmp_path) as farm:
        note_hosts(farm.store, [seen(offer("bench1", "near")), seen(offer("bench2", "far"), "left")])
        at = {
            name: register(farm, name, host)
            for name, host in (
                ("mine", "local"), ("near-too", "bench1"), ("far", "bench2"), ("lost", "bench3")
            )
        }  # fmt: skip

    def told(name: str) -> str:
        what, _ = refusal(run(tmp_path, "devices", "unreserve", f"near,{name}"), USAGE)
        return " ".join(what.split())

    gone = "{0} is in no inventory now: it was last seen at {1}, on "
    assert told("mine") == gone.format("mine", at["mine"]) + "the controller itself."
    begun = gone.format("near-too", at["near-too"])
    assert told("near-too") == begun + "host bench1, whose inventory lists it no more."
    assert told("far") == gone.format("far", at["far"]) + "host bench2, which has left the farm."
    assert told("lost") == gone.format("lost", at["lost"]) + "host bench3."
    assert told("nothing") == "No device is called 'nothing'."
