"""Importance scored by the agents of devices, beside this host's own scoring."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, select

from db.importance import latest_importance, scored_by
from db.models import EvaluationRow, ImportanceProfileRow, ImportanceScoreRow
from orchestrator.demo.demo_task import TASK
from orchestrator.farm import Farm, controlling
from orchestrator.library import KnownBundle
from orchestrator.measure import Work
from orchestrator.scoring import Scored, score_importance
from orchestrator.scoring_on_devices import Failed, score_on_devices
from orchestrator.worker import HostWorker
from sti_runtime.errors import InputError, ResourceError
from sti_runtime.importance_profile import ImportanceProfile
from tests.farm_world import DESK, ROWS, InProcess, fill, open_world, write_inventory

BOARD = (
    "{name: board, transport: local, threads: 1, engine: torch,"
    " emulate: {read_bandwidth: 20MB/s, cpu_share: 0.5, mechanism: agent}}"
)
ROUNDER = "{name: rounder, transport: local, threads: 1, engine: native-int8}"

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Farm]:
    write_inventory(tmp_path, DESK, BOARD, ROUNDER)
    with open_world(tmp_path) as opened, controlling(opened):
        yield opened


def on(farm: Farm, bundle: KnownBundle, *names: str, **more: Any) -> tuple[Scored, list[Failed]]:
    devices = [next(d for d in farm.inventory.devices if d.name == name) for name in names]
    worker = HostWorker(farm.settings, farm.inventory.devices)
    return score_on_devices(farm, worker, devices, bundle, TASK.name, rows=ROWS - 1, **more)


def by_host(farm: Farm, work: Work) -> tuple[ImportanceProfile, ImportanceProfile]:
    """This host's own (by loss, by accuracy), from nothing."""
    with farm.store.session() as session:
        session.execute(delete(ImportanceProfileRow))
        session.execute(delete(ImportanceScoreRow))
    by_loss = score_importance(farm, InProcess(), work.bundle, TASK.name, rows=ROWS - 1, workers=1).profile
    return by_loss, by_accuracy(farm, work)


def by_accuracy(farm: Farm, work: Work) -> ImportanceProfile:
    with farm.store.reader() as session:
        found = latest_importance(session, work.bundle.model_digest, TASK.name, "exhaustive-accuracy")
    assert found is not None
    return found


def agree(one: ImportanceProfile, other: ImportanceProfile) -> None:
    """Equal but for the rounding of other arithmetic: losses to 10⁻⁵ nats, the rest exactly. Levels are taken
    on this host only."""
    same = {"scores", "base", "reliability_ppm", "levels"}
    assert one.model_dump(exclude=same) == other.model_dump(exclude=same)
    pairs = zip(one.scores, other.scores, strict=True)
    scores = [(one.base, other.base), *((mine.score, theirs.score) for mine, theirs in pairs)]
    for mine, theirs in scores:
        assert mine.correct == theirs.correct
        assert mine.loss_nano == pytest.approx(theirs.loss_nano, abs=10_000)
    assert one.ranking() == other.ranking()


def test_two_emulated_devices_score_what_this_host_would(farm: Farm) -> None:
    work = fill(farm)
    told: list[tuple[int, int]] = []
    scored, failed = on(farm, work.bundle, "desk", "board", advance=lambda *now: told.append(now))
    assert (scored.scored, failed) == (4, [])
    assert (told[0], told[-1]) == ((0, 4), (4, 4))
    with farm.store.reader() as session:
        by = scored_by(session, scored.profile)
        engines = set(session.scalars(select(EvaluationRow.engine)))
    assert set(by) == {"desk", "board"}
    assert sum(by.values()) == 4
    assert engines == {"native", "torch"}
    accuracy = by_accuracy(farm, work)
    # All of it is in the store: nothing is scored again, here or there.
    assert on(farm, work.bundle, "desk")[0].scored == 0
    assert score_importance(farm, InProcess(), work.bundle, TASK.name, rows=ROWS - 1, workers=1).scored == 0

    own_by_loss, own_by_accuracy = by_host(farm, work)
    agree(scored.profile, own_by_loss)
    agree(accuracy, own_by_accuracy)
    with farm.store.reader() as session:
        assert scored_by(session, own_by_loss) == {None: 4}


def test_interrupted_scoring_goes_on_from_what_devices_evaluated(farm: Farm) -> None:
    work = fill(farm)

    def stop(done: int, _total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        on(farm, work.bundle, "desk", advance=stop)
    farm.stop.clear()
    with farm.store.session() as session:  # as if killed before the scores were kept
        session.execute(delete(ImportanceScoreRow))
        evaluated = session.scalars(select(EvaluationRow.id)).all()
    again, _ = on(farm, work.bundle, "desk")
    assert again.scored == 4
    with farm.store.reader() as session:
        ids = session.scalars(select(EvaluationRow.id)).all()
    assert set(evaluated) < set(ids)
    assert len(ids) == 2 * 5 + (0 if again.above_chance else 2 * 4)  # each content once on each half


def test_a_device_that_cannot_leaves_its_share_to_the_others(farm: Farm) -> None:
    work = fill(farm)
    scored, failed = on(farm, work.bundle, "rounder", "desk")
    assert scored.scored == 4
    assert [each.device for each in failed] == ["rounder"]
    assert "rounds activations" in failed[0].error.what
    with farm.store.session() as session:
        session.execute(delete(ImportanceScoreRow))
        session.execute(delete(EvaluationRow))
    with pytest.raises(ResourceError, match=r"No device is left to score importance: rounder: its engine"):
        on(farm, work.bundle, "rounder")
    with pytest.raises(InputError, match="no halves"):
        score_on_devices(farm, HostWorker(farm.settings, ()), [], work.bundle, TASK.name, rows=1)
