"""Campaigns on a small farm of local devices, without Ray.

Run as a program it is a controller: ``python -m tests.campaign_world ROOT`` works until no run is open, so
that tests can kill it.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import select

from db.campaigns import open_runs, runs_of
from db.models import CampaignBatchRow, CampaignCellRow, CampaignRunRow
from orchestrator.campaigns.controller import Controller
from orchestrator.campaigns.spec import CampaignSpec
from orchestrator.campaigns.spec_file import parse_campaign
from orchestrator.campaigns.start import begin_run, keep_campaign, resolve
from orchestrator.campaigns.steps import Means
from orchestrator.farm import Farm, controlling
from orchestrator.worker import HostWorker
from tests.agent_data import REPO
from tests.farm_world import InProcess, as_controller, open_world, write_inventory


def write_devices(root: Path) -> None:
    """Two local devices, desk and the slowed board, each on a "machine" of the test's own."""
    write_inventory(
        root,
        f"{{name: desk, transport: local, threads: 1, machine_lock: {root}/machine.lock}}",
        f"{{name: board, transport: local, threads: 1, machine_lock: {root}/board.lock, "
        "labels: {kind: board}, emulate: {read_bandwidth: 50MB/s, mechanism: agent}}",
    )


def campaign(text: str) -> CampaignSpec:
    """A campaign of these YAML lines."""
    return parse_campaign(f"version: 1\n{text}".encode(), Path("campaign.yaml"))


def begin(farm: Farm, spec: CampaignSpec) -> int:
    """A new run of a campaign; its row id."""
    resolved = resolve(farm, spec)
    with farm.store.session() as session:
        row = keep_campaign(session, spec)
        number = len(runs_of(session, row.id)) + 1
        run = begin_run(session, row, resolved, trigger="manual", number=number)
        assert run is not None
        return run.id


def means_of(farm: Farm, worker: HostWorker) -> Means:
    """What batches are done with, importance in this process."""
    return Means(farm, worker, InProcess(), 1)


def work_off(farm: Farm, worker: HostWorker) -> None:
    """Work until no run is open."""

    def over(_idle: bool) -> bool:
        with farm.store.reader() as session:
            return not open_runs(session)

    with as_controller(farm):
        Controller(means_of(farm, worker)).run(over)


def run_state(farm: Farm, run_id: int) -> str:
    """The state of a run."""
    with farm.store.reader() as session:
        return session.get_one(CampaignRunRow, run_id).state


def cells(farm: Farm, run_id: int) -> Sequence[tuple[CampaignBatchRow, CampaignCellRow]]:
    """The cells of a run with their batches, in order."""
    query = (
        select(CampaignBatchRow, CampaignCellRow)
        .join(CampaignCellRow, CampaignCellRow.batch_id == CampaignBatchRow.id)
        .where(CampaignCellRow.run_id == run_id)
        .order_by(CampaignBatchRow.number, CampaignCellRow.number)
    )
    with farm.store.reader() as session:
        return [(batch, cell) for batch, cell in session.execute(query)]


def kinds_and_states(farm: Farm, run_id: int) -> Counter[tuple[str, str]]:
    """How many cells of each kind are in each state."""
    return Counter((batch.kind, cell.state) for batch, cell in cells(farm, run_id))


def start_controller(root: Path) -> subprocess.Popen[str]:
    """A controller in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.campaign_world", str(root)],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _control(root: Path) -> None:
    with open_world(root) as farm, controlling(farm):
        work_off(farm, HostWorker(farm.settings, farm.inventory.devices))


if __name__ == "__main__":
    _control(Path(sys.argv[1]))
