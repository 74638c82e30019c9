"""ONNX Runtime. A model whose name ends in ``.prepacked.onnx`` is loaded as it was packed before."""

from __future__ import annotations

import numpy as np
import onnxruntime

from bench.peers.report import Ids, Infer, Logits, drive


def create(model: str, threads: int) -> Infer:
    """A CPU session; optimised at load unless that was done before."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if model.endswith(".prepacked.onnx"):
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    inputs = [entry.name for entry in session.get_inputs()]

    def infer(ids: Ids) -> Logits:
        every = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        logits: Logits = session.run(None, {name: every[name] for name in inputs})[0]
        return logits

    return infer


if __name__ == "__main__":
    drive(create)
