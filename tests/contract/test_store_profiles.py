"""Artifacts, importance and device profiles over every kind of store."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from sqlalchemy import select

from db.artifacts import find_bundle, find_model, save_bundle
from db.documents import parse
from db.errors import StoreError
from db.importance import BASE, ScoreKey, StoredScore, record_score, scores_done
from db.jobs import (
    begin_attempt,
)
from db.models import (
    ComputeSampleRow,
    FixedSampleRow,
    IoSampleRow,
    RunRow,
)
from db.plan_answers import latest_plans
from db.profiles import latest_profile, profile_by_digest, profile_samples, save_device_profile
from db.session import Store
from sti_runtime.errors import InputError
from sti_runtime.importance_profile import Score
from sti_runtime.messages import (
    ComputeProfileResult,
    FixedProfileResult,
    IoProfileResult,
    IoSample,
    JournalRecord,
    Payload,
    ResultRecord,
    Verdict,
)
from tests.contract import store_world as world
from tests.contract.store_rows import make, put


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
