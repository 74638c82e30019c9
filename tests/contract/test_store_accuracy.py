"""Accuracy over every kind of store: which evaluations answer a question."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sqlalchemy import update

from db.artifacts import drawn_split, save_task_data
from db.jobs import (
    begin_attempt,
    create_job,
)
from db.models import (
    ModelRow,
)
from db.plan_answers import latest_plans
from db.runs import accuracy_of, predictions_of
from db.session import Store
from sti_runtime.messages import (
    EvaluateResult,
    Payload,
    ResultRecord,
)
from tests.contract import store_world as world
from tests.contract.store_rows import make, put


def _evaluate(
    store: Store, made: world.World, *, data: str, rows: int, correct: int, engine: str = "torch"
) -> None:
    """Evaluate the world's plan on task data ``data``, by a job of its own."""
    names = {"id": f"evaluate-{data[:1]}-{engine}", "task_data": data, "engine": engine}
    job = made.job.model_copy(update=names)
    with store.session() as session:
        create_job(session, job, key=job.id, kind="evaluate", device_id=made.device_id)
        begin_attempt(session, job.id, lease_counter=1)
    result = EvaluateResult(
        kind="evaluate",
        content_digest=made.plan.content_digest,
        rows=rows,
        correct=correct,
        loss=0.5,
        predictions=(1,) * rows,
    )
    lines: list[Payload] = [
        world.start_record(job),
        ResultRecord(type="result", unit=5, result=result),
    ]
    assert put(store, replace(made, job=job), world.numbered(lines)).rejected == ()


def _register(store: Store, digest: str, split: str = "dev", tokenizer: str | None = None) -> None:
    with store.session() as session:
        save_task_data(
            session,
            digest=digest,
            task=world.TASK,
            split=split,
            rows=world.DATA_ROWS,
            sequence_length=world.LENGTH,
            tokenizer_digest=tokenizer,
        )


def _correct(store: Store, **filters: Any) -> int | None:
    with store.reader() as session:
        (answer,) = latest_plans(session, **filters)
    return None if answer.accuracy is None else answer.accuracy.correct.count


def test_accuracy_on_data_that_were_replaced_does_not_answer(store: Store) -> None:
    made = make(store)
    put(store, made, world.journal(made.job, made.plan))
    assert _correct(store) == 30
    newer = "1" * 64
    _register(store, newer)
    assert _correct(store) is None
    assert _correct(store, split="dev") is None
    _evaluate(store, made, data=newer, rows=20, correct=11)
    assert _correct(store) == 11
    _register(store, world.DATA)  # the first rows are added again: they are what the task is about now
    assert _correct(store) == 30
    content = made.plan.content_digest
    with store.reader() as session:
        by_data = {
            digest: accuracy_of(session, content, world.TASK, task_data_digest=digest)
            for digest in (world.DATA, newer, "2" * 64)
        }
        assert [None if a is None else a.correct.count for a in by_data.values()] == [30, 11, None]
        assert predictions_of(session, content, newer) == (1,) * 20


def test_accuracy_on_a_draw_of_rows_answers_only_who_asks_for_it(store: Store) -> None:
    made = make(store)
    put(store, made, world.journal(made.job, made.plan))
    draw = drawn_split("dev", 20, 1)
    _register(store, "1" * 64, draw)
    _evaluate(store, made, data="1" * 64, rows=20, correct=11)
    assert [_correct(store), _correct(store, split="dev"), _correct(store, split=draw)] == [30, 30, 11]
    with store.reader() as session:
        found = accuracy_of(session, made.plan.content_digest, world.TASK)
    assert found is not None
    assert found.split == "dev"


def test_accuracy_answers_for_engines_that_compute_alike(store: Store) -> None:
    made = make(store)
    content, data = made.plan.content_digest, "1" * 64
    _register(store, data)

    def correct(engine: str | None) -> int | None:
        with store.reader() as session:
            found = accuracy_of(session, content, world.TASK, task_data_digest=data, engine=engine)
            predicted = predictions_of(session, content, data, engine=engine)
        assert (found is None) == (predicted is None)
        return None if found is None else found.correct.count

    _evaluate(store, made, data=data, rows=40, correct=20, engine="native-int8")
    engines = ("native-int8", "native", "torch", None)
    assert [correct(engine) for engine in engines] == [20, None, None, 20]
    assert _correct(store) is None  # the device computes with torch
    _evaluate(store, made, data=data, rows=40, correct=30, engine="native")
    assert [correct(engine) for engine in engines] == [20, 30, 30, 30]
    assert _correct(store) == 30
    _evaluate(store, made, data=data, rows=40, correct=29, engine="torch")
    assert [correct(engine) for engine in engines] == [20, 30, 29, 29]


def test_accuracy_of_seen_splits_is_told_only_when_asked_for(store: Store) -> None:
    made = make(store)
    profile, test = "1" * 64, "2" * 64
    _register(store, profile, "profile")
    _register(store, test, "test")
    _evaluate(store, made, data=profile, rows=40, correct=40)
    assert _correct(store) is None
    assert _correct(store, split="profile") == 40
    with store.reader() as session:
        named = accuracy_of(session, made.plan.content_digest, world.TASK, task_data_digest=profile)
        assert named is not None
        assert (named.correct.count, named.split) == (40, "profile")
        assert accuracy_of(session, made.plan.content_digest, world.TASK) is None
    _evaluate(store, made, data=test, rows=40, correct=33)
    assert _correct(store) == 33
    assert _correct(store, split="dev") is None


def test_rows_for_another_tokenizer_do_not_replace_a_models_own(store: Store) -> None:
    made = make(store)
    put(store, made, world.journal(made.job, made.plan))
    with store.session() as session:
        session.execute(update(ModelRow).values(info_json=f'{{"tokenizer_digest":"{"7" * 64}"}}'))
    _register(store, "1" * 64, tokenizer="8" * 64)
    assert _correct(store) == 30
    _register(store, "2" * 64, tokenizer="7" * 64)
    assert _correct(store) is None
