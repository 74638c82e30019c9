"""Made-up manifests, importance and device profiles of any size, for the planner's tests and benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sti_runtime.importance_profile import ImportanceProfile
from sti_runtime.manifest import Manifest
from sti_runtime.model import ModelConfig, Submodel, all_submodels
from sti_runtime.profile import PPM, DeviceProfile

PAGE = 4096
MODEL_DIGEST = "d" * 64


def make_manifest(
    layers: int,
    heads: int,
    length_of: Callable[[int, int, int], int],
    *,
    fidelities: Sequence[int] = (2, 3, 4, 5, 6, 32),
    submodels: tuple[Submodel, ...] | None = None,
    untrained: bool = False,
) -> Manifest:
    """A manifest whose version of (layer, slice, fidelity) is ``length_of`` bytes, a multiple of 4096."""
    regions: list[dict[str, Any]] = []
    for fidelity in fidelities:
        offset, versions = 0, []
        for index in range(layers * heads):
            length = length_of(index // heads, index % heads, fidelity)
            versions.append(
                {
                    "offset": offset,
                    "length": length,
                    "payload_bytes": length,
                    "outliers": (0,) * 6,
                    "sha256": f"{index:064x}",
                }
            )
            offset += length
        regions.append({"fidelity": fidelity, "file": f"k{fidelity}.bin", "versions": tuple(versions)})
    return Manifest.model_validate(
        {
            "format": "stifarm-bundle",
            "version": 1,
            "model": ModelConfig(
                family="bert",
                layers=layers,
                heads=heads,
                hidden=heads * 4,
                ffn=heads * 16,
                vocab=100,
                positions=64,
                position_offset=0,
                token_types=2,
                layer_norm_eps=1e-12,
                activation="gelu",
                pad_id=0,
                head=None,
            ),
            "model_digest": MODEL_DIGEST,
            "untrained": untrained,
            "submodels": all_submodels(layers, heads) if submodels is None else submodels,
            "quantizer": {"name": "gobo", "refined": True, "outlier_log_density_milli": -4000},
            "regions": tuple(regions),
            "resident": (),
            "embeddings": (),
            "files": (),
        }
    )


def proportional(unit_bytes: int) -> Callable[[int, int, int], int]:
    """Versions of fidelity · ``unit_bytes``."""
    return lambda layer, slice_, fidelity: fidelity * unit_bytes


def make_importance(layers: int, heads: int, losses: Sequence[int] | None = None) -> ImportanceProfile:
    """Scores with these losses (lower: more important); by default in order, shard (0, 0) first."""
    values = range(layers * heads) if losses is None else losses
    return ImportanceProfile.model_validate(
        {
            "format": "stifarm-importance",
            "version": 1,
            "model_digest": MODEL_DIGEST,
            "task": "made-up",
            "split_digest": "5" * 64,
            "method": "exhaustive",
            "base_fidelity": 2,
            "rows": 100,
            "base": {"loss_nano": 10**9, "correct": 50},
            "reliability_ppm": PPM,
            "layers": layers,
            "slices": heads,
            "scores": tuple(
                {"layer": i // heads, "slice": i % heads, "score": {"loss_nano": loss, "correct": 50}}
                for i, loss in enumerate(values)
            ),
        }
    )


def make_profile(
    *,
    bundle: str,
    layer_ns: Mapping[int, int],
    decompress_ns: Mapping[int, int],
    alpha_ns: int = 0,
    ps_per_byte: int = 0,
    p95_ppm: int = PPM,
    beside_ppm: int = PPM,
    layer_ns_beside: int = 0,
    ps_per_byte_beside: int = 0,
    embed_io_ns: int = 0,
    embed_compute_ns: int = 0,
    head_ns: int = 0,
    median_percent: int = 100,
    unfit: tuple[str, ...] = (),
) -> DeviceProfile:
    """A profile with these p95 figures; medians are ``median_percent`` of them (IO: p95_ppm apart)."""

    def rows(key: str, figures: Mapping[int, int]) -> tuple[dict[str, int], ...]:
        return tuple(
            {key: k, "median_ns": ns * median_percent // 100, "p95_ns": ns, "samples": 9}
            for k, ns in sorted(figures.items())
        )

    fixed = {"embed_io_ns": embed_io_ns, "embed_compute_ns": embed_compute_ns, "head_ns": head_ns}
    return DeviceProfile.model_validate(
        {
            "format": "stifarm-device-profile",
            "version": 1,
            "bundle": bundle,
            "engine": "torch",
            "sequence_length": 32,
            "threads": 2,
            "queue_depth": 1,
            "emulated": False,
            "io": {
                "alpha_ns": alpha_ns,
                "ps_per_byte": ps_per_byte,
                "p95_ppm": p95_ppm,
                "error_ppm": 0,
                "samples": 9,
                "beside_ppm": beside_ppm,
                "beside_samples": 9,
            },
            "compute": rows("width", layer_ns),
            "decompress": rows("fidelity", decompress_ns),
            "read_cost": {
                "median_layer_ns": layer_ns_beside * median_percent // 100,
                "p95_layer_ns": layer_ns_beside,
                "median_ps_per_byte": ps_per_byte_beside * median_percent // 100,
                "p95_ps_per_byte": ps_per_byte_beside,
                "samples": 9,
            },
            "fixed_median": {k: v * median_percent // 100 for k, v in fixed.items()} | {"samples": 9},
            "fixed_p95": fixed | {"samples": 9},
            "unfit": unfit,
        }
    )
