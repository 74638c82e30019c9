from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import select, update

from db.importance import importance_profiles, latest_importance
from db.models import ImportanceScoreRow
from orchestrator.cli import main
from orchestrator.demo.demo_task import TASK
from orchestrator.farm import Farm
from orchestrator.measure import Work, importance_of
from orchestrator.scoring import estimate_importance, score_importance
from sti_runtime.errors import InputError
from sti_runtime.importance_levels import wanted_levels
from sti_runtime.importance_profile import ImportanceProfile, Method
from tests.farm_world import DESK, NAME, ROWS, InProcess, fill, open_world, write_inventory


@pytest.fixture
def farm(tmp_path: Path) -> Iterator[Farm]:
    write_inventory(tmp_path, DESK)
    with open_world(tmp_path) as farm:
        yield farm


def exhaustive(farm: Farm, work: Work) -> tuple[ImportanceProfile, int]:
    done = score_importance(farm, InProcess(), work.bundle, TASK.name, rows=ROWS, workers=1)
    return done.profile, done.scored


def newest(farm: Farm, work: Work, method: Method | None) -> ImportanceProfile | None:
    with farm.store.reader() as session:
        return latest_importance(session, work.bundle.model_digest, TASK.name, method)


def test_one_scoring_makes_both_rankings_and_an_estimate_displaces_neither(farm: Farm) -> None:
    work = fill(farm)
    with pytest.raises(InputError, match="no importance profile of tiny on demo"):
        importance_of(farm, work.bundle, TASK.name)
    estimated = estimate_importance(farm, InProcess(), work.bundle, TASK.name, rows=ROWS // 2).profile
    assert (estimated.method, estimated.rows) == ("gradient", ROWS // 2)
    assert importance_of(farm, work.bundle, TASK.name).digest == estimated.digest
    with pytest.raises(InputError, match="by method exhaustive-accuracy"):
        importance_of(farm, work.bundle, TASK.name, "exhaustive-accuracy")

    by_loss, scored = exhaustive(farm, work)
    assert scored == 4
    again = estimate_importance(farm, InProcess(), work.bundle, TASK.name, rows=ROWS // 2).profile
    assert again.digest == estimated.digest
    by_rows = newest(farm, work, "exhaustive-accuracy")
    assert by_rows is not None
    assert by_rows.scores == by_loss.scores
    assert importance_of(farm, work.bundle, TASK.name).digest == by_loss.digest
    assert importance_of(farm, work.bundle, TASK.name, "gradient").digest == estimated.digest
    with farm.store.reader() as session:
        found = importance_profiles(session, work.bundle.model_digest, TASK.name)
    assert [profile.method for profile in found] == ["exhaustive", "exhaustive-accuracy", "gradient"]


def test_scores_of_an_earlier_schema_are_taken_again(farm: Farm) -> None:
    work = fill(farm)
    profile, _ = exhaustive(farm, work)
    table = ImportanceScoreRow
    with farm.store.session() as session:
        session.execute(update(table).where(table.layer == 1).values(half_a_correct=None, loss_nano=5))
    assert exhaustive(farm, work) == (profile, 2)
    assert [(str(level.submodel), level.fidelity) for level in profile.levels] == [
        (str(submodel), k) for submodel, k in wanted_levels(work.bundle.manifest, profile.base_fidelity)
    ]
    with farm.store.reader() as session:
        losses = session.scalars(select(table.loss_nano).where(table.layer == 1)).all()
    assert 5 not in losses
    assert exhaustive(farm, work) == (profile, 0)


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.chdir(tmp_path)

    def command(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as done:
            main(words)
        captured = capsys.readouterr()
        return int(done.value.code or 0), captured.out, captured.err

    return command


def test_showing_what_the_store_holds(tmp_path: Path, farm: Farm, run: Run) -> None:
    work = fill(farm)
    code, out, err = run("importance", "show")
    assert (code, out) == (2, "")
    assert "no importance profile of tiny on demo" in err
    by_loss, _ = exhaustive(farm, work)
    estimate_importance(farm, InProcess(), work.bundle, TASK.name, rows=ROWS)

    code, out, _ = run("importance", "show")
    assert code == 0
    assert "Loss saved by raising one shard to 32 bits" in out
    assert "layer 1" in out
    assert "exhaustive-accuracy" in out
    assert max(map(len, out.splitlines())) <= 80

    document = json.loads(run("importance", "show", "--method", "exhaustive-accuracy", "--json")[1])
    assert document["profile"]["method"] == "exhaustive-accuracy"
    assert [row["method"] for row in document["methods"]] == ["exhaustive", "exhaustive-accuracy", "gradient"]
    assert document["methods"][1]["rank_correlation"] in (0, pytest.approx(1))
    assert document["methods"][0]["digest"] == by_loss.digest

    assert run("importance", "show", "--out", "importance.json")[0] == 0
    assert ImportanceProfile.read(tmp_path / "importance.json").digest == by_loss.digest

    _, out, _ = run("importance", "show", "--method", "gradient")
    assert "(estimated)" in out
    code, _, err = run("importance", "show", "--method", "magic")
    assert code == 2
    assert "gradient" in err


def test_a_picture_of_it(tmp_path: Path, farm: Farm, run: Run) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra figures")
    exhaustive(farm, fill(farm))
    code, _, err = run("importance", "show", "--bundle", NAME, "--png", "map.png")
    assert code == 0
    assert "map.png written" in err
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
