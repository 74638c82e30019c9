"""The planner ``exact``: the plan of most expected gain under the rules of ``paper``, by integer programming.

Submodel, fidelities and preload set are chosen together (``joint``), or the latter two for the submodel that
``paper`` takes. The search starts from the paper's plan and never returns one of less gain; where its optimum
could not be proven to ``PROVEN_PPM`` of the gain at stake, the plan's flag ``unproven-N-ppm`` says so.

Model, bounds and cuts: docs/planner.md.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from sti_runtime.errors import InfeasiblePlanError, ResourceError
from sti_runtime.exact_program import Budgets, Choice, SubmodelProgram
from sti_runtime.gain import GainModel
from sti_runtime.importance_profile import ImportanceProfile
from sti_runtime.integer_program import Solution, relax, solve
from sti_runtime.manifest import Manifest
from sti_runtime.plan import Plan, Policy
from sti_runtime.plan_build import assemble_plan, largest_first, plannable, shard_costs
from sti_runtime.planner import plan_paper
from sti_runtime.profile import DeviceProfile

PROVEN_PPM = 1000
"""How near the proven bound a large program's gain is called optimal, of the gain at stake: from all shards
at their lowest fidelity to the bound. Small programs are solved to the end."""

_SMALL = 60
"""Columns up to which a program is small."""

_CORE_QUARTERS = 9
"""Columns per four shards over which a large program is solved: those that forfeit least."""


@dataclass(frozen=True)
class _Effort:
    """How long to search, over a core or all columns: nodes, the solver's checks (None: any number), tighter
    timelines tried, solutions cut off."""

    core: bool
    nodes: int
    checks: int | None
    tighter: int
    cuts: int

    def solve(
        self,
        program: SubmodelProgram,
        timeline_ns: int | None,
        known_nano: int | None,
        without: Collection[frozenset[int]] = (),
    ) -> Solution | None:
        """Solve so far; nothing is chosen where ``known_nano``, a gain already found, is near enough."""
        made = program.program(timeline_ns=timeline_ns, without=without)
        if not self.core:
            return solve(made, gap=0.0, nodes=self.nodes)
        relaxed = relax(made)
        if relaxed is None:
            return None
        gap = (relaxed.bound - program.least_nano()) * PROVEN_PPM / 1e6
        if known_nano is not None and relaxed.bound - known_nano <= gap:
            return Solution(None, relaxed.bound)
        versions, shards = len(program.columns), program.submodel.shards
        count = shards * _CORE_QUARTERS // 4
        while True:
            core, forfeit = relaxed.core(count, versions)
            among = core.union(range(versions, len(made.gains)))
            solution = solve(made, gap=gap, nodes=self.nodes, checks=self.checks, among=among)
            if solution is not None and solution.chosen is not None:
                return Solution(
                    solution.chosen, min(relaxed.bound, max(solution.bound, relaxed.bound - forfeit))
                )
            if count >= versions:
                return solution
            count *= 2


_TO_THE_END = _Effort(core=False, nodes=100_000, checks=None, tighter=6, cuts=400)
_IN_A_SECOND = _Effort(core=True, nodes=5, checks=40, tighter=3, cuts=0)


@dataclass(frozen=True)
class Found:
    """The best choice for one submodel, and what no choice can exceed. Units: nano-nats."""

    program: SubmodelProgram
    choice: Choice
    gain_nano: int
    bound_nano: int


def plan_exact(
    manifest: Manifest,
    importance: ImportanceProfile,
    profile: DeviceProfile,
    *,
    target_ns: int,
    preload_bytes: int,
    working_bytes: int,
    slack: bool = True,
    joint: bool = True,
    policy: Policy = "exact",
    flags: Sequence[str] = (),
) -> Plan:
    """Plan for one (T, |S|, W). ``joint`` False: of the submodel that ``paper`` takes.

    Units: ns, bytes.
    Raises: InfeasiblePlanError naming the smallest T that ``paper`` can plan for; ResourceError and
    InputError as ``plan_paper`` does; SolverError.
    """
    gains = GainModel.of(importance)
    failed: InfeasiblePlanError | ResourceError | None = None
    try:
        paper = plan_paper(
            manifest,
            importance,
            profile,
            target_ns=target_ns,
            preload_bytes=preload_bytes,
            working_bytes=working_bytes,
            slack=slack,
        )
    except (InfeasiblePlanError, ResourceError) as error:
        paper, failed = None, error
    budgets = Budgets(target_ns, preload_bytes, working_bytes, slack)
    costs = shard_costs(manifest, profile, plannable(manifest, importance))
    programs = [
        SubmodelProgram(submodel, profile, costs, gains, budgets) for submodel in largest_first(manifest)
    ]
    best = None if paper is None else _of_paper(programs, paper)
    if joint or best is None:
        best = _among(programs, best, first=not joint)
    else:
        searched = _search(best.program, best.choice)
        best = searched if isinstance(searched, Found) else best
    if best is None:
        assert failed is not None
        raise failed
    return assemble_plan(
        manifest,
        profile,
        best.program.submodel,
        best.choice.fidelities,
        best.choice.preloaded,
        planner="exact",
        policy=policy,
        mode="pipeline",
        slack=slack,
        importance=importance.digest,
        target_ns=target_ns,
        preload_bytes=preload_bytes,
        working_bytes=working_bytes,
        flags=(*_unproven(best), *flags),
    )


def _of_paper(programs: Sequence[SubmodelProgram], paper: Plan) -> Found:
    program = next(each for each in programs if each.submodel == paper.submodel)
    held = frozenset(i for i, shard in enumerate(paper.shards) if shard.preloaded)
    choice = Choice(tuple(shard.fidelity for shard in paper.shards), held)
    return Found(program, choice, program.gain_nano(choice), program.bound_nano)


def _among(programs: Sequence[SubmodelProgram], paper: Found | None, *, first: bool) -> Found | None:
    """The best over submodels, those of the highest bound first; ``first``: the first that has a plan.

    A submodel is left out when its bound, cheap or of the fractional program, is not above the best gain.
    """
    able = [each for each in programs if each.feasible_compute]
    if first:
        return next((found for each in able if isinstance(found := _search(each, None), Found)), None)
    best, unbeaten = paper, [] if paper is None else [_total(paper)]
    for program in sorted(able, key=lambda each: -(each.absent_nano + each.bound_nano)):
        if best is not None and program.absent_nano + program.bound_nano <= _total(best):
            break
        relaxed = relax(program.program())
        if relaxed is None or (best is not None and program.absent_nano + relaxed.bound <= _total(best)):
            continue
        known = best.choice if best is not None and best.program is program else None
        found = _search(program, known)
        if isinstance(found, Found):
            unbeaten.append(program.absent_nano + found.bound_nano)
            if best is None or _total(found) > _total(best) or best.program is program:
                best = found
        elif found is not None:
            unbeaten.append(program.absent_nano + found)
    if best is None:
        return None
    return replace(best, bound_nano=max(best.gain_nano, max(unbeaten) - best.program.absent_nano))


def _total(found: Found) -> int:
    return found.program.absent_nano + found.gain_nano


def _search(program: SubmodelProgram, known: Choice | None) -> Found | int | None:
    """The best valid choice for one submodel; ``known``: a valid one to beat. None when there is none, a
    bound of the gain where none was found.

    The program is solved, with the timeline's rows where they matter; then the timeline is tightened until
    its solution is valid, which may not be the best; then invalid solutions are cut off one by one, until one
    is valid or the bound is no more than what was found.
    """
    effort = _TO_THE_END if len(program.columns) <= _SMALL else _IN_A_SECOND
    best = known
    gain = program.gain_nano(known) if known is not None else None
    bound = float(program.bound_nano)

    def ends(bound_nano: float | None) -> Found | int | None:
        if best is None or gain is None:
            return None if bound_nano is None else round(bound_nano)
        return Found(program, best, gain, gain if bound_nano is None else max(gain, round(bound_nano)))

    def better(choice: Choice) -> None:
        nonlocal best, gain
        if program.valid(choice) and (gain is None or program.gain_nano(choice) > gain):
            best, gain = choice, program.gain_nano(choice)

    target_ns = program.budgets.target_ns
    solution = effort.solve(program, None if program.timeline_follows else target_ns, gain)
    if solution is None:  # beside a known plan that is a matter of rounding, and proves nothing
        return ends(None if gain is None else bound)
    bound, chosen = min(bound, solution.bound), solution.chosen
    if chosen is None:
        return ends(bound)
    choice = program.choice(chosen)
    better(choice)
    if program.valid(choice) or (gain is not None and bound < gain + 1):
        return ends(bound)

    tighter_ns = target_ns
    trial: Choice | None = choice
    for again in range(effort.tighter):
        end_ns = None if trial is None else program.end_ns(trial)
        if trial is None or end_ns is None or end_ns <= target_ns:
            break
        tighter_ns -= (end_ns - target_ns) * (again + 1)
        tight = effort.solve(program, tighter_ns, gain)
        trial = None if tight is None or tight.chosen is None else program.choice(tight.chosen)
        if trial is not None:
            better(trial)

    cut: list[frozenset[int]] = []
    for _ in range(effort.cuts):
        cut.append(frozenset(c for c in chosen if c < len(program.columns)))
        solution = effort.solve(program, target_ns, gain, cut)
        if solution is None:
            return ends(None)
        bound = min(bound, solution.bound)
        if solution.chosen is None:
            break
        chosen = solution.chosen
        choice = program.choice(chosen)
        better(choice)
        if program.valid(choice) or (gain is not None and bound < gain + 1):
            break
    return ends(bound)


def _unproven(found: Found) -> tuple[str, ...]:
    """The flag of a plan whose optimum is not proven. The gain at stake: from all at the lowest fidelity."""
    at_stake = found.bound_nano - found.program.least_nano()
    if found.bound_nano - found.gain_nano <= at_stake * PROVEN_PPM // 1_000_000:
        return ()
    return (f"unproven-{(found.bound_nano - found.gain_nano) * 1_000_000 // at_stake}-ppm",)
