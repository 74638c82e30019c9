"""How long planning takes for a BERT-base-shaped bundle (12 × 12 shards, six fidelities).

    python -m bench.planner [--rounds 3] [--trained]

Plans a grid of (T, |S|, W) and prints the median with its 95 % interval (order statistics), the largest,
and the simulation's share: calls per plan (counted) times the time of one call (measured
apart on the finished plan, whose reads are the most: an upper estimate).
W "ample" never binds, so there the search needs no simulation; "tight" holds little more than one layer.
All inputs are made up; the shapes and sizes are BERT-base's, the device reads 100 MB/s.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import random
import time
from dataclasses import dataclass
from pathlib import Path

from sti_runtime import timeline
from sti_runtime.errors import InfeasiblePlanError
from sti_runtime.importance_profile import ImportanceProfile
from sti_runtime.manifest import Manifest
from sti_runtime.model import elastic_submodels
from sti_runtime.plan import Plan
from sti_runtime.planner import plan_paper
from sti_runtime.profile import DeviceProfile
from tests.unit.planning_data import PAGE, make_importance, make_manifest, make_profile

LAYERS = HEADS = 12
WEIGHTS_PER_SHARD = 12 * 768 * 768 // 12
TARGETS_MS = (3, 100, 150, 200, 300, 400, 600, 1000, 2000, 5000)
PRELOADS_BYTES = (0, 1_000_000, 2_000_000, 5_000_000)
WORKING_BYTES = {"ample": 1 << 30, "tight": 2_500_000}


@dataclass(frozen=True)
class Setting:
    """What every plan of the benchmark is made from."""

    manifest: Manifest
    importance: ImportanceProfile
    profile: DeviceProfile


def make_setting(
    trained: bool, *, layers: int = LAYERS, heads: int = HEADS, weights: int = WEIGHTS_PER_SHARD
) -> Setting:
    """BERT-base: 589,824 weights per shard; layer compute and IO such that IO is the bottleneck."""

    def length(layer: int, slice_: int, fidelity: int) -> int:
        outliers = 0 if fidelity == 32 else 200 + (layer * 37 + slice_ * 11) % 900
        payload = weights * fidelity // 8 + 8 * outliers + 256
        return -(-payload // PAGE) * PAGE

    submodels = elastic_submodels(layers, heads) if trained else None
    manifest = make_manifest(layers, heads, length, submodels=submodels)
    losses = list(range(layers * heads))
    random.Random(0).shuffle(losses)
    profile = make_profile(
        bundle=manifest.digest,
        layer_ns={m: 500_000 + 300_000 * m for m in range(1, heads + 1)},
        decompress_ns={2: 30_000, 3: 35_000, 4: 40_000, 5: 45_000, 6: 50_000, 32: 60_000},
        alpha_ns=5_000,
        ps_per_byte=10_000,
        p95_ppm=1_150_000,
        embed_io_ns=2_000_000,
        embed_compute_ns=100_000,
        head_ns=100_000,
        median_percent=80,
    )
    return Setting(manifest, make_importance(layers, heads, losses), profile)


def plan(setting: Setting, target_ns: int, preload_bytes: int, working_bytes: int) -> Plan | None:
    """One plan; None when the target is infeasible (that is timed as well)."""
    try:
        return plan_paper(
            setting.manifest,
            setting.importance,
            setting.profile,
            target_ns=target_ns,
            preload_bytes=preload_bytes,
            working_bytes=working_bytes,
        )
    except InfeasiblePlanError:
        return None


def simulation_share(setting: Setting, made: Plan, elapsed_s: float) -> tuple[int, float]:
    """Calls of the simulation in planning this again, and their share of ``elapsed_s``."""
    profiler = cProfile.Profile()
    profiler.runcall(plan, setting, made.target_ns, made.preload_bytes, made.working_bytes)
    stats: dict[tuple[str, int, str], tuple[int, ...]] = vars(pstats.Stats(profiler))["stats"]
    name = Path(timeline.__file__).name
    calls = sum(
        row[1]
        for (file, _, function), row in stats.items()
        if Path(file).name == name and function == "simulate"
    )
    works = timeline.layer_works(
        made.shards, made.submodel.depth, made.submodel.width, setting.profile, p95=True
    )
    start = time.perf_counter()
    for _ in range(20):
        timeline.simulate(works, setting.profile.fixed_p95, made.working_bytes)
    one_s = (time.perf_counter() - start) / 20
    return calls, calls * one_s / elapsed_s


def summary(values_s: list[float]) -> str:
    """Median, its 95 % interval by order statistics, and the largest, in ms."""
    ordered = sorted(values_s)
    n = len(ordered)
    half = 0.98 * n**0.5
    low, high = ordered[max(0, int(n / 2 - half))], ordered[min(n - 1, int(n / 2 + half))]
    return (
        f"median {ordered[n // 2] * 1e3:6.2f} ms  [{low * 1e3:.2f}, {high * 1e3:.2f}]  "
        f"largest {ordered[-1] * 1e3:6.2f} ms  of {n}"
    )


def main() -> None:
    """Run the grid and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trained", action="store_true", help="only DynaBERT's 12 submodels, not all 144")
    options = parser.parse_args()
    setting = make_setting(options.trained)
    print(
        f"{LAYERS} × {HEADS} shards, {len(setting.manifest.fidelities)} fidelities, "
        f"{len(setting.manifest.submodels)} submodels; {options.rounds} rounds"
    )
    for name, working_bytes in WORKING_BYTES.items():
        feasible: list[float] = []
        infeasible: list[float] = []
        counts: list[int] = []
        shares: list[float] = []
        for round_ in range(options.rounds):
            for target_ms in TARGETS_MS:
                for preload_bytes in PRELOADS_BYTES:
                    start = time.perf_counter()
                    made = plan(setting, target_ms * 10**6, preload_bytes, working_bytes)
                    elapsed_s = time.perf_counter() - start
                    (infeasible if made is None else feasible).append(elapsed_s)
                    if made is not None and round_ == 0:
                        count, share = simulation_share(setting, made, elapsed_s)
                        counts.append(count)
                        shares.append(share)
        print(f"W {name:5}  plans       {summary(feasible)}")
        print(
            f"         simulation  {sorted(counts)[len(counts) // 2]} calls in the median plan, "
            f"{max(counts)} at most; about {sorted(shares)[len(shares) // 2]:.0%} of the median plan's time"
        )
        if infeasible:
            print(f"         infeasible  {summary(infeasible)}")


if __name__ == "__main__":
    main()
