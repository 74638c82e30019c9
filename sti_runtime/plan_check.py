"""Check a plan against its profile and its bundle: written from the rules, sharing no planner code.

Tests hold the planner to it, and an agent can refuse a plan that was not made for what it has.
"""

from __future__ import annotations

from sti_runtime.manifest import Manifest
from sti_runtime.plan import Plan
from sti_runtime.profile import DeviceProfile
from sti_runtime.timeline import layer_works, simulate


def check_plan(
    plan: Plan,
    profile: DeviceProfile,
    *,
    target_ns: int | None = None,
    preload_bytes: int | None = None,
    working_bytes: int | None = None,
) -> list[str]:
    """Why the plan is not valid with ``profile``; empty when it is.

    ``target_ns``, ``preload_bytes``, ``working_bytes`` ask whether the same plan would be valid under
    other values than its own; it is under any larger ones.
    """
    target = plan.target_ns if target_ns is None else target_ns
    preload = plan.preload_bytes if preload_bytes is None else preload_bytes
    working = plan.working_bytes if working_bytes is None else working_bytes
    n, m = plan.submodel.depth, plan.submodel.width
    if plan.device_profile != profile.digest:
        return [f"made with device profile {plan.device_profile[:12]}, not {profile.digest[:12]}"]
    if plan.sequence_length != profile.sequence_length:
        return [f"made for {plan.sequence_length} tokens, the profile is of {profile.sequence_length}"]
    try:
        works = layer_works(plan.shards, n, m, profile, p95=True)
    except KeyError as error:
        return [f"the profile has no figure for width or fidelity {error.args[0]}"]

    problems: list[str] = []
    if plan.preloaded_bytes > preload:
        problems.append(f"preloads {plan.preloaded_bytes} bytes into a buffer of {preload}")
    layers_read = [shard.layer for shard in plan.streamed()]
    if layers_read != sorted(layers_read):
        problems.append("reads a layer before the one below it")
    if plan.planner != "baseline":
        problems += _negative_budgets(plan, profile, target)
    timeline = simulate(works, profile.fixed_p95, working, plan.mode, sharing=profile.sharing())
    if timeline is None:
        problems.append(f"streams more than a working buffer of {working} bytes can hold")
    elif timeline.end_ns > target:
        problems.append(f"ends after {timeline.end_ns} ns, the target is {target} ns")
    return problems


def _negative_budgets(plan: Plan, profile: DeviceProfile, target_ns: int) -> list[str]:
    n, t_comp_ns = plan.submodel.depth, profile.t_comp_ns(plan.submodel.width)
    slack_ns = target_ns - profile.fixed_p95.total_ns - n * t_comp_ns
    if slack_ns < 0:
        return [f"compute alone exceeds the target by {-slack_ns} ns"]
    problems = []
    for layer in range(n):
        streamed = [s.length for s in plan.shards if s.layer <= layer and not s.preloaded]
        debits = sum(map(profile.io.budget_ns, streamed))
        aib_ns = (slack_ns if plan.slack else 0) + layer * t_comp_ns - debits
        if aib_ns < 0:
            problems.append(f"AIB({layer}) is {aib_ns} ns")
    return problems


def check_bundle(plan: Plan, manifest: Manifest) -> list[str]:
    """Why the plan does not fit the bundle: its digest, submodel and the place of every version."""
    if plan.bundle != manifest.digest:
        return [f"made for bundle {plan.bundle[:12]}, not {manifest.digest[:12]}"]
    problems: list[str] = []
    if plan.submodel not in manifest.submodels:
        problems.append(f"submodel {plan.submodel} is not one of the bundle's")
    for shard in plan.shards:
        if shard.source_layer >= manifest.model.layers or shard.slice >= manifest.model.heads:
            problems.append(f"shard {shard.source_layer},{shard.slice} is not in the bundle")
            continue
        if shard.fidelity not in manifest.fidelities:
            problems.append(f"the bundle holds no versions at {shard.fidelity} bits")
            continue
        version = manifest.shard_version(shard.source_layer, shard.slice, shard.fidelity)
        if (version.offset, version.length) != (shard.offset, shard.length):
            problems.append(
                f"shard {shard.source_layer},{shard.slice} at {shard.fidelity} bits lies at "
                f"{version.offset}+{version.length}, not {shard.offset}+{shard.length}"
            )
    return problems
