"""CTranslate2, int8. It has no classifier: pooled outputs are multiplied by it here, in numpy."""

from __future__ import annotations

from pathlib import Path

import ctranslate2
import numpy as np

from bench.peers.report import Ids, Infer, Logits, drive


def create(model: str, threads: int) -> Infer:
    """An encoder with its pooler, and the classifier beside it. ``model``: its file, in their folder."""
    folder = Path(model).parent
    encoder = ctranslate2.Encoder(
        str(folder), device="cpu", compute_type="int8", inter_threads=1, intra_threads=threads
    )
    head = np.load(folder / "classifier.npz")
    weight, bias = head["weight"], head["bias"]

    def infer(ids: Ids) -> Logits:
        found = encoder.forward_batch(ctranslate2.StorageView.from_array(ids.astype(np.int32)), _lengths(ids))
        logits: Logits = np.asarray(found.pooler_output) @ weight.T + bias
        return logits

    return infer


def _lengths(ids: Ids) -> ctranslate2.StorageView:
    return ctranslate2.StorageView.from_array(np.full(len(ids), ids.shape[1], np.int32))


if __name__ == "__main__":
    drive(create)
