"""The plan: which shard versions to read, in which order, for one (model, task, device, T, |S|, W).

Frozen, validated once, executed identically by every engine: an engine makes no choices.
Integers only; times in ns, sizes in bytes.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sti_runtime.manifest import ALIGNMENT
from sti_runtime.model import Submodel
from sti_runtime.records import Digest, NonNegative, Positive, Record

PLAN_CAP_BYTES = 4 << 20
MERGE_LIMIT_BYTES = 1 << 20
"""Neighbouring versions are read as one up to this size (see ``merged_reads``)."""

Policy = Literal[
    "sti", "sti-0mb", "exact", "exact-io", "random", "no-slack", "uniform", "wide-first", "load-exec",
    "std-pipeline-2", "std-pipeline-6", "std-pipeline-32", "preload-6", "preload-32",
]  # fmt: skip
"""What is compared; see sti_runtime.policies."""


Planner = Literal["paper", "baseline", "exact"]
"""Who made a plan."""


class PlannedShard(Record):
    """One shard version: position ``layer`` in the submodel, ``source_layer`` in the bundle.

    ``offset`` and ``length`` locate it in the region of ``fidelity``. Streamed shards carry their read
    ``order`` 0, 1, …; preloaded shards theirs too, in a sequence of their own (read when cold).
    """

    layer: NonNegative
    source_layer: NonNegative
    slice: NonNegative
    fidelity: Literal[2, 3, 4, 5, 6, 32]
    offset: NonNegative
    length: Positive
    preloaded: bool
    order: NonNegative


class LayerTime(Record):
    """Predicted timeline of one layer in ns from the request: IO and compute, start and end."""

    io_start_ns: NonNegative
    io_end_ns: NonNegative
    compute_start_ns: NonNegative
    compute_end_ns: NonNegative


class Prediction(Record):
    """What the planner expects of a warm request, at the profile's p95 and median figures.

    ``stall_ns``: time the compute thread waits for shards (p95 timeline). ``layers``: p95 timeline.
    """

    latency_ns: NonNegative
    median_latency_ns: NonNegative
    fixed_ns: NonNegative
    stall_ns: NonNegative
    layers: tuple[LayerTime, ...]


class Plan(Record):
    """One plan. ``mode`` "load-exec" computes only after every read has ended.

    ``preload_bytes`` is |S|, ``working_bytes`` is W. ``within_target``: the prediction meets T.
    ``flags``: "unfit-profile", "untrained-submodels", "borrowed-profile", "seed-N",
    "unproven-N-ppm" where they apply.
    """

    format: Literal["stifarm-plan"]
    version: Literal[1]
    planner: Planner
    policy: Policy
    mode: Literal["pipeline", "load-exec"]
    slack: bool
    bundle: Digest
    importance: Digest | None
    device_profile: Digest
    target_ns: Positive
    preload_bytes: NonNegative
    working_bytes: Positive
    sequence_length: Positive
    submodel: Submodel
    shards: tuple[PlannedShard, ...] = Field(min_length=1)
    predicted: Prediction
    within_target: bool
    flags: tuple[str, ...]

    @model_validator(mode="after")
    def _consistent(self) -> Plan:
        ids = [(s.layer, s.slice) for s in self.shards]
        n, m = self.submodel.depth, self.submodel.width
        if len(ids) != n * m or ids != [(i, j) for i in range(n) for j in range(m)]:
            raise ValueError(f"shards must be the {n}×{m} of the submodel, layer-major")
        for shard in self.shards:
            if shard.source_layer != self.submodel.kept[shard.layer]:
                raise ValueError(f"shard {shard.layer},{shard.slice}: not its submodel's layer")
            if shard.offset % ALIGNMENT or shard.length % ALIGNMENT:
                raise ValueError(f"shard {shard.layer},{shard.slice}: misaligned")
        if self.preloaded_bytes > self.preload_bytes:
            raise ValueError(f"preloads {self.preloaded_bytes} bytes into a buffer of {self.preload_bytes}")
        for group in (self.streamed(), self.preloaded()):
            if [s.order for s in group] != list(range(len(group))):
                raise ValueError("read orders must be 0, 1, 2, … without gaps")
        return self

    def streamed(self) -> tuple[PlannedShard, ...]:
        """Shards read from storage in every request, in read order."""
        return tuple(sorted((s for s in self.shards if not s.preloaded), key=lambda s: s.order))

    def preloaded(self) -> tuple[PlannedShard, ...]:
        """Shards of the preload buffer, in read order (bottom layers first)."""
        return tuple(sorted((s for s in self.shards if s.preloaded), key=lambda s: s.order))

    @property
    def preloaded_bytes(self) -> int:
        """Bytes the preload buffer holds."""
        return sum(s.length for s in self.shards if s.preloaded)

    @property
    def streamed_bytes(self) -> int:
        """Shard bytes a warm request reads (embedding rows not included)."""
        return sum(s.length for s in self.shards if not s.preloaded)

    @property
    def mean_fidelity_milli(self) -> int:
        """Mean bits per weight over the planned shards, in thousandths."""
        return 1000 * sum(s.fidelity for s in self.shards) // len(self.shards)

    @property
    def content_digest(self) -> str:
        """Digest of what determines the logits: bundle, submodel, fidelities. Accuracy is keyed by it."""
        return _Content(
            bundle=self.bundle,
            submodel=self.submodel,
            sequence_length=self.sequence_length,
            fidelities=tuple(s.fidelity for s in self.shards),
        ).digest


class _Content(Record):
    bundle: Digest
    submodel: Submodel
    sequence_length: Positive
    fidelities: tuple[int, ...]


class MergedRead(Record):
    """One read of the executor: ``shards`` are neighbours in one region, in order.

    ``fidelity`` names the region; all shards belong to one submodel layer.
    """

    layer: NonNegative
    fidelity: int
    offset: NonNegative
    length: Positive
    shards: tuple[PlannedShard, ...]


def merged_reads(shards: tuple[PlannedShard, ...]) -> tuple[MergedRead, ...]:
    """Merge shards (already in read order) into reads: same layer, same region, adjacent bytes,
    at most MERGE_LIMIT_BYTES unless a single version is larger. Deterministic: part of the format.
    """
    groups: list[list[PlannedShard]] = []
    for shard in shards:
        last = groups[-1] if groups else None
        if (
            last is not None
            and last[-1].layer == shard.layer
            and last[-1].fidelity == shard.fidelity
            and last[-1].offset + last[-1].length == shard.offset
            and shard.offset + shard.length - last[0].offset <= MERGE_LIMIT_BYTES
        ):
            last.append(shard)
        else:
            groups.append([shard])
    return tuple(
        MergedRead(
            layer=group[0].layer,
            fidelity=group[0].fidelity,
            offset=group[0].offset,
            length=group[-1].offset + group[-1].length - group[0].offset,
            shards=tuple(group),
        )
        for group in groups
    )
