"""Plans as every kind of store answers them: the newest, and what made them stale."""

from __future__ import annotations

from dataclasses import replace

from sqlalchemy import select

from db.artifacts import save_bundle
from db.devices import (
    record_facts,
    set_agent,
)
from db.events import latest_events
from db.jobs import (
    begin_attempt,
    create_job,
)
from db.models import (
    ComputeSampleRow,
    EvaluationRow,
    FixedSampleRow,
    IoSampleRow,
    ProbeRow,
    RequestRow,
    RunRow,
)
from db.plan_answers import latest_plans
from db.plans import plan_by_digest, save_plan
from db.profiles import save_device_profile
from db.session import Store
from sti_runtime.messages import (
    Payload,
    ResultRecord,
)
from tests.contract import store_world as world
from tests.contract.store_rows import make, put


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
