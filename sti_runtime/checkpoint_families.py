"""What the supported checkpoint families call things: one table per family, read by ``checkpoint``.

Source: the modules ``modeling_bert``, ``modeling_distilbert`` and ``modeling_roberta`` of
Hugging Face Transformers, whose ``state_dict`` names these are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from sti_runtime.model import Family

Activation = Literal["gelu", "gelu_tanh", "relu"]

ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "gelu": "gelu",
        "gelu_python": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_fast": "gelu_tanh",
        "gelu_accurate": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_python_tanh": "gelu_tanh",
        "relu": "relu",
    }
)
"""FFN activations by their name in config.json."""

MODULE_ALIASES: Mapping[str, str] = MappingProxyType(
    {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
)
"""Endings that checkpoints converted from TensorFlow carry."""

IGNORED_BUFFERS = ("embeddings.position_ids", "embeddings.token_type_ids")
"""Not weights; some versions of Transformers saved them."""


@dataclass(frozen=True, slots=True)
class FamilyNames:
    """How one family spells its configuration and tensors.

    ``config_keys``: our field → key of config.json. ``embeddings``, ``layer`` and ``head``: our module →
    theirs (``layer`` below ``layer_prefix``.{l}, ``head`` from the root of the file).
    """

    family: Family
    prefix: str
    config_keys: Mapping[str, str]
    embeddings: Mapping[str, str]
    layer_prefix: str
    layer: Mapping[str, str]
    head: Mapping[str, str]
    head_activation: Literal["tanh", "relu"]
    classifier_architecture: str


_BERT_CONFIG = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "vocab": "vocab_size",
    "positions": "max_position_embeddings",
    "token_types": "type_vocab_size",
    "activation": "hidden_act",
}
_BERT_LAYER = {
    "attention.q": "attention.self.query",
    "attention.k": "attention.self.key",
    "attention.v": "attention.self.value",
    "attention.o": "attention.output.dense",
    "attention.norm": "attention.output.LayerNorm",
    "ffn.in": "intermediate.dense",
    "ffn.out": "output.dense",
    "ffn.norm": "output.LayerNorm",
}
_BERT_EMBEDDINGS = {
    "embeddings.word": "embeddings.word_embeddings",
    "embeddings.position": "embeddings.position_embeddings",
    "embeddings.token_type": "embeddings.token_type_embeddings",
    "embeddings.norm": "embeddings.LayerNorm",
}

FAMILIES: Mapping[str, FamilyNames] = MappingProxyType(
    {
        "bert": FamilyNames(
            family="bert",
            prefix="bert.",
            config_keys=_BERT_CONFIG,
            embeddings=_BERT_EMBEDDINGS,
            layer_prefix="encoder.layer",
            layer=_BERT_LAYER,
            head={"head.pooler": "bert.pooler.dense", "head.classifier": "classifier"},
            head_activation="tanh",
            classifier_architecture="BertForSequenceClassification",
        ),
        "distilbert": FamilyNames(
            family="distilbert",
            prefix="distilbert.",
            config_keys={
                "layers": "n_layers",
                "heads": "n_heads",
                "hidden": "dim",
                "ffn": "hidden_dim",
                "vocab": "vocab_size",
                "positions": "max_position_embeddings",
                "activation": "activation",
            },
            embeddings=_BERT_EMBEDDINGS,
            layer_prefix="transformer.layer",
            layer={
                "attention.q": "attention.q_lin",
                "attention.k": "attention.k_lin",
                "attention.v": "attention.v_lin",
                "attention.o": "attention.out_lin",
                "attention.norm": "sa_layer_norm",
                "ffn.in": "ffn.lin1",
                "ffn.out": "ffn.lin2",
                "ffn.norm": "output_layer_norm",
            },
            head={"head.pooler": "pre_classifier", "head.classifier": "classifier"},
            head_activation="relu",
            classifier_architecture="DistilBertForSequenceClassification",
        ),
        "roberta": FamilyNames(
            family="roberta",
            prefix="roberta.",
            config_keys=_BERT_CONFIG,
            embeddings=_BERT_EMBEDDINGS,
            layer_prefix="encoder.layer",
            layer=_BERT_LAYER,
            head={"head.pooler": "classifier.dense", "head.classifier": "classifier.out_proj"},
            head_activation="tanh",
            classifier_architecture="RobertaForSequenceClassification",
        ),
    }
)


def source_name(ours: str, names: FamilyNames, prefix: str) -> str:
    """The name in the checkpoint of canonical tensor ``ours``; ``prefix`` is "" or ``names.prefix``.

    Raises: KeyError when the family has no such tensor.
    """
    module, leaf = ours.rsplit(".", 1)
    if module.startswith("head."):
        return f"{names.head[module]}.{leaf}"
    if module.startswith("layers."):
        _, layer, rest = module.split(".", 2)
        return f"{prefix}{names.layer_prefix}.{layer}.{names.layer[rest]}.{leaf}"
    return f"{prefix}{names.embeddings[module]}.{leaf}"
