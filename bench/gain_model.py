"""How well expected gain predicts what plans measure, over random plans of the demo model.

    python -m bench.gain_model [--plans 120] [--rows 400] [--seed 0]

Each plan takes the whole model and draws its fidelities: a budget of bits first, then each shard's around it.
Predicted from the exhaustive importance profile; measured are loss and correct rows of the same split.
Rank correlations (Spearman) with 95 % intervals (bootstrap over plans) of four models of gain:

    bits       the mean fidelity alone
    equal      every shard's gain the same, by the squared error of its fidelity
    up         ``sti_runtime.gain``: each shard raised alone from the base
    up + down  the mean of that and of each shard lowered alone from 32 bits: twice the cost
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from orchestrator.demo.demo_model import load_demo_model
from orchestrator.demo.demo_task import TASK, demo_splits
from sti_runtime.bundle import Bundle
from sti_runtime.bundle_build import build_bundle
from sti_runtime.gain import ERROR_PPM
from sti_runtime.importance import (
    ImportanceTask,
    SplitScore,
    choose_base_fidelity,
    prepare_rows,
    raise_shards,
    score_configuration,
    score_shards,
    tensors_at,
)
from sti_runtime.rank_statistics import rank_correlation
from sti_runtime.rows import LabelledRows
from sti_runtime.shard import F32, ShardId
from sti_runtime.tasks import build_task_data

Tensors = Mapping[str, F32]


def correlation(
    predicted: Sequence[float], measured: Sequence[float], seed: int
) -> tuple[float, float, float]:
    """Spearman's rank correlation and its bootstrap interval."""
    a, b, rng = np.asarray(predicted), np.asarray(measured), np.random.default_rng(seed)

    again = sorted(
        rank_correlation(a[chosen], b[chosen])
        for chosen in (rng.integers(0, len(a), len(a)) for _ in range(1000))
    )
    return rank_correlation(a, b), again[25], again[974]


def drawn_plan(
    rng: random.Random, shards: Sequence[ShardId], fidelities: Sequence[int]
) -> dict[ShardId, int]:
    """Fidelities around a budget that is drawn first, so that plans of all sizes occur."""
    middle = rng.uniform(0, len(fidelities) - 1)
    places = {shard: round(min(len(fidelities) - 1, max(0, rng.gauss(middle, 1.2)))) for shard in shards}
    return {shard: fidelities[place] for shard, place in places.items()}


def measured(
    task: ImportanceTask, at: Mapping[int, Tensors], plan: Mapping[ShardId, int], rows: LabelledRows
) -> SplitScore:
    """Score one plan's fidelities."""
    tensors = task.base
    for fidelity, high in at.items():
        shards = [shard for shard, k in plan.items() if k == fidelity]
        tensors = raise_shards(ImportanceTask(task.config, tensors, high, rows), shards)
    return score_configuration(task.config, tensors, rows, threads=1)


def main() -> None:
    """Score the shards, draw and score the plans, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--plans", type=int, default=120)
    parser.add_argument("--rows", type=int, default=400, help="rows of the profile split")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model, splits = load_demo_model(), demo_splits(1)
    assert model.tokenizer_json is not None
    data = build_task_data(
        splits.profile, TASK, "profile", config=model.config, tokenizer_json=model.tokenizer_json
    )
    rows = prepare_rows(data, model.config, options.rows)
    with tempfile.TemporaryDirectory() as folder:
        path = build_bundle(
            model.config,
            model.tensors,
            model_digest=model.digest,
            submodels=model.info.submodels,
            untrained=False,
            out_root=Path(folder),
        )
        bundle = Bundle.open(path)
        base = choose_base_fidelity(bundle, rows, threads=1).fidelity
        at = {k: tensors_at(bundle, k) for k in bundle.manifest.fidelities}
    config = model.config
    shards = [(layer, s) for layer in range(config.layers) for s in range(config.heads)]
    up, down = ImportanceTask(config, at[base], at[32], rows), ImportanceTask(config, at[32], at[base], rows)
    base_nano, full_nano = (
        score_configuration(config, at[k], rows, threads=1).score.loss_nano for k in (base, 32)
    )
    raised = {s: base_nano - x.score.loss_nano for s, x in score_shards(up, shards, threads=1)}
    lowered = {s: x.score.loss_nano - full_nano for s, x in score_shards(down, shards, threads=1)}
    rng = random.Random(options.seed)
    plans = [drawn_plan(rng, shards, bundle.manifest.fidelities) for _ in range(options.plans)]
    scores = [measured(up, at, plan, rows).score for plan in plans]

    def expected(plan: Mapping[ShardId, int], gain: Mapping[ShardId, float]) -> float:
        error = ERROR_PPM[base]
        return sum(gain[shard] * (error - ERROR_PPM[k]) / error for shard, k in plan.items())

    models = {
        "bits": [sum(plan.values()) / len(shards) for plan in plans],
        "equal": [expected(plan, dict.fromkeys(shards, 1.0)) for plan in plans],
        "up": [expected(plan, raised) for plan in plans],
        "up + down": [expected(plan, {s: (raised[s] + lowered[s]) / 2 for s in shards}) for plan in plans],
    }
    saved = [float(base_nano - score.loss_nano) for score in scores]
    correct = [float(score.correct) for score in scores]
    sums = f"{sum(raised.values()) / 1e9:.4f} up, {sum(lowered.values()) / 1e9:.4f} down"
    print(f"{len(plans)} plans, {len(rows.labels)} rows; loss {base_nano / 1e9:.4f} at {base} bits, ", end="")
    print(f"{full_nano / 1e9:.4f} at 32; gains of single shards sum to {sums}\n")
    print("| model of gain | rank correlation with loss | with accuracy |")
    print("|---|---|---|")
    for name, predicted in models.items():
        loss, accuracy = (correlation(predicted, real, options.seed) for real in (saved, correct))
        print(
            f"| {name} | " + " | ".join(f"{a:.2f} [{b:.2f}, {c:.2f}]" for a, b, c in (loss, accuracy)) + " |"
        )


if __name__ == "__main__":
    main()
