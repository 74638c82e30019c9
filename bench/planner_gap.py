"""How far the planner ``paper`` is from ``exact``, and what ``exact`` costs, on a BERT-base-shaped bundle.

    python -m bench.planner_gap [--per-cell 3] [--joint] [--trained] [--working BYTES]
        [--layers 6 --hidden 384]

Sweeps T (as the share of the whole model's compute plus reads at 6 bits), |S|, IO speed and compute speed;
importance is drawn anew (seeded) for each plan. Gap: how much less gain ``paper`` expects than ``exact``, of
the gain from all of the submodel's shards at 2 bits to all at 32. Times are of the CPU, of one thread.
Medians with 95 % intervals (order statistics). All inputs are made up; reads beside compute take 1.3 times as
long, and add 0.03 ms a layer and 0.5 ns a byte to it.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import defaultdict
from dataclasses import dataclass, replace

from bench.planner import HEADS, LAYERS, Setting, make_setting
from sti_runtime.errors import InfeasiblePlanError
from sti_runtime.exact import plan_exact
from sti_runtime.gain import GainModel
from sti_runtime.planner import plan_paper
from tests.unit.planning_data import make_importance

TARGET_SHARES = (20, 40, 70, 100)
PRELOADS_BYTES = (0, 1_000_000, 5_000_000)
IO_PS_PER_BYTE = (1_000, 10_000, 50_000)
COMPUTE_PERCENT = (50, 100, 400)
WORKING_BYTES = 1 << 30


@dataclass(frozen=True)
class Sample:
    """One plan of each planner. ``gap``: of what fidelity can gain; ``unproven``: what it may lack."""

    keys: dict[str, str]
    gap: float
    unproven: float
    elapsed_s: float


def device(setting: Setting, ps_per_byte: int, compute_percent: int) -> Setting:
    """The same bundle on a device of other speeds."""
    profile = setting.profile
    compute = tuple(
        row.model_copy(update={"p95_ns": row.p95_ns * compute_percent // 100}) for row in profile.compute
    )
    io = profile.io.model_copy(update={"ps_per_byte": ps_per_byte, "beside_ppm": 1_300_000})
    read = profile.read_cost.model_copy(update={"p95_layer_ns": 30_000, "p95_ps_per_byte": 500})
    changed = {"compute": compute, "io": io, "read_cost": read}
    return replace(setting, profile=profile.model_copy(update=changed))


def drawn_importance(setting: Setting, seed: int) -> Setting:
    """Gains of a few strong shards and many weak ones, the lower layers' a little larger."""
    rng, model = random.Random(seed), setting.manifest.model
    shards = model.layers * model.heads
    gains = [int(rng.lognormvariate(0, 1.2) * 1e6 * (1.5 - index / shards)) for index in range(shards)]
    importance = make_importance(model.layers, model.heads, [10**9 - gain for gain in gains])
    return replace(setting, importance=importance)


def target_of(setting: Setting, share: int) -> int:
    """T: ``share`` percent of computing all layers and reading them at 6 bits, one after the other."""
    profile, manifest = setting.profile, setting.manifest
    six = next(region for region in manifest.regions if region.fidelity == 6)
    reads_ns = sum(profile.io.budget_ns(version.length) for version in six.versions)
    layers, heads = manifest.model.layers, manifest.model.heads
    return profile.fixed_p95.total_ns + (layers * profile.t_comp_ns(heads) + reads_ns) * share // 100


def sample(
    setting: Setting,
    keys: dict[str, str],
    target_ns: int,
    preload_bytes: int,
    *,
    joint: bool,
    working_bytes: int = WORKING_BYTES,
) -> Sample | None:
    """Both planners on one problem; None when ``paper`` has no plan."""
    gains = GainModel.of(setting.importance)
    try:
        paper = plan_paper(
            setting.manifest,
            setting.importance,
            setting.profile,
            target_ns=target_ns,
            preload_bytes=preload_bytes,
            working_bytes=working_bytes,
        )
    except InfeasiblePlanError:
        return None
    start = time.process_time()
    exact = plan_exact(
        setting.manifest,
        setting.importance,
        setting.profile,
        target_ns=target_ns,
        preload_bytes=preload_bytes,
        working_bytes=working_bytes,
        joint=joint,
    )
    elapsed_s = time.process_time() - start
    rows = [s.source_layer * setting.manifest.model.heads + s.slice for s in paper.shards]
    at_stake = gains.choice_nano(rows, [32] * len(rows)) - gains.choice_nano(rows, [2] * len(rows))
    unproven = [int(flag.split("-")[1]) for flag in exact.flags if flag.startswith("unproven")]
    gap = (gains.plan_nano(exact) - gains.plan_nano(paper)) / at_stake
    return Sample(keys, gap, sum(unproven) / 1e6, elapsed_s)


def interval(values: list[float]) -> tuple[float, float, float]:
    """Median and its 95 % interval by order statistics."""
    ordered, n = sorted(values), len(values)
    half = 0.98 * n**0.5
    return ordered[n // 2], ordered[max(0, int(n / 2 - half))], ordered[min(n - 1, int(n / 2 + half))]


def row(name: str, samples: list[Sample]) -> str:
    """A line of the table."""
    gaps, times = [100 * s.gap for s in samples], [1000 * s.elapsed_s for s in samples]
    gap, low, high = interval(gaps)
    time_, early, late = interval(times)
    return (
        f"| {name} | {len(samples)} | {gap:.2f} [{low:.2f}, {high:.2f}] | {max(gaps):.1f} "
        f"| {time_:.0f} [{early:.0f}, {late:.0f}] | {max(times):.0f} "
        f"| {sum(s.unproven > 0 for s in samples)} | {max(100 * s.unproven for s in samples):.2f} |"
    )


def main() -> None:
    """Run the sweep and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--per-cell", type=int, default=1, help="importance profiles drawn for each cell")
    parser.add_argument("--joint", action="store_true", help="exact chooses the submodel too")
    parser.add_argument("--trained", action="store_true", help="DynaBERT's 12 submodels, not only the whole")
    parser.add_argument("--working", type=int, default=WORKING_BYTES, help="W in bytes; ample unless given")
    parser.add_argument("--layers", type=int, default=LAYERS, help="layers, of 12 heads")
    parser.add_argument("--hidden", type=int, default=768, help="hidden size: 384 as MiniLM")
    options = parser.parse_args()
    base = make_setting(trained=True, layers=options.layers, weights=options.hidden**2)
    if not options.trained and not options.joint:
        whole = tuple(s for s in base.manifest.submodels if s.shards == options.layers * HEADS)
        base = replace(base, manifest=base.manifest.model_copy(update={"submodels": whole}))
    samples: list[Sample] = []
    for share in TARGET_SHARES:
        for preload_bytes in PRELOADS_BYTES:
            for ps_per_byte in IO_PS_PER_BYTE:
                for percent in COMPUTE_PERCENT:
                    for repeat in range(options.per_cell):
                        setting = drawn_importance(device(base, ps_per_byte, percent), len(samples) + repeat)
                        keys = {
                            "T": f"{share} %",
                            "\\|S\\|": f"{preload_bytes / 1e6:g} MB",
                            "IO": f"{1_000_000 // ps_per_byte} MB/s",
                            "compute": f"{percent} %",
                        }
                        made = sample(
                            setting,
                            keys,
                            target_of(setting, share),
                            preload_bytes,
                            joint=options.joint,
                            working_bytes=options.working,
                        )
                        samples += [] if made is None else [made]
    print("| | plans | gap of paper, % | largest | exact takes, ms | longest | unproven | by at most, % |")
    print("|---|---|---|---|---|---|---|---|")
    print(row("all", samples))
    grouped: dict[str, list[Sample]] = defaultdict(list)
    for made in samples:
        for key, value in made.keys.items():
            grouped[f"{key} = {value}"].append(made)
    for name in sorted(grouped, key=list(grouped).index):
        print(row(name, grouped[name]))


if __name__ == "__main__":
    main()
