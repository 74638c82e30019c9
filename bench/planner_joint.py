"""Where choosing submodel and fidelities together wins over taking the largest submodel first.

    python -m bench.planner_joint FILE [--hidden 384]

FILE is an importance profile with levels (``bench.gain_model --save``). Its model's shards, of made-up sizes
as ``bench.planner`` makes them, are planned for over T, |S|, IO and compute speeds (``bench.planner_gap``).
Figures: expected gain over the whole model at the base, in milli-nats; means over the plans of a T.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from bench.planner import Setting, make_setting
from bench.planner_gap import (
    COMPUTE_PERCENT,
    IO_PS_PER_BYTE,
    PRELOADS_BYTES,
    TARGET_SHARES,
    WORKING_BYTES,
    device,
    target_of,
)
from sti_runtime.errors import InfeasiblePlanError
from sti_runtime.gain import GainModel
from sti_runtime.importance_profile import ImportanceProfile
from sti_runtime.plan import Plan
from sti_runtime.policies import plan_policy

BERT_HIDDEN = 768


@dataclass(frozen=True)
class Three:
    """Plans of one problem."""

    paper: Plan
    exact_io: Plan
    exact: Plan


def plans(setting: Setting, share: int, preload_bytes: int) -> Three | None:
    """None where ``paper`` has no plan."""

    def plan(policy: str) -> Plan:
        return plan_policy(
            policy,  # type: ignore[arg-type]
            setting.manifest,
            setting.importance,
            setting.profile,
            target_ns=target_of(setting, share),
            preload_bytes=preload_bytes,
            working_bytes=WORKING_BYTES,
        )

    try:
        return Three(plan("sti"), plan("exact-io"), plan("exact"))
    except InfeasiblePlanError:
        return None


def main() -> None:
    """Plan the grid and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("profile", type=Path)
    parser.add_argument("--hidden", type=int, default=384, help="the model's hidden size")
    options = parser.parse_args()
    read = ImportanceProfile.read(options.profile)
    layers, heads, hidden = read.layers, read.slices, options.hidden
    base = make_setting(trained=True, layers=layers, heads=heads, weights=12 * hidden * hidden // heads)
    importance = read.model_copy(update={"model_digest": base.manifest.model_digest})
    base, gains = replace(base, importance=importance), GainModel.of(importance)
    scale = (layers * hidden * hidden) / (12 * BERT_HIDDEN * BERT_HIDDEN)
    found: dict[int, list[Three]] = defaultdict(list)
    for share in TARGET_SHARES:
        for preload_bytes in PRELOADS_BYTES:
            for ps_per_byte in IO_PS_PER_BYTE:
                for percent in COMPUTE_PERCENT:
                    made = plans(device(base, ps_per_byte, percent), share, int(preload_bytes * scale))
                    found[share] += [] if made is None else [made]
    print("| T | plans | paper | exact-io | exact | another submodel | most gained over exact-io | takes |")
    print("|---|---:|---:|---:|---:|---:|---:|---|")
    for share, threes in found.items():
        if not threes:
            continue
        saved = [[gains.plan_nano(plan) / 1e6 for plan in (t.paper, t.exact_io, t.exact)] for t in threes]
        means = " | ".join(f"{sum(column) / len(threes):.1f}" for column in zip(*saved, strict=True))
        other = [t for t in threes if t.exact.submodel != t.paper.submodel]
        most = max(joint - alone for _, alone, joint in saved)
        taken = Counter(f"{t.paper.submodel} → {t.exact.submodel}" for t in other)
        named = ", ".join(f"{name} ({count})" for name, count in taken.most_common(3))
        print(f"| {share} % | {len(threes)} | {means} | {len(other)} | {most:.1f} | {named} |")


if __name__ == "__main__":
    main()
