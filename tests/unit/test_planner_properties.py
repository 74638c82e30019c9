"""Planner properties over random bundles, devices, importance and budgets."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sti_runtime.errors import InfeasiblePlanError, ResourceError
from sti_runtime.importance_profile import ImportanceProfile
from sti_runtime.manifest import Manifest
from sti_runtime.model import all_submodels
from sti_runtime.plan import Plan, Policy
from sti_runtime.plan_build import layer_work, plannable, shard_costs, shard_rows
from sti_runtime.planner import check_bundle, check_plan, plan_paper
from sti_runtime.policies import POLICIES, Baseline, plan_policy
from sti_runtime.profile import PPM, DeviceProfile
from sti_runtime.timeline import layer_works
from tests.unit.planning_data import PAGE, make_importance, make_manifest, make_profile

ALL = (2, 3, 4, 5, 6, 32)
CASES = settings(max_examples=150, deadline=None)


@dataclass(frozen=True)
class Case:
    """One planning problem."""

    manifest: Manifest
    importance: ImportanceProfile
    profile: DeviceProfile
    target_ns: int
    preload_bytes: int
    working_bytes: int
    slack: bool

    def plan(self, **changes: int) -> Plan:
        """Plan it, with other budgets where given."""
        return plan_paper(
            self.manifest,
            self.importance,
            self.profile,
            target_ns=changes.get("target_ns", self.target_ns),
            preload_bytes=changes.get("preload_bytes", self.preload_bytes),
            working_bytes=changes.get("working_bytes", self.working_bytes),
            slack=self.slack,
        )


@st.composite
def cases(draw: st.DrawFn, *, tight: bool = True, slack: bool | None = None) -> Case:
    """Problems of up to 4×4 shards. Page counts rise with fidelity but unevenly; decompression does not
    have to. ``tight``: the working buffer may be of any size, else it never binds."""
    layers, heads = draw(st.sampled_from([4, 3, 2, 1])), draw(st.sampled_from([4, 3, 2, 1]))
    fidelities = draw(st.sampled_from([ALL, (2, 3, 4), (3, 6), (32,)]))
    pages = st.tuples(*(st.integers(1, 3 + k) for k in fidelities)).map(sorted)
    page_counts = [draw(pages) for _ in range(layers * heads)]
    everything = all_submodels(layers, heads)[::-1]
    submodels = tuple(draw(st.lists(st.sampled_from(everything), min_size=1, max_size=3, unique=True)))
    manifest = make_manifest(
        layers,
        heads,
        lambda layer, slice_, k: page_counts[layer * heads + slice_][fidelities.index(k)] * PAGE,
        fidelities=fidelities,
        submodels=submodels,
    )
    nanoseconds = st.sampled_from([0, 500, 2_000, 8_000])
    profile = make_profile(
        bundle=manifest.digest,
        layer_ns={m: draw(nanoseconds) for m in range(1, heads + 1)},
        decompress_ns={k: draw(st.integers(0, 200)) for k in fidelities},
        alpha_ns=draw(st.integers(0, 300)),
        ps_per_byte=draw(st.sampled_from([0, 20, 60, 200])),
        p95_ppm=draw(st.integers(900_000, 2_000_000)),
        beside_ppm=draw(st.sampled_from([PPM, PPM, 1_300_000, 3_000_000])),
        layer_ns_beside=draw(st.sampled_from([0, 0, 50, 700])),
        ps_per_byte_beside=draw(st.sampled_from([0, 0, 10, 100])),
        embed_io_ns=draw(nanoseconds),
        embed_compute_ns=draw(nanoseconds),
        head_ns=draw(nanoseconds),
        median_percent=draw(st.integers(30, 100)),
    )
    losses = draw(st.permutations(range(layers * heads)))
    base = draw(st.sampled_from([2, 2, 3]))
    case = Case(
        manifest,
        make_importance(layers, heads, losses).model_copy(update={"base_fidelity": base}),
        profile,
        target_ns=1,
        preload_bytes=draw(st.integers(0, 60)) * PAGE,
        working_bytes=draw(st.integers(4, 60)) * PAGE if tight else 1 << 40,
        slack=draw(st.booleans()) if slack is None else slack,
    )
    smallest = smallest_target_ns(case)
    assume(smallest is not None)
    target = (smallest or 0) + draw(st.sampled_from([0, 100, 500, 2_000, 5_000, 20_000]))
    return Case(**{**vars(case), "target_ns": max(1, target)})


def smallest_target_ns(case: Case) -> int | None:
    """What the planner says works, from its error; None when no T does."""
    try:
        case.plan(target_ns=1)
    except InfeasiblePlanError as error:
        return error.smallest_target_ns
    except ResourceError:
        return None
    return 1


@CASES
@given(cases())
def test_plans_are_valid_and_name_what_the_bundle_holds(case: Case) -> None:
    plan = case.plan()
    assert check_plan(plan, case.profile) == []
    assert check_bundle(plan, case.manifest) == []
    assert plan.within_target
    assert plan.predicted.latency_ns <= case.target_ns
    assert plan.predicted.median_latency_ns >= 0


@CASES
@given(cases())
def test_the_smallest_target_works_and_one_less_does_not(case: Case) -> None:
    smallest = smallest_target_ns(case)
    assert smallest is not None
    assert case.plan(target_ns=smallest).within_target
    if smallest > 1:
        with pytest.raises(InfeasiblePlanError) as caught:
            case.plan(target_ns=smallest - 1)
        assert caught.value.smallest_target_ns == smallest


@CASES
@given(cases(), st.integers(0, 50_000), st.integers(0, 10**7), st.integers(0, 10**7))
def test_a_valid_plan_stays_valid_under_larger_budgets(
    case: Case, more_ns: int, more_preload: int, more_working: int
) -> None:
    plan = case.plan()
    problems = check_plan(
        plan,
        case.profile,
        target_ns=plan.target_ns + more_ns,
        preload_bytes=plan.preload_bytes + more_preload,
        working_bytes=plan.working_bytes + more_working,
    )
    assert problems == []


@CASES
@given(cases(), st.integers(0, 50_000), st.integers(0, 10**7))
def test_more_time_or_working_buffer_never_costs_shards(case: Case, more_ns: int, more_working: int) -> None:
    shards = case.plan().submodel.shards
    assert case.plan(target_ns=case.target_ns + more_ns).submodel.shards >= shards
    assert case.plan(working_bytes=case.working_bytes + more_working).submodel.shards >= shards


@CASES
@given(cases(tight=False))
def test_without_a_working_limit_no_negative_aib_implies_the_target(case: Case) -> None:
    """The planner leaves the simulation out where this holds; the oracle never does."""
    plan = case.plan()
    by_hand = 0
    t_comp_ns = case.profile.t_comp_ns(plan.submodel.width)
    slack_ns = plan.target_ns - case.profile.fixed_p95.total_ns - plan.submodel.depth * t_comp_ns
    assert slack_ns >= 0
    for layer in range(plan.submodel.depth):
        by_hand += sum(case.profile.io.p95_ns(s.length) for s in plan.streamed() if s.layer == layer)
        assert (slack_ns if case.slack else 0) + layer * t_comp_ns >= by_hand
    assert plan.predicted.latency_ns <= plan.target_ns


@CASES
@given(cases())
def test_the_largest_possible_submodel_is_taken_and_ties_go_deeper(case: Case) -> None:
    """No submodel before the chosen one (more shards, or as many and deeper) can be planned alone."""
    chosen = case.plan().submodel
    for other in case.manifest.submodels:
        if (other.shards, other.depth) > (chosen.shards, chosen.depth):
            alone = case.manifest.model_copy(update={"submodels": (other,)})
            try:
                plan_paper(
                    alone,
                    case.importance,
                    case.profile,
                    target_ns=case.target_ns,
                    preload_bytes=case.preload_bytes,
                    working_bytes=case.working_bytes,
                    slack=case.slack,
                )
            except (InfeasiblePlanError, ResourceError):
                continue
            raise AssertionError(f"{other} could be planned, {chosen} was")


@CASES
@given(cases())
def test_the_preload_set_fits_is_bottom_up_and_of_one_fidelity(case: Case) -> None:
    plan = case.plan()
    held = [s for s in plan.shards if s.preloaded]
    assert sum(s.length for s in held) <= case.preload_bytes
    assert len({s.fidelity for s in held}) <= 1
    width = plan.submodel.width
    if len(held) >= width:
        assert list(plan.shards[: len(held)]) == held
    else:
        assert all(s.layer == 0 for s in held)
        ranks = {shard: i for i, shard in enumerate(case.importance.ranking())}
        bottom = sorted(plan.shards[:width], key=lambda s: ranks[s.source_layer, s.slice])
        lowest, free, expected = plannable(case.manifest, case.importance)[0], case.preload_bytes, set()
        for shard in bottom:  # one that does not fit is passed over
            length = case.manifest.shard_version(shard.source_layer, shard.slice, lowest).length
            if length <= free:
                free -= length
                expected.add(shard.slice)
        assert {(s.slice, s.fidelity) for s in held} == {(slice_, lowest) for slice_ in expected}


@CASES
@given(cases())
def test_no_shard_has_fewer_bits_than_the_base_of_importance(case: Case) -> None:
    assert min(shard.fidelity for shard in case.plan().shards) >= case.importance.base_fidelity


@CASES
@given(cases(tight=False))
def test_no_streamed_shard_could_be_raised_alone(case: Case) -> None:
    """Pass 2 leaves nothing on the table that is valid by itself. Asked where raising a shard only ever
    costs time: uneven decompression can give time back, and under a tight W so can a split read."""
    assume(len({row.p95_ns for row in case.profile.decompress}) == 1)
    plan = case.plan()
    for index, shard in enumerate(plan.shards):
        for fidelity in case.manifest.fidelities:
            if shard.preloaded or fidelity <= shard.fidelity:
                continue
            version = case.manifest.shard_version(shard.source_layer, shard.slice, fidelity)
            raised = shard.model_copy(
                update={"fidelity": fidelity, "offset": version.offset, "length": version.length}
            )
            shards = (*plan.shards[:index], raised, *plan.shards[index + 1 :])
            assert check_plan(plan.model_copy(update={"shards": shards}), case.profile) != []


@CASES
@given(cases())
def test_planning_is_deterministic_and_plans_round_trip(case: Case) -> None:
    plan = case.plan()
    assert case.plan().to_json() == plan.to_json()
    assert Plan.from_json(plan.to_json(), source="test") == plan


@CASES
@given(cases())
def test_layer_costs_agree_with_the_merged_reads_of_the_plan(case: Case) -> None:
    plan = case.plan()
    costs = shard_costs(case.manifest, case.profile, case.manifest.fidelities)
    width = plan.submodel.width
    ours = [
        layer_work(
            costs,
            shard_rows(plan.submodel, costs.heads),
            [s.fidelity for s in plan.shards],
            {i for i, s in enumerate(plan.shards) if s.preloaded},
            layer,
            width,
            case.profile.layer_ns(width),
        )
        for layer in range(plan.submodel.depth)
    ]
    theirs = layer_works(plan.shards, plan.submodel.depth, width, case.profile, p95=True)
    assert [(tuple(w.reads), w.streamed_bytes, w.compute_ns) for w in ours] == [tuple(w) for w in theirs]


@CASES
@given(cases(), st.sampled_from(sorted(POLICIES)))
def test_every_policy_makes_valid_plans_or_names_a_target_that_works(case: Case, policy: Policy) -> None:
    spec = POLICIES[policy]
    assume(not isinstance(spec, Baseline) or spec.fidelity in case.manifest.fidelities)

    def plan(target_ns: int) -> Plan:
        return plan_policy(
            policy,
            case.manifest,
            case.importance,
            case.profile,
            target_ns=target_ns,
            preload_bytes=case.preload_bytes,
            working_bytes=case.working_bytes,
            slack=case.slack,
        )

    try:
        plan(case.target_ns)
    except InfeasiblePlanError as error:
        smallest = error.smallest_target_ns
    except ResourceError:
        return
    else:
        smallest = case.target_ns
    assert smallest >= case.target_ns
    made = plan(smallest)
    assert check_plan(made, case.profile) == []
    assert check_bundle(made, case.manifest) == []
    assert made.within_target
