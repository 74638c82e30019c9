"""How fast the native engine's kernels are on a layer of BERT-base shape, for every instruction set here.

    python -m bench.kernels [--tokens 128] [--threads 1 2] [--rounds 36]

Compiles bench/native_kernels.c as the agent is compiled. Times are the least of the rounds, which other
load on the machine disturbs least; shares are of the same run's times. "in cache" is decompression of a
whole layer into a tile by one thread, codes in cache; within a layer they come from memory.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from orchestrator.agent_push import MACHINES
from orchestrator.toolchain import SOURCE_FOLDERS, Sources, build_agent

ISAS = ("portable", "avx2", "avx512", "neon", "neon-dotprod")
MODES = ("fp32", "int8")
NO_SUCH_ISA = 3


def build() -> Path:
    """The C program for this machine."""
    runtime = Sources.below(SOURCE_FOLDERS[:1])
    program = Path(__file__).with_name("native_kernels.c")
    return build_agent(
        MACHINES[platform.machine()], sources=Sources((program, *runtime.files), runtime.headers)
    )


def measure(
    program: Path, isa: str, mode: str, threads: int, tokens: int, rounds: int
) -> list[dict[str, Any]] | None:
    """The program's lines, the machine's first; None where the CPU has no such instruction set."""
    with tempfile.TemporaryDirectory() as folder:
        command = [str(program), folder, isa, mode, str(threads), str(tokens), str(rounds)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == NO_SUCH_ISA:
        return None
    if done.returncode != 0:
        raise SystemExit(f"bench.kernels: {' '.join(command)}: {done.stderr.strip()}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def show(kernels: dict[str, Any], fidelities: list[dict[str, Any]]) -> None:
    """One table: a product alone, then the layer at each fidelity."""
    print(
        f"\n{kernels['isa']}, {kernels['mode']}, {kernels['threads']} thread(s), {kernels['tokens']} tokens: "
        f"product {kernels['product_gflops_1']:.0f} GFLOP/s, fp32 multiply-add peak "
        f"{kernels['peak_gflops_1']:.0f} (1 thread), {kernels['peak_gflops']:.0f} (all)"
    )
    print(
        f"{'bits':>6} {'layer ms':>9} {'median':>8} {'decompress ms':>14} {'share':>7} {'in cache, ms':>13}"
    )
    for row in fidelities:
        share = row["decompress_ms"] / row["layer_ms"]
        print(
            f"{row['fidelity']:>6} {row['layer_ms']:>9.3f} {row['layer_median_ms']:>8.3f} "
            f"{row['decompress_ms']:>14.3f} {share:>7.1%} {row['decode_1_ms']:>13.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=36)
    arguments = parser.parse_args()
    program = build()
    for isa in ISAS:
        for mode in MODES:
            for threads in arguments.threads:
                lines = measure(program, isa, mode, threads, arguments.tokens, arguments.rounds)
                if lines is not None:
                    show(lines[0], lines[1:])


if __name__ == "__main__":
    main()
