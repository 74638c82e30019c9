"""The configurations that importance scores as plans of the whole model, for engines that score plans."""

from __future__ import annotations

from collections.abc import Collection

from sti_runtime.manifest import Manifest
from sti_runtime.model import Submodel
from sti_runtime.plan import Plan, PlannedShard, Prediction
from sti_runtime.plan_build import Fidelity
from sti_runtime.shard import ShardId

_NO_PROFILE = "0" * 64


def configuration_plan(
    manifest: Manifest, base: Fidelity, high: Fidelity, raised: Collection[ShardId], *, tokens: int
) -> Plan:
    """All shards at ``base`` bits but the ``raised`` ones at ``high``; to be evaluated, never timed.

    It rests on no device profile and predicts nothing. Raises: KeyError for a fidelity the bundle lacks.
    """
    config = manifest.model
    shards: list[PlannedShard] = []
    for layer in range(config.layers):
        for index in range(config.heads):
            bits = high if (layer, index) in raised else base
            version = manifest.shard_version(layer, index, bits)
            shards.append(
                PlannedShard(
                    layer=layer,
                    source_layer=layer,
                    slice=index,
                    fidelity=bits,
                    offset=version.offset,
                    length=version.length,
                    preloaded=False,
                    order=len(shards),
                )
            )
    return Plan(
        format="stifarm-plan",
        version=1,
        planner="baseline",
        policy="uniform",
        mode="load-exec",
        slack=False,
        bundle=manifest.digest,
        importance=None,
        device_profile=_NO_PROFILE,
        target_ns=1,
        preload_bytes=0,
        working_bytes=sum(shard.length for shard in shards),
        sequence_length=tokens,
        submodel=Submodel(kept=tuple(range(config.layers)), width=config.heads),
        shards=tuple(shards),
        predicted=Prediction(latency_ns=0, median_latency_ns=0, fixed_ns=0, stall_ns=0, layers=()),
        within_target=False,
        flags=(),
    )
