"""The planner ``paper``: (importance, device profile, T, |S|, W) → plan, in three steps.

1. compute planning: the largest trained submodel whose compute fits T;
2. preload: its bottom layers, at one fidelity, as far as they fit |S|;
3. IO planning: streamed shards at the highest uniform fidelity that is valid, then raised one by one
   from most to least important.

Rules, validity and a worked example: docs/planner.md. Source: STI (ASPLOS 2023), section 5.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from sti_runtime.errors import InfeasiblePlanError, InputError, ResourceError
from sti_runtime.importance_profile import ImportanceProfile
from sti_runtime.manifest import Manifest
from sti_runtime.model import Submodel
from sti_runtime.plan import Plan, Policy
from sti_runtime.plan_build import (
    Fidelity,
    ShardCosts,
    assemble_plan,
    check_budgets,
    largest_first,
    layer_work,
    plannable,
    shard_costs,
    shard_rows,
)
from sti_runtime.plan_check import check_bundle, check_plan
from sti_runtime.profile import DeviceProfile
from sti_runtime.shard import ShardId
from sti_runtime.timeline import LayerWork, Timeline, simulate
from sti_runtime.units import format_bytes, format_ns, format_ns_up

__all__ = ["check_bundle", "check_plan", "choose_preload", "plan_paper"]


def plan_paper(
    manifest: Manifest,
    importance: ImportanceProfile,
    profile: DeviceProfile,
    *,
    target_ns: int,
    preload_bytes: int,
    working_bytes: int,
    slack: bool = True,
    uniform: bool = False,
    wide_first: bool = False,
    policy: Policy = "sti",
    ranking: Sequence[ShardId] | None = None,
    flags: Sequence[str] = (),
) -> Plan:
    """Plan for one (T, |S|, W).

    Units: ns, bytes. ``slack`` False is the paper's form of the IO budget (``--no-slack``). Ablations:
    ``ranking`` replaces the importance profile's; ``uniform`` leaves pass 2 out; ``wide_first`` gives ties of
    submodels to the wider.
    Raises: InfeasiblePlanError naming the smallest T that works; ResourceError when no T does, because
    of W (or, without slack, of |S|); InputError when the inputs do not belong together.
    """
    check_budgets(target_ns=target_ns, preload_bytes=preload_bytes, working_bytes=working_bytes)
    _check_importance(manifest, importance)
    problem = _Problem(
        profile,
        shard_costs(manifest, profile, plannable(manifest, importance)),
        target_ns,
        working_bytes,
        slack,
    )
    order = importance.ranking() if ranking is None else tuple(ranking)
    for submodel in largest_first(manifest, wide_first=wide_first):
        if profile.fixed_p95.total_ns + submodel.depth * profile.t_comp_ns(submodel.width) > target_ns:
            continue
        draft = _Draft(problem, submodel, choose_preload(problem.costs, submodel, preload_bytes, order))
        if draft.raise_together():
            if not uniform:
                draft.raise_in_turn(order)
            return assemble_plan(
                manifest,
                profile,
                submodel,
                draft.fidelities,
                draft.preloaded,
                planner="paper",
                policy=policy,
                mode="pipeline",
                slack=slack,
                importance=importance.digest,
                target_ns=target_ns,
                preload_bytes=preload_bytes,
                working_bytes=working_bytes,
                flags=flags,
            )
    raise _infeasible(problem, manifest, preload_bytes, order)


def choose_preload(
    costs: ShardCosts, submodel: Submodel, preload_bytes: int, ranking: Iterable[ShardId]
) -> dict[int, Fidelity]:
    """Step 2: what the preload buffer holds, as {index into the submodel's shards: fidelity}.

    The highest k at which all of layer 0 fits; then bottom-up at k until one does not fit. If layer 0
    does not fit at the lowest k: its shards at that, most important first, as many as fit.
    """
    width, kept = submodel.width, submodel.kept
    walk: Iterable[int] = range(submodel.shards)
    for fidelity in reversed(costs.fidelities):
        start = kept[0] * costs.heads
        if sum(costs.lengths[fidelity][start : start + width]) <= preload_bytes:
            break
    else:
        fidelity = costs.fidelities[0]
        walk = [slice_ for layer, slice_ in ranking if layer == kept[0] and slice_ < width]
    chosen: dict[int, Fidelity] = {}
    free, whole_layers = preload_bytes, isinstance(walk, range)
    for index in walk:
        length = costs.lengths[fidelity][kept[index // width] * costs.heads + index % width]
        if length > free:
            if whole_layers:
                break
            continue
        free -= length
        chosen[index] = fidelity
    return chosen


@dataclass(frozen=True)
class _Problem:
    profile: DeviceProfile
    costs: ShardCosts
    target_ns: int
    working_bytes: int
    slack: bool


class _Draft:
    """Step 3 for one submodel: fidelities under construction, with AIB and layer costs kept current.

    ``margins[l]`` is the least of AIB(l), AIB(l+1), …: what a read of layer l may still cost, since it
    debits all of them. With AIB never below E, what all reads add to compute, and W no limit, layer l
    starts by embeddings + slack + l·T_comp, so the request ends by T: the simulation is only run when an
    AIB is less or the streamed bytes exceed W.
    """

    def __init__(self, problem: _Problem, submodel: Submodel, preload: dict[int, Fidelity]) -> None:
        self.problem = problem
        self.submodel = submodel
        self.preloaded: Collection[int] = preload.keys()
        self.streamed = [i for i in range(submodel.shards) if i not in preload]
        self.fidelities: list[Fidelity] = [
            preload.get(i, problem.costs.fidelities[0]) for i in range(submodel.shards)
        ]
        self.layer_ns = problem.profile.layer_ns(submodel.width)
        self.t_comp_ns = problem.profile.t_comp_ns(submodel.width)
        self.sharing = problem.profile.sharing()
        self.rows = shard_rows(submodel, problem.costs.heads)
        self.works: list[LayerWork] = []
        self.aib: list[int] = []
        self.margins: list[int] = []

    def raise_together(self) -> bool:
        """Pass 1: the highest uniform fidelity of all streamed shards that is valid; False if none is."""
        for fidelity in reversed(self.problem.costs.fidelities):
            self._set_uniform(fidelity)
            if self.margins[0] >= 0:
                self._cost_layers()
                if self._ends_in_time(self.margins[0]):
                    return True
        return False

    def raise_in_turn(self, ranking: Iterable[ShardId]) -> None:
        """Pass 2: from most to least important, each to the highest fidelity that stays valid."""
        position = {layer: i for i, layer in enumerate(self.submodel.kept)}
        for layer, slice_ in ranking:
            if layer in position and slice_ < self.submodel.width:
                index = position[layer] * self.submodel.width + slice_
                if index not in self.preloaded:
                    self._raise_one(index)

    def smallest_target_ns(self) -> int | None:
        """The smallest T at which some uniform fidelity is valid; None if W (or no slack) rules all out."""
        return min(
            (t for k in self.problem.costs.fidelities if (t := self._smallest_at(k)) is not None),
            default=None,
        )

    def least_working_bytes(self) -> int:
        """The smallest W at which some T works: the largest layer at the leanest uniform fidelity."""
        least: list[int] = []
        for fidelity in self.problem.costs.fidelities:
            self._set_uniform(fidelity)
            self._cost_layers()
            least.append(max(work.streamed_bytes for work in self.works))
        return min(least)

    def _smallest_at(self, fidelity: Fidelity) -> int | None:
        self._set_uniform(fidelity)
        self._cost_layers()
        least = self.margins[0]
        if self.problem.slack:
            # AIB rises by exactly as much as T, and AIB(0) is never above the slack.
            paced_ns = self.problem.target_ns - least
        elif least < 0:
            return None
        else:
            paced_ns = self.problem.target_ns - self._slack_ns()
        ends = self._timeline()
        return None if ends is None else max(paced_ns, ends.end_ns)

    def _slack_ns(self) -> int:
        spent = self.problem.profile.fixed_p95.total_ns + self.submodel.depth * self.t_comp_ns
        return self.problem.target_ns - spent

    def _set_uniform(self, fidelity: Fidelity) -> None:
        debits = [0] * self.submodel.depth
        budget_ns, width = self.problem.costs.budget_ns[fidelity], self.submodel.width
        for index in self.streamed:
            self.fidelities[index] = fidelity
            debits[index // width] += budget_ns[self.rows[index]]
        left_ns = self._slack_ns() if self.problem.slack else 0
        self.aib = []
        for layer, debit in enumerate(debits):
            left_ns -= debit
            self.aib.append(left_ns + layer * self.t_comp_ns)
        self._update_margins()

    def _cost_layers(self) -> None:
        self.works = [self._layer_work(layer) for layer in range(self.submodel.depth)]

    def _update_margins(self) -> None:
        least, margins = self.aib[-1], self.aib[:]
        for layer in range(len(margins) - 1, -1, -1):
            least = min(least, margins[layer])
            margins[layer] = least
        self.margins = margins

    def _raise_one(self, index: int) -> None:
        costs, layer, row = self.problem.costs, index // self.submodel.width, self.rows[index]
        current, work = self.fidelities[index], self.works[layer]
        for fidelity in reversed(costs.fidelities):
            if fidelity <= current:
                return
            debit = costs.budget_ns[fidelity][row] - costs.budget_ns[current][row]
            more_bytes = costs.lengths[fidelity][row] - costs.lengths[current][row]
            if debit > self.margins[layer] or work.streamed_bytes + more_bytes > self.problem.working_bytes:
                continue
            self.fidelities[index] = fidelity
            self.works[layer] = self._layer_work(layer)
            if self._ends_in_time(min([*self.aib[:layer], self.margins[layer] - debit])):
                for later in range(layer, len(self.aib)):
                    self.aib[later] -= debit
                self._update_margins()
                return
            self.fidelities[index], self.works[layer] = current, work

    def _ends_in_time(self, margin_ns: int) -> bool:
        """``margin_ns``: no AIB is less."""
        problem = self.problem
        streamed_bytes = sum(work.streamed_bytes for work in self.works)
        added_ns = sum(self.sharing.layer_ns(work.streamed_bytes) for work in self.works)
        if streamed_bytes <= problem.working_bytes and added_ns <= margin_ns:
            return True
        timeline = self._timeline()
        return timeline is not None and timeline.end_ns <= problem.target_ns

    def _timeline(self) -> Timeline | None:
        profile, working_bytes = self.problem.profile, self.problem.working_bytes
        return simulate(self.works, profile.fixed_p95, working_bytes, sharing=self.sharing)

    def _layer_work(self, layer: int) -> LayerWork:
        costs, width = self.problem.costs, self.submodel.width
        return layer_work(costs, self.rows, self.fidelities, self.preloaded, layer, width, self.layer_ns)


def _check_importance(manifest: Manifest, importance: ImportanceProfile) -> None:
    if importance.model_digest != manifest.model_digest:
        raise InputError(
            f"The importance profile is of model {importance.model_digest[:12]}, "
            f"the bundle of model {manifest.model_digest[:12]}.",
            "Name the importance profile of the bundle's model.",
        )
    if (importance.layers, importance.slices) != (manifest.model.layers, manifest.model.heads):
        raise InputError(
            f"The importance profile scores {importance.layers}×{importance.slices} shards, "
            f"the bundle has {manifest.model.layers}×{manifest.model.heads}.",
            "Make the importance profile again.",
        )


def _infeasible(
    problem: _Problem, manifest: Manifest, preload_bytes: int, ranking: Sequence[ShardId]
) -> InfeasiblePlanError | ResourceError:
    drafts = [
        _Draft(problem, submodel, choose_preload(problem.costs, submodel, preload_bytes, ranking))
        for submodel in manifest.submodels
    ]
    working = problem.working_bytes
    targets = [t for draft in drafts if (t := draft.smallest_target_ns()) is not None]
    if targets:
        smallest = min(targets)
        return InfeasiblePlanError(
            f"No trained submodel of the bundle meets {format_ns(problem.target_ns)} on this device with "
            f"|S| = {format_bytes(preload_bytes)} and W = {format_bytes(working)}.",
            f"The smallest target latency that works is {format_ns_up(smallest)}.",
            smallest_target_ns=smallest,
        )
    needed = min(draft.least_working_bytes() for draft in drafts)
    if needed > working:
        return ResourceError(
            f"A working buffer of {working} bytes cannot hold a layer of any trained submodel.",
            f"Give at least {needed} bytes.",
        )
    return ResourceError(
        f"Without slack no target latency works with |S| = {preload_bytes} bytes and W = {working} bytes: "
        "layer 0 has no IO time, and later layers too little.",
        "Give a larger preload buffer, or plan with slack.",
    )
