"""The results of a run: of half of it they say what is missing, of all of it every cell, figure and claim."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from db.campaigns import find_campaign
from db.models import CampaignBatchRow, CampaignRunRow, EvaluationRow
from orchestrator.farm import Farm
from orchestrator.results.figures import Figure, draw_figures
from orchestrator.results.gather import Results, gather
from orchestrator.results.headline import headline
from orchestrator.results.page import write_page
from orchestrator.worker import HostWorker
from tests.campaign_world import begin, campaign, means_of, run_state, work_off, write_devices
from tests.farm_world import ROWS, fill, open_world, require_storage

pytestmark = pytest.mark.slow

DEV_ROWS = 10
POLICIES = "[sti, random, load-exec, std-pipeline-2, preload-32]"
MATRIX = f"""
name: small
devices: all
bundles: [tiny for demo]
kinds: [execute, evaluate]
targets: [0.0001 of whole-model compute, 300 of whole-model compute]
preload: [0 % of 32-bit shards, 50 % of 32-bit shards]
working: 1MB
policies: {POLICIES}
requests: 4
dev_rows: {DEV_ROWS}
notes: [Sentences are generated.]
"""


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Farm]:
    write_devices(tmp_path)
    with open_world(tmp_path) as opened:
        yield opened


def page_of(farm: Farm, run_id: int, out: Path) -> tuple[Results, list[Figure], str]:
    """What a run's results are by now, drawn and written."""
    with farm.store.reader() as session:
        row = find_campaign(session, "small")
        assert row is not None
        found = gather(farm, session, row, session.get_one(CampaignRunRow, run_id))
        figures = draw_figures(session, found, out.with_suffix(""))
    return found, figures, write_page(found, figures, out, "stifarm campaign results small")


def work_on(farm: Farm, worker: HostWorker, run_id: int, device: str) -> None:
    """Work until nothing of a device is left, then stop as at Ctrl-C."""
    from orchestrator.campaigns.controller import Controller

    def over(_idle: bool) -> bool:
        table = CampaignBatchRow
        query = select(table.state).where(table.run_id == run_id, table.device == device)
        with farm.store.reader() as session:
            return set(session.scalars(query)) == {"ended"}

    Controller(means_of(farm, worker)).run(over)


def test_results_of_half_a_run_and_of_all_of_it(farm: Farm, worker: HostWorker, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures need Matplotlib")
    require_storage(tmp_path)
    fill(farm)
    run_id = begin(farm, campaign(MATRIX))
    out = tmp_path / "pages" / "results.md"

    found, figures, page = page_of(farm, run_id, out)
    assert (len(found.cells), figures) == (28, [])
    assert "## Not complete: 28 of 28 cells are missing" in page
    assert {claim.verdict for claim in headline(found)} == {"not known"}

    work_on(farm, worker, run_id, "desk")
    found, figures, page = page_of(farm, run_id, out)
    lacking = {cell.asked.device for cell in found.cells if cell.missing}
    assert lacking <= {"board"}
    assert ("Not complete" in page) == bool(lacking)
    assert [cell for cell in found.pick(device="desk") if cell.samples is not None]

    work_off(farm, worker)
    assert run_state(farm, run_id) == "done"
    found, figures, page = page_of(farm, run_id, out)
    assert "Not complete" not in page
    assert "board (emulated)" in page
    assert "Sentences are generated." in page
    measured = [cell for cell in found.cells if not cell.infeasible]
    assert len(measured) == 14
    assert all(cell.samples and cell.accuracy and cell.right is not None for cell in measured)
    assert {len(cell.samples.latency_ns) + cell.samples.invalid for cell in measured if cell.samples} == {4}
    assert {len(cell.right) for cell in measured if cell.right is not None} == {DEV_ROWS}
    assert found.dev_rows == {"demo": (DEV_ROWS, ROWS)}
    assert f"| {DEV_ROWS} of {ROWS} |" in page
    assert all(cell.gain_nano is not None for cell in measured if cell.asked.policy == "sti")
    claims = headline(found)
    decided = [claim for claim in claims if "gradient" not in claim.what]  # of which the store has none
    assert len(decided) == len(claims) - 1
    assert {claim.verdict for claim in decided} <= {"reached", "not reached", "nothing to compare"}
    (ahead,) = [claim for claim in claims if "std-pipeline" in claim.what]
    assert ahead.verdict == "nothing to compare"  # at the tightest T nothing has a plan
    assert [check.different for check in found.spot_checks] == [0, 0]
    assert {figure.path.name for figure in figures} == {
        "accuracy-target.png", "accuracy-memory.png", "timeline.png", "importance-demo-tiny.png",
    }  # fmt: skip
    for figure in figures:
        width, height = struct.unpack(">II", figure.path.read_bytes()[16:24])
        assert min(width, height) > 150
        assert f"](results/{figure.path.name})" in page
    with farm.store.reader() as session:
        contents = session.scalars(select(EvaluationRow.content_digest)).all()
    assert len(contents) == len(set(contents)) == len({c.plan.content_digest for c in measured if c.plan})
    again = page_of(farm, run_id, out)[2]
    assert again == page
