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
import torch.nn.functional as F

from orchestrator.demo.demo_model import (
    WEIGHTS_FILE,
    DemoWeightsInfo,
    demo_config,
    load_demo_model,
    save_weights,
    to_half,
)
from orchestrator.demo.demo_task import (
    LABELS,
    MAX_TOKENS,
    TASK,
    DemoSplits,
    demo_splits,
    generate,
    tokenizer_json,
    vocabulary,
    vocabulary_digest,
    write_tsv,
)
from sti_runtime.errors import FormatError
from sti_runtime.model import Submodel, elastic_submodels
from sti_runtime.pack import pack_version, unpack_version
from sti_runtime.shard import F32, MATRICES, matrix_shapes, shard_matrices
from sti_runtime.tasks import TaskData, build_task_data, read_tsv
from sti_runtime.tokenization import encode
from sti_runtime.torch_tensors import torch_threads
from sti_runtime.training import Evaluation, evaluate, initial_tensors


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny tensors: more threads only wait for each other."""
    with torch_threads(1):
        yield


@pytest.fixture(scope="module")
def splits() -> DemoSplits:
    return demo_splits(8_000)


@pytest.fixture(scope="module")
def dev(splits: DemoSplits) -> TaskData:
    return build_task_data(splits.dev, TASK, "dev", config=demo_config(), tokenizer_json=tokenizer_json())


# ------------------------------------------------------------------------------------------ task


def test_the_generator_is_seeded_and_balanced() -> None:
    assert generate(50, 7) == generate(50, 7)
    assert generate(50, 7) != generate(50, 8)
    assert sum(e.label for e in generate(51, 7)) == 25


def test_splits_share_no_sentence_and_do_not_depend_on_the_train_size(splits: DemoSplits) -> None:
    train, profile, dev = ({e.text for e in part} for part in (splits.train, splits.profile, splits.dev))
    assert (len(train), len(profile), len(dev)) == (8_000, 800, 1_000)
    assert not train & profile | train & dev | profile & dev
    smaller = demo_splits(100)
    assert (smaller.profile, smaller.dev) == (splits.profile, splits.dev)


def test_every_sentence_fits_and_every_word_is_known(splits: DemoSplits) -> None:
    everything = [*splits.train, *splits.profile, *splits.dev]
    rows = encode(tokenizer_json(), [(e.text, None) for e in everything], MAX_TOKENS + 8)
    assert rows.lengths.max() <= MAX_TOKENS
    assert not (rows.input_ids == vocabulary().index("[UNK]")).any()
    assert (rows.input_ids[:, 0] == vocabulary().index("[CLS]")).all()
    assert 150 <= len(vocabulary()) <= 400
    assert vocabulary()[0] == "[PAD]"
    assert set(np.unique(rows.input_ids)) == set(range(len(vocabulary()))) - {1}


def test_files_are_read_back_as_the_task(tmp_path: Path, splits: DemoSplits) -> None:
    write_tsv(tmp_path / "dev.tsv", splits.dev)
    assert tuple(read_tsv(tmp_path / "dev.tsv", TASK)) == splits.dev


def word_counts(data: TaskData) -> tuple[torch.Tensor, torch.Tensor]:
    counts = torch.zeros(data.rows, len(vocabulary()))
    ids = torch.from_numpy(data.input_ids.astype(np.int64))
    counts.scatter_add_(1, ids, torch.ones(ids.shape))
    return counts, torch.from_numpy(data.labels.astype(np.float32))


def test_a_bag_of_words_does_not_solve_the_task(splits: DemoSplits, dev: TaskData) -> None:
    """Logistic regression on word counts, fitted to convergence, stays near chance; the model does not."""
    config = demo_config()
    train = build_task_data(splits.train, TASK, "train", config=config, tokenizer_json=tokenizer_json())
    counts, labels = word_counts(train)
    weights = torch.zeros(len(vocabulary()) + 1, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(counts @ weights[1:] + weights[0], labels)
        loss = loss + 1e-4 * weights.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    with torch.no_grad():
        fitted = ((counts @ weights[1:] + weights[0] > 0) == (labels > 0)).float().mean()
        counts, labels = word_counts(dev)
        accuracy = ((counts @ weights[1:] + weights[0] > 0) == (labels > 0)).float().mean()
    assert fitted > 0.53  # it did learn what there is to learn
    assert accuracy <= 0.65
    model = load_demo_model()
    whole = model.info.submodels[0]
    assert evaluate(model.tensors, model.config, whole, dev).accuracy >= 0.95


# ----------------------------------------------------------------------------------------- model


def test_the_committed_scores_are_what_the_weights_give(dev: TaskData) -> None:
    model = load_demo_model()
    assert WEIGHTS_FILE.stat().st_size < 3_000_000
    assert model.info.submodels == elastic_submodels(6, 4)
    assert {s.submodel for s in model.info.scores} == set(model.info.submodels)
    for score in model.info.scores:
        result = evaluate(model.tensors, model.config, score.submodel, dev)
        # Other machines round differently; a row on the edge may flip.
        assert abs(result.correct - score.correct) <= 3
        assert result.rows == score.rows


def test_accuracy_falls_with_depth_width_and_fidelity(dev: TaskData) -> None:
    model = load_demo_model()
    correct = {s.submodel: s.correct for s in model.info.scores}
    whole, smallest = model.info.submodels[0], model.info.submodels[-1]
    assert correct[whole] >= 960
    assert correct[smallest] <= correct[whole] - 50

    def at(bits: int) -> Evaluation:
        return evaluate(quantised(dict(model.tensors), bits), model.config, whole, dev)

    two, four = at(2), at(4)
    assert two.correct < four.correct - 30
    assert four.correct >= correct[whole] - 30


def quantised(tensors: dict[str, F32], bits: int) -> dict[str, F32]:
    """The model with every shard as it comes back from ``bits`` bits."""
    config, shapes = demo_config(), matrix_shapes(demo_config())
    tensors = {name: tensor.copy() for name, tensor in tensors.items()}
    for layer in range(config.layers):
        for index in range(config.heads):
            views = shard_matrices(tensors, config, layer, index)
            packed = pack_version({name: views[name] for name in MATRICES}, bits)
            restored = unpack_version(packed.payload, shapes, bits, packed.outliers)
            for name, matrix in restored.items():
                views[name][...] = matrix
    return tensors


def test_weights_come_back_as_written_and_the_bytes_are_stable(tmp_path: Path) -> None:
    tensors = initial_tensors(demo_config(), 3)
    info = DemoWeightsInfo(
        version=1, command="test", provenance={"seed": 3}, vocabulary_digest=vocabulary_digest(), scores=()
    )
    for name in ("a", "b"):
        save_weights(tensors, info, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    model = load_demo_model(tmp_path / "a")
    assert model.info.provenance == {"seed": 3}
    for name, tensor in to_half(tensors).items():
        np.testing.assert_array_equal(model.tensors[name], tensor)
        assert model.tensors[name].dtype == np.float32


def test_bad_weight_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="missing"):
        load_demo_model(tmp_path / "missing")
    (tmp_path / "cut").write_bytes(WEIGHTS_FILE.read_bytes()[:-10])
    with pytest.raises(FormatError, match=r"cut.*cannot be read"):
        load_demo_model(tmp_path / "cut")
    info = DemoWeightsInfo(version=1, command="", provenance={}, vocabulary_digest="0" * 64, scores=())
    save_weights(initial_tensors(demo_config(), 3), info, tmp_path / "other")
    with pytest.raises(FormatError, match="another vocabulary"):
        load_demo_model(tmp_path / "other")


def test_the_training_command_starts_and_an_interrupt_is_told(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "orchestrator.demo.train", "--out", str(tmp_path / "w"),
         "--workspace", str(tmp_path / "state")],
        cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True, env=dict(os.environ),
    )  # fmt: skip
    assert process.stderr is not None
    first = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) == 130
    assert first.startswith("short-sentences: step 50 of 500, loss 0.")
    assert "the same command continues" in rest
    assert not (tmp_path / "w").exists()
    assert len(list((tmp_path / "state").glob("short-sentences-*.safetensors"))) == 1


def test_labels_are_in_the_model_s_order() -> None:
    """Plain sentences that need no composition come out right, by name."""
    model = load_demo_model()
    texts = ["the pasta was superb", "the pasta was awful", "the pasta was not superb"]
    rows = encode(tokenizer_json(), [(t, None) for t in texts], MAX_TOKENS)
    data = build_task_data(generate(3, 1), TASK, "dev", config=model.config, tokenizer_json=tokenizer_json())
    assert data.tokens == rows.input_ids.shape[1]
    wanted = np.array([LABELS.index("positive"), LABELS.index("negative"), LABELS.index("negative")])
    plain = TaskData(data.info, rows.input_ids, rows.token_types, rows.lengths, wanted.astype(np.int32))
    result = evaluate(model.tensors, model.config, Submodel(kept=tuple(range(6)), width=4), plain)
    assert result.correct == 3
