"""Small random-weight models, bundles and hand-made plans for tests."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal

import numpy as np

from sti_runtime.bundle import Bundle
from sti_runtime.bundle_build import Sensitivity, build_bundle
from sti_runtime.embedding_rows import Request
from sti_runtime.manifest import Manifest, SensitivityInfo
from sti_runtime.model import HeadConfig, ModelConfig, Submodel, all_submodels, tensor_shapes
from sti_runtime.plan import Plan, PlannedShard, Prediction
from sti_runtime.plan_build import Fidelity
from sti_runtime.quantizer import GOBO, Quantizer
from sti_runtime.shard import F32, FIDELITIES, SHARDED_WEIGHTS

HEAD = HeadConfig(pooling="cls", activation="tanh", labels=("negative", "positive"))


def small_config(
    *, layers: int = 3, heads: int = 4, hidden: int = 64, ffn: int = 128, head: HeadConfig | None = HEAD
) -> ModelConfig:
    """A BERT of small shape."""
    return ModelConfig(
        family="bert",
        layers=layers,
        heads=heads,
        hidden=hidden,
        ffn=ffn,
        vocab=200,
        positions=48,
        position_offset=0,
        token_types=2,
        layer_norm_eps=1e-12,
        activation="gelu",
        pad_id=0,
        head=head,
    )


def random_tensors(config: ModelConfig, seed: int = 1) -> dict[str, F32]:
    """Canonical tensors of plausible scale."""
    generator = np.random.default_rng(seed)
    tensors: dict[str, F32] = {}
    for name, shape in tensor_shapes(config).items():
        values = generator.standard_normal(shape, np.float32)
        tensors[name] = 1 + 0.1 * values if name.endswith("norm.weight") else 0.08 * values
    return tensors


def random_sensitivity(config: ModelConfig, seed: int = 2) -> Sensitivity:
    """Sensitivities as uneven as real ones: a tenth of the weights has nearly all."""
    info = SensitivityInfo(task="sst-2", rows=seed, rows_digest="5" * 64)

    def measure() -> dict[str, F32]:
        generator = np.random.default_rng(seed)
        shapes = tensor_shapes(config)
        names = [
            f"layers.{i}.{name}.weight" for i in range(config.layers) for name in SHARDED_WEIGHTS.values()
        ]
        return {name: generator.standard_normal(shapes[name], np.float32) ** 8 for name in names}

    return Sensitivity(info, measure)


def make_bundle(
    config: ModelConfig,
    folder: Path,
    seed: int = 1,
    submodels: tuple[Submodel, ...] = (),
    fidelities: tuple[int, ...] = FIDELITIES,
    quantizer: Quantizer = GOBO,
) -> tuple[Bundle, dict[str, F32]]:
    """Build a bundle of random weights and open it; ``submodels`` are offered besides all n × m."""
    tensors = random_tensors(config, seed)
    path = build_bundle(
        config,
        tensors,
        model_digest="0" * 64,
        submodels=all_submodels(config.layers, config.heads) + submodels,
        untrained=True,
        out_root=folder,
        fidelities=fidelities,
        quantizer=quantizer,
        sensitivity=random_sensitivity(config) if quantizer.codec == "fisher" else None,
    )
    return Bundle.open(path), tensors


def make_request(config: ModelConfig, tokens: int = 24, length: int = 17, seed: int = 3) -> Request:
    """A random row: ``length`` real tokens, then padding."""
    generator = np.random.default_rng(seed)
    ids = generator.integers(1, config.vocab, tokens, np.int32)
    ids[length:] = config.pad_id
    types = (np.arange(tokens) >= length // 2).astype(np.int32)
    return Request(input_ids=ids, token_types=types, length=length)


def hand_plan(
    manifest: Manifest,
    submodel: Submodel,
    fidelity: Callable[[int, int], Fidelity],
    *,
    preloaded: Collection[tuple[int, int]] = (),
    tokens: int = 24,
    mode: Literal["pipeline", "load-exec"] = "pipeline",
    working_bytes: int | None = None,
    preload_bytes: int | None = None,
) -> Plan:
    """A plan by hand: ``fidelity(layer, slice)``; buffers just large enough unless given."""
    orders = {True: 0, False: 0}
    shards = []
    for layer, source in enumerate(submodel.kept):
        for slice_ in range(submodel.width):
            bits = fidelity(layer, slice_)
            version = manifest.shard_version(source, slice_, bits)
            held = (layer, slice_) in preloaded
            shards.append(
                PlannedShard(
                    layer=layer,
                    source_layer=source,
                    slice=slice_,
                    fidelity=bits,
                    offset=version.offset,
                    length=version.length,
                    preloaded=held,
                    order=orders[held],
                )
            )
            orders[held] += 1
    held_bytes = sum(s.length for s in shards if s.preloaded)
    streamed_bytes = sum(s.length for s in shards if not s.preloaded)
    return Plan(
        format="stifarm-plan",
        version=1,
        planner="paper",
        policy="sti",
        mode=mode,
        slack=True,
        bundle=manifest.digest,
        importance=None,
        device_profile="1" * 64,
        target_ns=10**9,
        preload_bytes=held_bytes if preload_bytes is None else preload_bytes,
        working_bytes=max(1, streamed_bytes) if working_bytes is None else working_bytes,
        sequence_length=tokens,
        submodel=submodel,
        shards=tuple(shards),
        predicted=Prediction(latency_ns=0, median_latency_ns=0, fixed_ns=0, stall_ns=0, layers=()),
        within_target=True,
        flags=(),
    )
