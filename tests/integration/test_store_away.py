"""The database stops in the middle of a job and comes back: the job goes on, nothing is lost or doubled."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text
from structlog.testing import capture_logs

from db.errors import StoreUnreachableError
from db.events import latest_events, record_event
from db.session import open_store, sqlite_url, upgrade
from orchestrator.dispatch import Outcome, run_job
from orchestrator.farm import Farm, open_farm
from orchestrator.fleet import probe_device
from orchestrator.patience import patiently
from orchestrator.settings import load_settings
from orchestrator.worker import HostWorker
from tests.campaign_world import begin, campaign, run_state, work_off, write_devices
from tests.contract.postgres_server import (
    UNAVAILABLE,
    Server,
    restartable_server,
    server_binaries,
    unprivileged_user,
)
from tests.farm_world import (
    DESK,
    attempts_of,
    job_folders,
    journal,
    journal_lines,
    machine_of,
    probe_request,
    stored_records,
    wait_for,
    write_inventory,
)

UNITS = 30


@pytest.fixture
def server() -> Iterator[Server]:
    binaries, user = server_binaries(), unprivileged_user()
    if binaries is None or user is None:
        pytest.skip(UNAVAILABLE)
    with restartable_server(binaries, user) as started:
        yield started


@pytest.fixture
def farm(server: Server, tmp_path: Path) -> Iterator[Farm]:
    write_inventory(tmp_path, DESK)
    url = server.template.format(database="postgres")
    upgrade(url)
    with open_farm(load_settings(environ={}, cwd=tmp_path, db_url=url)) as opened:
        yield opened


def test_a_job_outlives_its_database(server: Server, farm: Farm, worker: HostWorker, tmp_path: Path) -> None:
    url = server.template.format(database="postgres")
    request = probe_request(farm, worker, UNITS)
    outcomes: list[Outcome] = []
    driving = threading.Thread(
        target=lambda: outcomes.append(run_job(farm.store, worker, farm.owner, request))
    )
    with machine_of(tmp_path) as machine:
        driving.start()
        wait_for(lambda: bool(job_folders(tmp_path, "desk", "probe")), "the job's folder")
        (folder,) = job_folders(tmp_path, "desk", "probe")
        machine.let_through(lambda: journal_lines(folder) > 5, "some units")
        server.stop()
    # The device goes on by itself, to its end.
    wait_for(lambda: b'"type":"end"' in (folder / "journal.log").read_bytes(), "the end of the journal")
    with pytest.raises(StoreUnreachableError, match="cannot be reached") as caught:
        open_store(url)
    assert "PostgreSQL server runs" in caught.value.remedy
    server.start()
    driving.join(300)
    (outcome,) = outcomes
    assert outcome.complete
    assert stored_records(farm, outcome.job_id, 1) == journal(folder)
    assert attempts_of(farm, outcome.job_id) == [(1, "done")]


def test_a_store_whose_disk_is_full_is_waited_for(tmp_path: Path) -> None:
    tries: list[int] = []
    with open_store(sqlite_url(tmp_path / "s.sqlite")) as store:

        def write() -> None:
            with store.session() as session:
                # SQLite reports its page limit as it does a full disk: SQLITE_FULL.
                session.execute(text(f"PRAGMA max_page_count = {1_000_000 if tries else 1}"))
                tries.append(1)
                record_event(session, "info", "big", "x" * 100_000)

        patiently(write)
        with store.reader() as session:
            assert len(latest_events(session, limit=9)) == 1
    assert len(tries) == 2


def test_a_campaign_outlives_its_database(server: Server, farm: Farm, tmp_path: Path) -> None:
    write_devices(tmp_path)  # whose machine's lock is the test's
    run_id = begin(farm, campaign("name: health\nkinds: [health]\ndevices: [desk]\n"))
    worker = HostWorker(farm.settings, farm.inventory.devices)
    driving = threading.Thread(target=work_off, args=(farm, worker))
    with machine_of(tmp_path):
        driving.start()
        wait_for(lambda: bool(job_folders(tmp_path, "desk", "health")), "the job's folder")
        server.stop()
    server.start()
    driving.join(300)
    assert not driving.is_alive()
    assert run_state(farm, run_id) == "done"
    worker.close()


def test_whoever_begins_something_waits_for_the_database(
    server: Server, farm: Farm, worker: HostWorker
) -> None:
    probed: list[int] = []
    server.stop()
    asking = threading.Thread(
        target=lambda: probed.append(probe_device(farm, worker, farm.inventory.devices[0])[0])
    )
    with capture_logs() as said:
        asking.start()
        wait_for(lambda: any("the store is away" in one["event"] for one in said), "it to wait")
        server.start()
        asking.join(300)
    assert probed == [1]


def test_a_controller_that_starts_before_its_database_waits_for_it(server: Server, farm: Farm) -> None:
    found: list[str] = []

    def begin_serving() -> None:
        with open_farm(farm.settings, wait_s=math.inf) as opened:
            found.append(opened.store.store_id)

    server.stop()
    with pytest.raises(StoreUnreachableError), open_farm(farm.settings):
        pass
    starting = threading.Thread(target=begin_serving)
    with capture_logs() as said:
        starting.start()
        wait_for(lambda: any("the store is away" in one["event"] for one in said), "it to wait")
        server.start()
        starting.join(300)
    assert found == [farm.store.store_id]


def test_patience_has_a_limit_and_can_be_interrupted() -> None:
    def away() -> None:
        raise StoreUnreachableError("The store is away.", "Start it.")

    with pytest.raises(StoreUnreachableError, match="waited for 0 s") as caught:
        patiently(away, limit_s=0)
    assert "nothing is lost" in caught.value.remedy
    stop = threading.Event()
    stop.set()
    with pytest.raises(KeyboardInterrupt):
        patiently(away, stop=stop)
