"""The planner ``exact`` against all plans there are, against ``paper``, and under growing budgets."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from itertools import product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sti_runtime.errors import InfeasiblePlanError, ResourceError, SolverError
from sti_runtime.exact import plan_exact
from sti_runtime.exact_program import Budgets, Choice, SubmodelProgram
from sti_runtime.gain import ERROR_PPM, GainModel
from sti_runtime.integer_program import Program, solve
from sti_runtime.model import Submodel, all_submodels
from sti_runtime.plan import Plan
from sti_runtime.plan_build import plannable, shard_costs
from sti_runtime.planner import check_bundle, check_plan
from sti_runtime.records import canonical_json
from tests.unit.planning_data import PAGE, make_importance, make_manifest, make_profile, proportional
from tests.unit.test_planner import UNBOUNDED, example
from tests.unit.test_planner_properties import Case, cases

SOME = settings(max_examples=40, deadline=None)


def exact(case: Case, *, joint: bool = True, **changes: int) -> Plan:
    return plan_exact(
        case.manifest,
        case.importance,
        case.profile,
        target_ns=changes.get("target_ns", case.target_ns),
        preload_bytes=changes.get("preload_bytes", case.preload_bytes),
        working_bytes=changes.get("working_bytes", case.working_bytes),
        slack=case.slack,
        joint=joint,
    )


def gain(case: Case, plan: Plan) -> int:
    return GainModel.of(case.importance).plan_nano(plan)


def proven(plan: Plan) -> bool:
    return not any(flag.startswith("unproven") for flag in plan.flags)


@SOME
@given(cases(), st.booleans())
def test_never_below_paper_and_valid(case: Case, joint: bool) -> None:
    paper, plan = case.plan(), exact(case, joint=joint)
    assert check_plan(plan, case.profile) == []
    assert check_bundle(plan, case.manifest) == []
    assert gain(case, plan) >= gain(case, paper)
    assert min(shard.fidelity for shard in plan.shards) >= case.importance.base_fidelity
    if not joint:
        assert plan.submodel == paper.submodel


@st.composite
def small_cases(draw: st.DrawFn) -> Case:
    """Problems whose plans can all be tried: up to four shards of up to three fidelities."""
    case = draw(cases())
    layers, heads = draw(st.sampled_from([(1, 2), (2, 1), (2, 2), (3, 1)]))
    fidelities = draw(st.sampled_from([(2, 3, 4), (2, 6), (3, 32)]))
    pages = [sorted(draw(st.tuples(*(st.integers(1, 9) for _ in fidelities)))) for _ in range(layers * heads)]
    manifest = make_manifest(
        layers,
        heads,
        lambda layer, slice_, k: pages[layer * heads + slice_][fidelities.index(k)] * PAGE,
        fidelities=fidelities,
        submodels=all_submodels(layers, heads),
    )
    figures = {row.width: row.p95_ns for row in case.profile.compute}
    profile = make_profile(
        bundle=manifest.digest,
        layer_ns={m: figures.get(m, 3_000) for m in range(1, heads + 1)},
        decompress_ns={k: draw(st.integers(0, 200)) for k in fidelities},
        alpha_ns=case.profile.io.alpha_ns,
        ps_per_byte=case.profile.io.ps_per_byte,
        p95_ppm=case.profile.io.p95_ppm,
        beside_ppm=case.profile.io.beside_ppm,
        layer_ns_beside=case.profile.read_cost.p95_layer_ns,
        ps_per_byte_beside=case.profile.read_cost.p95_ps_per_byte,
        embed_io_ns=case.profile.fixed_p95.embed_io_ns,
        embed_compute_ns=case.profile.fixed_p95.embed_compute_ns,
        head_ns=case.profile.fixed_p95.head_ns,
    )
    losses = draw(st.lists(st.integers(1, 40), min_size=layers * heads, max_size=layers * heads))
    importance = make_importance(layers, heads, [10**9 - 10**6 * loss for loss in losses])
    base = draw(st.sampled_from([2, 2, 3]))
    return Case(
        manifest,
        importance.model_copy(update={"base_fidelity": base}),
        profile,
        target_ns=draw(st.integers(1_000, 60_000)),
        preload_bytes=draw(st.integers(0, 16)) * PAGE,
        working_bytes=draw(st.sampled_from([6, 9, 14, 1000])) * PAGE,
        slack=case.slack,
    )


def every_choice(program: SubmodelProgram) -> Iterator[Choice]:
    shards = program.submodel.shards
    for fidelities in product(program.costs.fidelities, repeat=shards):
        for held in product((False, True), repeat=shards):
            yield Choice(fidelities, frozenset(i for i in range(shards) if held[i]))


def best_by_trying_all(case: Case) -> int | None:
    gains = GainModel.of(case.importance)
    costs = shard_costs(case.manifest, case.profile, plannable(case.manifest, case.importance))
    budgets = Budgets(case.target_ns, case.preload_bytes, case.working_bytes, case.slack)
    found: list[int] = []
    for submodel in case.manifest.submodels:
        program = SubmodelProgram(submodel, case.profile, costs, gains, budgets)
        if program.feasible_compute:
            mine = [program.gain_nano(choice) for choice in every_choice(program) if program.valid(choice)]
            assert all(gain <= program.bound_nano for gain in mine)
            found += [program.absent_nano + gain for gain in mine]
    return max(found, default=None)


@SOME
@given(small_cases())
def test_equal_to_the_best_of_all_plans(case: Case) -> None:
    best = best_by_trying_all(case)
    try:
        plan = exact(case)
    except (InfeasiblePlanError, ResourceError):
        assert best is None
        return
    assert check_plan(plan, case.profile) == []
    assert best is not None
    assert gain(case, plan) == best if proven(plan) else gain(case, plan) <= best


@SOME
@given(small_cases(), st.integers(0, 9_000), st.integers(0, 4), st.integers(0, 4))
def test_more_never_gains_less(case: Case, more_ns: int, more_preload: int, more_working: int) -> None:
    assume(best_by_trying_all(case) is not None)
    more = exact(
        case,
        target_ns=case.target_ns + more_ns,
        preload_bytes=case.preload_bytes + more_preload * PAGE,
        working_bytes=case.working_bytes + more_working * PAGE,
    )
    assume(proven(more))
    assert gain(case, more) >= gain(case, exact(case))


def test_worked_example() -> None:
    """Layer 0 must be preloaded; layer 1's ten bits go where they buy most, here as ``paper`` spends them."""
    manifest, profile = example()
    importance = make_importance(2, 3, [10**9 - gain for gain in (60, 50, 40, 30, 20, 10)])
    plan = plan_exact(
        manifest, importance, profile, target_ns=2 * 10**9, preload_bytes=6 * PAGE, working_bytes=UNBOUNDED
    )
    assert [s.fidelity for s in plan.shards[:3]] == [2, 2, 2]
    assert sorted(s.fidelity for s in plan.shards[3:]) == [3, 3, 4]


def test_joint_takes_a_smaller_submodel_where_that_gains_more() -> None:
    """The second slices are worth little: where paper takes them, exact reads the first ones better."""
    submodels = (Submodel(kept=(0, 1), width=2), Submodel(kept=(0, 1), width=1))
    manifest = make_manifest(2, 2, proportional(PAGE), submodels=submodels)
    profile = make_profile(
        bundle=manifest.digest,
        layer_ns={1: 1_000, 2: 1_000},
        decompress_ns=dict.fromkeys(manifest.fidelities, 0),
        ps_per_byte=1_000,
    )
    importance = make_importance(2, 2, [10**9 - gain for gain in (900_000, 1, 900_000, 1)])
    case = Case(manifest, importance, profile, 2_000 + 8 * PAGE, 0, 1 << 40, slack=True)
    assert str(case.plan().submodel) == "2×2"
    assert str(exact(case, joint=False).submodel) == "2×2"
    joint = exact(case)
    assert (str(joint.submodel), [s.fidelity for s in joint.shards]) == ("2×1", [4, 4])


def test_the_solver_finds_an_optimum_says_there_is_none_or_fails() -> None:
    program = Program()
    columns = [program.add_binary(float(gain)) for gain in (5, 4, 3)]
    program.at_most([(column, float(weight)) for column, weight in zip(columns, (4, 3, 2), strict=True)], 5.0)
    solution = solve(program, gap=0.0, nodes=100)
    assert solution is not None
    assert solution.chosen == frozenset(columns[1:])
    assert solution.bound == pytest.approx(7.0)
    program.add_row([(columns[0], 1.0)], 2.0, 3.0)
    assert solve(program, gap=0.0, nodes=100) is None
    endless = Program()
    endless.gains[endless.add_amount()] = 1.0
    with pytest.raises(SolverError, match=r"no optimum in 60 s.*Plan with policy sti"):
        solve(endless, gap=0.0, nodes=100)


def test_the_solver_prints_nothing() -> None:
    lines = [
        "from sti_runtime.integer_program import Program, solve",
        "program = Program()",
        "program.add_binary(1.0)",
        "solve(program, gap=0.0, nodes=1)",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, check=True)
    assert done.stdout == b""


def test_without_the_solver_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "highspy", None)
    with pytest.raises(SolverError, match=r"needs the solver HiGHS.*pip install highspy"):
        solve(Program(), gap=0.0, nodes=1)


def test_gain_model() -> None:
    gains = GainModel.of(make_importance(1, 2, [10**9 - 1_000_000, 10**9 + 500_000]))
    assert gains.full_nano == (1_000_000, 10_000)  # no shard counts less than a hundredth of the mean
    row = [gains.shard_nano(0, k) for k in sorted(ERROR_PPM)]
    assert row == sorted(row)
    assert (gains.shard_nano(0, 2), gains.shard_nano(0, 32)) == (0, 1_000_000)
    assert gains.absent_nano(Submodel(kept=(0,), width=2)) == 0
    assert gains.absent_nano(Submodel(kept=(0,), width=1)) == gains.shard_nano(1, 0) < 0
    higher = make_importance(1, 2, [10**9 - 1_000_000, 10**9]).model_copy(update={"base_fidelity": 3})
    assert GainModel.of(higher).shard_nano(0, 2) < 0


def level(submodel: Submodel, fidelity: int, loss_nano: int) -> dict[str, object]:
    score = {"loss_nano": loss_nano, "correct": 50}
    return {"submodel": submodel.model_dump(), "fidelity": fidelity, "score": score}


def test_gains_are_fitted_to_measured_levels() -> None:
    """Raised alone the shards say 3:1; together they gain 8 milli-nats, three quarters of these at 3 bits."""
    whole, narrow = Submodel(kept=(0,), width=2), Submodel(kept=(0,), width=1)
    bare = make_importance(1, 2, [10**9 - 3_000_000, 10**9 - 1_000_000])
    losses = {3: 994_000_000, 4: 994_500_000, 32: 992_000_000}
    levels = [level(whole, k, loss) for k, loss in losses.items()]
    levels += [level(narrow, 2, 10**9 - 2_000_000), level(narrow, 32, 10**9 - 1_500_000)]
    plain = bare.model_dump(mode="json") | {"levels": levels}
    fitted = type(bare).from_json(canonical_json(plain), source="this test")
    assert b"levels" not in bare.to_json()
    assert fitted.digest != bare.digest
    assert fitted.ranking() == bare.ranking()
    gains = GainModel.of(fitted)
    inside = gains.within(whole)
    together = [inside.choice_nano([0, 1], [k, k]) for k in (2, 3, 4, 32)]
    assert together == [0, 6_000_000, 6_000_000, 8_000_000]  # fewer bits are never expected to do better
    assert inside.shard_nano(0, 32) == 3 * inside.shard_nano(1, 32)
    assert gains.absent_nano(whole) == 0
    assert gains.absent_nano(narrow) == 2_000_000  # it does better with what is left out, but at 2 bits only
    assert gains.within(narrow) == gains
