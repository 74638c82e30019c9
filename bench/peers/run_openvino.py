"""OpenVINO, float32 arithmetic (on CPUs with bfloat16 it would choose that by itself)."""

from __future__ import annotations

import numpy as np
import openvino

from bench.peers.report import Ids, Infer, Logits, drive


def create(model: str, threads: int) -> Infer:
    """A compiled model for single requests."""
    compiled = openvino.Core().compile_model(
        model,
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        },
    )
    request = compiled.create_infer_request()
    inputs = [entry.any_name for entry in compiled.inputs]

    def infer(ids: Ids) -> Logits:
        every = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        found = request.infer({name: every[name] for name in inputs})
        logits: Logits = found[compiled.output(0)]
        return logits

    return infer


if __name__ == "__main__":
    drive(create)
