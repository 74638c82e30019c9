"""Each policy's plan: what it reads, holds, computes and predicts."""

from __future__ import annotations

from typing import get_args

import pytest

from sti_runtime.errors import InfeasiblePlanError, InputError, ResourceError
from sti_runtime.gain import GainModel
from sti_runtime.manifest import ALIGNMENT, Manifest
from sti_runtime.model import Submodel, kept_layers
from sti_runtime.plan import Plan, Policy
from sti_runtime.planner import check_bundle, check_plan
from sti_runtime.policies import POLICIES, Exact, plan_policy, shuffled_ranking, uses_preload
from sti_runtime.profile import DeviceProfile
from tests.unit.planning_data import PAGE, make_importance, make_manifest, make_profile, proportional

LAYERS, HEADS = 4, 4
IMPORTANCE = make_importance(LAYERS, HEADS)
COMPUTE_NS = {1: 1_000_000, 2: 2_000_000, 4: 4_000_000}


def setting() -> tuple[Manifest, DeviceProfile]:
    """Layer compute 1 ms per slice, IO 40.96 µs per bit of a shard, no decompression at 32 bits."""
    submodels = tuple(
        Submodel(kept=kept_layers(LAYERS, n), width=m) for n in (4, 2) for m in sorted(COMPUTE_NS)
    )
    manifest = make_manifest(LAYERS, HEADS, proportional(PAGE), submodels=submodels)
    profile = make_profile(
        bundle=manifest.digest,
        layer_ns=COMPUTE_NS,
        decompress_ns={2: 10_000, 3: 10_000, 4: 10_000, 5: 10_000, 6: 10_000, 32: 0},
        ps_per_byte=10_000,
        embed_io_ns=100_000,
        embed_compute_ns=50_000,
        head_ns=50_000,
    )
    return manifest, profile


def make(policy: Policy, target_ns: int, *, seed: int = 0, preload_pages: int = 16) -> Plan:
    manifest, profile = setting()
    plan = plan_policy(
        policy,
        manifest,
        IMPORTANCE,
        profile,
        target_ns=target_ns,
        preload_bytes=preload_pages * PAGE,
        working_bytes=200 * PAGE,
        seed=seed,
    )
    assert check_plan(plan, profile) == []
    assert check_bundle(plan, manifest) == []
    assert plan.policy == policy
    return plan


def test_the_table_has_every_policy() -> None:
    assert set(POLICIES) == set(get_args(Policy))


def test_load_exec_reads_all_then_computes() -> None:
    plan = make("load-exec", 60_000_000)
    assert (str(plan.submodel), plan.mode, plan.planner) == ("4×4", "load-exec", "baseline")
    assert {s.fidelity for s in plan.shards} == {32}
    assert plan.working_bytes == plan.streamed_bytes == 16 * 32 * PAGE
    reads_ns = 16 * 32 * PAGE * 10
    assert plan.predicted.latency_ns == 100_000 + reads_ns + 4 * 4_000_000 + 50_000
    assert plan.predicted.layers[0].compute_start_ns == plan.predicted.layers[-1].io_end_ns
    assert make("load-exec", plan.predicted.latency_ns).submodel == plan.submodel
    assert make("load-exec", plan.predicted.latency_ns - 1).submodel.shards < 16


@pytest.mark.parametrize(
    ("policy", "bits"), [("std-pipeline-2", 2), ("std-pipeline-6", 6), ("std-pipeline-32", 32)]
)
def test_std_pipeline_double_buffers_layers_at_one_fidelity(policy: Policy, bits: int) -> None:
    plan = make(policy, 60_000_000)
    assert {s.fidelity for s in plan.shards} == {bits}
    assert plan.preloaded_bytes == plan.preload_bytes == 0
    assert plan.working_bytes == 2 * plan.submodel.width * bits * PAGE
    third = plan.predicted.layers[2]
    assert third.io_start_ns >= plan.predicted.layers[0].compute_end_ns


@pytest.mark.parametrize(("policy", "bits"), [("preload-6", 6), ("preload-32", 32)])
def test_preload_holds_everything_and_reads_nothing(policy: Policy, bits: int) -> None:
    plan = make(policy, 17_000_000)
    assert {s.fidelity for s in plan.shards} == {bits}
    assert all(s.preloaded for s in plan.shards)
    assert plan.preload_bytes == plan.preloaded_bytes == 16 * bits * PAGE
    assert (plan.streamed_bytes, plan.working_bytes, plan.predicted.stall_ns) == (0, ALIGNMENT, 0)
    assert plan.predicted.latency_ns == 200_000 + 4 * (4_000_000 + (0 if bits == 32 else 40_000))


def test_sti_and_sti_0mb_differ_by_the_buffer() -> None:
    full, empty = make("sti", 17_500_000), make("sti-0mb", 17_500_000)
    assert full.preloaded_bytes > 0
    assert (empty.preload_bytes, empty.preloaded_bytes) == (0, 0)
    assert full.importance == empty.importance == IMPORTANCE.digest
    assert full.planner == empty.planner == "paper"


def test_random_depends_on_its_seed_alone() -> None:
    plans = [make("random", 17_500_000, seed=seed, preload_pages=0) for seed in (0, 0, 1, 2)]
    assert plans[0] == plans[1]
    assert plans[0].flags == ("seed-0",)
    fidelities = {tuple(s.fidelity for s in plan.shards) for plan in plans}
    assert len(fidelities) > 1
    assert tuple(s.fidelity for s in make("sti", 17_500_000, preload_pages=0).shards) not in fidelities
    order = shuffled_ranking(IMPORTANCE, 7)
    assert sorted(order) == sorted(IMPORTANCE.ranking())
    assert order == shuffled_ranking(make_importance(LAYERS, HEADS, range(100, 116)), 7)


def test_shuffle_is_fixed_for_other_implementations() -> None:
    """Ascending SHA-256 of "0:layer:slice"; the order is coreutils' sha256sum's."""
    assert shuffled_ranking(make_importance(2, 2), 0) == ((1, 0), (0, 1), (1, 1), (0, 0))


def test_no_slack_gives_layer_0_no_time_to_read() -> None:
    with pytest.raises(ResourceError, match="Without slack no target latency works"):
        make("no-slack", 60_000_000, preload_pages=0)
    slack, none = make("sti", 30_000_000), make("no-slack", 30_000_000)
    assert (slack.slack, none.slack) == (True, False)
    assert none.mean_fidelity_milli < slack.mean_fidelity_milli


def test_uniform_streams_one_fidelity_and_is_pass_1_of_sti() -> None:
    for target_ns in (17_500_000, 20_000_000, 26_000_000):
        sti, uniform = make("sti", target_ns), make("uniform", target_ns)
        assert uniform.submodel == sti.submodel
        assert uniform.preloaded() == sti.preloaded()
        assert len({s.fidelity for s in uniform.streamed()}) == 1
        assert all(u.fidelity <= s.fidelity for u, s in zip(uniform.shards, sti.shards, strict=True))
    assert make("sti", 17_500_000) != make("uniform", 17_500_000)


def test_wide_first_gives_ties_to_the_wider() -> None:
    """4×1 and 2×2 have four shards each; 4×2 and 2×4 eight."""
    for target_ns in (4_500_000, 8_600_000):
        deep, wide = make("sti", target_ns).submodel, make("wide-first", target_ns).submodel
        assert deep.shards == wide.shards
        assert deep.depth > wide.depth


@pytest.mark.parametrize("policy", ["exact", "exact-io"])
def test_exact_gains_no_less_than_sti_and_names_a_target_that_works(policy: Policy) -> None:
    gains = GainModel.of(IMPORTANCE)
    for target_ns in (4_500_000, 17_500_000, 60_000_000):
        plan = make(policy, target_ns)
        assert plan.planner == "exact"
        assert gains.plan_nano(plan) >= gains.plan_nano(make("sti", target_ns))
    with pytest.raises(InfeasiblePlanError) as caught:
        make(policy, 1_000)
    assert make(policy, caught.value.smallest_target_ns).within_target


@pytest.mark.parametrize(
    "policy",
    sorted(name for name, spec in POLICIES.items() if not isinstance(spec, Exact) and name != "no-slack"),
)
def test_infeasible_names_a_target_that_works_and_is_the_smallest(policy: Policy) -> None:
    with pytest.raises(InfeasiblePlanError) as caught:
        make(policy, 1_000)
    smallest = caught.value.smallest_target_ns
    assert make(policy, smallest).within_target
    with pytest.raises(InfeasiblePlanError) as again:
        make(policy, smallest - 1)
    assert again.value.smallest_target_ns == smallest


def test_what_a_policy_needs_is_named() -> None:
    manifest, profile = setting()

    def plan(policy: Policy, bundle: Manifest) -> Plan:
        return plan_policy(
            policy, bundle, None, profile, target_ns=10**9, preload_bytes=0, working_bytes=10**9
        )

    assert plan("load-exec", manifest).importance is None
    with pytest.raises(InputError, match="sti needs an importance profile"):
        plan("sti", manifest)
    lean = make_manifest(2, 2, proportional(PAGE), fidelities=(2, 3))
    with pytest.raises(InputError, match=r"no versions at 32 bits.*it has 2, 3"):
        plan("load-exec", lean)


def test_the_preload_buffer_matters_to_the_planners_not_to_baselines() -> None:
    using = {policy for policy in POLICIES if uses_preload(policy)}
    assert using == {"sti", "exact", "exact-io", "random", "no-slack", "uniform", "wide-first"}
