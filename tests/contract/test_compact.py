"""Compaction: what goes, what stays, and that nothing is lost by it."""

from __future__ import annotations

import pytest
from sqlalchemy import func, select, update

from db.audit import Audit, audit_attempt
from db.compact import Compaction, Retention, compact, vacuum
from db.documents import pack, unpack
from db.events import latest_events
from db.ingest import ingest
from db.jobs import results_of
from db.measured import measured_of
from db.models import (
    DeviceProfileRow,
    IoSampleRow,
    JournalRecordRow,
    RequestRow,
    RunRow,
    SampleSummaryRow,
)
from db.plan_answers import latest_plans
from db.plans import save_plan
from db.profiles import profile_of_job, profile_samples, save_device_profile
from db.session import Store
from sti_runtime.errors import InputError
from sti_runtime.messages import JournalRecord
from tests.contract import store_world as world

ALL = Retention(days=0, profiles=0, runs=0)


def fill(store: Store) -> tuple[world.World, list[JournalRecord]]:
    with store.session() as session:
        made = world.populate(session)
        records = world.journal(made.job, made.plan)
        ingest(session, device_id=made.device_id, job_id=made.job.id, attempt=1, records=records)
        profile = world.device_profile(made.bundle, alpha_ns=4000)
        save_device_profile(session, profile, device_id=made.device_id, job_id=made.job.id)
    return made, records


def replan(store: Store, made: world.World, alpha_ns: int = 5000) -> None:
    """The same question answered from a later profile, of which nobody measured anything here."""
    with store.session() as session:
        profile = world.device_profile(made.bundle, alpha_ns=alpha_ns)
        save_device_profile(session, profile, device_id=made.device_id, job_id="job-1")
        # It was fitted from another job's samples, as if that had been measured later.
        session.execute(update(DeviceProfileRow).values(job_id=None))
        save_plan(session, world.plan(made.bundle, profile.digest), device_id=made.device_id, task=world.TASK)


def audited(store: Store, made: world.World, records: list[JournalRecord]) -> Audit:
    with store.reader() as session:
        return audit_attempt(
            session, device_id=made.device_id, job_id=made.job.id, attempt=1, records=records
        )


def rows(store: Store) -> tuple[int, ...]:
    with store.reader() as session:
        tables = (IoSampleRow, RequestRow, SampleSummaryRow)
        return tuple(session.scalar(select(func.count()).select_from(table)) or 0 for table in tables)


def test_what_a_latest_plan_or_a_kept_fit_rests_on_stays(store: Store) -> None:
    fill(store)
    for retention in (Retention(), Retention(0, 1, 1), Retention(1, 0, 0)):
        assert compact(store, retention) == Compaction(0, 0, 0, 0)
    # Without fits kept, those samples go which no fit is known to rest on; the latest plan's requests stay.
    assert rows(store)[1] == 12
    with store.reader() as session:
        assert latest_plans(session)[0].measured is not None


def test_compacted_samples_are_summaries_and_nothing_is_lost(store: Store) -> None:
    made, records = fill(store)
    before = audited(store, made, records)
    with store.session() as session:
        results = results_of(session, made.job.id)
        # Another plan answers the question now, and no fit stays.
        session.execute(update(DeviceProfileRow).values(job_id="job-1"))
        later = world.plan(made.bundle, "f" * 64)
        save_plan(session, later, device_id=made.device_id, task=world.TASK)
    would = compact(store, ALL, dry_run=True)
    assert rows(store) == (5, 12, 0)
    assert (would.records, would.samples) == (4, 22)  # 5 io, 3 compute, 2 fixed, 12 requests
    assert compact(store, ALL) == would
    assert compact(store, ALL) == Compaction(0, 0, 0, 0)
    assert rows(store) == (0, 0, would.summaries)
    assert audited(store, made, records) == before
    with store.reader() as session:
        assert results_of(session, made.job.id) == results
        kept = session.scalars(
            select(SampleSummaryRow).where(
                SampleSummaryRow.kind == "request",
                SampleSummaryRow.quantity == "latency",
                SampleSummaryRow.warmup.is_(False),
            )
        ).one()
        assert (kept.count, kept.min_ns, kept.median_ns, kept.max_ns) == (
            10, 2_020_000, 2_065_000, 2_110_000,
        )  # fmt: skip
        assert kept.median_low_ns is not None
        assert kept.median_low_ns < kept.median_ns < (kept.median_high_ns or 0)
        assert [e.kind for e in latest_events(session)] == ["samples-compacted"]
        assert profile_samples(session, device_id=1, bundle_digest=made.bundle, engine="torch") is None
        assert profile_of_job(session, made.device_id, made.job.id) is not None
    # What came again after all, as from a device that was away, is known as a duplicate.
    with store.session() as session:
        again = ingest(session, device_id=made.device_id, job_id=made.job.id, attempt=1, records=records)
        assert (again.inserted, again.conflicts) == (0, ())
    vacuum(store)
    assert audited(store, made, records) == before


def test_what_was_measured_of_a_plan_outlives_its_requests(store: Store) -> None:
    made, _ = fill(store)
    replan(store, made)
    with store.reader() as session:
        plan_id = session.scalars(select(RunRow.plan_id)).one()
        before = measured_of(session, {plan_id: False})
    assert before[plan_id].latency.count == 10
    compact(store, ALL)
    assert rows(store)[1] == 0
    with store.reader() as session:
        assert measured_of(session, {plan_id: False}) == before


def test_a_fit_of_which_nobody_knows_the_job_keeps_what_it_may_rest_on(store: Store) -> None:
    made, _ = fill(store)
    replan(store, made)
    compact(store, Retention(0, 1, 0))
    assert rows(store)[0] == 5


def test_jobs_that_have_not_ended_are_left_alone(store: Store) -> None:
    with store.session() as session:
        made = world.populate(session)
        records = world.journal(made.job, made.plan)[:-1]
        ingest(session, device_id=made.device_id, job_id=made.job.id, attempt=1, records=records)
    assert compact(store, ALL) == Compaction(0, 0, 0, 0)


def test_an_audit_finds_a_summary_that_is_missing(store: Store) -> None:
    made, records = fill(store)
    with store.session() as session:
        save_plan(session, world.plan(made.bundle, "f" * 64), device_id=made.device_id, task=world.TASK)
    compact(store, ALL)
    with store.session() as session:
        session.execute(update(SampleSummaryRow).values(count=SampleSummaryRow.count - 1))
    assert audited(store, made, records).discrepancies


def test_a_policy_that_is_none(store: Store) -> None:
    with pytest.raises(InputError, match="less than nothing"):
        compact(store, Retention(days=-1))


def test_packed_documents_are_the_same_text() -> None:
    text = '{"a":"ü"}' * 100
    assert len(pack(text)) < len(text) / 4
    assert unpack(pack(text)) == unpack(text) == text
    assert pack(pack(text)) == pack(text)


def test_records_are_packed_under_the_digest_of_their_text(store: Store) -> None:
    made, _ = fill(store)
    with store.session() as session:
        save_plan(session, world.plan(made.bundle, "f" * 64), device_id=made.device_id, task=world.TASK)
    compact(store, ALL)
    with store.reader() as session:
        packed = session.scalars(
            select(JournalRecordRow).where(JournalRecordRow.compacted_wall_ns.is_not(None))
        ).all()
        assert len(packed) == 4
        assert all(row.record_json.startswith("zlib:") for row in packed)
