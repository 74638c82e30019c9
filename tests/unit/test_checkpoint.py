"""Import of checkpoints against Transformers' own forward pass, and every way an import fails."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, BertModel, PreTrainedModel

from sti_runtime.checkpoint import import_checkpoint
from sti_runtime.encoder import model_forward
from sti_runtime.errors import CheckpointError
from sti_runtime.model import all_submodels, tensor_shapes
from sti_runtime.model_store import Model
from sti_runtime.tokenization import encode
from tests.checkpoints import VOCAB, random_model, write_checkpoint

SHARED = Path(os.environ.get("STIFARM_SHARED", Path(__file__).parents[2].parent / "shared"))
MINILM = SHARED / "models" / "all-MiniLM-L6-v2-fp16"
TOLERANCE = 1e-5
"""Ten times stricter than promised: below what a wrong variant of gelu would cause."""


def inputs(model: Model, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """A padded batch of random tokens: ids [4, L], types [4, L], lengths [4]."""
    config = model.config
    lengths = torch.tensor([config.max_tokens, 9, 2, 14])
    generator = torch.Generator().manual_seed(seed)
    shape = (4, config.max_tokens)
    ids = torch.randint(5, VOCAB, shape, generator=generator)
    types = torch.randint(0, max(config.token_types, 1), shape, generator=generator)
    padding = torch.arange(config.max_tokens)[None] >= lengths[:, None]
    return ids.masked_fill(padding, config.pad_id), types.masked_fill(padding, 0), lengths


def ours(model: Model, ids: Tensor, types: Tensor, lengths: Tensor) -> tuple[Tensor | None, Tensor]:
    """Logits and hidden states with all layers and all slices."""
    tensors = {name: torch.from_numpy(array) for name, array in model.tensors.items()}
    config = model.config
    largest = max(model.info.submodels, key=lambda submodel: submodel.shards)
    assert (largest.depth, largest.width) == (config.layers, config.heads)
    with torch.no_grad():
        return model_forward(tensors, config, largest, ids, types, lengths)


def theirs(model: PreTrainedModel, ids: Tensor, types: Tensor, lengths: Tensor) -> tuple[Any, Tensor]:
    """The same by Transformers."""
    mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    more = {} if model.config.model_type == "distilbert" else {"token_type_ids": types}
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, **more)
    return getattr(output, "logits", None), output.hidden_states[-1]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """max |Δ| / max |reference|."""
    return float((found - expected).abs().max() / expected.abs().max())


def assert_same_outputs(model: Model, oracle: PreTrainedModel) -> None:
    """Hidden states at real tokens, and logits where the model has a head, agree."""
    ids, types, lengths = inputs(model)
    logits, hidden = ours(model, ids, types, lengths)
    expected_logits, expected_hidden = theirs(oracle, ids, types, lengths)
    real = torch.arange(ids.shape[1])[None] < lengths[:, None]
    assert relative_error(hidden[real], expected_hidden[real]) <= TOLERANCE
    assert (logits is None) == (model.config.head is None)
    if logits is not None:
        assert relative_error(logits, expected_logits) <= TOLERANCE


# ------------------------------------------------------------------ what must work


@pytest.mark.parametrize("kind", ["encoder", "classifier"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
def test_outputs_equal_transformers(tmp_path: Path, family: str, kind: str) -> None:
    oracle = random_model(family, kind)
    model = import_checkpoint(write_checkpoint(tmp_path / "checkpoint", oracle))
    assert_same_outputs(model, oracle)
    assert model.config.family == family
    assert model.info.untrained
    assert model.info.submodels == all_submodels(3, 4)
    assert model.tokenizer_json is not None
    if kind == "classifier":
        assert model.config.head is not None
        assert model.config.head.labels == ("no", "perhaps", "yes")
    assert {name: array.shape for name, array in model.tensors.items()} == tensor_shapes(model.config)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "relu"])
def test_activations(tmp_path: Path, activation: str) -> None:
    oracle = random_model("bert", "classifier", hidden_act=activation)
    assert_same_outputs(import_checkpoint(write_checkpoint(tmp_path, oracle)), oracle)


def test_names_with_prefix_and_another_head_give_a_headless_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    oracle = random_model("bert", "masked")
    with caplog.at_level(logging.INFO):
        model = import_checkpoint(write_checkpoint(tmp_path, oracle))
    assert any(name.startswith("bert.") for name in load_file(tmp_path / "model.safetensors"))
    assert model.config.head is None
    assert "cls.predictions" in str(model.info.provenance["ignored_tensors"])
    assert "cls.predictions" in caplog.text
    encoder = random_model("bert", "encoder")
    encoder.load_state_dict(oracle.base_model.state_dict(), strict=False)
    assert_same_outputs(model, encoder)


def test_sharded_checkpoint_equals_whole(tmp_path: Path) -> None:
    oracle = random_model("roberta", "classifier")
    whole = import_checkpoint(write_checkpoint(tmp_path / "a" / "m", oracle))
    folder = write_checkpoint(tmp_path / "b" / "m", oracle, max_shard_size="20KB")
    assert not (folder / "model.safetensors").exists()
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert import_checkpoint(folder).digest == whole.digest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_cast_up(tmp_path: Path, dtype: torch.dtype) -> None:
    oracle = random_model("bert", "classifier")
    torch.nn.Module.to(oracle, dtype)
    model = import_checkpoint(write_checkpoint(tmp_path, oracle))
    assert {array.dtype for array in model.tensors.values()} == {np.dtype(np.float32)}
    torch.nn.Module.to(oracle, torch.float32)
    assert_same_outputs(model, oracle)


def test_tensorflow_norm_names_and_buffers(tmp_path: Path) -> None:
    oracle = random_model("bert", "encoder")
    expected = import_checkpoint(write_checkpoint(tmp_path, oracle)).info.tensors_digest
    tensors = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in load_file(tmp_path / "model.safetensors").items()
    }
    tensors["embeddings.position_ids"] = torch.arange(20)[None]
    save_file(tensors, tmp_path / "model.safetensors")
    model = import_checkpoint(tmp_path)
    assert model.info.tensors_digest == expected
    assert "position_ids" not in str(model.info.provenance["ignored_tensors"])


def test_import_is_deterministic_and_independent_of_the_place(tmp_path: Path) -> None:
    oracle = random_model("distilbert", "classifier")
    first = import_checkpoint(write_checkpoint(tmp_path / "a" / "m", oracle))
    second = import_checkpoint(write_checkpoint(tmp_path / "b" / "m", oracle))
    assert first.digest == second.digest
    assert first.info.source == "m"
    assert import_checkpoint(tmp_path / "a" / "m", source="org/m@1234").info.source == "org/m@1234"


def test_config_without_model_type_is_recognised_by_its_architecture(tmp_path: Path) -> None:
    oracle = random_model("distilbert", "classifier")
    folder = write_checkpoint(tmp_path, oracle)
    edit_config(folder, model_type=None)
    assert import_checkpoint(folder).config.family == "distilbert"


def test_classifier_without_architectures_or_names_of_labels(tmp_path: Path) -> None:
    oracle = random_model("bert", "classifier")
    folder = write_checkpoint(tmp_path, oracle)
    edit_config(folder, architectures=None, id2label=None)
    head = import_checkpoint(folder).config.head
    assert head is not None
    assert head.labels == ("LABEL_0", "LABEL_1", "LABEL_2")


@pytest.mark.shared_data
def test_minilm() -> None:
    if not MINILM.is_dir():
        pytest.skip(f"needs the MiniLM checkpoint in {MINILM}; set STIFARM_SHARED")
    model = import_checkpoint(MINILM)
    oracle = BertModel.from_pretrained(MINILM, dtype=torch.float32, add_pooling_layer=False)
    oracle.train(False)
    texts: list[tuple[str, str | None]] = [
        ("it 's a charming and often affecting journey .", None),
        ("What is the first major city?", "Strasbourg, not Mainz."),
    ]
    assert model.tokenizer_json is not None
    rows = encode(model.tokenizer_json, texts, 32)
    reference = AutoTokenizer.from_pretrained(MINILM)
    for row, (first, second) in enumerate(texts):
        expected = reference(first, second)["input_ids"]
        assert rows.input_ids[row, : rows.lengths[row]].tolist() == expected
    ids, types, lengths = (
        torch.from_numpy(array).long() for array in (rows.input_ids, rows.token_types, rows.lengths)
    )
    _, hidden = ours(model, ids, types, lengths)
    _, expected_hidden = theirs(oracle, ids, types, lengths)
    real = torch.arange(ids.shape[1])[None] < lengths[:, None]
    assert relative_error(hidden[real], expected_hidden[real]) <= TOLERANCE


# ------------------------------------------------------------------ what must fail, and how


def edit_config(folder: Path, **changes: Any) -> None:
    """Rewrite keys of config.json; None removes one."""
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Rewrite model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that imports; tests break copies of it."""
    return write_checkpoint(tmp_path_factory.mktemp("good"), random_model("bert", "classifier"))


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(good, tmp_path / "checkpoint"))


def refusal(folder: Path) -> str:
    """The message of the CheckpointError; it must name the folder and a remedy."""
    with pytest.raises(CheckpointError) as caught:
        import_checkpoint(folder)
    assert str(folder) in caught.value.what
    assert caught.value.remedy
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_no_folder(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "nothing")


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "no config.json" in refusal(folder)


@pytest.mark.parametrize("content", ["{", "[1]", "\xff\xfe"])
def test_config_that_is_no_json_object(folder: Path, content: str) -> None:
    (folder / "config.json").write_bytes(content.encode("latin-1"))
    assert "JSON" in refusal(folder)


@pytest.mark.parametrize("model_type", ["gpt2", None, ["bert"]])
def test_unsupported_architecture(folder: Path, model_type: object) -> None:
    edit_config(folder, model_type=model_type, architectures=["GPT2LMHeadModel"])
    message = refusal(folder)
    assert "GPT2LMHeadModel" in message
    assert "bert, distilbert, roberta" in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"is_decoder": True}, "is_decoder"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"hidden_act": "silu"}, "'silu'"),
        ({"intermediate_size": 42}, "intermediate_size (42)"),
        ({"num_attention_heads": 5}, "hidden_size (24)"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": True}, "vocab_size"),
        ({"pad_token_id": 67}, "pad_token_id"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps"),
        ({"id2label": {"0": "a", "1": "b"}}, "id2label"),
        ({"id2label": {"0": "a", "1": "b", "2": "a"}}, "id2label"),
        ({"problem_type": "regression"}, "regression"),
    ],
)
def test_unsupported_configuration(folder: Path, changes: dict[str, Any], named: str) -> None:
    edit_config(folder, **changes)
    assert named in refusal(folder)


def test_regression_head(tmp_path: Path) -> None:
    oracle = random_model("bert", "classifier", id2label={0: "score"})
    assert "1 outputs" in refusal(write_checkpoint(tmp_path, oracle))


def test_missing_tensors_are_counted_and_named(folder: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".layer.1.attention.self" in name]:
            del tensors[name]

    edit_tensors(folder, drop)
    message = refusal(folder)
    assert "6 of" in message
    assert "bert.encoder.layer.1.attention.self.query.weight" in message
    assert "and 3 more" in message


def test_missing_classifier(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("classifier.weight"))
    assert "classifier.weight" in refusal(folder)


def test_missing_pooler_of_a_classifier(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop("bert.pooler.dense.bias"))
    assert "bert.pooler.dense.bias" in refusal(folder)


def test_wrong_shape(folder: Path) -> None:
    edit_config(folder, intermediate_size=80)
    message = refusal(folder)
    assert "[40, 24]" in message
    assert "[80, 24]" in message


def test_more_layers_than_the_configuration_says(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=2)
    assert "bert.encoder.layer.2." in refusal(folder)


def test_parts_that_change_the_computation(folder: Path) -> None:
    name = "bert.encoder.layer.0.attention.self.distance_embedding.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.zeros(39, 6)}))
    assert name in refusal(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(folder: Path, value: float) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["bert.encoder.layer.2.output.dense.weight"][3, 5] = value

    edit_tensors(folder, spoil)
    message = refusal(folder)
    assert "bert.encoder.layer.2.output.dense.weight" in message
    assert "not finite" in message


def test_integer_weights(folder: Path) -> None:
    name = "bert.encoder.layer.0.output.dense.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    assert "stored as I8" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(folder: Path, keep: int) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:keep])
    assert "model.safetensors" in refusal(folder)


def test_weights_with_a_header_that_is_no_header(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[8:40] = b"x" * 32
    (folder / "model.safetensors").write_bytes(content)
    assert "not a whole safetensors file" in refusal(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no model.safetensors" in refusal(folder)


def test_pickled_weights_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = refusal(folder)
    assert "pytorch_model.bin" in message
    assert "save_pretrained" in message


def test_missing_shard(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, random_model("bert", "encoder"), max_shard_size="20KB")
    lost = min(folder.glob("model-*.safetensors"))
    lost.unlink()
    assert lost.name in refusal(folder)


def test_shard_outside_the_folder(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "c", random_model("bert", "encoder"), max_shard_size="20KB")
    shutil.move(min(folder.glob("model-*.safetensors")), tmp_path / "elsewhere.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../elsewhere.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "'../elsewhere.safetensors'" in refusal(folder)


def test_no_tokenizer_is_an_error_unless_allowed(folder: Path) -> None:
    (folder / "vocab.txt").unlink()
    assert "vocab.txt" in refusal(folder)
    assert import_checkpoint(folder, need_tokenizer=False).tokenizer_json is None
