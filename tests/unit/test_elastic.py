from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from sti_runtime.elastic import (
    UnitImportance,
    make_elastic,
    reorder,
    train_depths,
    train_widths,
    unit_importance,
)
from sti_runtime.encoder import model_forward
from sti_runtime.errors import DatasetError, FormatError, InputError, ResourceError
from sti_runtime.model import HeadConfig, ModelConfig, Submodel, elastic_submodels
from sti_runtime.rows import LabelledRows, epoch_order, in_order, to_batch
from sti_runtime.shard import F32
from sti_runtime.torch_tensors import as_torch, torch_threads
from sti_runtime.training import (
    EarlyStop,
    Progress,
    Trained,
    TrainSettings,
    classify,
    evaluate,
    evaluate_submodels,
    fine_tune,
    full_model,
    initial_tensors,
    with_head,
)

CONFIG = ModelConfig(
    family="bert", layers=3, heads=4, hidden=32, ffn=64, vocab=24, positions=16, position_offset=0,
    token_types=2, layer_norm_eps=1e-12, activation="gelu", pad_id=0,
    head=HeadConfig(pooling="cls", activation="tanh", labels=("no", "yes")),
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny tensors: more threads only wait for each other."""
    with torch_threads(1):
        yield


def make_rows(count: int, seed: int, tokens: int = 10) -> LabelledRows:
    """Rows labelled 1 when token 5 occurs before token 6 (both always occur)."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, tokens + 1, count).astype(np.int32)
    ids = rng.integers(8, CONFIG.vocab, (count, tokens)).astype(np.int32)
    labels = rng.integers(0, 2, count).astype(np.int32)
    ids[:, 0] = 2
    for row, (length, label) in enumerate(zip(lengths, labels, strict=True)):
        first, second = sorted(rng.choice(np.arange(1, length), 2, replace=False))
        ids[row, first], ids[row, second] = (5, 6) if label else (6, 5)
        ids[row, length:] = 0
    return LabelledRows(ids, np.zeros_like(ids), lengths, labels)


def random_tensors(seed: int) -> dict[str, F32]:
    """Larger than initial weights, so that every head and neuron matters; biases not zero."""
    rng = np.random.default_rng(seed)
    return {
        name: (tensor + rng.standard_normal(tensor.shape) * 0.2).astype(np.float32)
        for name, tensor in initial_tensors(CONFIG, seed).items()
    }


def logits_of(tensors: dict[str, F32], submodel: Submodel, rows: LabelledRows) -> torch.Tensor:
    batch = to_batch(rows, np.arange(len(rows.labels)))
    with torch.inference_mode():
        return classify(as_torch(tensors), CONFIG, submodel, batch)


# ------------------------------------------------------------------------------------- ordering


def test_reorder_leaves_the_function_and_sorts_the_importance() -> None:
    tensors, rows = random_tensors(3), make_rows(48, 3)
    before = unit_importance(tensors, CONFIG, rows, batch=16)
    ordered = reorder(tensors, CONFIG, before)
    after = unit_importance(ordered, CONFIG, rows, batch=16)

    assert not np.array_equal(ordered["layers.0.ffn.in.weight"], tensors["layers.0.ffn.in.weight"])
    torch.testing.assert_close(
        logits_of(ordered, full_model(CONFIG), rows),
        logits_of(tensors, full_model(CONFIG), rows),
        rtol=1e-5,
        atol=1e-5,
    )
    np.testing.assert_allclose(after.heads, -np.sort(-before.heads, axis=1), rtol=1e-3)
    np.testing.assert_allclose(after.neurons, -np.sort(-before.neurons, axis=1), rtol=1e-3, atol=1e-6)


def test_importance_agrees_with_finite_differences_and_known_zeros() -> None:
    tensors, rows = random_tensors(4), make_rows(16, 4)
    tensors["layers.1.attention.o.weight"][:, 8:16] = 0  # head 1 reaches nothing
    tensors["layers.1.ffn.out.weight"][:, 7] = 0  # nor does neuron 7
    importance = unit_importance(tensors, CONFIG, rows, batch=16)
    assert importance.heads[1, 1] == 0
    assert importance.neurons[1, 7] == 0
    assert (np.delete(importance.heads[1], 1) > 0).all()

    # Scaling a head's O columns is scaling its mask.
    step = 1e-2
    losses = []
    for factor in (1 + step, 1 - step):
        scaled = dict(tensors)
        weight = tensors["layers.0.attention.o.weight"].copy()
        weight[:, :8] *= factor
        scaled["layers.0.attention.o.weight"] = weight
        losses.append(evaluate(scaled, CONFIG, full_model(CONFIG), rows).loss_nano / 1e9)
    assert importance.heads[0, 0] == pytest.approx(abs(losses[0] - losses[1]) / (2 * step), rel=0.02)


def test_slices_after_reordering_hold_the_chosen_units() -> None:
    tensors = random_tensors(5)
    heads = np.array([[0.0, 3.0, 2.0, 1.0]] * CONFIG.layers)
    neurons = np.tile(np.arange(CONFIG.ffn, dtype=np.float64), (CONFIG.layers, 1))
    ordered = reorder(tensors, CONFIG, UnitImportance(heads, neurons))
    for name in ("q.weight", "k.weight", "v.weight", "q.bias", "k.bias", "v.bias"):
        key = f"layers.2.attention.{name}"
        np.testing.assert_array_equal(ordered[key][:8], tensors[key][8:16])
        np.testing.assert_array_equal(ordered[key][24:], tensors[key][:8])
    key = "layers.2.attention.o.weight"
    np.testing.assert_array_equal(ordered[key][:, :8], tensors[key][:, 8:16])
    np.testing.assert_array_equal(ordered["layers.0.ffn.in.bias"], tensors["layers.0.ffn.in.bias"][::-1])
    key = "layers.0.ffn.out.weight"
    np.testing.assert_array_equal(ordered[key], tensors[key][:, ::-1])


# -------------------------------------------------------------------------------------- training


def test_training_learns_and_elastic_phases_help_the_small_submodels() -> None:
    train, held_out = make_rows(2000, 1), make_rows(256, 2)
    settings = TrainSettings(epochs=20, batch=32, learning_rate=1e-3, max_steps=300, seed=0, threads=1)
    tuned = fine_tune(initial_tensors(CONFIG, 0), CONFIG, train, settings).tensors
    whole, smallest = full_model(CONFIG), elastic_submodels(CONFIG.layers, CONFIG.heads)[-1]
    assert evaluate(tuned, CONFIG, whole, held_out).accuracy > 0.95

    ordered = reorder(tuned, CONFIG, unit_importance(tuned, CONFIG, held_out))
    short = TrainSettings(epochs=20, batch=32, learning_rate=1e-3, max_steps=60, threads=1)
    elastic = make_elastic(tuned, CONFIG, train, held_out, short, short).tensors
    before = evaluate(ordered, CONFIG, smallest, held_out)
    scores = evaluate_submodels(elastic, CONFIG, elastic_submodels(3, 4), held_out)
    assert scores[smallest].loss_nano < before.loss_nano / 2
    assert scores[smallest].correct >= before.correct
    assert scores[whole].accuracy > 0.9
    assert list(scores) == list(elastic_submodels(3, 4))


def test_width_phase_alone_leaves_the_input_untouched() -> None:
    tensors = random_tensors(6)
    copies = {name: tensor.copy() for name, tensor in tensors.items()}
    settings = TrainSettings(epochs=1, batch=16, learning_rate=1e-3, max_steps=2, threads=1)
    for phase in (train_widths, train_depths):
        result = phase(tensors, CONFIG, make_rows(64, 6), settings).tensors
        assert not np.array_equal(result["layers.0.ffn.in.weight"], tensors["layers.0.ffn.in.weight"])
        for name, copy in copies.items():
            np.testing.assert_array_equal(tensors[name], copy)


def test_the_same_call_gives_the_same_bits_and_another_seed_does_not() -> None:
    rows, tensors = make_rows(128, 7), initial_tensors(CONFIG, 7)
    settings = TrainSettings(epochs=1, batch=16, learning_rate=1e-3, threads=1)
    first, second = (fine_tune(tensors, CONFIG, rows, settings).tensors for _ in range(2))
    other = fine_tune(
        tensors, CONFIG, rows, TrainSettings(epochs=1, batch=16, learning_rate=1e-3, seed=1, threads=1)
    ).tensors
    for name, tensor in first.items():
        np.testing.assert_array_equal(tensor, second[name])
    assert any(not np.array_equal(tensor, other[name]) for name, tensor in first.items())


def test_progress_reports_every_step_and_the_schedule_ends() -> None:
    calls: list[tuple[str, int, int]] = []
    settings = TrainSettings(epochs=2, batch=16, learning_rate=1e-3, max_steps=7, threads=1)
    fine_tune(
        initial_tensors(CONFIG, 0),
        CONFIG,
        make_rows(64, 0),
        settings,
        progress=lambda status: calls.append((status.phase, status.done, status.total)),
    )
    assert calls == [("fine-tune", step, 7) for step in range(1, 8)]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_new_head_fits_the_encoder(pooling: str) -> None:
    encoder = CONFIG.model_copy(update={"head": None})
    body = {n: t for n, t in initial_tensors(CONFIG, 1).items() if not n.startswith("head.")}
    head = HeadConfig.model_validate(
        {"pooling": pooling, "activation": "none", "labels": ("a", "b", "c")}, strict=False
    )
    config, tensors = with_head(encoder, body, head, seed=1)
    assert tensors["head.classifier.weight"].shape == (3, CONFIG.hidden)
    assert "head.pooler.weight" not in tensors
    logits, _ = model_forward(as_torch(tensors), config, full_model(config), *_ids(make_rows(4, 1)))
    assert logits is not None
    assert logits.shape == (4, 3)


def _ids(rows: LabelledRows) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch = next(in_order(rows, len(rows.labels)))
    return batch.input_ids, batch.token_types, batch.lengths


# ----------------------------------------------------------------------------------------- rows


def test_an_epoch_visits_every_row_once_in_an_order_of_its_own() -> None:
    rows = make_rows(101, 9)
    epochs = [epoch_order(rows, 8, 0, epoch) for epoch in (0, 1)]
    for batches in epochs:
        assert sorted(np.concatenate(batches).tolist()) == list(range(101))
        assert max(len(batch) for batch in batches) == 8
    assert not np.array_equal(epochs[0][0], epochs[1][0])
    np.testing.assert_array_equal(np.concatenate(epochs[0]), np.concatenate(epoch_order(rows, 8, 0, 0)))


def test_cutting_a_batch_to_its_longest_row_changes_no_logit() -> None:
    tensors, rows = random_tensors(8), make_rows(16, 8)
    padded = LabelledRows(
        np.pad(rows.input_ids, ((0, 0), (0, 4))),
        np.pad(rows.token_types, ((0, 0), (0, 4))),
        rows.lengths,
        rows.labels,
    )
    whole = full_model(CONFIG)
    torch.testing.assert_close(logits_of(tensors, whole, padded), logits_of(tensors, whole, rows))


def test_rows_that_do_not_fit_the_model_are_refused() -> None:
    settings, tensors, rows = TrainSettings(max_steps=1), initial_tensors(CONFIG, 0), make_rows(4, 0)
    wrong_label = LabelledRows(rows.input_ids, rows.token_types, rows.lengths, rows.labels + 2)
    with pytest.raises(DatasetError, match="label outside the 2"):
        fine_tune(tensors, CONFIG, wrong_label, settings)
    too_long = make_rows(4, 0, tokens=17)
    with pytest.raises(DatasetError, match="17 tokens, and the model has 16 positions"):
        fine_tune(tensors, CONFIG, too_long, settings)
    strange = LabelledRows(rows.input_ids + CONFIG.vocab, rows.token_types, rows.lengths, rows.labels)
    with pytest.raises(DatasetError, match="vocabulary of 24"):
        fine_tune(tensors, CONFIG, strange, settings)
    unlabelled = LabelledRows(rows.input_ids, rows.token_types, rows.lengths, np.full(4, -1, np.int32))
    with pytest.raises(DatasetError, match="None of the rows has a label"):
        fine_tune(tensors, CONFIG, unlabelled, settings)


def test_a_model_without_a_head_is_refused() -> None:
    config = CONFIG.model_copy(update={"head": None})
    with pytest.raises(InputError, match="no classification head"):
        unit_importance(initial_tensors(CONFIG, 0), config, make_rows(4, 0))


def test_a_diverging_training_stops_with_an_error() -> None:
    tensors = initial_tensors(CONFIG, 0)
    tensors["head.classifier.weight"][0, 0] = np.inf
    with pytest.raises(ResourceError, match="diverged"):
        fine_tune(tensors, CONFIG, make_rows(32, 0), TrainSettings(max_steps=2))


# ------------------------------------------------------------------------------------ resuming

_SCRIPT = """
import sys, time
from pathlib import Path
from orchestrator.interrupts import lost_interrupts_return
from tests.unit.test_elastic import resumable

def on_step(status):
    print(status.phase, status.done, flush=True)
    if (status.phase, status.done) == (sys.argv[2], status.total - 1):
        time.sleep(600)  # so that the signal comes before the last step, on any machine

with lost_interrupts_return():
    resumable(Path(sys.argv[1]), on_step=on_step)
"""


def resumable(workspace: Path | None, on_step: Progress | None = None) -> Trained:
    """A whole elastic training, run by a test and by the process it kills."""
    settings = TrainSettings(
        epochs=9, batch=16, learning_rate=1e-3, max_steps=20, threads=1, checkpoint_every=3,
        early_stop=EarlyStop(patience=9),
    )  # fmt: skip
    return make_elastic(
        initial_tensors(CONFIG, 0), CONFIG, make_rows(256, 1), make_rows(64, 2), settings, settings,
        workspace=workspace, progress=on_step,
    )  # fmt: skip


@pytest.mark.parametrize(("phase", "stop"), [("widths", signal.SIGKILL), ("depths", signal.SIGINT)])
def test_a_killed_training_resumes_to_the_same_bits(tmp_path: Path, phase: str, stop: signal.Signals) -> None:
    repository = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(tmp_path), phase],
        cwd=repository,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"PYTHONPATH": str(repository)},
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.split()[0] == phase and int(line.split()[1]) >= 8:
            process.send_signal(stop)
            break
    assert process.wait(timeout=120) != 0
    process.stdout.close()

    steps: list[tuple[str, int]] = []
    resumed = resumable(tmp_path, on_step=lambda status: steps.append((status.phase, status.done)))
    first = next(done for name, done in steps if name == phase)
    assert 6 <= first < 20
    if phase == "depths":
        assert [done for name, done in steps if name == "widths"] == [20]
    whole = resumable(None)
    assert whole.ends == resumed.ends
    for name, tensor in whole.tensors.items():
        np.testing.assert_array_equal(tensor, resumed.tensors[name])


def test_a_finished_phase_is_not_trained_again(tmp_path: Path) -> None:
    resumable(tmp_path)
    steps: list[tuple[str, int]] = []
    resumable(tmp_path, on_step=lambda status: steps.append((status.phase, status.done)))
    assert [step for step in steps if step[0] != "head importance"] == [("widths", 20), ("depths", 20)]
    assert not list(tmp_path.glob("*.partial"))


def test_other_settings_do_not_pick_up_a_state(tmp_path: Path) -> None:
    rows, tensors = make_rows(64, 1), initial_tensors(CONFIG, 0)
    for rate in (1e-3, 2e-3):
        fine_tune(tensors, CONFIG, rows, TrainSettings(max_steps=2, learning_rate=rate), workspace=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    rows, tensors, settings = make_rows(64, 1), initial_tensors(CONFIG, 0), TrainSettings(max_steps=2)
    fine_tune(tensors, CONFIG, rows, settings, workspace=tmp_path)
    (state,) = tmp_path.iterdir()
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(FormatError, match=r"training state is damaged.*Delete the file"):
        fine_tune(tensors, CONFIG, rows, settings, workspace=tmp_path)


def test_a_workspace_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    with pytest.raises(ResourceError, match="cannot be written"):
        fine_tune(
            initial_tensors(CONFIG, 0), CONFIG, make_rows(32, 0), TrainSettings(max_steps=1),
            workspace=blocker / "sub",
        )  # fmt: skip
