"""Small random checkpoints, as Hugging Face Transformers saves them: the oracle of the import tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
)

VOCAB = 67
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 40,
}
_CONFIGS: dict[str, Any] = {
    "bert": lambda **more: BertConfig(**{**_SIZES, "max_position_embeddings": 20, **more}),
    "roberta": lambda **more: RobertaConfig(
        **{**_SIZES, "max_position_embeddings": 22, "type_vocab_size": 1, "layer_norm_eps": 1e-5, **more}
    ),
    "distilbert": lambda **more: DistilBertConfig(
        **{
            "vocab_size": VOCAB,
            "dim": 24,
            "n_layers": 3,
            "n_heads": 4,
            "hidden_dim": 40,
            "max_position_embeddings": 20,
            **more,
        }
    ),
}
_CLASSES: dict[tuple[str, str], type[PreTrainedModel]] = {
    ("bert", "encoder"): BertModel,
    ("bert", "classifier"): BertForSequenceClassification,
    ("bert", "masked"): BertForMaskedLM,
    ("distilbert", "encoder"): DistilBertModel,
    ("distilbert", "classifier"): DistilBertForSequenceClassification,
    ("roberta", "encoder"): RobertaModel,
    ("roberta", "classifier"): RobertaForSequenceClassification,
}
TOKENIZER_WORDS = (
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *(
        "the",
        "film",
        "is",
        "not",
        "good",
        "bad",
        "very",
        "##ly",
        "a",
        "and",
        ",",
        ".",
        "!",
        "cafe",
        "深",
        "圳",
    ),
)


def random_model(family: str, kind: str, *, seed: int = 0, **config: Any) -> PreTrainedModel:
    """A model all of whose parameters (biases and norms too) differ from their initial values."""
    if kind == "classifier":
        config = {"id2label": {0: "no", 1: "perhaps", 2: "yes"}, **config}
    model = _CLASSES[family, kind](_CONFIGS[family](**config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.copy_(noise + (1.0 if "norm.weight" in name.lower() else 0.0))
    model.train(False)
    return model


def write_vocab(folder: Path) -> None:
    """A WordPiece vocab.txt as long as the models' embedding tables."""
    words = [*TOKENIZER_WORDS, *(f"[unused{i}]" for i in range(VOCAB - len(TOKENIZER_WORDS)))]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")


def write_checkpoint(folder: Path, model: PreTrainedModel, **options: Any) -> Path:
    """``save_pretrained`` beside a vocab.txt (or a byte-level vocabulary for RoBERTa)."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, **options)
    if model.config.model_type == "roberta":
        write_byte_vocab(folder)
    else:
        write_vocab(folder)
    return folder


def write_byte_vocab(folder: Path) -> None:
    """A tiny byte-level vocab.json and merges.txt: specials, a few letters, one merge."""
    letters = "abdefhilmnorsty.!Ġ"
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *letters, "th", "the", "Ġthe"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\nt h\nth e\nĠ the\n", encoding="utf-8")
