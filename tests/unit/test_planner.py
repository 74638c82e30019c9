"""The planner ``paper``: the worked example, each step and rule, and what bad input says."""

from __future__ import annotations

import pytest

from sti_runtime.errors import InfeasiblePlanError, InputError, ResourceError
from sti_runtime.importance_profile import ImportanceProfile
from sti_runtime.manifest import Manifest
from sti_runtime.model import Submodel, kept_layers
from sti_runtime.plan import Plan
from sti_runtime.plan_build import layer_work, shard_costs
from sti_runtime.planner import check_bundle, check_plan, plan_paper
from sti_runtime.profile import DeviceProfile
from sti_runtime.units import NS_PER_S, parse_duration_ns
from tests.unit.planning_data import PAGE, make_importance, make_manifest, make_profile, proportional

UNBOUNDED = 1 << 40


def grid(*pairs: tuple[int, int], layers: int) -> tuple[Submodel, ...]:
    return tuple(Submodel(kept=kept_layers(layers, n), width=m) for n, m in pairs)


def example() -> tuple[Manifest, DeviceProfile]:
    """N=2, M=3; T_comp(3) = 1.0 s; T_io = 0.1 s per bit (48,828,125 ps · 4096 · ½); no fixed cost."""
    manifest = make_manifest(2, 3, proportional(PAGE), submodels=grid((2, 3), layers=2))
    profile = make_profile(
        bundle=manifest.digest,
        layer_ns={3: NS_PER_S},
        decompress_ns=dict.fromkeys((2, 3, 4, 5, 6, 32), 0),
        ps_per_byte=48_828_125,
        p95_ppm=500_000,
    )
    return manifest, profile


def fidelities(plan: Plan) -> tuple[tuple[int, ...], ...]:
    width = plan.submodel.width
    row = [s.fidelity for s in plan.shards]
    return tuple(tuple(row[i : i + width]) for i in range(0, len(row), width))


def test_worked_example() -> None:
    manifest, profile = example()
    for k, expected_ns in ((2, 2), (3, 3), (4, 4), (5, 5), (6, 6), (32, 32)):
        assert profile.io.p95_ns(k * PAGE) == expected_ns * NS_PER_S // 10
    plan = plan_paper(
        manifest,
        make_importance(2, 3),
        profile,
        target_ns=2 * NS_PER_S,
        preload_bytes=3 * 2 * PAGE,
        working_bytes=UNBOUNDED,
    )
    assert fidelities(plan) == ((2, 2, 2), (4, 3, 3))
    assert [s.preloaded for s in plan.shards] == [True] * 3 + [False] * 3
    # AIB(1) = 1.0 s - (0.4 + 0.3 + 0.3) s = 0: layer 1 is in exactly when layer 0 has been computed.
    assert sum(profile.io.p95_ns(s.length) for s in plan.streamed()) == NS_PER_S
    assert plan.predicted.stall_ns == 0
    assert plan.predicted.latency_ns == 2 * NS_PER_S
    assert plan.within_target
    assert check_plan(plan, profile) == []
    assert check_bundle(plan, manifest) == []


def test_worked_example_raises_the_most_important_shard_of_layer_1() -> None:
    manifest, profile = example()
    plan = plan_paper(
        manifest,
        make_importance(2, 3, losses=[0, 1, 2, 9, 8, 7]),
        profile,
        target_ns=2 * NS_PER_S,
        preload_bytes=3 * 2 * PAGE,
        working_bytes=UNBOUNDED,
    )
    assert fidelities(plan) == ((2, 2, 2), (3, 3, 4))


def test_slack_lets_layer_0_be_streamed_and_no_slack_does_not() -> None:
    manifest, profile = example()
    importance = make_importance(2, 3)
    plan = plan_paper(
        manifest,
        importance,
        profile,
        target_ns=2 * NS_PER_S + 600_000_000,
        preload_bytes=0,
        working_bytes=UNBOUNDED,
    )
    # Slack 0.6 s is layer 0 at 2 bits, so pass 1 stops there; AIB(1) = 1.0 - 0.6 s raises one shard to 6.
    assert fidelities(plan) == ((2, 2, 2), (6, 2, 2))
    assert check_plan(plan, profile) == []
    with pytest.raises(ResourceError, match="Without slack no target latency works"):
        plan_paper(
            manifest,
            importance,
            profile,
            target_ns=100 * NS_PER_S,
            preload_bytes=0,
            working_bytes=UNBOUNDED,
            slack=False,
        )
    unslack = plan_paper(
        manifest,
        importance,
        profile,
        target_ns=100 * NS_PER_S,
        preload_bytes=3 * 2 * PAGE,
        working_bytes=UNBOUNDED,
        slack=False,
    )
    assert fidelities(unslack) == ((2, 2, 2), (4, 3, 3))
    assert check_plan(unslack, profile) == []


def test_infeasible_names_the_smallest_target() -> None:
    manifest, profile = example()
    importance = make_importance(2, 3)
    with pytest.raises(InfeasiblePlanError) as caught:
        plan_paper(manifest, importance, profile, target_ns=1, preload_bytes=0, working_bytes=UNBOUNDED)
    assert caught.value.smallest_target_ns == 2_600_000_000
    assert parse_duration_ns(" ".join(caught.value.remedy.rstrip(".").split()[-2:])) == 2_600_000_000
    plan = plan_paper(
        manifest, importance, profile, target_ns=2_600_000_000, preload_bytes=0, working_bytes=UNBOUNDED
    )
    assert plan.predicted.latency_ns == 2_600_000_000


def test_no_fewer_bits_than_the_base_of_importance() -> None:
    """Below the base the whole model is at chance: later is better than a guess."""
    manifest, profile = example()
    importance = make_importance(2, 3).model_copy(update={"base_fidelity": 3})

    def plan(bundle: Manifest, target_ns: int) -> Plan:
        return plan_paper(
            bundle, importance, profile, target_ns=target_ns, preload_bytes=0, working_bytes=UNBOUNDED
        )

    with pytest.raises(InfeasiblePlanError) as caught:
        plan(manifest, 2_600_000_000)
    assert caught.value.smallest_target_ns == 2_900_000_000
    assert fidelities(plan(manifest, 2_900_000_000))[0] == (3, 3, 3)
    two_bits = make_manifest(2, 3, proportional(PAGE), submodels=grid((2, 3), layers=2), fidelities=(2,))
    with pytest.raises(InputError, match="base is 3 bits") as refused:
        plan(two_bits, 2_900_000_000)
    assert refused.value.remedy == "Build it with more bits; it has 2."


def test_ties_go_deeper_and_the_next_smaller_submodel_is_taken() -> None:
    submodels = grid((2, 4), (4, 2), (4, 4), (1, 4), (2, 2), (4, 1), layers=4)
    manifest = make_manifest(4, 4, proportional(PAGE), submodels=submodels)
    profile = make_profile(
        bundle=manifest.digest,
        layer_ns={1: 100, 2: 200, 4: 400},
        decompress_ns=dict.fromkeys((2, 3, 4, 5, 6, 32), 0),
        ps_per_byte=1000,
    )
    importance = make_importance(4, 4)

    def chosen(target: int, preload: int) -> str:
        plan = plan_paper(
            manifest, importance, profile, target_ns=target, preload_bytes=preload, working_bytes=UNBOUNDED
        )
        return str(plan.submodel)

    everything = 16 * 32 * PAGE
    assert chosen(1600, everything) == "4×4"
    assert chosen(1599, everything) == "4×2"
    assert chosen(799, everything) == "4×1"
    # 8 shards at 2 bits take 65,536 ns: the compute of 4×4 fits long before its IO does.
    assert chosen(65_536 + 200, 0) == "4×2"
    assert chosen(65_536, 0) == "4×1"


def test_preload_takes_the_highest_fidelity_of_layer_0_then_walks_up() -> None:
    manifest = make_manifest(3, 2, proportional(PAGE), submodels=grid((3, 2), layers=3))
    profile = make_profile(
        bundle=manifest.digest, layer_ns={2: 10}, decompress_ns=dict.fromkeys((2, 3, 4, 5, 6, 32), 0)
    )

    def preloaded(pages: int) -> list[tuple[int, int, int]]:
        plan = plan_paper(
            manifest,
            make_importance(3, 2, losses=[1, 0, 2, 3, 4, 5]),
            profile,
            target_ns=1000,
            preload_bytes=pages * PAGE,
            working_bytes=UNBOUNDED,
        )
        return [(s.layer, s.slice, s.fidelity) for s in plan.preloaded()]

    assert preloaded(1) == []
    assert preloaded(2) == [(0, 1, 2)]  # the more important of layer 0
    assert preloaded(4) == [(0, 0, 2), (0, 1, 2)]
    assert preloaded(5) == [(0, 0, 2), (0, 1, 2)]
    assert preloaded(6) == [(0, 0, 3), (0, 1, 3)]
    assert preloaded(17) == [(0, 0, 6), (0, 1, 6)]
    assert preloaded(18) == [(0, 0, 6), (0, 1, 6), (1, 0, 6)]
    assert preloaded(6 * 32) == [(i, j, 32) for i in range(3) for j in range(2)]


def test_importance_is_looked_up_by_the_bundles_layers() -> None:
    """A 2-deep submodel of 4 keeps layers 0 and 2; the ranking names 2, not 1."""
    submodels = (Submodel(kept=(0, 2), width=2),)
    manifest = make_manifest(4, 2, proportional(PAGE), submodels=submodels)
    profile = make_profile(
        bundle=manifest.digest,
        layer_ns={2: 10_000},
        decompress_ns=dict.fromkeys((2, 3, 4, 5, 6, 32), 0),
        ps_per_byte=1000,
    )
    losses = [8] * 8
    losses[2 * 2 + 1], losses[1 * 2 + 0] = 0, 1
    plan = plan_paper(
        manifest,
        make_importance(4, 2, losses=losses),
        profile,
        target_ns=20_000 + 9 * PAGE,
        preload_bytes=0,
        working_bytes=UNBOUNDED,
    )
    assert [s.source_layer for s in plan.shards] == [0, 0, 2, 2]
    assert fidelities(plan) == ((2, 2), (2, 5))
    assert check_bundle(plan, manifest) == []


def test_working_buffer_limits_fidelity_and_is_named_when_too_small() -> None:
    manifest = make_manifest(3, 2, proportional(PAGE), submodels=grid((3, 2), layers=3))
    profile = make_profile(
        bundle=manifest.digest, layer_ns={2: 10**6}, decompress_ns=dict.fromkeys((2, 3, 4, 5, 6, 32), 0)
    )

    def plan(working: int) -> Plan:
        return plan_paper(
            manifest,
            make_importance(3, 2),
            profile,
            target_ns=10**9,
            preload_bytes=0,
            working_bytes=working,
        )

    assert fidelities(plan(64 * PAGE)) == ((32, 32),) * 3
    assert fidelities(plan(12 * PAGE)) == ((6, 6),) * 3
    assert fidelities(plan(9 * PAGE)) == ((5, 4),) * 3
    assert plan(4 * PAGE).streamed_bytes == 3 * 4 * PAGE
    with pytest.raises(ResourceError, match=f"Give at least {4 * PAGE} bytes"):
        plan(4 * PAGE - 1)


def test_a_larger_buffer_can_cost_a_submodel() -> None:
    """n·m is not monotone in |S|: room for layer 0 at 3 bits takes away what held part of layer 1."""
    manifest = make_manifest(2, 4, proportional(PAGE), submodels=grid((2, 4), (1, 4), layers=2))
    profile = make_profile(
        bundle=manifest.digest,
        layer_ns={4: 2 * PAGE},
        decompress_ns=dict.fromkeys((2, 3, 4, 5, 6, 32), 0),
        ps_per_byte=1000,
    )

    def plan(pages: int) -> Plan:
        return plan_paper(
            manifest,
            make_importance(2, 4),
            profile,
            target_ns=2 * 2 * PAGE + 4 * PAGE,  # slack of 4 pages: AIB(1) is 6, three shards at 2 bits
            preload_bytes=pages * PAGE,
            working_bytes=UNBOUNDED,
        )

    assert fidelities(plan(11)) == ((2, 2, 2, 2), (2, 2, 2, 2))
    assert fidelities(plan(12)) == ((3, 3, 3, 3),)


def test_a_raise_debits_all_later_layers() -> None:
    """One shard per layer: what raising layer 0 costs is gone for layers 1 and 2 as well."""
    manifest = make_manifest(3, 1, proportional(PAGE), submodels=grid((3, 1), layers=3))
    profile = make_profile(
        bundle=manifest.digest,
        layer_ns={1: 0},
        decompress_ns=dict.fromkeys((2, 3, 4, 5, 6, 32), 0),
        ps_per_byte=1000,
    )
    plan = plan_paper(
        manifest,
        make_importance(3, 1),
        profile,
        target_ns=8 * PAGE,
        preload_bytes=0,
        working_bytes=UNBOUNDED,
    )
    assert fidelities(plan) == ((4,), (2,), (2,))


def test_preloaded_slices_split_the_reads_around_them() -> None:
    """Layer 0 holds slice 1 of 3: slices 0 and 2 are no neighbours, each waits for its own room."""
    manifest = make_manifest(2, 3, proportional(PAGE), fidelities=(2,), submodels=grid((2, 3), layers=2))
    profile = make_profile(bundle=manifest.digest, layer_ns={3: 100}, decompress_ns={2: 0})
    costs = shard_costs(manifest, profile, (2,))
    work = layer_work(costs, range(6), [2] * 6, {1}, 0, 3, 100)
    assert [length for length, _ in work.reads] == [2 * PAGE, 2 * PAGE]
    assert [length for length, _ in layer_work(costs, range(6), [2] * 6, {1}, 1, 3, 100).reads] == [6 * PAGE]


def test_the_smallest_target_counts_waiting_for_the_working_buffer() -> None:
    """W of one layer: layer 1 is read only after layer 0 has been computed, which AIB does not see."""
    manifest = make_manifest(2, 1, proportional(PAGE), fidelities=(2,), submodels=grid((2, 1), layers=2))
    profile = make_profile(
        bundle=manifest.digest, layer_ns={1: 10_000}, decompress_ns={2: 0}, ps_per_byte=1000
    )

    def smallest(pages: int) -> int:
        with pytest.raises(InfeasiblePlanError) as caught:
            plan_paper(
                manifest,
                make_importance(2, 1),
                profile,
                target_ns=1,
                preload_bytes=0,
                working_bytes=pages * PAGE,
            )
        return caught.value.smallest_target_ns

    assert smallest(4) == 2 * PAGE + 20_000
    assert smallest(2) == 2 * (2 * PAGE + 10_000)


def test_flags_say_what_the_plan_rests_on() -> None:
    manifest = make_manifest(1, 1, proportional(PAGE), untrained=True)
    profile = make_profile(
        bundle="0" * 64,
        layer_ns={1: 10},
        decompress_ns=dict.fromkeys((2, 3, 4, 5, 6, 32), 0),
        unfit=("io: made up",),
    )
    plan = plan_paper(
        manifest,
        make_importance(1, 1),
        profile,
        target_ns=1000,
        preload_bytes=0,
        working_bytes=UNBOUNDED,
    )
    assert plan.flags == ("unfit-profile", "untrained-submodels", "borrowed-profile")


def test_inputs_that_do_not_belong_together() -> None:
    manifest, profile = example()
    importance = make_importance(2, 3)

    def plan(
        scores: ImportanceProfile = importance,
        device: DeviceProfile = profile,
        target_ns: int = NS_PER_S,
        preload_bytes: int = 0,
        working_bytes: int = UNBOUNDED,
    ) -> Plan:
        return plan_paper(
            manifest,
            scores,
            device,
            target_ns=target_ns,
            preload_bytes=preload_bytes,
            working_bytes=working_bytes,
        )

    with pytest.raises(InputError, match="importance profile is of model eeee"):
        plan(importance.model_copy(update={"model_digest": "e" * 64}))
    with pytest.raises(InputError, match="scores 3×2 shards, the bundle has 2×3"):
        plan(make_importance(3, 2))
    narrow = profile.model_copy(update={"compute": (profile.compute[0].model_copy(update={"width": 2}),)})
    with pytest.raises(InputError, match="no compute time for layers 3 slices wide"):
        plan(device=narrow)
    coarse = profile.model_copy(update={"decompress": profile.decompress[:4]})
    with pytest.raises(InputError, match="no decompression time at 6, 32 bits"):
        plan(device=coarse)
    with pytest.raises(InputError, match="target latency of 0 cannot be planned for"):
        plan(target_ns=0)
    with pytest.raises(InputError, match="preload buffer of -1 cannot be planned for"):
        plan(preload_bytes=-1)
    with pytest.raises(InputError, match="working buffer of 0 cannot be planned for"):
        plan(working_bytes=0)


def test_figures_that_come_to_2_63_are_refused() -> None:
    manifest = make_manifest(1, 1, proportional(PAGE))

    def plan(device: DeviceProfile) -> Plan:
        return plan_paper(
            manifest,
            make_importance(1, 1),
            device,
            target_ns=2**63 - 1,
            preload_bytes=0,
            working_bytes=UNBOUNDED,
        )

    def device(layer_ns: int) -> DeviceProfile:
        return make_profile(
            bundle=manifest.digest,
            layer_ns={1: layer_ns},
            decompress_ns=dict.fromkeys((2, 3, 4, 5, 6, 32), 0),
        )

    room = 2**63 - 1 - 12  # six versions are counted as 1 ns each, alone and beside compute
    assert plan(device(room)).predicted.latency_ns == room
    with pytest.raises(InputError, match=r"takes 2\^63 ns or more"):
        plan(device(room + 1))
    manifest = make_manifest(1, 1, lambda layer, slice_, k: PAGE * 2**49)
    with pytest.raises(InputError, match=r"come to 2\^63 bytes or more"):
        plan(device(1))


def test_check_plan_finds_each_fault() -> None:
    manifest, profile = example()
    plan = plan_paper(
        manifest,
        make_importance(2, 3),
        profile,
        target_ns=2 * NS_PER_S,
        preload_bytes=6 * PAGE,
        working_bytes=UNBOUNDED,
    )
    assert check_plan(plan, profile, target_ns=2 * NS_PER_S - 1) == [
        "compute alone exceeds the target by 1 ns",
        f"ends after {2 * NS_PER_S} ns, the target is {2 * NS_PER_S - 1} ns",
    ]
    assert check_plan(plan, profile, preload_bytes=6 * PAGE - 1) == [
        f"preloads {6 * PAGE} bytes into a buffer of {6 * PAGE - 1}"
    ]
    assert "can hold" in check_plan(plan, profile, working_bytes=10 * PAGE - 1)[0]
    assert check_plan(plan, profile, working_bytes=10 * PAGE) == []
    other = profile.model_copy(update={"threads": 3})
    assert "made with device profile" in check_plan(plan, other)[0]
    dearer = plan.model_copy(
        update={"shards": (*plan.shards[:5], plan.shards[5].model_copy(update={"length": 4 * PAGE}))}
    )
    assert check_plan(dearer, profile)[0] == f"AIB(1) is {-NS_PER_S // 10} ns"
    assert "lies at" in check_bundle(dearer, manifest)[0]
    elsewhere = manifest.model_copy(update={"model_digest": "e" * 64})
    assert "made for bundle" in check_bundle(plan, elsewhere)[0]
