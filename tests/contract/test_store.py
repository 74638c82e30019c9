"""One suite over every kind of store: SQLite and PostgreSQL."""

from __future__ import annotations

import multiprocessing
import time
import uuid
from dataclasses import replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, func, inspect, select, text, update
from sqlalchemy.exc import IntegrityError

from db import leases
from db.artifacts import drawn_split, find_bundle, find_model, save_bundle, save_task_data
from db.audit import Audit, audit_attempt
from db.devices import (
    device_by_name,
    latest_facts,
    list_devices,
    record_facts,
    register_device,
    set_agent,
)
from db.documents import parse
from db.errors import LeaseHeldError, StoreError, StoreVersionError
from db.events import latest_events
from db.importance import BASE, ScoreKey, StoredScore, record_score, scores_done
from db.ingest import IngestReport, ingest
from db.jobs import (
    begin_attempt,
    create_job,
    get_job,
    latest_attempt,
    open_jobs,
    progress,
    rejections_of,
    results_of,
)
from db.models import (
    Base,
    ComputeSampleRow,
    EvaluationRow,
    FixedSampleRow,
    IoSampleRow,
    JournalRecordRow,
    ModelRow,
    ProbeRow,
    RequestRow,
    RunRow,
)
from db.plan_answers import latest_plans
from db.plans import plan_by_digest, save_plan
from db.profiles import latest_profile, profile_by_digest, profile_samples, save_device_profile
from db.runs import accuracy_of, predictions_of
from db.session import KNOWN_REVISIONS, Store, open_store, parse_url, upgrade
from sti_runtime.errors import InputError
from sti_runtime.importance_profile import Score
from sti_runtime.messages import (
    ComputeProfileResult,
    EndRecord,
    EvaluateResult,
    FailureRecord,
    FixedProfileResult,
    GateVerdict,
    IoProfileResult,
    IoSample,
    JournalRecord,
    Payload,
    ResultRecord,
    SettingReport,
    Verdict,
)
from tests.contract import store_world as world

SAMPLES: tuple[type[Base], ...] = (
    IoSampleRow,
    ComputeSampleRow,
    FixedSampleRow,
    ProbeRow,
    RunRow,
    RequestRow,
    EvaluationRow,
)
EXPECTED_ROWS = (5, 3, 2, 1, 1, 12, 1)

PROCESSES = multiprocessing.get_context("forkserver")
"""Processes fork off one that has imported this module: importing takes longer than what they do."""

PROCESSES.set_forkserver_preload([__name__])


def counts(store: Store) -> tuple[int, ...]:
    with store.reader() as session:
        return tuple(session.scalar(select(func.count()).select_from(table)) or 0 for table in SAMPLES)


def put(store: Store, made: world.World, records: list[JournalRecord], attempt: int = 1) -> IngestReport:
    with store.session() as session:
        return ingest(session, device_id=made.device_id, job_id=made.job.id, attempt=attempt, records=records)


def make(store: Store, **options: object) -> world.World:
    with store.session() as session:
        return world.populate(session, **options)  # type: ignore[arg-type]


# ------------------------------------------------------------------ schema


def test_upgrade_twice_keeps_store_id(url: str) -> None:
    with open_store(url) as first:
        store_id = first.store_id
    assert upgrade(url) == KNOWN_REVISIONS[-1]
    with open_store(url) as again:
        assert again.store_id == store_id
        assert uuid.UUID(store_id)


def _upgrade_and_report(url: str, out: multiprocessing.Queue[str]) -> None:
    upgrade(url)
    with open_store(url) as store:
        out.put(store.store_id)


def test_stores_created_by_several_processes_at_once_are_one(fresh_url: str) -> None:
    out = PROCESSES.Queue()
    processes = [PROCESSES.Process(target=_upgrade_and_report, args=(fresh_url, out)) for _ in range(3)]
    for process in processes:
        process.start()
    ids = {out.get(timeout=300) for _ in processes}
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * 3
    assert len(ids) == 1


def test_newer_schema_is_refused(url: str) -> None:
    engine = create_engine(parse_url(url))
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(StoreVersionError, match="newer stifarm"):
        open_store(url)
    with pytest.raises(StoreVersionError, match="newer stifarm"):
        upgrade(url)


def test_foreign_database_is_left_alone(fresh_url: str) -> None:
    engine = create_engine(parse_url(fresh_url))
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE cats (name TEXT)"))
    with pytest.raises(StoreError, match="not a stifarm store"):
        open_store(fresh_url)
    with pytest.raises(StoreError, match="not a stifarm store"):
        upgrade(fresh_url)
    assert inspect(engine).get_table_names() == ["cats"]
    engine.dispose()


def test_enumerations_and_references_are_enforced(store: Store) -> None:
    made = make(store)
    with pytest.raises(IntegrityError), store.session() as session:
        get_job(session, made.job.id).state = "confused"
    with pytest.raises(IntegrityError), store.session() as session:
        record_facts(session, 999, {}, boot_id="b", os_build=None, kernel=None)
    with store.reader() as session:
        assert get_job(session, made.job.id).state == "running"


# ------------------------------------------------------------------ ingestion


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


# ------------------------------------------------------------------ jobs


def test_the_same_key_is_the_same_job(store: Store) -> None:
    made = make(store)
    key = "work of job-1"
    renamed = made.job.model_copy(update={"id": "job-2"})
    with store.session() as session:
        found = create_job(session, renamed, key=key, kind="test", device_id=made.device_id)
        assert found.id == made.job.id
    with pytest.raises(StoreError, match="there already"), store.session() as session:
        create_job(session, made.job, key="another", kind="test", device_id=made.device_id)


def test_new_attempt_gives_up_the_open_one_and_late_records_still_count(store: Store) -> None:
    made = make(store)
    with store.session() as session:
        assert begin_attempt(session, made.job.id, lease_counter=2) == 2
    assert put(store, made, world.journal(made.job, made.plan)).complete
    assert counts(store) == EXPECTED_ROWS
    with store.reader() as session:
        assert get_job(session, made.job.id).state == "running"


# ------------------------------------------------------------------ devices and leases


def test_device_identity_is_its_hardware(store: Store) -> None:
    with store.session() as session:
        first = register_device(
            session, identity="hw-1", name="p", transport="adb", engine="native", emulated=False
        )
        same = register_device(
            session, identity="hw-1", name="q", transport="adb", engine="native", emulated=False
        )
        assert (same.id, same.name) == (first.id, "q")
        other = register_device(
            session, identity="hw-2", name="q", transport="adb", engine="native", emulated=False
        )
        assert device_by_name(session, "q").id == other.id
        assert [d.identity for d in list_devices(session)] == ["hw-2"]
        assert len(list_devices(session, retired=True)) == 2
        assert [e.kind for e in latest_events(session)] == ["device-replaced"]
        with pytest.raises(StoreError, match="no device named 'p'"):
            device_by_name(session, "p")


def test_facts_are_appended_only_when_they_change(store: Store) -> None:
    made = make(store)
    with store.session() as session:
        before = latest_facts(session, made.device_id)
        assert before is not None
        same = record_facts(
            session, made.device_id, {"cpu": "x"}, boot_id="boot-1", os_build="os-1", kernel="6.1"
        )
        assert same.id == before.id
        rebooted = record_facts(
            session, made.device_id, {"cpu": "x"}, boot_id="boot-2", os_build="os-1", kernel="6.1"
        )
        assert rebooted.id > before.id


def _take_counters(url: str, device_id: int, out: multiprocessing.Queue[list[int]]) -> None:
    taken = []
    with open_store(url) as store:
        for _ in range(10):
            with store.session() as session:
                taken.append(leases.acquire_lease(session, device_id, "host", 10**12).counter)
    out.put(taken)


def test_fencing_counters_are_never_given_twice(url: str, store: Store) -> None:
    made = make(store)
    out = PROCESSES.Queue()
    processes = [PROCESSES.Process(target=_take_counters, args=(url, made.device_id, out)) for _ in range(2)]
    for process in processes:
        process.start()
    taken = [out.get(timeout=300) for _ in processes]
    for process in processes:
        process.join(300)
    assert sorted(counter for one in taken for counter in one) == list(range(1, 21))
    assert all(one == sorted(one) for one in taken)


def test_a_lease_has_one_owner_until_it_expires(store: Store) -> None:
    made = make(store)
    hour_ns = 3600 * 10**9
    with store.session() as session:
        mine = leases.acquire_lease(session, made.device_id, "host-a", hour_ns)
    with pytest.raises(LeaseHeldError, match="in use by host-a"), store.session() as session:
        leases.acquire_lease(session, made.device_id, "host-b", hour_ns)
    with store.session() as session:
        mine = leases.renew_lease(session, mine, -1)
    with store.session() as session:
        theirs = leases.acquire_lease(session, made.device_id, "host-b", hour_ns)
        assert theirs.counter == mine.counter + 1
    with pytest.raises(LeaseHeldError, match="lost to another"), store.session() as session:
        leases.renew_lease(session, mine, hour_ns)
    with store.session() as session:
        leases.release_lease(session, mine)
        with pytest.raises(LeaseHeldError):
            leases.acquire_lease(session, made.device_id, "host-a", hour_ns)
        leases.release_lease(session, theirs)
        assert leases.acquire_lease(session, made.device_id, "host-a", hour_ns).counter == 3


# ------------------------------------------------------------------ artifacts, importance, profiles


def test_artifacts_are_found_by_name_and_digest(store: Store) -> None:
    make(store)
    with store.session() as session:
        newer = world.manifest(refined=False)
        save_bundle(session, newer, name="tiny")
        assert find_bundle(session, "tiny").digest == newer.digest
        older = world.manifest()
        assert find_bundle(session, older.digest[:10]).digest == older.digest
        assert find_model(session, "tiny").digest == world.MODEL
        with pytest.raises(InputError, match="Known: tiny"):
            find_model(session, "huge")
        save_bundle(session, older, name="tiny")
        assert find_bundle(session, "tiny").digest == older.digest


def test_interrupted_importance_resumes_from_rows(store: Store) -> None:
    make(store)
    key = ScoreKey(world.MODEL, world.TASK, "f" * 64, 2)
    score = StoredScore(Score(loss_nano=700_000_000, correct=20), 40, 1, 2, 11)
    with store.session() as session:
        record_score(session, key, BASE, replace(score, half_a_correct=None))  # of an earlier schema
        record_score(session, key, BASE, score)
        record_score(session, key, (0, 1), score)
        changed = replace(score, score=Score(loss_nano=1, correct=1))
        record_score(session, key, (0, 1), changed)
    with store.reader() as session:
        assert scores_done(session, key) == {BASE: score, (0, 1): score}
        assert scores_done(session, replace(key, base_fidelity=3)) == {}


def test_profile_samples_are_valid_ones_of_one_job(store: Store) -> None:
    made = make(store)
    put(store, made, world.journal(made.job, made.plan))
    with store.reader() as session:
        samples = profile_samples(
            session, device_id=made.device_id, bundle_digest=made.bundle, engine="torch"
        )
        assert samples is not None
        assert (samples.job_id, samples.emulated) == ("job-1", False)
        assert (len(samples.io), len(samples.compute), len(samples.fixed)) == (2, 3, 2)
        assert [s.duration_ns for s in samples.beside] == [150_000]  # the other did not come from storage
        assert [s.warmup for s in samples.compute] == [True, False, False]
        found = latest_profile(session, device_id=made.device_id, bundle_digest=made.bundle, engine="torch")
        assert found is not None
        assert profile_by_digest(session, made.profile).digest == found.digest == made.profile


def test_profiles_are_found_by_the_setting_they_were_measured_in(store: Store) -> None:
    made = make(store)
    slow = make(store, name="slow", identity="hw-2", emulated=True, job_id="job-2")
    four = world.device_profile(made.bundle).model_copy(update={"threads": 4, "queue_depth": 8})
    throttled = world.device_profile(made.bundle, emulated=True, alpha_ns=77)
    with store.session() as session:
        save_device_profile(session, four, device_id=made.device_id, job_id=made.job.id)
        row = save_device_profile(session, throttled, device_id=slow.device_id, job_id=slow.job.id)
        assert row.emulation_json == world.SLOWED.to_json().decode()
        with pytest.raises(StoreError, match="no job 'job-9'"):
            save_device_profile(session, four, device_id=made.device_id, job_id="job-9")

    def found(device_id: int, **filters: Any) -> str | None:
        with store.reader() as session:
            row = latest_profile(
                session, device_id=device_id, bundle_digest=made.bundle, engine="torch", **filters
            )
            return None if row is None else row.digest

    assert found(made.device_id) == four.digest
    assert found(made.device_id, threads=2) == made.profile
    assert found(made.device_id, threads=2, queue_depth=8) is None
    assert found(made.device_id, queue_depth=8) == four.digest
    assert found(made.device_id, rates=(None, None)) == four.digest
    assert found(made.device_id, rates=(20_000_000, None)) is None
    assert found(slow.device_id, rates=(20_000_000, None)) == throttled.digest
    assert found(slow.device_id, rates=(20_000_000, 500)) is None
    # The world's own profile of this device names no job: nothing is known to have slowed it.
    assert found(slow.device_id, rates=(None, None)) == slow.profile


def io_sample(made: world.World, **changes: Any) -> IoSample:
    """A valid read, changed."""
    profile = world.results(made.plan)[1]
    assert isinstance(profile, IoProfileResult)
    return profile.samples[0].model_copy(update=changes)


def test_throttled_samples_of_every_kind_are_kept_and_not_fitted(store: Store) -> None:
    made = make(store)
    payloads: list[Payload] = [world.start_record(made.job)]
    for unit, result in enumerate(world.results(made.plan)):
        if isinstance(result, ComputeProfileResult | FixedProfileResult):
            held = result.samples[-1].model_copy(update={"throttled": True})
            result = result.model_copy(update={"samples": (*result.samples[:-1], held)})
        payloads.append(ResultRecord(type="result", unit=unit, result=result))
    assert put(store, made, world.numbered(payloads)).rejected == ()
    with store.reader() as session:
        found = profile_samples(session, device_id=made.device_id, bundle_digest=made.bundle, engine="torch")
        assert found is not None
        assert (len(found.compute), len(found.fixed)) == (2, 1)
        compute = session.scalars(select(ComputeSampleRow.reasons_json).order_by(ComputeSampleRow.ordinal))
        assert list(compute) == ["[]", "[]", '["throttled"]']
        fixed = session.scalars(select(FixedSampleRow.reasons_json).order_by(FixedSampleRow.ordinal))
        assert list(fixed) == ["[]", '["throttled"]']


def test_modes_of_all_requests_are_counted_and_a_claim_that_bytes_belie_is_not_taken(store: Store) -> None:
    made = make(store)
    requests = [world.request(i, warmup=i < 2) for i in range(12)]
    requests[0] = requests[0].model_copy(update={"mode_proven": "cached"})  # a warm-up: not counted
    requests[5] = requests[5].model_copy(update={"storage_bytes": 0})
    requests[6] = requests[6].model_copy(update={"storage_bytes": 4096})
    requests[7] = requests[7].model_copy(
        update={"verdict": Verdict(valid=False, reasons=("throttled",)), "mode_proven": "buffered-cold"}
    )
    lines = world.journal(made.job, made.plan)
    run = world.execute_result(made.plan, tuple(requests))
    lines[5] = lines[5].model_copy(update={"payload": ResultRecord(type="result", unit=4, result=run)})
    assert put(store, made, lines).rejected == ()
    with store.reader() as session:
        (answer,) = latest_plans(session)
        assert answer.measured is not None
        assert answer.measured.modes == (
            ("direct", "buffered-cold", 1),
            ("direct", "cached", 1),
            ("direct", "direct", 7),
            ("direct", "mixed", 1),
        )
        assert (answer.measured.latency.count, answer.measured.invalid) == (7, 3)
        (row,) = session.scalars(select(RunRow)).all()
        assert parse(row.readings_json) == [reading.model_dump(mode="json") for reading in run.readings]


def test_store_overrules_a_device_that_calls_a_cached_profile_read_valid(store: Store) -> None:
    made = make(store)
    good = io_sample(made, mode_proven="buffered-cold")
    cached = good.model_copy(update={"storage_bytes": 8191})
    distrusted = good.model_copy(update={"valid": False})
    throttled = good.model_copy(update={"throttled": True})
    samples = (good, cached, distrusted, throttled)
    lines: list[Payload] = [
        world.start_record(made.job),
        ResultRecord(
            type="result",
            unit=1,
            result=IoProfileResult(kind="profile-io", io_mode="buffered", readings=(), samples=samples),
        ),
    ]
    assert put(store, made, world.numbered(lines)).rejected == ()
    with store.reader() as session:
        rows = session.scalars(select(IoSampleRow).order_by(IoSampleRow.ordinal)).all()
        assert [(row.valid, row.reasons_json) for row in rows] == [
            (True, "[]"),
            (False, '["not-from-storage"]'),
            (False, '["device-verdict"]'),
            (False, '["throttled"]'),
        ]
        assert [(row.mode_asked, row.mode_proven) for row in rows] == [
            ("direct", "buffered-cold"),
            ("direct", "mixed"),
            ("direct", "buffered-cold"),
            ("direct", "buffered-cold"),
        ]
        found = profile_samples(session, device_id=made.device_id, bundle_digest=made.bundle, engine="torch")
        assert found is not None
        assert found.io == (good,)


def _second_attempt(store: Store, made: world.World, slower_ns: int) -> list[JournalRecord]:
    """The journal of attempt 2, in which units 1 and 4 took ``slower_ns`` longer; it stops behind unit 4."""
    with store.session() as session:
        assert begin_attempt(session, made.job.id, lease_counter=2) == 2
    results = world.results(made.plan)
    io = results[1]
    assert isinstance(io, IoProfileResult)
    slow_io = tuple(s.model_copy(update={"duration_ns": s.duration_ns + slower_ns}) for s in io.samples)
    slow_requests = tuple(world.request(i, warmup=i < 2, latency_ns=2_000_000 + slower_ns) for i in range(12))
    payloads: list[Payload] = [
        world.start_record(made.job.model_copy(update={"attempt": 2})),
        ResultRecord(type="result", unit=1, result=io.model_copy(update={"samples": slow_io})),
        ResultRecord(type="result", unit=4, result=world.execute_result(made.plan, slow_requests)),
    ]
    return world.numbered(payloads)


@pytest.mark.parametrize("late", [False, True])
def test_a_unit_of_several_attempts_counts_once(store: Store, late: bool) -> None:
    made = make(store)
    first = world.journal(made.job, made.plan)
    if not late:
        put(store, made, first)
    second = _second_attempt(store, made, 1_000_000)
    put(store, made, second, attempt=2)
    if late:  # the first attempt was given up, and what it had measured comes in at last
        put(store, made, first)
    with store.reader() as session:
        samples = profile_samples(
            session,
            device_id=made.device_id,
            bundle_digest=made.bundle,
            engine="torch",
            job_id=made.job.id,
        )
        assert samples is not None
        assert [s.duration_ns for s in samples.io] == [1_100_000] * 2
        # Attempt 2 has no result of these units: attempt 1's stay.
        assert (len(samples.compute), len(samples.fixed)) == (3, 2)
        (answer,) = latest_plans(session)
        assert answer.measured is not None
        assert answer.measured.latency.count == 10
        assert answer.measured.latency.median == 3_000_000
        assert (answer.measured.runs, answer.measured.older_runs) == (1, 0)


def test_a_rejected_result_does_not_hide_an_accepted_one(store: Store) -> None:
    made = make(store)
    put(store, made, world.journal(made.job, made.plan))
    lines = _second_attempt(store, made, 1_000_000)
    impossible = io_sample(made, duration_ns=10**18)
    lie = IoProfileResult(kind="profile-io", io_mode="direct", readings=(), samples=(impossible,))
    lines[1] = lines[1].model_copy(update={"payload": ResultRecord(type="result", unit=1, result=lie)})
    assert [r.seq for r in put(store, made, lines, attempt=2).rejected] == [1]
    with store.reader() as session:
        samples = profile_samples(
            session, device_id=made.device_id, bundle_digest=made.bundle, engine="torch"
        )
        assert samples is not None
        assert [s.duration_ns for s in samples.io] == [100_000] * 2


# ------------------------------------------------------------------ plans


def test_plan_answer_has_everything(store: Store) -> None:
    made = make(store)
    with store.reader() as session:
        (bare,) = latest_plans(session)
        assert (bare.measured, bare.accuracy, bare.stale) == (None, None, ())
    put(store, made, world.journal(made.job, made.plan))
    with store.reader() as session:
        (answer,) = latest_plans(session)
    assert answer.plan == made.plan
    assert (answer.device, answer.identity, answer.task) == ("board", "hw-1", world.TASK)
    assert answer.measured is not None
    assert answer.measured.latency.count == 10
    assert answer.measured.latency.median == 2_065_000
    assert answer.measured.latency.p95 == 2_110_000
    assert answer.measured.latency.interval is not None
    assert answer.measured.within_target.count == 10
    assert answer.measured.stall_share_ppm == 100_000
    assert answer.measured.storage_bytes == 8192
    assert answer.measured.memory.parts_bytes == 100
    assert answer.accuracy is not None
    assert answer.accuracy.correct.value_ppm == 750_000
    assert answer.profiles[0].digest == made.profile
    assert answer.stale == ()
    assert plan_by_digest_of(store, answer.plan_digest[:12]) == made.plan.digest


def plan_by_digest_of(store: Store, digest: str) -> str:
    with store.reader() as session:
        return plan_by_digest(session, digest).digest


def test_plan_answers_are_the_newest_and_filtered(store: Store) -> None:
    made = make(store)
    wide = world.plan(made.bundle, made.profile, target_ns=9_000_000)
    again = made.plan.model_copy(update={"slack": False})
    with store.session() as session:
        save_plan(session, wide, device_id=made.device_id, task=world.TASK)
        save_plan(session, again, device_id=made.device_id, task=world.TASK)
    with store.session() as session:
        assert [a.plan for a in latest_plans(session)] == [again, wide]
        assert [a.plan for a in latest_plans(session, target_ns=9_000_000)] == [wide]
        assert latest_plans(session, task="rte") == []
        assert latest_plans(session, policy="random") == []
        assert latest_plans(session, device="nobody") == []
        assert latest_plans(session, label=("soc", "x")) == []
        save_plan(session, made.plan, device_id=made.device_id, task=world.TASK)
        assert [a.plan for a in latest_plans(session)] == [made.plan, wide]


def test_emulated_devices_stay_out_unless_asked_for(store: Store) -> None:
    make(store)
    slow = make(store, name="slow", identity="hw-2", emulated=True, job_id="job-2")
    put(store, slow, world.journal(slow.job, slow.plan, emulated=True))
    with store.reader() as session:
        assert [a.device for a in latest_plans(session)] == ["board"]
        assert [a.device for a in latest_plans(session, include_emulated=True)] == ["board", "slow"]
        (answer,) = latest_plans(session, device="slow")
        assert answer.emulated
        assert answer.mechanisms == ("io: agent",)
        run = session.scalars(select(RunRow)).one()
        assert run.emulated
        assert run.verified_json is not None
        assert '"io_bytes_per_s":19900000' in run.verified_json
        for table in (IoSampleRow, ComputeSampleRow, FixedSampleRow, ProbeRow, RequestRow, EvaluationRow):
            assert set(session.scalars(select(table.emulated))) == {True}


def test_agent_that_says_emulated_is_believed(store: Store) -> None:
    made = make(store)
    lines = world.journal(made.job, made.plan)
    start = world.start_record(made.job, emulated=True)
    lines[0] = lines[0].model_copy(update={"payload": start})
    put(store, made, lines)
    with store.reader() as session:
        assert set(session.scalars(select(RequestRow.emulated))) == {True}
        (answer,) = latest_plans(session)
        assert answer.measured is None


def test_answers_say_what_made_them_stale(store: Store) -> None:
    made = make(store)
    put(store, made, world.journal(made.job, made.plan))
    with store.session() as session:
        save_bundle(session, world.manifest(refined=False), name="tiny")
        record_facts(session, made.device_id, {"cpu": "x"}, boot_id="boot-2", os_build="os-2", kernel="6.2")
        (answer,) = latest_plans(session)
        assert answer.stale == ("bundle rebuilt since", "OS changed since", "kernel changed since")
        set_agent(session, made.device_id, "9" * 64)
        (answer,) = latest_plans(session)
        assert "agent changed since" not in answer.stale  # the profile's agent is not known
        newer = world.device_profile(made.bundle, alpha_ns=7)
        save_device_profile(session, newer, device_id=made.device_id, job_id=made.job.id)
        (answer,) = latest_plans(session)
        assert answer.stale[:2] == ("bundle rebuilt since", "newer profile")
        plan = world.plan(made.bundle, newer.digest)
        save_plan(session, plan, device_id=made.device_id, task=world.TASK)
        (answer,) = latest_plans(session)
        assert answer.stale == ("bundle rebuilt since", "agent changed since")
        stranger = world.plan(made.bundle, "0" * 64)
        save_plan(session, stranger, device_id=made.device_id, task=world.TASK)
        (answer,) = latest_plans(session)
        assert answer.stale == ("bundle rebuilt since", "its profile is not in this store")


def test_only_a_profile_made_after_the_planning_makes_a_plan_stale(store: Store) -> None:
    made = make(store)
    other_device = make(store, name="two", identity="hw-2", job_id="job-2")
    newer = world.device_profile(made.bundle, alpha_ns=7)
    longer = newer.model_copy(update={"sequence_length": 2 * world.LENGTH})

    def stale_of_board() -> tuple[str, ...]:
        with store.reader() as session:
            (answer,) = latest_plans(session, device="board")
            return answer.stale

    with store.session() as session:
        save_device_profile(session, longer, device_id=made.device_id)
        save_device_profile(session, newer, device_id=other_device.device_id)
    assert stale_of_board() == ()
    with store.session() as session:
        save_device_profile(session, newer, device_id=made.device_id)
    assert stale_of_board() == ("newer profile",)
    with store.session() as session:
        save_plan(session, made.plan, device_id=made.device_id, task=world.TASK)
    assert stale_of_board() == ()


def test_runs_of_an_older_agent_are_not_averaged_in(store: Store) -> None:
    made = make(store)
    put(store, made, world.journal(made.job, made.plan))
    again = made.job.model_copy(update={"id": "job-2"})
    with store.session() as session:
        create_job(session, again, key="again", kind="test", device_id=made.device_id)
        begin_attempt(session, again.id, lease_counter=2)
    slow = tuple(world.request(i, warmup=i < 2, latency_ns=4_000_000) for i in range(12))
    lines: list[Payload] = [
        world.start_record(again, agent_digest="9" * 64),
        ResultRecord(type="result", unit=4, result=world.execute_result(made.plan, slow)),
    ]
    put(store, replace(made, job=again), world.numbered(lines))
    with store.reader() as session:
        (answer,) = latest_plans(session)
        assert answer.measured is not None
        assert answer.measured.latency.median == 4_000_000
        assert (answer.measured.runs, answer.measured.older_runs) == (1, 1)


def test_accuracy_is_kept_once_and_disagreement_is_an_event(store: Store) -> None:
    made = make(store)
    put(store, made, world.journal(made.job, made.plan))
    other = make(store, name="two", identity="hw-2", job_id="job-2")
    lines: list[Payload] = [
        world.start_record(other.job),
        ResultRecord(type="result", unit=5, result=world.evaluate_result(other.plan, correct=29)),
    ]
    assert put(store, other, world.numbered(lines)).rejected == ()
    with store.reader() as session:
        assert session.scalars(select(EvaluationRow.correct)).all() == [30]
        assert [event.kind for event in latest_events(session)] == ["evaluation-disagrees"]


# ------------------------------------------------------------------ accuracy


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


# ------------------------------------------------------------------ docs/schema.md


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
