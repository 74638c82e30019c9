"""What an exhaustive importance profile of the demo model costs: ``python -m bench.importance``."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from orchestrator.demo.demo_model import load_demo_model
from orchestrator.demo.demo_task import TASK, demo_splits
from sti_runtime.bundle import Bundle
from sti_runtime.bundle_build import build_bundle
from sti_runtime.importance import (
    ImportanceTask,
    SplitScore,
    build_profile,
    choose_base_fidelity,
    plan_units,
    prepare_rows,
    score_configuration,
    score_shards,
    tensors_at,
)
from sti_runtime.shard import ShardId
from sti_runtime.tasks import build_task_data, split_digest


def main() -> None:
    """Build the bundle, score all shards on one process, print times and the profile's reliability."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=None, help="rows of the profile split (default: all)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    model, splits = load_demo_model(), demo_splits(1)
    if model.tokenizer_json is None:
        raise SystemExit("the demo model has no tokenizer")
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
        for fidelity in bundle.manifest.fidelities:
            score = score_configuration(
                model.config, tensors_at(bundle, fidelity), rows, threads=options.threads
            ).score
            print(
                f"{fidelity:2d}-bit uniform: {100 * score.correct / len(rows.labels):.1f} %, "
                f"loss {score.loss_nano / 1e9:.4f}"
            )
        started = time.perf_counter()
        base = choose_base_fidelity(bundle, rows, threads=options.threads)
        task = ImportanceTask(model.config, tensors_at(bundle, base.fidelity), tensors_at(bundle, 32), rows)
        prepared = time.perf_counter()
        scores: dict[ShardId, SplitScore] = {}
        for unit in plan_units(model.config, scores, 1):
            scores |= dict(score_shards(task, unit, threads=options.threads))
        done = time.perf_counter()
    profile = build_profile(
        model.config,
        scores,
        base.score,
        base_fidelity=base.fidelity,
        model_digest=model.digest,
        task=TASK.name,
        split_digest=split_digest(splits.profile),
        rows=len(rows.labels),
    )
    print(f"base: {base.fidelity} bits (above chance: {base.above_chance}), {prepared - started:.2f} s")
    print(
        f"{len(scores)} shards × {profile.rows} rows: {done - prepared:.2f} s on {options.threads} thread(s)"
    )
    print(f"split-half reliability: {profile.reliability_ppm / 1e6:.3f}")
    for shard in profile.ranking():
        print(f"  {shard}: gain {profile.gain_nano(shard) / 1e9:+.4f} nats")


if __name__ == "__main__":
    main()
