"""Train the demo model from scratch: ``python -m orchestrator.demo.train --out FILE``.

1. short sentences only, so that words and negation are learned before contrast and intensity;
2. all sentences; 3. the elastic phases. One thread and fixed seeds: the same machine and torch version
give the same bytes; others differ by rounding. About nine minutes on one core. ``--workspace`` keeps
the state, so that an interrupted training continues.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from orchestrator.demo.demo_model import DemoWeightsInfo, demo_config, save_weights, to_half
from orchestrator.demo.demo_task import (
    TASK,
    demo_splits,
    tokenizer_json,
    vocabulary_digest,
)
from orchestrator.interrupts import lost_interrupts_return
from sti_runtime.elastic import make_elastic
from sti_runtime.errors import StifarmError
from sti_runtime.model import elastic_submodels
from sti_runtime.model_store import SubmodelScore
from sti_runtime.rows import select_rows
from sti_runtime.tasks import build_task_data, split_digest
from sti_runtime.training import (
    PhaseStatus,
    TrainSettings,
    evaluate_submodels,
    fine_tune,
    initial_tensors,
)

COMMAND = "python -m orchestrator.demo.train --out FILE"
SEED = 1
SHORT_TOKENS = 11  # sentences of one clause
SHORT = TrainSettings(
    epochs=100, batch=32, learning_rate=5e-4, max_steps=500, max_tokens=32, seed=SEED, threads=1
)
WHOLE = TrainSettings(
    epochs=100, batch=32, learning_rate=5e-4, max_steps=4000, max_tokens=32, seed=SEED, threads=1
)
WIDTHS = TrainSettings(
    epochs=100, batch=32, learning_rate=2e-4, max_steps=300, max_tokens=32, seed=SEED, threads=1
)
DEPTHS = TrainSettings(
    epochs=100, batch=32, learning_rate=2e-4, max_steps=200, max_tokens=32, seed=SEED, threads=1
)
IMPORTANCE_ROWS = 512


def train(out: Path, workspace: Path | None) -> None:
    """Run all phases and write the weights to ``out``. Raises: ResourceError if it cannot be written."""
    config, tokenizer, splits = demo_config(), tokenizer_json(), demo_splits()
    rows = build_task_data(splits.train, TASK, "train", config=config, tokenizer_json=tokenizer)
    dev = build_task_data(splits.dev, TASK, "dev", config=config, tokenizer_json=tokenizer)
    # Heads and neurons are ordered by rows that no phase trains on; the profile split stays unseen by all.
    ordering = select_rows(rows, np.arange(IMPORTANCE_ROWS))
    rest = select_rows(rows, np.arange(IMPORTANCE_ROWS, rows.rows))
    short = select_rows(rest, np.flatnonzero(rest.lengths <= SHORT_TOKENS))

    tensors = initial_tensors(config, SEED)
    tensors = fine_tune(
        tensors, config, short, SHORT, workspace=workspace, progress=_report, phase="short-sentences"
    ).tensors
    tensors = fine_tune(
        tensors, config, rest, WHOLE, workspace=workspace, progress=_report, phase="all-sentences"
    ).tensors
    tensors = make_elastic(
        tensors, config, rest, ordering, WIDTHS, DEPTHS, workspace=workspace, progress=_report
    ).tensors
    tensors = to_half(tensors)
    submodels = elastic_submodels(config.layers, config.heads)
    results = evaluate_submodels(tensors, config, submodels, dev, threads=1)
    info = DemoWeightsInfo(
        version=1,
        command=COMMAND,
        provenance={
            "command": COMMAND,
            "seed": SEED,
            "torch": torch.__version__.split("+")[0],
            "threads": 1,
            "train_split": split_digest(splits.train),
            "dev_split": split_digest(splits.dev),
            **{
                f"{phase}_{key}": value
                for phase, settings in (
                    ("short", SHORT), ("whole", WHOLE), ("widths", WIDTHS), ("depths", DEPTHS)
                )
                for key, value in (
                    ("steps", settings.max_steps or 0),
                    ("batch", settings.batch),
                    ("learning_rate_nano", round(settings.learning_rate * 1e9)),
                )
            },
        },
        vocabulary_digest=vocabulary_digest(),
        scores=tuple(
            SubmodelScore(submodel=submodel, split="dev", correct=result.correct, rows=result.rows)
            for submodel, result in results.items()
        ),
    )  # fmt: skip
    save_weights(tensors, info, out)
    for submodel, result in results.items():
        _say(f"{submodel}: {100 * result.accuracy:.1f} % of {result.rows} dev rows")


def _report(status: PhaseStatus) -> None:
    if status.done % 50 == 0 or status.done == status.total:
        _say(f"{status.phase}: step {status.done} of {status.total}, loss {status.loss:.3f}")


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse ``arguments``, train, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator.demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="weight file to write")
    parser.add_argument("--workspace", type=Path, help="folder for resumable state")
    options = parser.parse_args(arguments)
    try:
        with lost_interrupts_return():
            train(options.out, options.workspace)
    except StifarmError as error:
        _say(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _say("Interrupted; with --workspace the same command continues where it stopped.")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
