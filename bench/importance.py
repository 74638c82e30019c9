"""How well importance is estimated, and what it costs: ``python -m bench.importance``.

Every method ranks the shards of a model; printed are its rank correlation (Spearman) with the exhaustive
loss-based profile, the 95 % interval of it (bootstrap over shards), and CPU seconds. The exhaustive
profile's own split-half reliability stands beside: no method can be expected to agree better with it than
it does with itself. Subjects: the demo model and, where STIFARM_SHARED has them, MiniLM on SST-2; or one that
was trained: ``--model FOLDER --task rte``, a model folder of a home, its task's data from STIFARM_SHARED.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bench.importance_subjects import FOLDERS, Subject, demo, minilm, trained
from sti_runtime.bundle import Bundle
from sti_runtime.bundle_build import build_bundle
from sti_runtime.elastic import unit_importance
from sti_runtime.importance import (
    ImportanceTask,
    SplitScore,
    choose_base_fidelity,
    score_configuration,
    score_shards,
    tensors_at,
)
from sti_runtime.importance_gradient import Slopes, estimate_shards, shard_slopes
from sti_runtime.metrics import F64
from sti_runtime.model import all_submodels
from sti_runtime.rank_statistics import rank_correlation, reliability_ppm
from sti_runtime.rows import I32, select_rows
from sti_runtime.shard import F32, ShardId

COUNTS = (400, 250, 200, 125, 60)
"""The gradient method is tried on all rows and on the first so many of them."""
SHARE = 20
"""The exhaustive method on a twentieth of the rows costs what the estimate may cost at most."""
RESAMPLES = 2000


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A method's value of every shard, layer-major, and the CPU seconds it took."""

    name: str
    values: F64
    seconds: float


def main() -> None:
    """Score, estimate and compare on every subject."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=("demo", "minilm"), help="one subject only")
    parser.add_argument("--model", type=Path, help="a model folder, instead of these subjects")
    parser.add_argument("--task", default="sst-2", choices=sorted(FOLDERS), help="with --model: its task")
    parser.add_argument("--held-out", type=int, default=500, help="rows that training held out of train")
    options = parser.parse_args()
    if options.model is not None:
        compare(trained(options.model, options.task, options.held_out), options.threads)
        return
    if options.only != "minilm":
        compare(demo(), options.threads)
    if options.only != "demo":
        subject = minilm(options.threads)
        if subject is None:
            print("MiniLM on SST-2: left out, STIFARM_SHARED has no models/ or data/glue/")
        else:
            compare(subject, options.threads)


def compare(subject: Subject, threads: int) -> None:
    """Print the table of one subject."""
    task, fidelity, choosing_s = prepare(subject, threads)
    exhaustive, scores, base = score_all(task, threads)
    gains = exhaustive.values
    halves = [
        [getattr(base, half) - getattr(scores[shard], half) for shard in sorted(scores)]
        for half in ("even_loss_nano", "odd_loss_nano")
    ]
    cost = exhaustive.seconds + choosing_s
    rows = len(task.rows.labels)
    whole = score_configuration(task.config, task.high, task.rows, threads=threads).score
    print(
        f"\n{subject.name}: {len(gains)} shards, base {fidelity} bits, {rows} profile rows; loss"
        f" {base.score.loss_nano / 1e9:.4f} at the base, {whole.loss_nano / 1e9:.4f}"
        f" at 32 bits\nexhaustive: {cost:.1f} CPU s; split-half reliability"
        f" {reliability_ppm(*halves) / 1e6:.3f}"
    )
    by_accuracy = np.array([float(scores[shard].score.correct) for shard in sorted(scores)])
    print(f"by accuracy: {len(set(by_accuracy.tolist()))} distinct values of {len(gains)}")
    print(f"{'method':58} {'rows':>5} {'rank correlation':>22} {'CPU s':>8} {'cost':>7}")
    row("exhaustive, by accuracy (the paper's)", by_accuracy, gains, rows, cost, cost)
    few, _, _ = score_all(first(task, rows // SHARE), threads)
    row("exhaustive, by loss, on fewer rows", few.values, gains, rows // SHARE, few.seconds, cost)
    for count in (rows, *(count for count in COUNTS if count < rows)):
        found = estimate(first(task, count), threads)
        row(found.name, found.values, gains, count, found.seconds, cost)
    print("alternatives, on all rows")
    for found in alternatives(task, threads):
        row(found.name, found.values, gains, rows, found.seconds, cost)


def row(name: str, values: F64, gains: F64, rows: int, seconds: float, cost: float) -> None:
    """One line of the table."""
    low, high = interval(values, gains)
    print(
        f"{name:58} {rows:5d} {rank_correlation(values, gains):+6.3f} [{low:+.3f}, {high:+.3f}]"
        f" {seconds:8.2f} {f'1/{cost / seconds:.0f}':>7}"
    )


# ------------------------------------------------------------------ methods


def prepare(subject: Subject, threads: int) -> tuple[ImportanceTask, int, float]:
    """(the task at its base fidelity, that fidelity, CPU seconds that choosing it took)."""
    config = subject.config
    with tempfile.TemporaryDirectory() as folder:
        bundle = Bundle.open(
            build_bundle(
                config,
                subject.tensors,
                model_digest="0" * 64,
                submodels=all_submodels(config.layers, config.heads),
                untrained=True,
                out_root=Path(folder),
            )
        )
        began = time.process_time()
        choice = choose_base_fidelity(bundle, subject.rows, threads=threads)
        seconds = time.process_time() - began
        base, high = tensors_at(bundle, choice.fidelity), tensors_at(bundle, 32)
    return ImportanceTask(config, base, high, subject.rows), choice.fidelity, seconds


def first(task: ImportanceTask, count: int) -> ImportanceTask:
    """The task on its first rows."""
    return dataclasses.replace(task, rows=select_rows(task.rows, np.arange(count)))


def score_all(task: ImportanceTask, threads: int) -> tuple[Ranked, dict[ShardId, SplitScore], SplitScore]:
    """The exhaustive loss gains, with the scores behind them; the base's score is not in the seconds."""
    base = score_configuration(task.config, task.base, task.rows, threads=threads)
    every = [(layer, s) for layer in range(task.config.layers) for s in range(task.config.heads)]
    began = time.process_time()
    scores = dict(score_shards(task, every, threads=threads))
    seconds = time.process_time() - began
    return Ranked("exhaustive", gains_of(base, scores), seconds), scores, base


def estimate(task: ImportanceTask, threads: int) -> Ranked:
    """The gradient method as ``stifarm importance --method gradient`` runs it."""
    began = time.process_time()
    base, scores = estimate_shards(task, threads=threads)
    return Ranked("gradient", gains_of(base, scores), time.process_time() - began)


def gains_of(base: SplitScore, scores: Mapping[ShardId, SplitScore]) -> F64:
    """Loss saved by each shard, nano-nats, layer-major."""
    return np.array([float(base.score.loss_nano - scores[shard].score.loss_nano) for shard in sorted(scores)])


def alternatives(task: ImportanceTask, threads: int) -> list[Ranked]:
    """Other estimates from slopes, at the base, at the high weights and half-way, and DynaBERT's masks."""
    config, labels = task.config, task.rows.labels
    step = {name: task.high[name] - task.base[name] for name in task.high}
    middle = {name: task.base[name] + step[name] * np.float32(0.5) for name in task.high}
    points: dict[str, tuple[Slopes, float]] = {}
    for name, at in (("base", task.base), ("middle", middle), ("high", task.high)):
        began = time.process_time()
        found = shard_slopes(config, at, task.high, task.rows, step=step, threads=threads)
        points[name] = found, time.process_time() - began
    ranked = [
        Ranked(f"{name}: {kind}", values, seconds)
        for name, (slopes, seconds) in points.items()
        for kind, values in loss_terms(slopes, labels, _CURVED[name]).items()
    ]
    (base, base_s), (half, half_s) = points["base"], points["middle"]
    mean: F32 = (base.slopes + half.slopes) * np.float32(0.5)
    for kind, slopes, seconds in (
        ("middle: slopes, at the base's logits", half.slopes, half_s + base_s / 3),
        ("base and middle: mean slopes, at the base's logits", mean, base_s + half_s),
    ):
        ranked.append(Ranked(kind, moved_gains(base.logits, slopes, labels), seconds))
    began = time.process_time()
    units = unit_importance(task.high, config, task.rows, threads=threads)
    masks = units.heads + units.neurons.reshape(config.layers, config.heads, -1).sum(2)
    seconds = time.process_time() - began
    ranked.append(Ranked("high: |Taylor| on head and neuron masks (DynaBERT)", masks.ravel(), seconds))
    return ranked


_CURVED = {"base": 1, "middle": 0, "high": -1}
"""Sign of the second-order term in the loss that a step saves, by where it is expanded; half-way: none."""


def loss_terms(found: Slopes, labels: I32, curved: int) -> dict[str, F64]:
    """Per shard, layer-major: terms of the expansion of the mean loss in the shard's step."""
    probabilities = softmax(found.logits)[:, None, None]
    wanted = np.eye(found.logits.shape[1])[labels][:, None, None]
    slopes = found.slopes.astype(float)
    first = ((probabilities - wanted) * slopes).sum(-1)
    second = ((probabilities * slopes**2).sum(-1) - (probabilities * slopes).sum(-1) ** 2) / 2
    terms = {
        "first order, signed": -first.mean(0),
        "first order, |mean|": np.abs(first.mean(0)),
        "first order, mean of |row|": np.abs(first).mean(0),
        "Fisher, empirical": (first**2).mean(0),
        "Fisher of the softmax (Gauss-Newton)": second.mean(0),
    }
    if curved:
        terms["first order + Gauss-Newton"] = -(first + curved * second).mean(0)
    return {name: values.ravel() for name, values in terms.items()}


def moved_gains(logits: F32, slopes: F32, labels: I32) -> F64:
    """Mean loss saved, layer-major, when the logits move by each shard's slopes."""
    before = _losses(logits[:, None, None], labels)
    gains: F64 = (before - _losses(logits[:, None, None] + slopes, labels)).mean(0).ravel()
    return gains


def _losses(logits: F32, labels: I32) -> F64:
    picked = np.take_along_axis(np.log(softmax(logits)), labels[:, None, None, None].astype(int), 3)
    losses: F64 = -picked[..., 0]
    return losses


def softmax(logits: F32) -> F64:
    """Over the last axis, float64."""
    raised: F64 = np.exp(logits.astype(float) - logits.max(-1, keepdims=True))
    shares: F64 = raised / raised.sum(-1, keepdims=True)
    return shares


# ------------------------------------------------------------------ statistics


def interval(values: F64, gains: F64) -> tuple[float, float]:
    """95 % percentile interval of the rank correlation, bootstrap over shards."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(gains), (RESAMPLES, len(gains)))
    found = [rank_correlation(values[index], gains[index]) for index in drawn]
    low, high = np.percentile(found, (2.5, 97.5))
    return float(low), float(high)


if __name__ == "__main__":
    main()
