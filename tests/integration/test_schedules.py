"""Schedules that fall due, and what the verbs of campaigns and schedules say to wrong input."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import pytest
from sqlalchemy import text as sql
from sqlalchemy import update

from db.campaigns import find_campaign, open_runs, runs_of
from db.controllers import begin_controller, end_controller
from db.errors import ReplacedError
from db.events import latest_events
from db.models import CampaignRunRow, ScheduleRow
from db.schedules import put_schedule
from orchestrator.campaigns.schedules import fire_due
from orchestrator.campaigns.spec import CampaignSpec
from orchestrator.campaigns.spec_file import load_campaign
from orchestrator.campaigns.start import begin_run, keep_campaign, resolve, take_run
from orchestrator.cli import main
from orchestrator.cli.schedules import reread
from orchestrator.farm import Farm, controlling
from orchestrator.hosts import HostOffer, SeenHost
from orchestrator.inventory import Device
from orchestrator.inventory_watch import InventoryWatch
from orchestrator.lab_hosts import LabHosts
from orchestrator.shipping import ShippedWorker
from orchestrator.worker import HostWorker
from tests.agent_data import REPO
from tests.campaign_world import begin, campaign, write_devices
from tests.farm_world import fill, open_world, wait_for

HEALTH = "name: health\nkinds: [health]\n"
HOUR_NS = 3600 * 10**9
DUE_ONCE_NS = 45 * 60 * 10**9  # so long ago one time of `schedule` fell due since


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Farm]:
    write_devices(tmp_path)
    with open_world(tmp_path) as opened:
        yield opened


def schedule(farm: Farm, spec: CampaignSpec, *, catch_up: str = "once", overlap: str = "skip") -> int:
    """A schedule of every hour, that is not due again within half an hour, however slow the machine is."""
    minute = (datetime.now(UTC).minute + 30) % 60
    with farm.store.session() as session:
        row = keep_campaign(session, spec)
        made = put_schedule(
            session, row.id, cron=f"{minute} * * * *", timezone="UTC", catch_up=catch_up, overlap=overlap
        )
        return made.id


def settle_back(farm: Farm, schedule_id: int, age_ns: int) -> None:
    """As if nothing had looked at the schedule for so long."""
    with farm.store.session() as session:
        session.execute(
            update(ScheduleRow)
            .where(ScheduleRow.id == schedule_id)
            .values(settled_wall_ns=time.time_ns() - age_ns)
        )


def runs(farm: Farm) -> list[CampaignRunRow]:
    with farm.store.reader() as session:
        return list(runs_of(session, 1))


def events(farm: Farm) -> list[tuple[str, str]]:
    with farm.store.reader() as session:
        return [(event.level, event.kind) for event in latest_events(session)]


def test_a_due_time_begins_one_run_and_what_was_missed_is_told(farm: Farm) -> None:
    schedule_id = schedule(farm, campaign(HEALTH))
    assert fire_due(farm) == []
    settle_back(farm, schedule_id, 2 * HOUR_NS)
    assert fire_due(farm) == ["health"]
    assert fire_due(farm) == []
    (run,) = runs(farm)
    assert (run.trigger, run.state, run.number) == ("catch-up", "running", 1)
    assert ("warning", "schedule-missed") in events(farm)


@pytest.mark.parametrize(("overlap", "states"), [("skip", "skipped"), ("queue", "queued")])
def test_due_while_a_run_is_open(farm: Farm, overlap: str, states: str) -> None:
    begin(farm, campaign(HEALTH))
    schedule_id = schedule(farm, campaign(HEALTH), overlap=overlap)
    settle_back(farm, schedule_id, DUE_ONCE_NS)
    assert fire_due(farm) == ["health"]
    newest = runs(farm)[0]
    assert newest.state == states
    if overlap == "skip":
        assert "run 1 was still under way" in (newest.cause or "")
        assert ("warning", "campaign-skipped") in events(farm)
        return
    # A second one does not queue behind it.
    settle_back(farm, schedule_id, DUE_ONCE_NS)
    with farm.store.session() as session:
        table = CampaignRunRow
        session.execute(update(table).where(table.id == newest.id).values(due_wall_ns=1))
    fire_due(farm)
    assert [run.state for run in runs(farm)] == ["skipped", "queued", "running"]


def test_a_run_that_cannot_begin_is_a_failure_that_is_told(farm: Farm) -> None:
    schedule_id = schedule(farm, campaign(HEALTH + "devices: [gone]\n"))
    settle_back(farm, schedule_id, DUE_ONCE_NS)
    assert fire_due(farm) == ["health"]
    (run,) = runs(farm)
    assert run.state == "failed"
    assert "gone" in (run.cause or "")
    assert ("error", "campaign-failed") in events(farm)
    with farm.store.reader() as session:
        assert list(open_runs(session)) == []


def test_after_a_run_that_could_not_begin_a_new_one_does(farm: Farm, tmp_path: Path, cli: Cli) -> None:
    spec = campaign("name: health\nkinds: [health]\ndevices: [late]\n")
    settle_back(farm, schedule(farm, spec), DUE_ONCE_NS)
    assert fire_due(farm) == ["health"]
    (tmp_path / "inventory.yaml").write_text("version: 1\ndevices: [{name: late, transport: local}]\n")
    assert "run 2 of health is open" in cli("campaign", "run", "health", "--detach")[1]
    assert [(run.number, run.state) for run in runs(farm)] == [(2, "running"), (1, "failed")]


def test_serve_does_what_fell_due_while_nothing_ran(farm: Farm, cli: Cli, tmp_path: Path) -> None:
    schedule_id = schedule(farm, campaign(HEALTH + "devices: [desk]\n"))
    settle_back(farm, schedule_id, 2 * HOUR_NS)
    served = subprocess.run(
        [sys.executable, "-c", "from orchestrator.cli import main; main()", "serve", "--once"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert served.returncode == 0, served.stderr
    assert "health is due" in served.stderr
    assert "failed" not in served.stderr
    told = " ".join(served.stderr.split())
    assert "run 1 of health: done; 1 cell: 1 done; took" in told
    assert "See it: stifarm campaign report health --run 1" in told
    history = json.loads(cli("schedules", "history", "health", "--json")[1])
    assert history
    assert {(row["state"], row["cells"]) for row in history} == {("done", "1 of 1")}
    assert ("warning", "schedule-missed") in events(farm)


# ------------------------------------------------------------------ verbs


class Cli:
    """The command line in this process."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self._root, self._capsys = root, capsys

    def __call__(self, *argv: str) -> tuple[int, str]:
        """(exit code, both outputs on one line)."""
        code = 0
        try:
            main(["--inventory", str(self._root / "inventory.yaml"), *argv])
        except SystemExit as ended:
            code = int(ended.code or 0)
        said = self._capsys.readouterr()
        return code, " ".join((said.out + said.err).split())


@pytest.fixture
def cli(farm: Farm, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(tmp_path, capsys)


def write(root: Path, text: str) -> str:
    path = root / "campaign.yaml"
    path.write_text(f"version: 1\n{text}")
    return str(path)


def test_wrong_input_is_told_before_anything_begins(farm: Farm, cli: Cli, tmp_path: Path) -> None:
    cases = (
        (HEALTH + "devices: '!all'\n", "selects no device"),
        (HEALTH + "devices: [desc]\n", "Did you mean desk?"),
        ("name: x\nkinds: execute\ntargets: 0ms\n", "No latency can be 0"),
        ("name: x\nkinds: execute\ntargets: 1ms\npolicies: best\n", "no policy is called 'best'"),
        ("name: x\nkinds: execute\ntargets: 1ms\nbundles: none\n", "none"),
    )
    for text, what in cases:
        code, said = cli("campaign", "run", write(tmp_path, text), "--detach")
        assert (code, what in said) == (2, True), said
    with farm.store.reader() as session:
        assert list(open_runs(session)) == []


def test_open_runs_that_nobody_works_on_are_told_with_what_to_do(
    farm: Farm, cli: Cli, tmp_path: Path
) -> None:
    assert "no controller" not in cli("campaign", "status")[1]
    code, said = cli("campaign", "run", write(tmp_path, HEALTH), "--detach")
    assert (code, "stifarm serve works on it" in said) == (0, False), said
    for verb in (("status",), ("status", "health"), ("run", "health", "--detach")):
        code, said = cli("campaign", *verb)
        assert "no controller works on the open runs of health. Start one: stifarm" in said, said
        assert "campaign run health" in said
    (status,) = json.loads(cli("campaign", "status", "--json")[1])
    assert status["worked_on"] is False
    with controlling(farm):
        (status,) = json.loads(cli("campaign", "status", "--json")[1])
        assert status["worked_on"] is True
        assert "no controller" not in cli("campaign", "status")[1]
        assert "stifarm serve works on it" in cli("campaign", "run", "health", "--detach")[1]
    program = tmp_path / "stifarm"
    program.write_text("input()")
    for words, told in ((["--home", "serve", "profile"], True), (["-v", "serve"], False)):
        with subprocess.Popen([sys.executable, program, *words], stdin=subprocess.PIPE) as other:
            with farm.store.session() as session:  # of another home on this machine
                began = begin_controller(
                    session, host=socket.gethostname(), home="elsewhere", stifarm="1", pid=other.pid
                )
            assert ("no controller works" in cli("campaign", "status")[1]) == told
            other.communicate(b"\n")
        with farm.store.session() as session:
            end_controller(session, began.name)
    with farm.store.session() as session:  # killed: its process is gone, and its heartbeat recent
        begin_controller(session, host=socket.gethostname(), home="elsewhere", stifarm="1", pid=2**22 + 1)
    assert "no controller works" in cli("campaign", "status")[1]
    with farm.store.session() as session:
        begin_controller(session, host="another", home="elsewhere", stifarm="1", pid=2**22 + 1)
    assert "no controller works" not in cli("campaign", "status")[1]


def test_a_campaign_that_is_replaced_while_it_begins_does_not_begin(farm: Farm) -> None:
    asked, other = campaign(HEALTH), campaign(HEALTH + "priority: 3\n")
    with farm.store.session() as session:
        read = keep_campaign(session, asked)
    with farm.store.session() as session:
        keep_campaign(session, other, replace=True)
    with pytest.raises(ReplacedError, match="other content meanwhile"):
        take_run(farm, read, asked, again=True)
    with pytest.raises(ReplacedError), farm.store.session() as session:
        begin_run(session, read, resolve(farm, asked), trigger="manual", number=1)
    assert runs(farm) == []
    taken = take_run(farm, read, other, again=False)
    assert taken.how == "begun"


def test_two_campaigns_of_one_name(cli: Cli, tmp_path: Path) -> None:
    assert cli("campaign", "run", write(tmp_path, HEALTH), "--detach")[0] == 0
    changed = write(tmp_path, HEALTH + "priority: 3\n")
    code, said = cli("campaign", "run", changed, "--detach")
    assert (code, "other content" in said) == (2, True)
    assert "is open" in cli("campaign", "run", changed, "--detach", "--replace")[1]
    assert cli("campaign", "cancel", "health")[0] == 0
    # What is asked now was never measured: it is a new run, and not what is missing of the old one.
    assert "run 2 of health is open" in cli("campaign", "run", changed, "--detach", "--replace")[1]
    assert "no run of it is open" not in cli("campaign", "cancel", "health")[1]
    assert "no run of it is open" in cli("campaign", "cancel", "health")[1]
    assert cli("campaign", "cancel", "healht")[0] == 2


def test_a_campaign_that_an_earlier_version_kept_goes_on_with_its_rows(
    farm: Farm, cli: Cli, tmp_path: Path
) -> None:
    with farm.store.session() as session:
        kept = keep_campaign(session, campaign(HEALTH + "importance_rows: 500\n"))
    path = write(tmp_path, HEALTH)
    code, said = cli("campaign", "run", path, "--detach")
    assert (code, "is kept with importance_rows: 500" in said) == (0, True), said
    with farm.store.reader() as session:
        found = find_campaign(session, "health")
    assert found is not None
    assert found.spec_digest == kept.spec_digest
    assert cli("campaign", "cancel", "health")[0] == 0
    code, said = cli("campaign", "run", path, "--detach", "--replace")
    assert (code, "importance_rows" in said) == (0, False), said
    with farm.store.reader() as session:
        found = find_campaign(session, "health")
    assert found is not None
    assert "importance_rows" not in found.spec_json


def test_a_large_matrix_is_begun_after_a_yes_only(farm: Farm, cli: Cli, tmp_path: Path) -> None:
    names = ", ".join(f"{{name: d{n}, transport: local}}" for n in range(1001))
    (tmp_path / "inventory.yaml").write_text(f"version: 1\ndevices: [{names}]\n")
    path = write(tmp_path, HEALTH)
    code, said = cli("campaign", "run", path, "--detach")
    assert (code, "1,001 cells; about 83 min" in said, "--yes" in said) == (2, True, True), said
    nightly = ("campaign", "schedule", path, "--cron", "0 2 * * *")
    code, said = cli(*nightly)
    assert (code, "1,001 cells; about 83 min" in said, "--yes" in said) == (2, True, True), said
    assert json.loads(cli("campaign", "list", "--json")[1]) == []  # its name is free for a smaller one
    assert cli(*nightly, "--yes")[0] == 0
    assert cli("campaign", "run", path, "--detach", "--yes")[0] == 0
    assert "goes on with run 1" in cli("campaign", "run", path, "--detach")[1]
    code, said = cli("campaign", "status", "--json")
    assert json.loads(said)[0]["counts"] == {"queued": 1001}


def test_a_matrix_that_no_run_can_have_is_refused(farm: Farm, cli: Cli, tmp_path: Path) -> None:
    names = ", ".join(f"{{name: d{n}, transport: local}}" for n in range(1001))
    (tmp_path / "inventory.yaml").write_text(f"version: 1\ndevices: [{names}]\n")
    path = write(tmp_path, HEALTH.replace("health]", "health, profile]") + "repeats: 1000\n")
    fill(farm)
    code, said = cli("campaign", "run", path, "--detach", "--yes")
    assert (code, "a run has 1,000,000 at most" in said) == (2, True), said
    # Nor does a schedule begin one, whose selector has come to stand for more.
    schedule_id = schedule(farm, load_campaign(Path(path)))
    settle_back(farm, schedule_id, DUE_ONCE_NS)
    farm.read_inventory()
    farm.know(farm.own_devices)
    assert fire_due(farm) == ["health"]
    (run,) = runs(farm)
    assert (run.state, "1,000,000 at most" in (run.cause or "")) == ("failed", True)


def test_a_database_that_is_not_there_at_the_start(cli: Cli) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        url = f"postgresql://farm@127.0.0.1:{taken.getsockname()[1]}/farm"
        code, said = cli("--db-url", url, "campaign", "list")
    assert (code, "cannot be reached" in said) == (1, True), said


def test_runs_are_named_by_number_age_and_date(farm: Farm, cli: Cli) -> None:
    spec = campaign(HEALTH)
    run_ids = []
    for day in (26, 27, 28):
        run_ids.append(begin(farm, spec))
        with farm.store.session() as session:
            # In Auckland it is the next day already.
            due = int(datetime(2026, 11, day, 14, tzinfo=UTC).timestamp()) * 10**9
            row = session.get_one(CampaignRunRow, run_ids[-1])
            row.due_wall_ns, row.state, row.ended_wall_ns = due, "done", time.time_ns()

    def compared(*named: str) -> tuple[int, int]:
        code, said = cli("campaign", "compare", "health", *named, "--json")
        assert code == 0, said
        found = json.loads(said)
        return found["before"], found["after"]

    assert compared() == compared("last-1", "last") == compared("2", "3") == (2, 3)
    assert compared("2026-11-26", "2026-11-28") == (1, 3)
    with farm.store.session() as session:
        put_schedule(
            session, 1, cron="0 3 * * *", timezone="Pacific/Auckland", catch_up="once", overlap="skip"
        )
    assert compared("2026-11-27", "2026-11-29") == (1, 3)
    assert compared("1") == (1, 3)
    for one in (("3",), ("last",), ("3", "last")):
        code, said = cli("campaign", "compare", "health", *one)
        told = " ".join(said.split())
        assert (code, "are the same run of health, 3" in told) == (2, True), said
        assert "stifarm campaign compare health 2 3" in told
    for wrong in ("4", "last-3", "last-²", "²", "2026-11-26", "yesterday"):
        code, said = cli("campaign", "compare", "health", wrong, "last")
        assert (code, f"no run '{wrong}'" in said, "YYYY-MM-DD" in said) == (2, True, True), said


def test_a_store_of_another_program_s_schema(cli: Cli, farm: Farm) -> None:
    for revision, what in (("0004", "stifarm db upgrade"), ("9999", "newer stifarm")):
        with farm.store.session() as session:
            session.execute(sql("UPDATE alembic_version SET version_num = :one"), {"one": revision})
        code, said = cli("campaign", "list")
        assert (code, what in said) == (1, True), said


def test_the_inventory_is_read_anew(farm: Farm, tmp_path: Path) -> None:
    path = farm.settings.inventory
    watch, asked = InventoryWatch(path), list[tuple[str, ...]]()
    hosts = LabHosts(
        farm.own_devices, cast(HostWorker, None), NoHosts(), changed=lambda found: farm.know(found.devices)
    )

    def look() -> bool:
        return watch.changed() or watch.changed()

    def worker_of(devices: Sequence[Device]) -> HostWorker:
        asked.append(tuple(device.name for device in devices))
        return cast(HostWorker, None)

    ended: list[HostWorker] = []
    assert not look()
    path.write_text("version: 1\ndevices: [{name: new, transport: local}, {name: desk, transport: local}]\n")
    assert not watch.changed()  # it may still be written to
    assert look()
    assert not look()
    reread(farm, hosts, worker_of, ended.append)
    wait_for(lambda: len(ended) == 1, "the worker of before to be ended")
    assert asked == [("new", "desk")]
    assert [device.name for device in farm.inventory.devices] == ["new", "desk"]
    path.write_text("version: 1\ndevices: [{name: new, transport: smoke}]\n")
    assert look()
    reread(farm, hosts, worker_of, ended.append)
    assert [device.name for device in farm.inventory.devices] == ["new", "desk"]
    assert len(asked) == len(ended) == 1
    assert events(farm)[:2] == [("error", "inventory-invalid"), ("info", "inventory-read")]


class NoHosts:
    """A farm without lab hosts."""

    def hosts(self) -> tuple[SeenHost, ...]:
        """None."""
        return ()

    def worker_of(self, offer: HostOffer) -> ShippedWorker:
        """There is none."""
        raise AssertionError(offer.name)


def test_schedules_are_listed_rested_and_removed(cli: Cli, tmp_path: Path) -> None:
    path = write(tmp_path, HEALTH)
    assert cli("campaign", "schedule", path, "--cron", "0 2 * *")[0] == 2
    assert cli("campaign", "schedule", path, "--cron", "0 2 * * *", "--overlap", "both")[0] == 2
    assert cli("schedules", "pause", "health")[0] == 2
    code, said = cli("campaign", "schedule", path, "--cron", "0 2 * * *", "--timezone", "Europe/Berlin")
    assert (code, "02:00:00 CE" in said) == (0, True)
    for verb, state in (("pause", "paused"), ("resume", "active")):
        assert cli("schedules", verb, "health")[0] == 0
        (row,) = json.loads(cli("schedules", "list", "--json")[1])
        assert (row["state"], row["timezone"]) == (state, "Europe/Berlin")
        assert (row["next"] is None) == (state == "paused")
        assert ("–" in cli("schedules", "list")[1]) == (state == "paused")
    assert cli("schedules", "run-now", "health")[0] == 0
    assert cli("schedules", "run-now", "health")[0] == 2
    (row,) = json.loads(cli("schedules", "history", "health", "--json")[1])
    assert (row["trigger"], row["state"], row["cells"]) == ("manual", "running", "0 + 2 queued of 2")
    assert (row["counts"], row["took"]) == ({"queued": 2}, None)
    assert cli("campaign", "report", "health")[0] == 0
    code, said = cli("campaign", "compare", "health")
    told = " ".join(said.split())
    assert (code, "it has one, run 1" in told) == (2, True), said
    assert "stifarm campaign run health --again" in told
    assert "stifarm campaign report health" in told
    assert cli("schedules", "remove", "health")[0] == 0
    assert json.loads(cli("schedules", "list", "--json")[1]) == []
