"""One step of training on the CPU: float32 beside bfloat16, AdamW's fused step beside the plain one.

    python -m bench.training_step [--rounds 12] [--threads 1]

A random model of MiniLM's shape (6 layers, 12 heads, 384), 32 rows of 50 tokens. Sides take turns within a
round. Prints medians with 95 % intervals and the paired ratios with theirs. Without bfloat16 products in
this CPU the first comparison is left out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from bench.figures import figure, paired_ratio
from bench.quantize import bert_base
from sti_runtime.arithmetic import Arithmetic, Precision, cpu_multiplies_bf16
from sti_runtime.evaluation import classify, full_model
from sti_runtime.rows import LabelledRows, to_batch
from sti_runtime.torch_tensors import as_torch, torch_threads
from sti_runtime.training import initial_tensors

ROWS, TOKENS = 32, 50

CONFIG = bert_base(6).model_copy(update={"hidden": 384, "ffn": 1536})


def gradients(precision: Precision) -> Callable[[], None]:
    """Forward and backward of one batch through the whole model."""
    parameters = {n: t.requires_grad_() for n, t in as_torch(initial_tensors(CONFIG, 0), copy=True).items()}
    rng = np.random.default_rng(0)
    rows = LabelledRows(
        rng.integers(0, CONFIG.vocab, (ROWS, TOKENS)).astype(np.int32),
        np.zeros((ROWS, TOKENS), np.int32),
        np.full(ROWS, TOKENS, np.int32),
        rng.integers(0, 2, ROWS).astype(np.int32),
    )
    batch, arithmetic = to_batch(rows, np.arange(ROWS)), Arithmetic("cpu", precision)

    def act() -> None:
        with arithmetic.forward():
            logits = classify(parameters, CONFIG, full_model(CONFIG), batch)
        arithmetic.backward(F.cross_entropy(logits.float(), batch.labels))
        for tensor in parameters.values():
            tensor.grad = None

    return act


def update(*, fused: bool) -> Callable[[], None]:
    """AdamW's step over the model's parameters."""
    parameters = [t.requires_grad_() for t in as_torch(initial_tensors(CONFIG, 0), copy=True).values()]
    for tensor in parameters:
        tensor.grad = torch.ones_like(tensor)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=fused or None)

    def act() -> None:
        optimizer.step()

    return act


def compare(what: str, ours: Callable[[], None], theirs: Callable[[], None], rounds: int) -> None:
    """Print both sides' times and their ratio; the first round is not counted."""
    times: tuple[list[int], list[int]] = ([], [])
    for number in range(rounds + 1):
        for side, act in zip(times, (ours, theirs), strict=True):
            start = time.perf_counter_ns()
            act()
            if number:
                side.append(time.perf_counter_ns() - start)
    first, second = (figure(side) for side in times)
    ratio = paired_ratio(*times).text(digits=2)
    print(f"{what}: {first.text(1e6)} ms against {second.text(1e6)} ms, ratio {ratio}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    with torch_threads(arguments.threads):
        if cpu_multiplies_bf16():
            compare("gradients, bf16 against fp32", gradients("bf16"), gradients("fp32"), arguments.rounds)
        else:
            print("gradients: this CPU has no bfloat16 products")
        compare("AdamW, fused against plain", update(fused=True), update(fused=False), arguments.rounds)


if __name__ == "__main__":
    main()
