"""How well expected gain predicts what plans measure, over random plans of the demo model or a trained one.

    python -m bench.gain_model [--plans 120] [--rows 400] [--seed 0] [--save FILE]
                               [--model FOLDER --task sst-2]

Half the plans take the whole model, half a trained submodel. Fidelities are drawn: a budget of bits first,
then each shard's around it. Predicted from the exhaustive importance profile; measured are loss and
correct rows of the same split. Rank correlations (Spearman) with 95 % intervals (bootstrap over plans), and
how far the predicted loss is off in the mean, of these models of gain:

    bits       the mean fidelity alone, of shards left out 0
    equal      every shard's gain the same, by the squared error of its fidelity
    up         each shard raised alone from the base, by the squared error of its fidelity
    up + down  the mean of that and of each shard lowered alone from 32 bits: twice the cost
    fitted     ``up``, fitted to the losses of submodels with all shards at one fidelity: ``sti_runtime.gain``

FOLDER is a model folder of a home; its task's data come from STIFARM_SHARED, the profile split as
``stifarm model train`` holds it out of train.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from bench.importance_subjects import FOLDERS, SEED, glue_folder
from orchestrator.demo.demo_model import load_demo_model
from orchestrator.demo.demo_task import TASK, demo_splits
from sti_runtime.bundle import Bundle
from sti_runtime.bundle_build import build_bundle
from sti_runtime.gain import GainModel
from sti_runtime.importance import (
    ImportanceTask,
    build_profile,
    choose_base_fidelity,
    prepare_rows,
    raise_shards,
    score_configuration,
    score_shards,
    tensors_at,
)
from sti_runtime.importance_levels import as_levels, score_levels, wanted_levels
from sti_runtime.importance_profile import Score
from sti_runtime.model import Submodel
from sti_runtime.model_store import Model, load_model
from sti_runtime.rank_statistics import rank_correlation
from sti_runtime.rows import LabelledRows, rows_digest
from sti_runtime.shard import F32, ShardId
from sti_runtime.tasks import PRESETS, Example, build_task_data, read_tsv, split_profile

Tensors = Mapping[str, F32]


@dataclass(frozen=True)
class Drawn:
    """A plan's submodel and the fidelities of its shards."""

    submodel: Submodel
    fidelities: Mapping[ShardId, int]


def subject(options: argparse.Namespace) -> tuple[str, Model, LabelledRows]:
    """(name, model, rows of the profile split)."""
    examples: Sequence[Example]
    if options.model is None:
        name, model, spec, examples = "demo model", load_demo_model(), TASK, demo_splits(1).profile
    else:
        model, spec = load_model(options.model), PRESETS[options.task]
        name = f"{model.info.source} on {options.task}"
        train = read_tsv(glue_folder(options.task) / "train.tsv", spec)
        _, examples = split_profile(train, options.held_out, SEED)
    assert model.tokenizer_json is not None
    data = build_task_data(
        examples, spec, "profile", config=model.config, tokenizer_json=model.tokenizer_json
    )
    return name, model, prepare_rows(data, model.config, options.rows)


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


def drawn_plan(rng: random.Random, submodel: Submodel, fidelities: Sequence[int]) -> Drawn:
    """Fidelities around a budget that is drawn first, so that plans of all sizes occur."""
    middle = rng.uniform(0, len(fidelities) - 1)
    places = {
        (layer, index): round(min(len(fidelities) - 1, max(0, rng.gauss(middle, 1.2))))
        for layer in submodel.kept
        for index in range(submodel.width)
    }
    return Drawn(submodel, {shard: fidelities[place] for shard, place in places.items()})


def measured(task: ImportanceTask, at: Mapping[int, Tensors], plan: Drawn) -> Score:
    """Score one plan."""
    tensors = task.base
    for fidelity, high in at.items():
        shards = [shard for shard, k in plan.fidelities.items() if k == fidelity]
        tensors = raise_shards(ImportanceTask(task.config, tensors, high, task.rows), shards)
    return score_configuration(task.config, tensors, task.rows, submodel=plan.submodel, threads=1).score


def gain(model: GainModel, plan: Drawn) -> float:
    """Expected gain over the whole model at the base, in nano-nats."""
    rows = [layer * model.slices + index for layer, index in plan.fidelities]
    inside = model.within(plan.submodel).choice_nano(rows, list(plan.fidelities.values()))
    return float(model.absent_nano(plan.submodel) + inside)


def table(
    name: str,
    plans: Sequence[Drawn],
    scores: Sequence[Score],
    models: Mapping[str, Sequence[float]],
    base: Score,
    seed: int,
) -> None:
    """Print how the models do on some plans."""
    saved = [float(base.loss_nano - score.loss_nano) for score in scores]
    correct = [float(score.correct) for score in scores]
    spread = np.mean(np.abs(np.array(saved) - np.mean(saved))) / 1e6
    print(
        f"\n{name}: {len(plans)} plans, their losses {spread:.1f} milli-nats from their mean, in the mean\n"
    )
    print("| model of gain | rank correlation with loss | with accuracy | mean error of loss, milli-nats |")
    print("|---|---|---|---:|")
    for each, predicted in models.items():
        cells = [
            f"{a:.2f} [{b:.2f}, {c:.2f}]"
            for a, b, c in (correlation(predicted, real, seed) for real in (saved, correct))
        ]
        off = np.mean(np.abs(np.array(predicted) - np.array(saved))) / 1e6
        print(f"| {each} | {cells[0]} | {cells[1]} | {'' if each in ('bits', 'equal') else f'{off:.1f}'} |")


def main() -> None:
    """Score the shards, draw and score the plans, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--plans", type=int, default=120)
    parser.add_argument("--rows", type=int, default=400, help="rows of the profile split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="a model folder; without: the demo model")
    parser.add_argument("--task", default="sst-2", choices=sorted(FOLDERS))
    parser.add_argument("--held-out", type=int, default=500, help="rows that training held out of train")
    parser.add_argument(
        "--save", type=Path, help="write the importance profile there, for bench.planner_joint"
    )
    options = parser.parse_args()
    name, model, rows = subject(options)
    with tempfile.TemporaryDirectory() as folder:
        path = build_bundle(
            model.config,
            model.tensors,
            model_digest=model.digest,
            submodels=model.info.submodels,
            untrained=model.info.untrained,
            out_root=Path(folder),
        )
        bundle = Bundle.open(path)
        manifest = bundle.manifest
        choice = choose_base_fidelity(bundle, rows, threads=1)
        base_fidelity, base = choice.fidelity, choice.score
        began = time.process_time()
        levels = dict(score_levels(bundle, wanted_levels(manifest, base_fidelity), rows, threads=1))
        levels_s = time.process_time() - began
        at = {k: tensors_at(bundle, k) for k in manifest.fidelities}
    config = model.config
    shards = [(layer, s) for layer in range(config.layers) for s in range(config.heads)]
    up = ImportanceTask(config, at[base_fidelity], at[32], rows)
    down = ImportanceTask(config, at[32], at[base_fidelity], rows)
    began = time.process_time()
    raised = dict(score_shards(up, shards, threads=1))
    raised_s = time.process_time() - began
    profile = build_profile(
        config,
        raised,
        base,
        base_fidelity=base_fidelity,
        model_digest=model.digest,
        task=options.task,
        split_digest=rows_digest(rows),
        rows=len(rows.labels),
        levels=as_levels(manifest, base_fidelity, levels),
    )
    if options.save is not None:
        options.save.write_bytes(profile.to_json())
    whole = Submodel(kept=tuple(range(config.layers)), width=config.heads)
    full_nano = levels[whole, 32].score.loss_nano
    lowered = [x.score.loss_nano - full_nano for _, x in sorted(score_shards(down, shards, threads=1))]
    fitted, assumed = GainModel.of(profile), GainModel.of(profile.model_copy(update={"levels": ()}))
    both = [(a + max(1, b)) // 2 for a, b in zip(assumed.full_nano, lowered, strict=True)]
    models = {
        "equal": replace(assumed, full_nano=(1_000_000,) * len(shards)),
        "up": assumed,
        "up + down": replace(assumed, full_nano=tuple(both)),
        "fitted": fitted,
    }
    print(
        f"{name}: {len(rows.labels)} rows; base {base_fidelity} bits, loss {base.score.loss_nano / 1e9:.4f}"
        f" there and {full_nano / 1e9:.4f} at 32 bits; gains of single shards sum to"
        f" {sum(profile.worth()) / 1e9:.4f} up, {sum(lowered) / 1e9:.4f} down"
    )
    shares = ", ".join(f"{k} bits {ppm / 1e4:.1f}" for k, ppm in fitted.shares_ppm if k >= base_fidelity)
    print(f"shares of the gain, %: {shares}; CPU s: shards {raised_s:.1f}, levels {levels_s:.1f}")
    for submodel in manifest.submodels:
        found = [levels.get((submodel, k), base).score.loss_nano / 1e9 for k in (base_fidelity, 32)]
        print(f"  {submodel}: loss {found[0]:.4f} at the base, {found[1]:.4f} at 32")
    rng = random.Random(options.seed)
    smaller = [submodel for submodel in manifest.submodels if submodel != whole]
    groups = {
        "whole model": [drawn_plan(rng, whole, manifest.fidelities) for _ in range(options.plans // 2)],
        "submodels": [
            drawn_plan(rng, rng.choice(smaller), manifest.fidelities) for _ in range(options.plans // 2)
        ],
    }
    groups["all"] = [plan for plans in groups.values() for plan in plans]
    scores = {id(plan): measured(up, at, plan) for plan in groups["all"]}
    for group, plans in groups.items():
        predicted = {"bits": [sum(plan.fidelities.values()) / len(shards) for plan in plans]}
        predicted |= {each: [gain(of, plan) for plan in plans] for each, of in models.items()}
        table(group, plans, [scores[id(plan)] for plan in plans], predicted, base.score, options.seed)


if __name__ == "__main__":
    main()
