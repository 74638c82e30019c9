"""Records read back: what is newer is told from what is damaged, however much a newer version has changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent.errors import RefusedError
from agent.job_runner import read_job
from agent.spool import Spool
from orchestrator.demo.demo_model import DemoWeightsInfo
from sti_runtime.errors import FormatError, StifarmError
from sti_runtime.messages import EvaluateUnit, Job
from sti_runtime.model import Submodel
from sti_runtime.records import Record, canonical_json
from sti_runtime.task_data import TaskDataInfo
from tests.agent_data import make_job
from tests.bundles import hand_plan
from tests.unit.planning_data import make_importance, make_manifest, make_profile, proportional

MANIFEST = make_manifest(2, 2, proportional(4096))
PLAN = hand_plan(MANIFEST, Submodel(kept=(0, 1), width=2), lambda _layer, _slice: 2)
RECORDS: dict[str, Record] = {
    "bundle": MANIFEST,
    "plan": PLAN,
    "device-profile": make_profile(bundle=MANIFEST.digest, layer_ns={1: 9}, decompress_ns={2: 1}),
    "importance": make_importance(2, 2),
    "task-data": TaskDataInfo(
        format="stifarm-task-data", version=1, task="test", split="dev", labels=("a", "b"), tokenizer=None
    ),
}


def document(record: Record) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(record.to_json())
    return fields


def refused(kind: type[Record], fields: dict[str, Any]) -> StifarmError:
    with pytest.raises(StifarmError) as caught:
        kind.from_json(canonical_json(fields), source="the file")
    return caught.value


@pytest.mark.parametrize("name", RECORDS)
def test_a_newer_record_is_reported_as_that(name: str) -> None:
    """Fields added, gone and of another type: the version comes first."""
    record = RECORDS[name]
    newer = document(record) | {"version": 7, "added": {"of": "a later version"}}
    changed = dict.fromkeys(newer, None) | {"format": newer["format"], "version": 7}
    for fields in (newer, changed, {"format": newer["format"], "version": 7}):
        error = refused(type(record), fields)
        assert type(error) is FormatError
        assert error.what == f"the file: {name} version 7, this stifarm knows 1."
        assert error.remedy.startswith("Update the agent or stifarm")


@pytest.mark.parametrize("name", RECORDS)
@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"version": 0}, "version"),
        ({"version": "2"}, "version"),
        ({"version": True, "added": 1}, "added"),
        ({"version": 2**63}, "version"),
        ({"version": 2, "format": "stifarm-other"}, "format"),
        ({"added": 1}, "added"),
    ],
)
def test_what_is_not_newer_is_reported_by_field(name: str, changes: dict[str, Any], place: str) -> None:
    error = refused(type(RECORDS[name]), document(RECORDS[name]) | changes)
    assert error.what.startswith(f"the file: not a valid {type(RECORDS[name]).__name__}: {place}: ")


def test_a_newer_record_without_a_format_is_named_by_its_type() -> None:
    error = refused(DemoWeightsInfo, {"version": 2})
    assert error.what == "the file: DemoWeightsInfo version 2, this stifarm knows 1."


def test_a_job_is_refused_when_it_is_newer_itself(tmp_path: Path) -> None:
    unit = EvaluateUnit(number=0, kind="evaluate", plan=PLAN, batch=1)
    job = document(make_job(Spool.open(tmp_path / "spool"), units=(unit,)))
    path = tmp_path / "job.json"

    def problem(**changes: Any) -> StifarmError:
        path.write_bytes(canonical_json(job | changes))
        with pytest.raises(StifarmError) as caught:
            read_job(path)
        return caught.value

    newer_plan = {"units": [job["units"][0] | {"plan": document(PLAN) | {"version": 3, "added": 1}}]}
    own = problem(version=2, **newer_plan)
    assert (type(own), own.what) == (RefusedError, f"{path}: job version 2, this stifarm knows 1.")
    inner = problem(**newer_plan)
    assert (type(inner), inner.what) == (FormatError, f"{path}: plan version 3, this stifarm knows 1.")
    path.write_bytes(canonical_json(job))
    assert isinstance(read_job(path), Job)
