"""The policies that are compared, as one table: from a policy's name to its plan.

The paper's planner serves ``sti``, ``sti-0mb`` and the ablations, the planner ``exact`` the policies named
after it. A baseline takes the largest trained submodel whose predicted p95 latency meets T, at one uniform
fidelity, with the buffers it needs. Source: STI (ASPLOS 2023), section 7.1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from sti_runtime.errors import InfeasiblePlanError, InputError
from sti_runtime.exact import plan_exact
from sti_runtime.importance_profile import ImportanceProfile
from sti_runtime.manifest import ALIGNMENT, Manifest
from sti_runtime.plan import Plan, Policy
from sti_runtime.plan_build import (
    Fidelity,
    assemble_plan,
    check_budgets,
    largest_first,
    layer_work,
    shard_costs,
    shard_rows,
)
from sti_runtime.planner import plan_paper
from sti_runtime.profile import DeviceProfile
from sti_runtime.shard import ShardId
from sti_runtime.timeline import Mode, simulate
from sti_runtime.units import format_ns, format_ns_up


@dataclass(frozen=True)
class Planned:
    """A policy of the paper's planner. ``preload``: uses |S|; ``shuffled``: ignores the importance;
    ``slack``: where asked; ``uniform``: streams one fidelity; ``wide_first``: ties go to the wider submodel.
    """

    preload: bool = True
    shuffled: bool = False
    slack: bool = True
    uniform: bool = False
    wide_first: bool = False


@dataclass(frozen=True)
class Exact:
    """A policy of the planner ``exact``; ``joint``: chooses the submodel too. Planned on the host only."""

    joint: bool


@dataclass(frozen=True)
class Baseline:
    """A policy of one uniform fidelity. ``working_bytes`` takes the bytes each layer streams."""

    fidelity: Fidelity
    mode: Mode
    preload: Literal["all", "none"]
    working_bytes: Callable[[Sequence[int]], int]


def _two_largest(layer_bytes: Sequence[int]) -> int:
    return sum(sorted(layer_bytes)[-2:])


def _smallest_buffer(layer_bytes: Sequence[int]) -> int:
    return ALIGNMENT


POLICIES: dict[Policy, Planned | Exact | Baseline] = {
    "sti": Planned(),
    "sti-0mb": Planned(preload=False),
    "exact": Exact(joint=True),
    "exact-io": Exact(joint=False),
    "random": Planned(shuffled=True),
    "no-slack": Planned(slack=False),
    "uniform": Planned(uniform=True),
    "wide-first": Planned(wide_first=True),
    "load-exec": Baseline(32, "load-exec", "none", sum),
    "std-pipeline-2": Baseline(2, "pipeline", "none", _two_largest),
    "std-pipeline-6": Baseline(6, "pipeline", "none", _two_largest),
    "std-pipeline-32": Baseline(32, "pipeline", "none", _two_largest),
    "preload-6": Baseline(6, "pipeline", "all", _smallest_buffer),
    "preload-32": Baseline(32, "pipeline", "all", _smallest_buffer),
}


def plan_policy(
    policy: Policy,
    manifest: Manifest,
    importance: ImportanceProfile | None,
    profile: DeviceProfile,
    *,
    target_ns: int,
    preload_bytes: int,
    working_bytes: int,
    seed: int = 0,
    slack: bool = True,
) -> Plan:
    """The plan that ``policy`` makes.

    Baselines need no importance profile and take the buffers they need: ``preload_bytes`` and
    ``working_bytes`` of their plans are their own. ``seed`` is that of ``random``, kept as a flag.
    Raises: InfeasiblePlanError naming the smallest T that works; ResourceError and InputError as
    ``plan_paper`` does; SolverError of the policies of ``exact``.
    """
    spec = POLICIES[policy]
    if isinstance(spec, Baseline):
        check_budgets(target_ns=target_ns, preload_bytes=preload_bytes, working_bytes=working_bytes)
        return _plan_baseline(policy, spec, manifest, profile, target_ns)
    if importance is None:
        raise InputError(
            f"Policy {policy} needs an importance profile.", "Name one, or measure it for this task first."
        )
    if isinstance(spec, Exact):
        return plan_exact(
            manifest,
            importance,
            profile,
            target_ns=target_ns,
            preload_bytes=preload_bytes,
            working_bytes=working_bytes,
            slack=slack,
            joint=spec.joint,
            policy=policy,
        )
    return plan_paper(
        manifest,
        importance,
        profile,
        target_ns=target_ns,
        preload_bytes=preload_bytes if spec.preload else 0,
        working_bytes=working_bytes,
        slack=slack and spec.slack,
        uniform=spec.uniform,
        wide_first=spec.wide_first,
        policy=policy,
        ranking=shuffled_ranking(importance, seed) if spec.shuffled else None,
        flags=(f"seed-{seed}",) if spec.shuffled else (),
    )


def uses_preload(policy: Policy) -> bool:
    """Whether |S| makes a difference to a policy; a baseline holds what its name says."""
    spec = POLICIES[policy]
    return spec.preload if isinstance(spec, Planned) else isinstance(spec, Exact)


def takes_its_own_buffers(policy: Policy) -> bool:
    """Whether a policy takes the buffers it needs, whatever |S| and W are asked for."""
    return isinstance(POLICIES[policy], Baseline)


def shuffled_ranking(importance: ImportanceProfile, seed: int) -> tuple[ShardId, ...]:
    """All shards in an order that depends on ``seed`` alone: by SHA-256 of "seed:layer:slice"."""

    def key(shard: ShardId) -> bytes:
        return hashlib.sha256(f"{seed}:{shard[0]}:{shard[1]}".encode()).digest()

    return tuple(sorted(((s.layer, s.slice) for s in importance.scores), key=key))


def _plan_baseline(
    policy: Policy, spec: Baseline, manifest: Manifest, profile: DeviceProfile, target_ns: int
) -> Plan:
    costs = shard_costs(manifest, profile, {spec.fidelity})
    ends: list[int] = []
    for submodel in largest_first(manifest):
        rows, width = shard_rows(submodel, costs.heads), submodel.width
        fidelities: list[Fidelity] = [spec.fidelity] * submodel.shards
        preloaded: Collection[int] = range(submodel.shards) if spec.preload == "all" else ()
        works = [
            layer_work(costs, rows, fidelities, preloaded, layer, width, profile.layer_ns(width))
            for layer in range(submodel.depth)
        ]
        working_bytes = spec.working_bytes([work.streamed_bytes for work in works])
        timeline = simulate(works, profile.fixed_p95, working_bytes, spec.mode, sharing=profile.sharing())
        if timeline is None:
            raise AssertionError(f"{policy}: its own working buffer of {working_bytes} bytes is too small")
        if timeline.end_ns <= target_ns:
            return assemble_plan(
                manifest,
                profile,
                submodel,
                fidelities,
                preloaded,
                planner="baseline",
                policy=policy,
                mode=spec.mode,
                slack=False,
                importance=None,
                target_ns=target_ns,
                preload_bytes=sum(costs.lengths[spec.fidelity][rows[i]] for i in preloaded),
                working_bytes=working_bytes,
            )
        ends.append(timeline.end_ns)
    raise InfeasiblePlanError(
        f"No trained submodel of the bundle meets {format_ns(target_ns)} on this device under {policy}.",
        f"The smallest target latency that works is {format_ns_up(min(ends))}.",
        smallest_target_ns=min(ends),
    )
