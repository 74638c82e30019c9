"""Ingestion over every kind of store: what a journal says becomes rows, once."""

from __future__ import annotations

import time
from dataclasses import replace
from multiprocessing.synchronize import Event

import pytest
from sqlalchemy import func, select

from db.errors import StoreError
from db.events import latest_events
from db.ingest import IngestReport, ingest
from db.jobs import (
    begin_attempt,
    get_job,
    latest_attempt,
    open_jobs,
    progress,
    rejections_of,
    results_of,
)
from db.models import (
    JournalRecordRow,
    RequestRow,
    RunRow,
)
from db.plan_answers import latest_plans
from db.profiles import profile_samples
from db.session import Store, open_store
from sti_runtime.messages import (
    EndRecord,
    FailureRecord,
    GateVerdict,
    JournalRecord,
    Payload,
    ResultRecord,
    SettingReport,
)
from tests.contract import store_world as world
from tests.contract.store_rows import EXPECTED_ROWS, PROCESSES, counts, make, put


def test_ingest_fans_out_every_kind(store: Store) -> None:
    made = make(store)
    report = put(store, made, world.journal(made.job, made.plan))
    assert report == IngestReport(8, 0, (), (), 8, gaps=False, complete=True, finished=6)
    assert counts(store) == EXPECTED_ROWS
    with store.reader() as session:
        assert get_job(session, made.job.id).state == "done"
        attempt = latest_attempt(session, made.job.id)
        assert attempt is not None
        assert (attempt.state, attempt.agent_digest) == ("done", world.AGENT)
        run = session.scalars(select(RunRow)).one()
        assert (run.os_build, run.kernel, run.boot_id) == ("os-1", "6.1", "boot-1")
        assert (run.gate_verdict, run.emulated, run.agent_digest) == ("pass", False, world.AGENT)
        assert run.temperature_after_milli_c == 40_000
        assert dict(results_of(session, made.job.id)) == dict(enumerate(world.results(made.plan)))
        assert open_jobs(session) == []


def test_same_and_overlapping_batches_make_no_doubles(store: Store) -> None:
    made = make(store)
    records = world.journal(made.job, made.plan)
    assert put(store, made, records[:5]).inserted == 5
    again = put(store, made, records[:5])
    assert (again.inserted, again.duplicates, again.next_seq) == (0, 5, 5)
    overlap = put(store, made, records[3:])
    assert (overlap.inserted, overlap.duplicates, overlap.complete) == (3, 2, True)
    assert put(store, made, records + records).inserted == 0
    assert counts(store) == EXPECTED_ROWS


def test_out_of_order_batches_show_gaps_and_end_complete(store: Store) -> None:
    made = make(store)
    records = world.journal(made.job, made.plan)
    late = put(store, made, records[4:])
    assert (late.next_seq, late.gaps, late.complete) == (0, True, False)
    with store.reader() as session:
        assert get_job(session, made.job.id).state == "running"
    assert put(store, made, records[:4]).complete
    with store.reader() as session:
        assert get_job(session, made.job.id).state == "done"
        assert progress(session, made.job.id, 1).next_seq == 8
    assert counts(store) == EXPECTED_ROWS


def _ingest_in_pieces(url: str, made: world.World, pieces: list[list[JournalRecord]]) -> None:
    with open_store(url) as store:
        for records in pieces:
            put(store, made, records)


def test_two_processes_at_once_make_no_doubles(url: str, store: Store) -> None:
    made = make(store)
    records = world.journal(made.job, made.plan)
    pieces = [[records[i], records[min(i + 1, 7)]] for i in range(8)]
    processes = [
        PROCESSES.Process(target=_ingest_in_pieces, args=(url, made, given))
        for given in (pieces, list(reversed(pieces)))
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    assert counts(store) == EXPECTED_ROWS
    with store.reader() as session:
        assert session.scalar(select(func.count()).select_from(JournalRecordRow)) == 8
        assert get_job(session, made.job.id).state == "done"


def _ingest_both(store: Store, one: world.World, two: world.World, records: list[JournalRecord]) -> None:
    with store.session() as session:
        for each in (one, two):
            ingest(session, device_id=each.device_id, job_id=each.job.id, attempt=1, records=records)


def test_a_batch_that_fails_half_way_leaves_nothing(store: Store) -> None:
    made = make(store)
    records = world.journal(made.job, made.plan)
    other = make(store, name="two", identity="hw-2", job_id="job-2")
    with pytest.raises(StoreError, match="belongs to device"):
        _ingest_both(store, made, replace(other, job=made.job), records)
    assert counts(store) == (0,) * 7
    assert put(store, made, records).inserted == 8


def _ingest_and_hang(url: str, made: world.World, records: list[JournalRecord], ready: Event) -> None:
    with open_store(url) as store, store.session() as session:
        ingest(session, device_id=made.device_id, job_id=made.job.id, attempt=1, records=records)
        ready.set()
        time.sleep(600)


def test_controller_killed_in_the_middle_of_a_batch(url: str, store: Store) -> None:
    made = make(store)
    records = world.journal(made.job, made.plan)
    ready = PROCESSES.Event()
    process = PROCESSES.Process(target=_ingest_and_hang, args=(url, made, records, ready))
    process.start()
    assert ready.wait(300)
    process.kill()
    process.join(300)
    assert counts(store) == (0,) * 7
    assert put(store, made, records).inserted == 8
    assert counts(store) == EXPECTED_ROWS


def test_rejected_record_is_kept_without_samples(store: Store) -> None:
    made = make(store)
    records = world.journal(made.job, made.plan)
    sample = world.request(2)
    bad = [world.request(i, warmup=i < 2) for i in range(12)]
    bad[2] = sample.model_copy(update={"logits": (float("nan"), 0.0)})
    lie = ResultRecord(type="result", unit=4, result=world.execute_result(made.plan, tuple(bad)))
    records[5] = records[5].model_copy(update={"payload": lie})
    report = put(store, made, records)
    assert [(r.seq, r.reason) for r in report.rejected] == [(5, "logits that are not finite numbers")]
    assert put(store, made, records).conflicts == ()
    assert counts(store) == (5, 3, 2, 1, 0, 0, 1)
    with store.reader() as session:
        assert get_job(session, made.job.id).state == "failed"
        (kept,) = rejections_of(session, made.job.id)
        assert kept.seq == 5
        assert '"nan"' in kept.record_json
        assert [event.kind for event in latest_events(session)] == ["record-rejected"]
        assert 4 not in results_of(session, made.job.id)


def test_settings_that_are_not_as_asked_are_events_and_stay_in_the_record(store: Store) -> None:
    made = make(store)
    records = world.journal(made.job, made.plan)
    begun = SettingReport(target="global/a", value="7", before=None, state="applied", why="")
    missing = begun.model_copy(update={"target": "/sys/devices/b", "state": "not-applied", "why": "absent"})
    reports = {0: (begun, missing, missing), len(records) - 1: (begun.model_copy(update={"state": "kept"}),)}
    for seq, settings in reports.items():
        payload = records[seq].payload.model_copy(update={"settings": settings})
        records[seq] = records[seq].model_copy(update={"payload": payload})
    assert put(store, made, records).rejected == ()
    with store.reader() as session:
        events = {event.kind: event.what for event in latest_events(session)}
        assert set(events) == {"setting-not-applied", "setting-kept"}
        assert "/sys/devices/b and 1 more not-applied: absent" in events["setting-not-applied"]
        kept = session.scalars(select(JournalRecordRow.record_json).where(JournalRecordRow.seq == 0)).one()
        assert '"state":"not-applied"' in kept


def test_second_result_of_a_unit_and_changed_records_are_not_believed(store: Store) -> None:
    made = make(store)
    records = world.journal(made.job, made.plan)[:-1]
    put(store, made, records)
    twice = records[5].model_copy(update={"seq": 7, "wall_ns": records[6].wall_ns + world.STEP_NS})
    assert put(store, made, [twice]).rejected[0].reason == "a second result of unit 4"
    changed = records[3].model_copy(update={"wall_ns": records[3].wall_ns + 1})
    assert put(store, made, [changed]).conflicts == (3,)
    assert counts(store) == EXPECTED_ROWS


@pytest.mark.parametrize("years", [-29, 76])
def test_a_device_whose_clock_is_years_off_is_believed_all_the_same(store: Store, years: int) -> None:
    made = make(store)
    off_ns = years * 365 * 86_400 * 10**9
    records = [
        record.model_copy(update={"wall_ns": max(0, record.wall_ns + off_ns)})
        for record in world.journal(made.job, made.plan)
    ]
    # Its clock is set right in the middle of the job, as by a board that has found the network.
    records[4:] = world.journal(made.job, made.plan)[4:]
    report = put(store, made, records)
    assert (report.rejected, report.conflicts, report.complete) == ((), (), True)
    assert counts(store) == EXPECTED_ROWS
    with store.reader() as session:
        found = profile_samples(session, device_id=made.device_id, bundle_digest=made.bundle, engine="torch")
        assert found is not None
        assert abs(found.newest_wall_ns - time.time_ns()) < 3600 * 10**9  # the host's clock counts


def test_journal_of_unknown_job_attempt_or_device_is_refused(store: Store) -> None:
    made = make(store)
    records = world.journal(made.job, made.plan)
    with pytest.raises(StoreError, match="no attempt 2"):
        put(store, made, records, attempt=2)
    with pytest.raises(StoreError, match="belongs to device"):
        put(store, replace(made, device_id=made.device_id + 1), records)
    other = made.job.model_copy(update={"id": "job-9"})
    with pytest.raises(StoreError, match="no job 'job-9'"):
        put(store, replace(made, job=other), records)


def test_failures_and_refusals_end_the_attempt(store: Store) -> None:
    made = make(store)
    payloads: list[Payload] = [
        world.start_record(made.job),
        FailureRecord(type="failure", unit=0, error="ResourceError", what="x", remedy="y"),
        EndRecord(type="end", done=0, failed=1, refused="not\x00 me"),
    ]
    assert put(store, made, world.numbered(payloads)).complete
    with store.session() as session:
        attempt = latest_attempt(session, made.job.id)
        assert attempt is not None
        assert (attempt.state, attempt.refused) == ("refused", "not\ufffd me")
        assert get_job(session, made.job.id).state == "failed"
        assert begin_attempt(session, made.job.id, lease_counter=2) == 2
        assert get_job(session, made.job.id).state == "running"


def test_store_overrules_a_device_that_calls_cached_reads_valid(store: Store) -> None:
    made = make(store)
    requests = [world.request(i, warmup=i < 2) for i in range(12)]
    requests[3] = requests[3].model_copy(update={"storage_bytes": 100})
    gates = (GateVerdict(gate="load", verdict="ungated", detail="no sensor"),)
    result = world.execute_result(made.plan, tuple(requests), gates)
    lines: list[Payload] = [
        world.start_record(made.job),
        ResultRecord(type="result", unit=4, result=result),
    ]
    put(store, made, world.numbered(lines))
    with store.reader() as session:
        rows = session.scalars(select(RequestRow).order_by(RequestRow.ordinal)).all()
        assert [row.ordinal for row in rows if not row.valid] == [3]
        assert rows[3].reasons_json == '["not-from-storage"]'
        assert session.scalars(select(RunRow.gate_verdict)).one() == "ungated"


def test_failed_gate_invalidates_all_requests(store: Store) -> None:
    made = make(store)
    gates = (GateVerdict(gate="temperature", verdict="fail", detail="90 C"),)
    result = world.execute_result(made.plan, None, gates)
    lines: list[Payload] = [
        world.start_record(made.job),
        ResultRecord(type="result", unit=4, result=result),
    ]
    put(store, made, world.numbered(lines))
    with store.reader() as session:
        assert set(session.scalars(select(RequestRow.valid))) == {False}
        (answer,) = latest_plans(session)
        assert answer.measured is None
