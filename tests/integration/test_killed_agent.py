"""An agent that is killed again and again, driven by the host: the unit is named, the rest is done."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.dispatch import Outcome, Request, run_job
from orchestrator.errors import StableError
from orchestrator.farm import Farm
from orchestrator.worker import HostWorker
from sti_runtime.messages import FixedProfileUnit, ProbeUnit, Unit
from tests.farm_world import (
    DESK,
    agent_pid,
    attempts_of,
    fill,
    job_folders,
    make_ready,
    open_world,
    probe_request,
    wait_for,
    write_inventory,
)


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Farm]:
    write_inventory(tmp_path, DESK)
    with open_world(tmp_path) as opened:
        yield opened


def open_unit(folder: Path) -> tuple[int, int] | None:
    """The unit that the agent has begun, and how often it was killed in it before."""
    path = folder / "open-unit"
    try:
        line, newline, _ = path.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return None
    note = json.loads(line) if newline else None
    return None if note is None else (note["unit"], note["kills"])


def test_units_that_the_agent_is_killed_in_are_given_up_and_named(
    farm: Farm, worker: HostWorker, tmp_path: Path
) -> None:
    """The rows are a FIFO that nobody writes, and whenever a unit has begun to wait for it, the agent is
    killed: more often in the whole job than an agent is started again that does not get on."""
    work = fill(farm)
    ready = make_ready(farm, worker, work, "desk")
    rows = farm.settings.spool("desk") / "tasks" / f"{work.task_data}.safetensors"
    whole = rows.read_bytes()
    rows.unlink()
    os.mkfifo(rows)
    fixed = FixedProfileUnit(number=0, kind="profile-fixed", warmups=0, rows=(0,))
    probe = ProbeUnit(number=0, kind="probe")
    kinds: tuple[Unit, ...] = (probe, fixed, fixed, probe, fixed)
    units = tuple(unit.model_copy(update={"number": number}) for number, unit in enumerate(kinds))
    request = Request(
        device="desk",
        device_id=ready.device_id,
        agent_digest=ready.facts.agent_digest,
        target=ready.target,
        kind="profile",
        bundle=work.bundle.digest,
        task_data=work.task_data,
        units=units,
    )
    outcomes: list[Outcome] = []
    driving = threading.Thread(
        target=lambda: outcomes.append(run_job(farm.store, worker, farm.owner, request))
    )
    driving.start()
    wait_for(lambda: bool(job_folders(tmp_path, "desk", "profile")), "the job's folder")
    (folder,) = job_folders(tmp_path, "desk", "profile")
    killed: set[tuple[int, int]] = set()
    while driving.is_alive():
        begun = open_unit(folder)
        if begun is not None and begun not in killed and units[begun[0]].kind == "profile-fixed":
            os.kill(agent_pid(folder), signal.SIGKILL)
            killed.add(begun)
        driving.join(0.02)
    assert killed == {(unit, kills) for unit in (1, 2, 4) for kills in (0, 1)}
    (outcome,) = outcomes
    assert set(outcome.results) == {0, 3}
    assert {number: failure.error for number, failure in outcome.failures.items()} == dict.fromkeys(
        (1, 2, 4), "ResourceError"
    )
    said = r"desk: unit 1 of job profile-.* failed: The agent was killed 2 times while it ran unit 1 .*memory"
    with pytest.raises(StableError, match=said) as caught:
        outcome.require_complete()
    assert "smaller preload or working buffer" in caught.value.remedy
    assert attempts_of(farm, outcome.job_id) == [(1, "failed")]
    assert run_job(farm.store, worker, farm.owner, probe_request(farm, worker, 2)).complete
    rows.unlink()
    rows.write_bytes(whole)
    assert run_job(farm.store, worker, farm.owner, request).complete
