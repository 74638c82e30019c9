from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from sti_runtime.arithmetic import Arithmetic, Precision, choose_device, choose_precision
from sti_runtime.early_stop import EarlyStop
from sti_runtime.elastic import make_elastic
from sti_runtime.errors import FormatError, InputError
from sti_runtime.evaluation import evaluate, full_model
from sti_runtime.training import PhaseStatus, Trained, TrainSettings, initial_tensors
from tests.unit.test_elastic import CONFIG, make_rows

TRAIN, HELD_OUT = make_rows(256, 1), make_rows(64, 2)

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device that PyTorch sees; there is none"
)


def elastic(
    precision: Precision, device: str, workspace: Path | None = None, stop_at: int | None = None
) -> Trained:
    """Both elastic phases in ``precision``; interrupted after ``stop_at`` steps of the second."""

    def progress(status: PhaseStatus) -> None:
        if (status.phase, status.done) == ("depths", stop_at):
            raise KeyboardInterrupt

    settings = TrainSettings(
        epochs=9, batch=16, learning_rate=1e-3, max_steps=8, threads=1, checkpoint_every=3,
        early_stop=EarlyStop(patience=9), device=device, precision=precision,
    )  # fmt: skip
    return make_elastic(
        initial_tensors(CONFIG, 0), CONFIG, TRAIN, HELD_OUT, settings, settings,
        workspace=workspace, progress=progress,
    )  # fmt: skip


def loss_of(trained: Trained) -> float:
    return evaluate(trained.tensors, CONFIG, full_model(CONFIG), HELD_OUT, threads=1).loss_nano / 1e9


def check_mixed(precision: Precision, device: str, folder: Path) -> None:
    """Mixed precision trains as float32 does but for rounding, and resumes with the scaler as it was."""
    plain, mixed = elastic("fp32", device), elastic(precision, device)
    for name, tensor in mixed.tensors.items():
        assert tensor.dtype == np.float32
        np.testing.assert_allclose(tensor, plain.tensors[name], atol=2e-2)
    assert any(not np.array_equal(mixed.tensors[name], plain.tensors[name]) for name in plain.tensors)
    assert loss_of(mixed) == pytest.approx(loss_of(plain), abs=0.02)

    with pytest.raises(KeyboardInterrupt):
        elastic(precision, device, folder, stop_at=7)
    (state,) = folder.glob("depths-*.safetensors")
    with safe_open(state, framework="np") as archive:
        kept = json.loads(archive.metadata()["arithmetic"])
    assert ("scale" in kept["scaler"]) == (precision == "fp16")
    resumed = elastic(precision, device, folder)
    if device == "cpu":
        assert resumed.ends == mixed.ends
        for name, tensor in mixed.tensors.items():
            np.testing.assert_array_equal(resumed.tensors[name], tensor)
    else:  # sums on a GPU need not come in the same order
        assert loss_of(resumed) == pytest.approx(loss_of(mixed), abs=0.02)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_by_the_same_code_on_the_cpu(precision: Precision, tmp_path: Path) -> None:
    check_mixed(precision, "cpu", tmp_path)


@needs_cuda
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_on_cuda(precision: Precision, tmp_path: Path) -> None:
    check_mixed(precision, "cuda", tmp_path)


@needs_cuda
def test_mixed_means_bf16_where_the_hardware_has_it() -> None:
    wanted = "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"
    assert choose_precision("mixed", "cuda") == wanted
    assert choose_device("auto") == "cuda"


def test_mixed_on_a_cpu_is_bf16_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, gains in (({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx2": True}, False)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has)
        if gains:
            assert choose_precision("mixed", "cpu") == "bf16"
            continue
        with pytest.raises(InputError, match="this CPU, which has no bfloat16 arithmetic"):
            choose_precision("mixed", "cpu")


def test_what_cannot_be_trained_on_is_refused() -> None:
    assert choose_precision("fp32", "cpu") == "fp32"
    with pytest.raises(InputError, match="no precision 'fp8'"):
        choose_precision("fp8", "cpu")
    assert choose_device("cpu") == "cpu"
    count = torch.cuda.device_count()
    with pytest.raises(InputError, match=f"sees {count} CUDA devices"):
        choose_device(f"cuda:{count}")
    for word in ("gpu", "cpu:1", "cuda:x"):
        with pytest.raises(InputError, match="nothing to train on"):
            choose_device(word)


def test_a_step_whose_gradient_overflows_is_left_out_and_the_scale_lowered() -> None:
    arithmetic = Arithmetic("cpu", "fp16")
    weight = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scale = json.loads(arithmetic.state())["scaler"]["scale"]
    arithmetic.backward((weight * torch.tensor([1.0, torch.inf, 1.0])).sum())
    arithmetic.step(optimizer, [weight], clip_norm=1.0)
    assert weight.tolist() == [1, 1, 1]
    assert arithmetic.overflows == 1
    optimizer.zero_grad()
    arithmetic.backward((weight * 2).sum())
    arithmetic.step(optimizer, [weight], clip_norm=1e9)
    assert weight.tolist() == pytest.approx([0.8, 0.8, 0.8])

    other = Arithmetic("cpu", "fp16")
    other.restore(arithmetic.state())
    assert other.state() == arithmetic.state()
    assert json.loads(other.state())["scaler"]["scale"] == scale / 2
    with pytest.raises(FormatError, match="gradient scaler is damaged"):
        other.restore("{}")
