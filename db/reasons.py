"""Why a plan is as it is: which submodels were passed over, and why each shard has its fidelity.

Made from the plan and the profiles that it names, by the rules of docs/planner.md; nothing is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from db.artifacts import bundle_manifest
from db.grounds import profile_record
from db.importance import importance_by_digest
from db.models import BundleRow, DeviceProfileRow, ImportanceProfileRow, PlanRow
from sti_runtime.importance_profile import ImportanceProfile
from sti_runtime.manifest import Manifest
from sti_runtime.plan import Plan, PlannedShard
from sti_runtime.plan_build import largest_first
from sti_runtime.profile import DeviceProfile
from sti_runtime.units import format_bytes, format_ns


@dataclass(frozen=True)
class LayerReason:
    """One layer of the plan: its shards' fidelities, and what its reads leave of the time before it.

    ``budget_ns``: how long IO may still take until this layer is computed (AIB, docs/planner.md).
    """

    layer: int
    source_layer: int
    fidelities: tuple[int, ...]
    preloaded: tuple[bool, ...]
    streamed_bytes: int
    budget_ns: int


@dataclass(frozen=True)
class Raised:
    """A shard above the uniform fidelity; ``rank`` 1 is the most important of the model. None: not known."""

    source_layer: int
    slice: int
    fidelity: int
    rank: int | None


@dataclass(frozen=True)
class Reasons:
    """Why a plan is as it is. ``passed_over``: (submodel, why) of every larger one.

    ``uniform``: the fidelity of all streamed shards that are not ``raised``; None when none are streamed.
    """

    submodel: str
    passed_over: tuple[tuple[str, str], ...]
    t_comp_ns: int
    slack_ns: int
    uniform: int | None
    raised: tuple[Raised, ...]
    layers: tuple[LayerReason, ...]


def reasons_of(session: Session, plan_id: int, plan: Plan) -> Reasons | None:
    """Why the stored plan is as it is; None when its profile is not in this store."""
    row = session.get_one(PlanRow, plan_id)
    stored = None if row.device_profile_id is None else session.get(DeviceProfileRow, row.device_profile_id)
    if stored is None:
        return None
    known = plan.importance is not None and session.get(ImportanceProfileRow, plan.importance) is not None
    importance = importance_by_digest(session, plan.importance) if known and plan.importance else None
    manifest = bundle_manifest(session.get_one(BundleRow, plan.bundle))
    return reasons(plan, profile_record(stored), manifest, importance)


def reasons(
    plan: Plan, profile: DeviceProfile, manifest: Manifest, importance: ImportanceProfile | None
) -> Reasons:
    """The same, of what is given."""
    t_comp_ns = profile.t_comp_ns(plan.submodel.width)
    slack_ns = plan.target_ns - profile.fixed_p95.total_ns - plan.submodel.depth * t_comp_ns
    streamed = plan.streamed()
    uniform = min((shard.fidelity for shard in streamed), default=None)
    ranks = {} if importance is None else {s: i for i, s in enumerate(importance.ranking(), 1)}
    return Reasons(
        submodel=str(plan.submodel),
        passed_over=tuple(_passed_over(plan, profile, manifest)),
        t_comp_ns=t_comp_ns,
        slack_ns=slack_ns,
        uniform=uniform,
        raised=tuple(
            sorted(
                (
                    Raised(s.source_layer, s.slice, s.fidelity, ranks.get((s.source_layer, s.slice)))
                    for s in streamed
                    if s.fidelity != uniform
                ),
                key=lambda shard: (shard.rank or 0, shard.source_layer, shard.slice),
            )
        ),
        layers=tuple(_layers(plan, profile, t_comp_ns, slack_ns if plan.slack else 0)),
    )


def in_words(why: Reasons, plan: Plan) -> list[str]:
    """Lines for people."""
    lines = [f"{name} was passed over: {reason}." for name, reason in why.passed_over]
    lines.append(
        f"{why.submodel} is computed in {format_ns(why.t_comp_ns)} a layer at p95;"
        f" T = {format_ns(plan.target_ns)} leaves {format_ns(max(0, why.slack_ns))} before the first."
    )
    preloaded, exact = plan.preloaded(), plan.planner == "exact"
    if preloaded:
        bits = ", ".join(str(k) for k in sorted({shard.fidelity for shard in preloaded}))
        lines.append(
            f"|S| = {format_bytes(plan.preload_bytes)} holds {len(preloaded)} shards at {bits} bits, "
            + (
                "where they gain most."
                if exact
                else "from the bottom up: the highest fidelity at which layer 0 fits."
            )
        )
    if exact:
        lines.append("All fidelities were chosen together, for the most gain that the importance promises.")
        return lines
    if why.uniform is not None:
        lines.append(f"{why.uniform} bits is the highest fidelity at which all streamed shards come in time.")
    if why.raised:
        first = ", ".join(_in_words(shard) for shard in why.raised[:5])
        more = f" and {len(why.raised) - 5} more" if len(why.raised) > 5 else ""
        lines.append(f"What time was left raised, most important first: {first}{more}.")
    return lines


def _in_words(shard: Raised) -> str:
    rank = "" if shard.rank is None else f" (rank {shard.rank})"
    return f"layer {shard.source_layer} slice {shard.slice}{rank} to {shard.fidelity} bits"


def _passed_over(plan: Plan, profile: DeviceProfile, manifest: Manifest) -> Sequence[tuple[str, str]]:
    found, widths = [], {row.width for row in profile.compute}
    for submodel in largest_first(manifest, wide_first=plan.policy == "wide-first"):
        if submodel == plan.submodel:
            break
        if submodel.width not in widths:
            found.append((str(submodel), "the profile has no layer of its width"))
            continue
        computed_ns = profile.fixed_p95.total_ns + submodel.depth * profile.t_comp_ns(submodel.width)
        if computed_ns > plan.target_ns:
            why = f"computing it takes {format_ns(computed_ns)}, more than T"
        elif plan.planner == "exact":
            why = "it promises less gain in this T"
        else:
            why = "its shards would not come in time at any fidelity"
        found.append((str(submodel), why))
    return found


def _layers(plan: Plan, profile: DeviceProfile, t_comp_ns: int, slack_ns: int) -> Sequence[LayerReason]:
    by_layer: dict[int, list[PlannedShard]] = {}
    for shard in plan.shards:
        by_layer.setdefault(shard.layer, []).append(shard)
    found, read_ns = [], 0
    for layer, shards in sorted(by_layer.items()):
        streamed = [shard for shard in shards if not shard.preloaded]
        read_ns += sum(profile.io.budget_ns(shard.length) for shard in streamed)
        found.append(
            LayerReason(
                layer=layer,
                source_layer=plan.submodel.kept[layer],
                fidelities=tuple(shard.fidelity for shard in shards),
                preloaded=tuple(shard.preloaded for shard in shards),
                streamed_bytes=sum(shard.length for shard in streamed),
                budget_ns=slack_ns + layer * t_comp_ns - read_ns,
            )
        )
    return found
