"""From a checkpoint through import, bundle and executor: the logits are the original model's.

The oracle is Hugging Face Transformers running the very checkpoint that was imported.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, PreTrainedModel

from sti_runtime.bundle import Bundle
from sti_runtime.bundle_build import build_bundle
from sti_runtime.checkpoint import import_checkpoint
from sti_runtime.pipeline import Executor, Request, RequestOutcome
from sti_runtime.shard import F32
from sti_runtime.torch_engine import TorchEngine
from sti_runtime.training import full_model
from tests.bundles import hand_plan, make_request
from tests.checkpoints import random_model, write_checkpoint

SHARED = Path(os.environ.get("STIFARM_SHARED", Path(__file__).parents[2].parent / "shared"))
MINILM = SHARED / "models" / "all-MiniLM-L6-v2-fp16"


def run_at_32_bits(folder: Path, out: Path, tokens: int, length: int) -> tuple[RequestOutcome, Request]:
    """Import a checkpoint, bundle it, run one cold request with all slices at 32 bits."""
    model = import_checkpoint(folder)
    path = build_bundle(
        model.config,
        model.tensors,
        model_digest=model.digest,
        submodels=model.info.submodels,
        untrained=True,
        out_root=out,
    )
    bundle = Bundle.open(path)
    plan = hand_plan(bundle.manifest, full_model(model.config), lambda layer, index: 32, tokens=tokens)
    request = make_request(model.config, tokens, length)
    if model.config.token_types < 2:  # as build_task_data does for such a model
        request = replace(request, token_types=np.zeros_like(request.token_types))
    engine = TorchEngine(bundle, threads=2)
    with Executor(bundle, engine, threads=2, queue_depth=4) as executor:
        return executor.run(plan, request, "cold", "direct"), request


def original(model: PreTrainedModel, request: Request) -> torch.Tensor:
    """What Transformers computes of the same row: logits, or the last hidden states of real tokens."""
    arguments = {
        "input_ids": torch.from_numpy(request.input_ids)[None].long(),
        "attention_mask": (torch.arange(len(request.input_ids)) < request.length)[None].long(),
    }
    if model.config.model_type == "bert":
        arguments["token_type_ids"] = torch.from_numpy(request.token_types)[None].long()
    with torch.inference_mode():
        output = model(**arguments)
    found: torch.Tensor = (output.logits if "logits" in output else output.last_hidden_state)[0]
    return found


def relative(values: F32, wanted: F32) -> float:
    return float(np.abs(values - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
@pytest.mark.parametrize("kind", ["encoder", "classifier"])
def test_all_slices_at_32_bits_give_the_checkpoint_s_own_output(
    family: str, kind: str, tmp_path: Path
) -> None:
    model = random_model(family, kind, seed=7)
    folder = write_checkpoint(tmp_path / "checkpoint", model)
    outcome, request = run_at_32_bits(folder, tmp_path / "bundles", tokens=16, length=11)
    wanted = original(model, request).numpy()
    if kind == "classifier":
        assert relative(np.array(outcome.logits, np.float32), wanted) <= 1e-4
    else:
        assert outcome.logits == ()
        assert relative(outcome.hidden[: request.length], wanted[: request.length]) <= 1e-4


@pytest.mark.shared_data
def test_minilm_s_hidden_states(tmp_path: Path) -> None:
    if not MINILM.is_dir():
        pytest.skip(f"needs the MiniLM checkpoint in {MINILM}; set STIFARM_SHARED")
    outcome, request = run_at_32_bits(MINILM, tmp_path, tokens=64, length=40)
    model = AutoModel.from_pretrained(MINILM, dtype=torch.float32)
    wanted = original(model, request).numpy()
    assert relative(outcome.hidden[: request.length], wanted[: request.length]) <= 1e-4
