"""Quantize and pack a BERT-base-shaped random model at all fidelities.

    python -m bench.quantize [--layers 12] [--folder DIR]

Prints the seconds of the whole build (flushed to storage), the peak memory of the process and the
bytes per fidelity. The bound: under 180 s and 4 GB on 2 cores.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import time
from pathlib import Path

import numpy as np

from sti_runtime.bundle import Bundle
from sti_runtime.bundle_build import build_bundle
from sti_runtime.decode import LayerScratch, decode_shard
from sti_runtime.model import HeadConfig, ModelConfig, all_submodels, tensor_shapes
from sti_runtime.shard import F32
from sti_runtime.units import format_bytes


def bert_base(layers: int) -> ModelConfig:
    """BERT-base with a two-label head."""
    return ModelConfig(
        family="bert",
        layers=layers,
        heads=12,
        hidden=768,
        ffn=3072,
        vocab=30522,
        positions=512,
        position_offset=0,
        token_types=2,
        layer_norm_eps=1e-12,
        activation="gelu",
        pad_id=0,
        head=HeadConfig(pooling="cls", activation="tanh", labels=("0", "1")),
    )


def random_tensors(config: ModelConfig, std: float = 0.04) -> dict[str, F32]:
    """Gaussian weights of a typical scale, from a fixed seed."""
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape, np.float32) * np.float32(std)
        for name, shape in tensor_shapes(config).items()
    }


def peak_bytes() -> int:
    """VmHWM of this process."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def decode_layer_ms(bundle: Bundle, fidelity: int, rounds: int = 7) -> float:
    """Median time to decode one full-width layer on one thread, in milliseconds."""
    config = bundle.manifest.model
    region = np.fromfile(bundle.region_path(fidelity), np.uint8, count=64 << 20)
    scratch = LayerScratch.allocate(config, config.heads)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for index in range(config.heads):
            version = bundle.manifest.shard_version(0, index, fidelity)
            payload = region[version.offset : version.offset + version.length]
            decode_shard(payload, config, fidelity, version.outliers, scratch, index)
        times.append(time.perf_counter() - start)
    return 1e3 * sorted(times)[rounds // 2]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--folder", type=Path, default=None, help="where to build; removed afterwards")
    arguments = parser.parse_args()
    config = bert_base(arguments.layers)
    tensors = random_tensors(config)
    model_bytes = sum(tensor.nbytes for tensor in tensors.values())
    before = peak_bytes()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        start = time.perf_counter()
        path = build_bundle(
            config,
            tensors,
            model_digest="0" * 64,
            submodels=all_submodels(config.layers, config.heads),
            untrained=True,
            out_root=Path(folder),
        )
        built_s = time.perf_counter() - start
        peak = peak_bytes()
        start = time.perf_counter()
        bundle = Bundle.open(path, verify=True)
        verified_s = time.perf_counter() - start
        shape = f"{config.layers}×{config.heads}×{config.hidden}"
        print(f"model            {shape}, {format_bytes(model_bytes)} float32")
        print(f"cores            {len(os.sched_getaffinity(0))}")
        print(f"build            {built_s:.1f} s (quantize, pack, digest, write, flush)")
        print(f"verify           {verified_s:.2f} s")
        print(f"peak memory      {format_bytes(peak)} (of which before the build {format_bytes(before)})")
        print(f"digest           {bundle.digest}")
        for name, size in sorted(bundle.file_sizes().items()):
            print(f"{name:16} {format_bytes(size)}")
        for fidelity in bundle.manifest.fidelities:
            print(f"decode a layer   {decode_layer_ms(bundle, fidelity):.2f} ms at {fidelity} bits, 1 thread")


if __name__ == "__main__":
    main()
