"""Ingestion of several attempts at once, what it counts on them, and rows written past the ORM."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from sqlalchemy import func, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from db.audit import audit_attempt
from db.bulk import Columns, insert_rows
from db.errors import StoreError, StoreUnreachableError
from db.ingest import Batch, IngestReport, ingest_all
from db.jobs import Progress, get_job, progress
from db.models import AttemptRow, IoSampleRow, JournalRecordRow, RequestRow, RunRow
from db.session import Store, open_store
from db.source import REQUESTS
from sti_runtime.messages import EndRecord, JournalRecord, ResultRecord
from tests.contract import store_world as world
from tests.contract.stores import database


def make(store: Store, count: int) -> list[world.World]:
    """Devices with a job each."""
    with store.session() as session:
        return [
            world.populate(session, name=f"board-{n}", identity=f"hw-{n}", job_id=f"job-{n}")
            for n in range(count)
        ]


def batch(made: world.World, records: Sequence[JournalRecord]) -> Batch:
    return Batch(made.device_id, made.job.id, 1, records)


def recounted(session: Session, job_id: str) -> Progress:
    """``progress``, from the records themselves."""
    table = JournalRecordRow
    query = select(table.seq, table.type, table.rejected).where(table.job_id == job_id)
    rows = session.execute(query).all()
    stored = {row.seq for row in rows}
    next_seq = next(n for n in range(len(stored) + 1) if n not in stored)
    kinds = [row.type for row in rows if row.rejected is None]
    return Progress(
        next_seq=next_seq,
        gaps=next_seq < len(stored),
        results=kinds.count("result"),
        failures=kinds.count("failure"),
        rejected=len(rows) - len(kinds),
        ended="end" in kinds,
    )


def test_batches_of_many_devices_are_one_transaction_and_a_stranger_harms_none(store: Store) -> None:
    one, two, three = make(store, 3)
    records = world.journal(one.job, one.plan)
    strangers = [
        Batch(two.device_id, one.job.id, 2, records),
        Batch(two.device_id, three.job.id, 1, records),
        Batch(two.device_id, "job-9", 1, records),
    ]
    with store.session() as session:
        own = [
            batch(one, records),
            Batch(two.device_id, two.job.id, 1, world.journal(two.job, two.plan)[:5], job=two.job),
        ]
        found = ingest_all(session, [own[0], *strangers, own[1]])
    assert found[0] == IngestReport(8, 0, (), (), 8, gaps=False, complete=True, finished=6)
    assert found[4] == IngestReport(5, 0, (), (), 5, gaps=False, complete=False, finished=4)
    whys = [str(error) for error in found[1:4] if isinstance(error, StoreError)]
    wanted = ("belongs to device", "belongs to device", "no job 'job-9'")
    assert [part in why for part, why in zip(wanted, whys, strict=True)] == [True] * 3
    with store.reader() as session:
        states = [get_job(session, made.job.id).state for made in (one, two, three)]
        assert states == ["done", "running", "running"]
        assert session.scalar(select(func.count()).select_from(RequestRow)) == 12
        of_run = select(RunRow.job_id, func.count()).join(RequestRow, RequestRow.run_id == RunRow.id)
        assert session.execute(of_run.group_by(RunRow.job_id)).all() == [(one.job.id, 12)]
    twice = [batch(one, records[:1]), batch(one, records[1:])]
    with pytest.raises(ValueError, match="two batches"), store.session() as session:
        ingest_all(session, twice)


@pytest.mark.parametrize("seed", range(3))
def test_an_attempt_counts_what_its_records_say_in_whatever_order_they_come(store: Store, seed: int) -> None:
    chance = random.Random(seed)
    (made,) = make(store, 1)
    records = world.journal(made.job, made.plan)
    # One that is not believed, and an end that is not the last record.
    lie = ResultRecord(type="result", unit=99, result=world.evaluate_result(made.plan))
    records[2] = records[2].model_copy(update={"payload": lie})
    early = EndRecord(type="end", done=6, failed=0, refused=None)
    records[3] = records[3].model_copy(update={"payload": early})
    pieces = [sorted(chance.sample(range(8), chance.randint(1, 4))) for _ in range(8)]
    for numbers in [*pieces, list(range(8))]:
        with store.session() as session:
            (report,) = ingest_all(session, [batch(made, [records[n] for n in numbers])])
            assert isinstance(report, IngestReport)
            now = progress(session, made.job.id, 1)
            assert now == recounted(session, made.job.id), numbers
            assert (report.next_seq, report.gaps) == (now.next_seq, now.gaps)
            assert report.complete == (now.ended and not now.gaps)
    with store.reader() as session:
        assert progress(session, made.job.id, 1).next_seq == 8
        assert get_job(session, made.job.id).state == "failed"  # units lack results, whatever it says


def test_an_audit_finds_counts_that_are_not_those_of_the_records(store: Store) -> None:
    (made,) = make(store, 1)
    records = world.journal(made.job, made.plan)
    with store.session() as session:
        ingest_all(session, [batch(made, records)])
        session.execute(update(AttemptRow).values(results=AttemptRow.results - 1))
    with store.reader() as session:
        (wrong,) = audit_attempt(
            session, device_id=made.device_id, job_id=made.job.id, attempt=1, records=records
        ).discrepancies
    assert wrong.what == "the attempt counts 5 results where the store has 6"


def test_progress_of_an_attempt_that_is_not_there_is_refused(store: Store) -> None:
    make(store, 1)
    with store.reader() as session, pytest.raises(StoreError, match="no attempt 7"):
        progress(session, "job-0", 7)


# ------------------------------------------------------------------ rows past the ORM

SOME_REQUEST = (0, 0, False, True, "[]", False, 1, 0, 1, 1, "direct", "direct", "[]", '["a\tb\\\\"]')


def test_rows_past_the_orm_are_checked_and_come_back_as_they_were(store: Store) -> None:
    (made,) = make(store, 1)
    with store.session() as session:
        ingest_all(session, [batch(made, world.journal(made.job, made.plan))])
    with store.reader() as session:
        run_id = session.scalars(select(RunRow.id)).one()
    for wrong in ((10**6, *SOME_REQUEST), (run_id, *SOME_REQUEST)):  # no such run; its number is there
        with pytest.raises(IntegrityError), store.session() as session:
            insert_rows(session, REQUESTS, [wrong])
    again = (run_id, 90, *SOME_REQUEST[1:])
    with store.session() as session:
        insert_rows(session, REQUESTS, [again])
        insert_rows(session, Columns(IoSampleRow, ("ordinal",)), [])
    with store.reader() as session:
        row = session.scalars(select(RequestRow).where(RequestRow.ordinal == 90)).one()
        assert tuple(getattr(row, name) for name in REQUESTS.names) == again


def _insert_into_a_server_that_goes(store: Store) -> None:
    with store.session() as session:
        backend = session.execute(text("SELECT pg_backend_pid()")).scalar_one()
        with store.session() as other:
            other.execute(text("SELECT pg_terminate_backend(:pid, 30000)"), {"pid": backend})
        insert_rows(session, REQUESTS, [(1, *SOME_REQUEST)])


def test_a_server_that_goes_while_rows_are_copied_is_told_as_such(
    postgres_template: str, migrated_postgres: str
) -> None:
    with (
        database(postgres_template, migrated_postgres) as name,
        open_store(postgres_template.format(database=name)) as store,
    ):
        with pytest.raises(StoreUnreachableError):
            _insert_into_a_server_that_goes(store)
        with store.reader() as session:  # by a connection of its own
            assert session.execute(text("SELECT 1")).scalar_one() == 1
