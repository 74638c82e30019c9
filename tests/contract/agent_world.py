"""Small models and what the agents' contract is tested with: spools, jobs, journals."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from agent.spool import Spool
from sti_runtime.bundle import Bundle
from sti_runtime.embedding_rows import Request
from sti_runtime.journal_format import parse_lines
from sti_runtime.messages import (
    EndRecord,
    ExecuteUnit,
    FailureRecord,
    Job,
    JournalRecord,
    ResultRecord,
    StartRecord,
    Unit,
)
from sti_runtime.model import HeadConfig, ModelConfig, Submodel
from sti_runtime.plan import Plan
from sti_runtime.plan_build import Fidelity
from sti_runtime.quantizer import FISHER, GOBO, Quantizer
from sti_runtime.task_data import TaskData, TaskDataInfo, save_task_data
from tests.agent_data import make_job, push_job
from tests.agents import Agent
from tests.bundles import hand_plan, make_bundle, make_request

TOKENS, ROWS = 20, 6
TOLERANCE = 1e-4
"""Largest deviation of logits from the torch engine's, relative to the largest of them."""

LABELS = ("no", "maybe", "yes")
T = TypeVar("T")


def config(
    family: Literal["bert", "distilbert", "roberta"],
    pooling: Literal["cls", "mean"],
    pooler: Literal["none", "tanh", "relu"],
    **changes: Any,
) -> ModelConfig:
    """A tiny model of a family; sizes are no multiples of a vector's width."""
    fields: dict[str, Any] = {
        "family": family, "layers": 2, "heads": 3, "hidden": 36, "ffn": 60, "vocab": 90, "positions": 32,
        "position_offset": 0, "token_types": 2, "layer_norm_eps": 1e-12, "activation": "gelu", "pad_id": 0,
        "head": HeadConfig(pooling=pooling, activation=pooler, labels=LABELS),
    }  # fmt: skip
    return ModelConfig(**(fields | changes))


FAMILIES = {
    "bert": config("bert", "cls", "tanh", hidden=48, ffn=96),
    "distilbert": config("distilbert", "cls", "relu", token_types=0),
    "roberta": config(
        "roberta", "cls", "tanh", hidden=96, ffn=144, positions=34, position_offset=2, token_types=1,
        layer_norm_eps=1e-5, pad_id=1,
    ),
    "mean-pooled": config("bert", "mean", "none", activation="gelu_tanh", heads=4, hidden=40, ffn=52),
}  # fmt: skip
CODECS = {"mean-pooled": FISHER}
"""Of the families whose bundle is not GOBO's."""
GAPPED = Submodel(kept=(1,), width=2)


# ------------------------------------------------------------------ what all tests work with


@dataclass(frozen=True)
class Content:
    """One family's bundle and rows, made once; ``folder`` holds bundles/ and tasks/ of a spool."""

    folder: Path
    bundle: Bundle
    rows: tuple[Request, ...]
    labels: tuple[int, ...]
    task_digest: str

    def plan(self, fidelity: Fidelity = 4, submodel: Submodel | None = None, **options: Any) -> Plan:
        """A plan of the whole model, or ``submodel``, at one fidelity."""
        model = self.bundle.manifest.model
        whole = Submodel(kept=tuple(range(model.layers)), width=model.heads)
        return hand_plan(
            self.bundle.manifest, submodel or whole, lambda _l, _s: fidelity, tokens=TOKENS, **options
        )


def make_content(folder: Path, model: ModelConfig, quantizer: Quantizer = GOBO) -> Content:
    Spool.open(folder)
    bundle, _ = make_bundle(model, folder / "bundles", submodels=(GAPPED,), quantizer=quantizer)
    rows = tuple(make_request(model, TOKENS, 5 + 2 * seed, seed) for seed in range(ROWS))
    labels = (0, 1, 2, 0, 1, -1)
    info = TaskDataInfo(
        format="stifarm-task-data", version=1, task="test", split="dev", labels=LABELS, tokenizer=None
    )
    data = TaskData(
        info=info,
        input_ids=np.stack([row.input_ids for row in rows]),
        token_types=np.stack([row.token_types * (model.token_types > 1) for row in rows]),
        lengths=np.array([row.length for row in rows], np.int32),
        labels=np.array(labels, np.int32),
    )
    digest = save_task_data(data, folder / "tasks" / "new")
    (folder / "tasks" / "new").rename(folder / "tasks" / f"{digest}.safetensors")
    requests = tuple(
        Request(input_ids=row.input_ids, token_types=types, length=row.length)
        for row, types in zip(rows, data.token_types, strict=True)
    )
    return Content(folder, bundle, requests, labels, digest)


def spool_with(content: Content, folder: Path) -> Spool:
    shutil.copytree(content.folder, folder)
    return Spool.open(folder)


def a_job(agent: Agent, spool: Spool, content: Content | None = None, **changes: Any) -> Job:
    """A job for this device and agent, with the content's bundle and rows."""
    named = {} if content is None else {"bundle": content.bundle.digest, "task_data": content.task_digest}
    job = make_job(spool, **({"engine": agent.engine, "threads": 2, "queue_depth": 4, **named} | changes))
    push_job(spool, job)
    return job


def job_path(spool: Spool, job: Job) -> Path:
    return spool.job(job.id, job.attempt) / "job.json"


def run(agent: Agent, spool: Spool, job: Job, **options: Any) -> tuple[int, dict[str, Any]]:
    return agent.call("run", job_path(spool, job), "--spool", spool.root, **options)


def journal_path(spool: Spool, job: Job) -> Path:
    return spool.job(job.id, job.attempt) / "journal.log"


def journal_of(spool: Spool, job: Job) -> list[JournalRecord]:
    """All records of a journal, which must be whole."""
    path = journal_path(spool, job)
    data = path.read_bytes()
    found = parse_lines(data, offset=0, source=str(path))
    assert found.problem is None
    assert found.next_offset == len(data)
    return list(found.records)


def run_units(agent: Agent, spool: Spool, content: Content | None, units: tuple[Unit, ...]) -> list[Any]:
    """Run units as one job to its end; each unit's result, or its failure record."""
    job = a_job(agent, spool, content, units=units)
    code, report = run(agent, spool, job)
    assert (code, report["state"]) == (0, "ended"), report
    payloads = [record.payload for record in journal_of(spool, job)]
    assert isinstance(payloads[0], StartRecord)
    assert isinstance(payloads[-1], EndRecord)
    found: list[Any] = []
    for payload in payloads[1:-1]:
        assert isinstance(payload, ResultRecord | FailureRecord)
        assert payload.unit == len(found)
        found.append(payload.result if isinstance(payload, ResultRecord) else payload)
    assert report == {
        "state": "ended",
        "done": sum(not isinstance(item, FailureRecord) for item in found),
        "failed": sum(isinstance(item, FailureRecord) for item in found),
    }
    return found


def result_of(kind: type[T], found: object) -> T:
    assert isinstance(found, kind), found
    return found


def execute(number: int, plan: Plan, **changes: Any) -> ExecuteUnit:
    unit = ExecuteUnit(
        number=number, kind="execute", plan=plan, request_kind="cold", io_mode="direct", warmups=0, rows=(0,)
    )
    return unit.model_copy(update=changes)


def numbered(units: Sequence[Unit]) -> tuple[Unit, ...]:
    return tuple(unit.model_copy(update={"number": number}) for number, unit in enumerate(units))


def wait_for(condition: Callable[[], bool], what: str, limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s} s for {what}"
        time.sleep(0.005)


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def refusal(spool: Spool, job: Job) -> str:
    end = journal_of(spool, job)[-1].payload
    assert isinstance(end, EndRecord)
    assert end.refused is not None
    return end.refused


def units_of(records: list[JournalRecord]) -> list[int]:
    return [r.payload.unit for r in records if isinstance(r.payload, ResultRecord | FailureRecord)]
