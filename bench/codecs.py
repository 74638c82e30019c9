"""Codecs side by side: ``python -m bench.codecs``.

For each fidelity below 32 bits and each codec, of the whole model with all shards at that fidelity: bytes
of a shard (median), mean squared error of the weights, the sum of it weighted by the Fisher information of
rows that no codec saw, cosine of the dev rows' logits to the model's, accuracy on the dev rows with its 95 %
interval, and the paired difference from GOBO with its own. Subjects: the demo model and, where
STIFARM_SHARED has them, MiniLM on SST-2; or, with --home, the model of a farm's bundle and one of its
tasks.

Sensitivities are measured on the first ``--rows`` profile rows, the weighted error on the others.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from bench.figures import cosine
from bench.importance_subjects import Subject, demo, minilm
from orchestrator.cli.bundle import SENSITIVITY_ROWS
from orchestrator.farm import open_farm
from orchestrator.library import DEV_SPLIT, PROFILE_SPLIT, find_bundle, model_of, task_rows
from orchestrator.results.paired import Right, difference
from orchestrator.settings import load_settings
from sti_runtime.bundle import Bundle
from sti_runtime.bundle_build import Sensitivity, build_bundle
from sti_runtime.encoder import layer_forward, layer_weights
from sti_runtime.errors import InputError
from sti_runtime.fisher import fisher_information
from sti_runtime.importance import logits_of, prepare_rows, start, tensors_at
from sti_runtime.manifest import SensitivityInfo
from sti_runtime.metrics import row_losses, wilson_interval
from sti_runtime.model import ModelConfig, all_submodels
from sti_runtime.quantizer import FISHER, GOBO, Quantizer
from sti_runtime.rows import LabelledRows, by_length, rows_digest, select_rows
from sti_runtime.shard import F32, FIDELITIES
from sti_runtime.torch_tensors import as_torch, torch_threads

LOW = tuple(bits for bits in FIDELITIES if bits != 32)
CODECS: Mapping[str, Quantizer] = {"gobo": GOBO, "gobo-converged": Quantizer("converged"), "fisher": FISHER}
"""The first is what the others are compared with."""
_BATCH = 64


@dataclass(frozen=True)
class Built:
    """A codec's bundle and the seconds it took, its sensitivities apart."""

    bundle: Bundle
    seconds: float
    measuring_s: float


def main() -> None:
    """Build with every codec and compare, on every subject."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=SENSITIVITY_ROWS)
    parser.add_argument("--only", choices=("demo", "minilm"), help="one subject only")
    parser.add_argument("--home", type=Path, help="a farm's state folder, instead of the subjects")
    parser.add_argument("--bundle", help="with --home: whose model; the newest")
    parser.add_argument("--task", help="with --home: the task")
    options = parser.parse_args()
    if options.home is not None:
        if options.task is None:
            parser.error("--home needs --task")
        compare(of_farm(options.home, options.bundle, options.task), options.rows, options.threads)
        return
    if options.only != "minilm":
        compare(demo(), options.rows, options.threads)
    if options.only != "demo":
        subject = minilm(options.threads)
        if subject is None:
            print("MiniLM on SST-2: left out, STIFARM_SHARED has no models/ or data/glue/")
        else:
            compare(subject, options.rows, options.threads)


def of_farm(home: Path, bundle: str | None, task: str) -> Subject:
    """The model of a bundle in a farm's home, with the rows of a task. Raises: InputError."""
    with open_farm(load_settings(home=home)) as farm:
        known = find_bundle(farm, bundle)
        model = model_of(farm, known)
        rows, dev = (
            prepare_rows(task_rows(farm, task, split, model)[1], model.config)
            for split in (PROFILE_SPLIT, DEV_SPLIT)
        )
    return Subject(f"{known.name} on {task}", model.config, model.tensors, rows, dev)


def compare(subject: Subject, rows: int, threads: int) -> None:
    """Print the table of one subject. Raises: InputError if the profile split has no more than ``rows``."""
    count, config = len(subject.rows.labels), subject.config
    if rows >= count:
        raise InputError(
            f"{subject.name} has {count} profile rows; {rows} of them leave none to weigh errors by.",
            "Give --rows a smaller number.",
        )
    seen = select_rows(subject.rows, np.arange(rows))
    unseen = select_rows(subject.rows, np.arange(rows, count))
    weighing = fisher_information(config, subject.tensors, unseen, threads=threads)
    whole = logits(config, subject.tensors, subject.dev, threads)
    right = whole.argmax(1) == subject.dev.labels
    print(
        f"\n{subject.name}: {config.layers} × {config.heads} shards, sensitivities of {rows} profile rows,"
        f" weighted error by {count - rows} others, {len(right)} dev rows; 32 bits: {share(right)},"
        f" loss {loss(whole, subject.dev):.4f}\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        built = {name: build(subject, name, seen, Path(folder)) for name in CODECS}
        print(
            "| bits | codec | bytes a shard | weight MSE | Fisher-weighted | cosine | accuracy, % [95 %]"
            " | less gobo's, points [95 %] | loss |\n|---|---|---|---|---|---|---|---|---|"
        )
        for bits in LOW:
            line_up(subject, built, bits, weighing, whole, threads)
    for name, of_codec in built.items():
        print(
            f"{name}: built in {of_codec.seconds:.1f} s, of which sensitivities {of_codec.measuring_s:.1f} s"
        )


def build(subject: Subject, codec: str, rows: LabelledRows, folder: Path) -> Built:
    """The subject's bundle, whole, as ``stifarm bundle build`` makes it."""
    spent = [0.0]

    def measure() -> Mapping[str, F32]:
        began = time.perf_counter()
        found = fisher_information(subject.config, subject.tensors, rows, threads=1)
        spent[0] = time.perf_counter() - began
        return found

    info = SensitivityInfo(task="bench", rows=len(rows.labels), rows_digest=rows_digest(rows))
    quantizer, began = CODECS[codec], time.perf_counter()
    path = build_bundle(
        subject.config,
        subject.tensors,
        model_digest="0" * 64,
        submodels=all_submodels(subject.config.layers, subject.config.heads),
        untrained=True,
        out_root=folder,
        quantizer=quantizer,
        sensitivity=Sensitivity(info, measure) if quantizer.codec == "fisher" else None,
    )
    return Built(Bundle.open(path), time.perf_counter() - began, spent[0])


def line_up(
    subject: Subject,
    built: Mapping[str, Built],
    bits: int,
    weighing: Mapping[str, F32],
    whole: F32,
    threads: int,
) -> None:
    """The lines of one fidelity."""
    base: Right | None = None
    for name, of_codec in built.items():
        tensors = tensors_at(of_codec.bundle, bits)
        found = logits(subject.config, tensors, subject.dev, threads)
        right = found.argmax(1) == subject.dev.labels
        less = "–" if base is None else str(difference(right, base))
        base = right if base is None else base
        mse, weighted = errors(subject.tensors, tensors, weighing)
        size = statistics.median(v.payload_bytes for v in of_codec.bundle.manifest.region(bits).versions)
        print(
            f"| {bits} | {name} | {size:,.0f} | {mse:.3e} | {weighted:.3e} | {cosine(found, whole):.4f}"
            f" | {share(right)} | {less}"
            f" | {loss(found, subject.dev):.4f} |"
        )


# ------------------------------------------------------------------ figures


def logits(config: ModelConfig, tensors: Mapping[str, F32], rows: LabelledRows, threads: int) -> F32:
    """Logits [R, labels] of the whole model, in the rows' order."""
    parameters = as_torch(tensors)
    assert config.head is not None
    found = np.empty((len(rows.labels), len(config.head.labels)), np.float32)
    with torch_threads(threads), torch.inference_mode():
        for index, batch in by_length(rows, _BATCH):
            x, mask = start(parameters, config, batch)
            for layer in range(config.layers):
                x = layer_forward(x, mask, layer_weights(parameters, config, layer, config.heads), config)
            found[index] = logits_of(x, parameters, config, batch).numpy()
    return found


def errors(
    exact: Mapping[str, F32], stored: Mapping[str, F32], weighing: Mapping[str, F32]
) -> tuple[float, float]:
    """(mean squared error of the sharded weights, sum of it weighted by the Fisher information)."""
    squared, weighted, count = 0.0, 0.0, 0
    for name, fisher in weighing.items():
        error = (exact[name].astype(np.float64) - stored[name]) ** 2
        squared += float(error.sum())
        weighted += float((error * fisher).sum())
        count += error.size
    return squared / count, weighted


def loss(found: F32, rows: LabelledRows) -> float:
    """Mean cross-entropy, nats."""
    return float(row_losses(found, rows.labels).mean())


def share(right: Right) -> str:
    """Accuracy in per cent with its interval."""
    correct, rows = int(right.sum()), len(right)
    low, high = wilson_interval(correct, rows)
    return f"{100 * correct / rows:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


if __name__ == "__main__":
    main()
