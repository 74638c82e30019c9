"""Job files: units numbered and shared out as asked, keys that change with the work and with nothing else."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import jobs
from orchestrator.jobs import DeviceTarget, evaluate_units, execute_units, job_key, make_job, sample_rows
from orchestrator.prepare import Prepare
from sti_runtime.errors import InputError
from sti_runtime.manifest import Manifest
from sti_runtime.messages import Emulation, ExecuteUnit, Job, Lease, ProbeUnit, Unit
from sti_runtime.model import Submodel
from sti_runtime.plan import Plan
from tests.agent_data import OPEN_GATES, manifest_of, tiny_bundle
from tests.bundles import hand_plan

LEASE = Lease(store="store", counter=3, takeover=False)
TARGET = DeviceTarget(
    identity="0123456789abcdef",
    engine="torch",
    threads=2,
    queue_depth=4,
    cpus=(),
    machine_lock="/run/lock",
    emulation=None,
    gates=OPEN_GATES,
)
SETTINGS = Prepare(stay_awake=True, governor="performance", shallow_idle=True).settings
SLOWED = Emulation(io_bytes_per_s=10**6, io_mechanism="agent", cpu_share_milli=None, cpu_mechanism=None)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return manifest_of(tiny_bundle(tmp_path_factory.mktemp("bundles")))


@pytest.fixture(scope="module")
def plans(manifest: Manifest) -> list[Plan]:
    """Three plans; the last has the content of the first for another T."""
    full = Submodel(kept=(0, 1), width=2)
    made = [hand_plan(manifest, full, lambda _l, _s: 2), hand_plan(manifest, full, lambda _l, _s: 32)]
    return [*made, made[0].model_copy(update={"target_ns": 2 * made[0].target_ns})]


def executes(units: tuple[Unit, ...]) -> list[ExecuteUnit]:
    return [unit for unit in units if isinstance(unit, ExecuteUnit)]


def timed(plans: list[Plan], *, requests: int = 7, rounds: int = 2, seed: int = 0) -> tuple[Unit, ...]:
    return execute_units(
        plans,
        50,
        requests=requests,
        warmups=2,
        request_kind="warm",
        io_mode="direct",
        rounds=rounds,
        seed=seed,
    )


# ------------------------------------------------------------------ rows


@given(st.integers(1, 60), st.integers(0, 200), st.integers(0, 2**32))
def test_sampled_rows_are_spread_evenly_and_the_same_every_time(rows: int, count: int, seed: int) -> None:
    chosen = sample_rows(rows, count, seed)
    assert chosen == sample_rows(rows, count, seed)
    assert len(chosen) == count
    assert all(0 <= row < rows for row in chosen)
    for start in range(0, count, rows):  # no row comes again before every other one has
        part = chosen[start : start + rows]
        assert len(set(part)) == len(part)


def test_another_seed_samples_other_rows() -> None:
    assert sample_rows(1000, 20, 1) != sample_rows(1000, 20, 2)


def test_no_rows_to_sample_is_an_error() -> None:
    with pytest.raises(InputError, match="no rows to sample"):
        sample_rows(0, 3, 0)


# ------------------------------------------------------------------ units


def test_profile_units_cover_every_width_and_are_numbered(manifest: Manifest) -> None:
    units = jobs.profile_units(manifest, 100)
    assert [unit.number for unit in units] == list(range(len(units)))
    widths = sorted({submodel.width for submodel in manifest.submodels})
    kinds = Counter(unit.kind for unit in units)
    assert kinds == {
        "probe": 2,
        "profile-io": jobs.PROFILE_ROUNDS,
        "profile-compute": jobs.PROFILE_ROUNDS * len(widths),
        "profile-fixed": 1,
    }
    assert (units[0].kind, units[-1].kind) == ("probe", "probe")
    for unit in units:
        if unit.kind == "profile-io":
            assert (list(unit.widths), unit.fidelities) == (widths, manifest.fidelities)
        if unit.kind == "profile-fixed":
            assert len(unit.rows) == jobs.FIXED_WARMUPS + jobs.FIXED_REQUESTS
    computed = [unit.width for unit in units if unit.kind == "profile-compute"]
    assert computed == widths * jobs.PROFILE_ROUNDS
    assert len({unit.seed for unit in units if unit.kind == "profile-io"}) == jobs.PROFILE_ROUNDS
    assert units == jobs.profile_units(manifest, 100)
    assert units != jobs.profile_units(manifest, 100, seed=1)


@given(requests=st.integers(1, 40), rounds=st.integers(1, 5), seed=st.integers(0, 99))
def test_requests_are_shared_out_over_rounds_to_the_last_one(
    plans: list[Plan], requests: int, rounds: int, seed: int
) -> None:
    units = timed(plans, requests=requests, rounds=rounds, seed=seed)
    assert [unit.number for unit in units] == list(range(len(units)))
    assert isinstance(units[0], ProbeUnit)
    counted: Counter[str] = Counter()
    for unit in executes(units):
        assert unit.warmups == 2
        counted[unit.plan.digest] += len(unit.rows) - unit.warmups
    assert counted == {plan.digest: requests for plan in plans}


def test_plans_are_interleaved_and_every_round_has_each_once(plans: list[Plan]) -> None:
    order = [unit.plan.digest for unit in executes(timed(plans, requests=20, rounds=4))]
    rounds = [order[i : i + len(plans)] for i in range(0, len(order), len(plans))]
    assert len(rounds) == 4
    assert all(sorted(part) == sorted(plan.digest for plan in plans) for part in rounds)
    assert len({tuple(part) for part in rounds}) > 1  # not in one order, which drift would favour


def test_plans_of_a_round_see_the_same_rows(plans: list[Plan]) -> None:
    units = executes(timed(plans, requests=20, rounds=2))
    assert len({unit.rows for unit in units[: len(plans)]}) == 1
    assert units[0].rows != units[len(plans)].rows


def test_the_seed_decides_order_and_rows(plans: list[Plan]) -> None:
    assert timed(plans, seed=4) == timed(plans, seed=4)
    assert len({timed(plans, seed=seed) for seed in range(6)}) == 6


def test_plans_with_the_same_content_are_evaluated_once(plans: list[Plan]) -> None:
    units = evaluate_units(plans)
    assert [unit.number for unit in units] == [0, 1]
    assert {unit.plan.content_digest for unit in units if unit.kind == "evaluate"} == {
        plan.content_digest for plan in plans
    }


# ------------------------------------------------------------------ keys and files


def key(target: DeviceTarget = TARGET, *, kind: str = "execute", units: int = 2, **changes: object) -> str:
    digests: dict[str, object] = {"bundle": "a" * 64, "task_data": "b" * 64, "agent_digest": "c" * 64}
    probes = [ProbeUnit(number=number, kind="probe") for number in range(units)]
    return job_key(kind, target, units=probes, **(digests | changes))  # type: ignore[arg-type]


def test_the_key_changes_with_everything_that_decides_results() -> None:
    keys = [
        key(),
        key(kind="profile"),
        key(units=3),
        key(bundle="d" * 64),
        key(bundle=None),
        key(task_data="d" * 64),
        key(agent_digest="d" * 64),
        key(again=1),
        key(replace(TARGET, identity="fedcba9876543210")),
        key(replace(TARGET, threads=1)),
        key(replace(TARGET, queue_depth=8)),
        key(replace(TARGET, cpus=(1,))),
        key(replace(TARGET, settings=SETTINGS)),
        key(replace(TARGET, emulation=SLOWED)),
        key(replace(TARGET, emulation=SLOWED.model_copy(update={"io_bytes_per_s": 2 * 10**6}))),
    ]
    assert len(set(keys)) == len(keys)


def test_the_key_does_not_change_with_where_the_lock_is() -> None:
    assert key() == key(replace(TARGET, machine_lock=None))


def test_only_timed_work_changes_settings(plans: list[Plan]) -> None:
    target = replace(TARGET, settings=SETTINGS)
    assert target.settings_for(evaluate_units(plans)) == ()
    assert target.settings_for(timed(plans)) == SETTINGS
    made = make_job(
        "execute", key(), target, attempt=1, lease=LEASE, bundle=None, task_data=None, units=timed(plans)
    )  # fmt: skip
    assert made.settings == SETTINGS
    assert [setting.kind for setting in SETTINGS] == ["android", "android", "file", "idle"]


def test_a_job_file_carries_its_target_and_survives_writing(tmp_path: Path) -> None:
    name = key()
    units = (ProbeUnit(number=0, kind="probe"),)
    job = make_job(
        "execute", name, TARGET, attempt=2, lease=LEASE, bundle="a" * 64, task_data=None, units=units
    )  # fmt: skip
    assert (job.id, job.attempt, job.lease) == (f"execute-{name[:20]}", 2, LEASE)
    assert (job.device, job.threads, job.machine_lock) == (TARGET.identity, 2, "/run/lock")
    assert Job.from_json(job.to_json(), source="job file") == job
    again = make_job(
        "execute", name, TARGET, attempt=2, lease=LEASE, bundle="a" * 64, task_data=None, units=units
    )  # fmt: skip
    assert again.to_json() == job.to_json()
