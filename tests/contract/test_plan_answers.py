"""What a plan answer says of its grounds: intervals, samples, staleness, borrowed profiles, reasons."""

from __future__ import annotations

from typing import Any

from db.borrowing import borrowed_profile, chip_of
from db.devices import record_facts, register_device
from db.grounds import SampleCounts
from db.plan_answers import PlanAnswer, latest_plans
from db.plans import save_plan
from db.profiles import save_device_profile
from db.reasons import in_words, reasons_of
from db.session import Store
from db.statistics import Interval
from tests.contract import store_world as world


def make(store: Store, **options: Any) -> world.World:
    with store.session() as session:
        return world.populate(session, **options)


def answer_of(store: Store, device: str) -> PlanAnswer:
    with store.reader() as session:
        (found,) = latest_plans(session, device=device)
        return found


def see(store: Store, device_id: int, facts: dict[str, Any]) -> None:
    with store.session() as session:
        record_facts(session, device_id, facts, boot_id="b", os_build="os-1", kernel="6.1")


def plan_from(store: Store, made: world.World, alpha_ns: int, job_id: str | None = None) -> None:
    """A new fit of the device, and the question answered from it."""
    with store.session() as session:
        fit = world.device_profile(made.bundle, alpha_ns=alpha_ns)
        save_device_profile(session, fit, device_id=made.device_id, job_id=job_id)
        save_plan(session, world.plan(made.bundle, fit.digest), device_id=made.device_id, task=world.TASK)


def lender(store: Store, device_id: int, bundle: str, **setting: Any) -> str | None:
    with store.reader() as session:
        wanted: dict[str, Any] = {"engine": "torch", "sequence_length": world.LENGTH, **setting}
        found = borrowed_profile(session, device_id=device_id, bundle_digest=bundle, **wanted)
        return None if found is None else found[0].name


def test_the_interval_goes_from_median_to_p95_and_the_residual_beyond(store: Store) -> None:
    made = make(store)
    found = answer_of(store, "board")
    assert found.predicted_interval == Interval(2_497_500, 3_003_000)  # 2.5 and 3 ms, 0.1 % outwards
    assert not found.borrowed
    (profile,) = found.profiles
    assert (profile.digest, profile.device, profile.job_id) == (made.profile, "board", None)
    assert profile.samples == SampleCounts(io=9, beside=9, compute=9, fixed=5)


def test_the_job_of_a_fit_is_named(store: Store) -> None:
    made = make(store)
    plan_from(store, made, 5, made.job.id)
    assert answer_of(store, "board").profiles[0].job_id == made.job.id


def test_changed_clocks_make_a_plan_stale(store: Store) -> None:
    made = make(store)
    see(store, made.device_id, {"max_khz": [2_000_000], "governors": ["powersave"]})
    assert answer_of(store, "board").stale == ()  # what they were before is not known
    plan_from(store, made, 5)
    see(store, made.device_id, {"max_khz": [2_000_000], "governors": ["powersave"], "cpu": "y"})
    assert answer_of(store, "board").stale == ()
    see(store, made.device_id, {"max_khz": [1_500_000], "governors": ["powersave"]})
    assert answer_of(store, "board").stale == ("clocks changed since",)


def test_a_profile_is_borrowed_from_the_same_chip_only(store: Store) -> None:
    made = make(store)
    slow = make(store, name="slow", identity="hw-2", job_id="job-2", emulated=True)
    new: dict[str, Any] = {"transport": "adb", "engine": "torch"}
    with store.session() as session:
        twin = register_device(session, identity="hw-3", name="twin", emulated=False, **new).id
        other = register_device(session, identity="hw-4", name="other", emulated=True, **new).id
    assert lender(store, twin, made.bundle) is None  # it names no chip
    for device_id in (twin, other, slow.device_id):
        see(store, device_id, {"host_seen": {"chip": "SM8550"}})
    assert lender(store, twin, made.bundle) is None  # of that chip there are only emulated devices
    see(store, made.device_id, {"host_seen": {"chip": "SM8450"}})
    assert lender(store, twin, made.bundle) is None
    see(store, made.device_id, {"host_seen": {"chip": "SM8550"}})
    with store.reader() as session:
        assert chip_of(session, twin) == "SM8550"
    assert lender(store, twin, made.bundle) == "board"
    assert lender(store, other, made.bundle) is None  # an emulated device borrows nothing
    assert lender(store, twin, made.bundle, engine="native") is None
    assert lender(store, twin, made.bundle, threads=3) is None
    with store.session() as session:
        unfit = world.device_profile(made.bundle, alpha_ns=9).model_copy(update={"unfit": ("io: no",)})
        save_device_profile(session, unfit, device_id=made.device_id)
        save_plan(session, made.plan, device_id=twin, task=world.TASK)
    assert lender(store, twin, made.bundle) == "board"  # the good one before it
    found = answer_of(store, "twin")
    assert found.borrowed
    assert found.profiles[0].device == "board"
    assert found.predicted_interval == Interval(2_497_500 // 2, 2 * 3_003_000)
    with store.session() as session:
        save_device_profile(session, world.device_profile(made.bundle, alpha_ns=11), device_id=twin)
    assert answer_of(store, "twin").stale == ("newer profile",)


def test_a_plan_can_be_explained(store: Store) -> None:
    made = make(store)
    found = answer_of(store, "board")
    with store.reader() as session:
        why = reasons_of(session, found.plan_id, found.plan)
    assert why is not None
    assert (why.uniform, why.raised, len(why.layers)) == (2, (), 1)
    assert why.passed_over[0][0] == "2×2"
    text = " ".join(in_words(why, made.plan))
    assert "2 bits is the highest fidelity at which all streamed shards come in time" in text
