"""Audits over every kind of store, and the example query of docs/schema.md."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from sqlalchemy import select, text

from db.audit import Audit, audit_attempt
from db.importance import BASE, ScoreKey, StoredScore, record_score
from db.models import (
    IoSampleRow,
    JournalRecordRow,
    RequestRow,
    RunRow,
)
from db.session import Store
from sti_runtime.importance_profile import Score
from sti_runtime.messages import (
    FailureRecord,
    JournalRecord,
    ResultRecord,
)
from tests.contract import store_world as world
from tests.contract.store_rows import EXPECTED_ROWS, make, put


def test_example_query_ranks_shards_by_what_they_gain_over_the_base(store: Store) -> None:
    make(store)
    page = (Path(__file__).parents[2] / "docs" / "schema.md").read_text(encoding="utf-8")
    (query,) = (part for part in page.split(";") if "AS gain_nano" in part)
    key = ScoreKey(world.MODEL, world.TASK, "f" * 64, 2)
    losses = {BASE: 700, (0, 0): 650, (0, 1): 690, (1, 0): 710}
    with store.session() as session:
        for shard, loss_nano in losses.items():
            record_score(session, key, shard, StoredScore(Score(loss_nano=loss_nano, correct=20), 40))
        # Without its own base a score has nothing to be compared with.
        record_score(
            session, replace(key, base_fidelity=3), (1, 1), StoredScore(Score(loss_nano=1, correct=1), 40)
        )
    with store.reader() as session:
        rows = session.execute(text(query[query.index("SELECT") :])).all()
    assert [tuple(row) for row in rows] == [(0, 0, 50), (0, 1, 10), (1, 0, -10)]


def audited(store: Store, made: world.World, records: list[JournalRecord]) -> Audit:
    with store.reader() as session:
        return audit_attempt(
            session, device_id=made.device_id, job_id=made.job.id, attempt=1, records=records
        )


def test_an_audit_agrees_with_what_was_ingested(store: Store) -> None:
    with store.session() as session:
        made = world.populate(session)
    records = world.journal(made.job, made.plan)
    put(store, made, records)
    found = audited(store, made, records)
    evaluations = 1  # compared as records, not by their rows; a run is a row beside its requests
    assert (found.records, found.samples) == (len(records), sum(EXPECTED_ROWS) - evaluations)
    assert found.discrepancies == ()


def test_an_audit_finds_every_kind_of_discrepancy(store: Store) -> None:
    with store.session() as session:
        made = world.populate(session)
    records = world.journal(made.job, made.plan)
    put(store, made, records)
    kinds = {r.seq: r.payload.result.kind for r in records if isinstance(r.payload, ResultRecord)}
    io, executed = (
        next(seq for seq, kind in kinds.items() if kind == of) for of in ("profile-io", "execute")
    )
    with store.session() as session:
        row = session.scalars(select(JournalRecordRow).where(JournalRecordRow.seq == io)).one()
        sample = session.scalars(select(IoSampleRow).where(IoSampleRow.journal_id == row.id)).first()
        session.delete(sample)
        session.delete(session.scalars(select(RequestRow)).first())
        run = session.scalars(select(RunRow)).one()
        run.measured_json = run.measured_json.replace("[", "[1,", 1)
        start = session.scalars(select(JournalRecordRow).where(JournalRecordRow.seq == 0)).one()
        start.digest = "0" * 64
    lost = world.numbered([FailureRecord(type="failure", unit=0, error="X", what="y", remedy="")], first=90)
    shorter = [*records[:-1], *lost]
    found = {(wrong.seq, wrong.what) for wrong in audited(store, made, shorter).discrepancies}
    assert (0, "the store holds another content") in found
    assert (90, "the failure record is not in the store") in found
    assert (records[-1].seq, "the store holds a record that is not in the journal") in found
    assert any(seq == io and "io_samples" in what for seq, what in found)
    assert any(seq == executed and "requests in brief" in what for seq, what in found)
    assert any(seq == executed and "rows of requests" in what for seq, what in found)
    assert len(found) == 6
