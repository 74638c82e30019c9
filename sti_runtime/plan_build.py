"""What every policy needs to make a plan: cost tables, the order of submodels, assembling the record."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from sti_runtime.errors import InputError, ResourceError
from sti_runtime.importance_profile import ImportanceProfile
from sti_runtime.manifest import Manifest
from sti_runtime.model import Submodel
from sti_runtime.plan import MERGE_LIMIT_BYTES, Plan, PlannedShard, Planner, Policy
from sti_runtime.profile import PPM, DeviceProfile
from sti_runtime.timeline import LayerWork, Mode, predict

UNFIT = "unfit-profile"
"""The flag of a plan whose device profile misses its stated bounds."""

Fidelity = Literal[2, 3, 4, 5, 6, 32]


@dataclass(frozen=True)
class ShardCosts:
    """Per fidelity, the bytes and p95 T_io of every shard's version, alone and as budgets are debited.

    Shapes: ``lengths[k][l·M + s]``, ``io_ns`` and ``budget_ns`` likewise. ``fidelities`` ascend.
    """

    fidelities: tuple[Fidelity, ...]
    heads: int
    lengths: dict[Fidelity, list[int]]
    io_ns: dict[Fidelity, list[int]]
    budget_ns: dict[Fidelity, list[int]]
    decompress_ns: dict[Fidelity, int]


def shard_costs(manifest: Manifest, profile: DeviceProfile, fidelities: Collection[int]) -> ShardCosts:
    """Cost the versions of ``fidelities``.

    Raises: InputError if the bundle does not hold one, the profile lacks one or a submodel's width, or its
    figures are absurdly large.
    """
    regions = [region for region in manifest.regions if region.fidelity in fidelities]
    absent = sorted(set(fidelities) - {region.fidelity for region in regions})
    if absent:
        raise InputError(
            f"The bundle holds no versions at {_listing(absent)} bits.",
            f"Build it with these fidelities; it has {_listing(manifest.fidelities)}.",
        )
    profiled = {row.fidelity: row.p95_ns for row in reversed(profile.decompress)}
    missing = sorted({region.fidelity for region in regions} - profiled.keys())
    if missing:
        raise InputError(
            f"The device profile has no decompression time at {_listing(missing)} bits.",
            "Profile the device again with every fidelity of the bundle.",
        )
    widths = sorted({s.width for s in manifest.submodels} - {row.width for row in profile.compute})
    if widths:
        raise InputError(
            f"The device profile has no compute time for layers {_listing(widths)} slices wide, "
            "which submodels of the bundle have.",
            "Profile the device again with every width of the bundle.",
        )
    lengths = {region.fidelity: [v.length for v in region.versions] for region in regions}
    _check_extent(manifest, profile, len(regions), sum(map(sum, lengths.values())))
    sizes = {length for row in lengths.values() for length in row}
    io_ns = {length: profile.io.p95_ns(length) for length in sizes}
    budget_ns = {length: profile.io.budget_ns(length) for length in sizes}
    return ShardCosts(
        fidelities=tuple(region.fidelity for region in regions),
        heads=manifest.model.heads,
        lengths=lengths,
        io_ns={k: [io_ns[length] for length in row] for k, row in lengths.items()},
        budget_ns={k: [budget_ns[length] for length in row] for k, row in lengths.items()},
        decompress_ns={region.fidelity: profiled[region.fidelity] for region in regions},
    )


def plannable(manifest: Manifest, importance: ImportanceProfile) -> tuple[Fidelity, ...]:
    """The fidelities that a plan made by importance may use: those from the profile's base up.

    The base is the lowest at which the whole model is not at chance on the task; with fewer bits shards cost
    time and tell nothing. Raises: InputError when the bundle has none.
    """
    found = tuple(r.fidelity for r in manifest.regions if r.fidelity >= importance.base_fidelity)
    if not found:
        raise InputError(
            f"The importance profile's base is {importance.base_fidelity} bits, below which the model is at"
            " chance; the bundle holds no versions of so many.",
            f"Build it with more bits; it has {_listing(manifest.fidelities)}.",
        )
    return found


def _check_extent(manifest: Manifest, profile: DeviceProfile, regions: int, bytes_: int) -> None:
    """Costed versions read one after the other, and all N·M shards computed, stay below 2^63 bytes and ns:
    so 64 bits hold every sum of planning, in any language. Raises: InputError.
    """
    shards = manifest.model.layers * manifest.model.heads
    versions = regions * shards
    if bytes_ >= 1 << 63:
        raise InputError("The bundle's versions come to 2^63 bytes or more.", "Name another bundle.")
    read_ns = versions * profile.io.alpha_ns + bytes_ * profile.io.ps_per_byte // 1000
    cost = profile.read_cost
    worst_ns = -(-read_ns * max(profile.io.p95_ppm, PPM) // PPM) + versions
    total_ns = (
        -(-worst_ns * profile.io.beside_ppm // PPM)
        + versions
        + manifest.model.layers * max(max(row.median_ns, row.p95_ns) for row in profile.compute)
        + shards * max(max(row.median_ns, row.p95_ns) for row in profile.decompress)
        + manifest.model.layers * max(cost.median_layer_ns, cost.p95_layer_ns)
        + bytes_ * max(cost.median_ps_per_byte, cost.p95_ps_per_byte) // 1000
        + max(profile.fixed_median.total_ns, profile.fixed_p95.total_ns)
    )
    if total_ns >= 1 << 63:
        raise InputError(
            "By the device profile, reading and computing all of the bundle takes 2^63 ns or more.",
            "Profile the device again.",
        )


def shard_rows(submodel: Submodel, heads: int) -> list[int]:
    """Where each of the submodel's shards, layer-major, stands in the rows of ``ShardCosts``."""
    return [layer * heads + slice_ for layer in submodel.kept for slice_ in range(submodel.width)]


def layer_work(
    costs: ShardCosts,
    rows: Sequence[int],
    fidelities: Sequence[Fidelity],
    preloaded: Collection[int],
    layer: int,
    width: int,
    layer_ns: int,
) -> LayerWork:
    """What ``timeline.layer_works`` makes of one layer at p95 figures, without making a plan first.

    The rule of ``plan.merged_reads``: versions of one layer are adjacent in a region when their slices
    are, so a run of streamed neighbours at one fidelity is one read, up to the limit.
    """
    reads: list[tuple[int, int]] = []
    total, compute_ns, last = 0, layer_ns, 0
    for index in range(layer * width, (layer + 1) * width):
        fidelity = fidelities[index]
        compute_ns += costs.decompress_ns[fidelity]
        if index in preloaded:
            last = 0
            continue
        row = rows[index]
        length, ns = costs.lengths[fidelity][row], costs.io_ns[fidelity][row]
        if last == fidelity and reads[-1][0] + length <= MERGE_LIMIT_BYTES:
            reads[-1] = (reads[-1][0] + length, reads[-1][1] + ns)
        else:
            reads.append((length, ns))
        total += length
        last = fidelity
    return LayerWork(reads, total, compute_ns)


def largest_first(manifest: Manifest, *, wide_first: bool = False) -> list[Submodel]:
    """The bundle's submodels in the order planning tries them: most shards, then the deeper (or wider)."""
    return sorted(manifest.submodels, key=lambda s: (-s.shards, s.depth if wide_first else -s.depth))


def check_budgets(*, target_ns: int, preload_bytes: int, working_bytes: int) -> None:
    """Raises: InputError unless T > 0, |S| >= 0, W > 0, all below 2^63."""
    for name, value, least in (
        ("target latency", target_ns, 1),
        ("preload buffer", preload_bytes, 0),
        ("working buffer", working_bytes, 1),
    ):
        if not least <= value < 1 << 63:
            raise InputError(f"A {name} of {value} cannot be planned for.", f"Give at least {least}.")


def assemble_plan(
    manifest: Manifest,
    profile: DeviceProfile,
    submodel: Submodel,
    fidelities: Sequence[Fidelity],
    preloaded: Collection[int],
    *,
    planner: Planner,
    policy: Policy,
    mode: Mode,
    slack: bool,
    importance: str | None,
    target_ns: int,
    preload_bytes: int,
    working_bytes: int,
    flags: Sequence[str] = (),
) -> Plan:
    """Make the record. Read order is layer by layer, slices ascending.

    Shapes: ``fidelities`` [n·m]; ``preloaded`` holds indices into it.
    Raises: ResourceError if the working buffer cannot hold a layer of the plan.
    """
    bundle = manifest.digest
    versions = {region.fidelity: region.versions for region in manifest.regions}
    orders = {True: 0, False: 0}
    shards: list[PlannedShard] = []
    for index, fidelity in enumerate(fidelities):
        layer, slice_ = divmod(index, submodel.width)
        version = versions[fidelity][submodel.kept[layer] * manifest.model.heads + slice_]
        held = index in preloaded
        shards.append(
            PlannedShard(
                layer=layer,
                source_layer=submodel.kept[layer],
                slice=slice_,
                fidelity=fidelity,
                offset=version.offset,
                length=version.length,
                preloaded=held,
                order=orders[held],
            )
        )
        orders[held] += 1
    predicted = predict(
        shards, submodel.depth, submodel.width, profile, working_bytes=working_bytes, mode=mode
    )
    if predicted is None:
        raise ResourceError(
            f"A working buffer of {working_bytes} bytes cannot hold a layer of submodel {submodel}.",
            "Give a larger working buffer.",
        )
    return Plan(
        format="stifarm-plan",
        version=1,
        planner=planner,
        policy=policy,
        mode=mode,
        slack=slack,
        bundle=bundle,
        importance=importance,
        device_profile=profile.digest,
        target_ns=target_ns,
        preload_bytes=preload_bytes,
        working_bytes=working_bytes,
        sequence_length=profile.sequence_length,
        submodel=submodel,
        shards=tuple(shards),
        predicted=predicted,
        within_target=predicted.latency_ns <= target_ns,
        flags=(*profile_flags(manifest, bundle, profile), *flags),
    )


def profile_flags(manifest: Manifest, bundle: str, profile: DeviceProfile) -> tuple[str, ...]:
    """What a reader of the plan must be told about the inputs it rests on."""
    rules = (
        (UNFIT, bool(profile.unfit)),
        ("untrained-submodels", manifest.untrained),
        ("borrowed-profile", profile.bundle != bundle),
    )
    return tuple(flag for flag, applies in rules if applies)


def _listing(values: Collection[int]) -> str:
    return ", ".join(str(value) for value in values)
