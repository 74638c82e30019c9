"""The arithmetic of a BERT-family encoder, once: used by the reference model, by training and by the
torch engine. Every function takes any number m of slices per layer.

Shapes: B rows, L tokens, H hidden, m slices, d = head size, f = FFN slice. Weights are [out, in].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sti_runtime.model import HeadConfig, ModelConfig, Submodel

Watch = Callable[[str, Tensor, Tensor], None]
"""Called with the name of each sharded matrix of a layer ("q" … "ffn_out"), its input [B, L, in] and its
output [B, L, out]."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer, m slices wide. Norms and output biases are whole; the rest covers the m slices."""

    q: Tensor  # [m·d, H]
    k: Tensor  # [m·d, H]
    v: Tensor  # [m·d, H]
    o: Tensor  # [H, m·d]
    ffn_in: Tensor  # [m·f, H]
    ffn_out: Tensor  # [H, m·f]
    q_bias: Tensor  # [m·d]
    k_bias: Tensor  # [m·d]
    v_bias: Tensor  # [m·d]
    o_bias: Tensor  # [H]
    ffn_in_bias: Tensor  # [m·f]
    ffn_out_bias: Tensor  # [H]
    attention_norm: tuple[Tensor, Tensor]  # weight, bias [H]
    ffn_norm: tuple[Tensor, Tensor]  # weight, bias [H]


def layer_weights(tensors: Mapping[str, Tensor], config: ModelConfig, layer: int, width: int) -> LayerWeights:
    """Views of the first ``width`` slices of ``layer`` of canonical tensors (differentiable)."""
    d, f, p = width * config.head_size, width * config.ffn_slice, f"layers.{layer}."
    return LayerWeights(
        q=tensors[p + "attention.q.weight"][:d],
        k=tensors[p + "attention.k.weight"][:d],
        v=tensors[p + "attention.v.weight"][:d],
        o=tensors[p + "attention.o.weight"][:, :d],
        ffn_in=tensors[p + "ffn.in.weight"][:f],
        ffn_out=tensors[p + "ffn.out.weight"][:, :f],
        q_bias=tensors[p + "attention.q.bias"][:d],
        k_bias=tensors[p + "attention.k.bias"][:d],
        v_bias=tensors[p + "attention.v.bias"][:d],
        o_bias=tensors[p + "attention.o.bias"],
        ffn_in_bias=tensors[p + "ffn.in.bias"][:f],
        ffn_out_bias=tensors[p + "ffn.out.bias"],
        attention_norm=(tensors[p + "attention.norm.weight"], tensors[p + "attention.norm.bias"]),
        ffn_norm=(tensors[p + "ffn.norm.weight"], tensors[p + "ffn.norm.bias"]),
    )


def activate(x: Tensor, activation: str) -> Tensor:
    """The FFN's non-linearity: "gelu" (erf), "gelu_tanh" or "relu"."""
    if activation == "relu":
        return F.relu(x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


def attention_mask(lengths: Tensor, tokens: int) -> Tensor:
    """[B, 1, 1, L] booleans: True where a token is real. ``lengths`` is [B]."""
    return (torch.arange(tokens, device=lengths.device)[None, :] < lengths[:, None])[:, None, None]


def embed(
    words: Tensor,
    positions: Tensor,
    types: Tensor | None,
    norm: tuple[Tensor, Tensor],
    eps: float,
) -> Tensor:
    """Sum the embedding rows and normalise. words, types [B, L, H]; positions [L, H] → [B, L, H]."""
    x = words + positions
    if types is not None:
        x = x + types
    return F.layer_norm(x, x.shape[-1:], norm[0], norm[1], eps)


def layer_forward(
    x: Tensor,
    mask: Tensor,
    w: LayerWeights,
    config: ModelConfig,
    *,
    head_mask: Tensor | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """One post-norm layer of m = w.q.shape[0] / d slices: [B, L, H] → [B, L, H].

    ``mask`` as from ``attention_mask``; ``head_mask`` [m] scales each head's output, ``watch`` sees every
    sharded matrix at work (training and importance only).
    """
    batch, tokens, _ = x.shape
    d = config.head_size
    m = w.q.shape[0] // d

    def linear(name: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.linear(x, weight, bias)
        if watch is not None:
            watch(name, x, y)
        return y

    def split(name: str, weight: Tensor, bias: Tensor) -> Tensor:
        return linear(name, x, weight, bias).view(batch, tokens, m, d).transpose(1, 2)

    heads = F.scaled_dot_product_attention(
        split("q", w.q, w.q_bias), split("k", w.k, w.k_bias), split("v", w.v, w.v_bias), attn_mask=mask
    )
    if head_mask is not None:
        heads = heads * head_mask.view(1, m, 1, 1)
    context = heads.transpose(1, 2).reshape(batch, tokens, m * d)
    x = F.layer_norm(
        x + linear("o", context, w.o, w.o_bias), x.shape[-1:], *w.attention_norm, config.layer_norm_eps
    )
    hidden = activate(linear("ffn_in", x, w.ffn_in, w.ffn_in_bias), config.activation)
    return F.layer_norm(
        x + linear("ffn_out", hidden, w.ffn_out, w.ffn_out_bias),
        x.shape[-1:],
        *w.ffn_norm,
        config.layer_norm_eps,
    )


def head_forward(x: Tensor, lengths: Tensor, tensors: Mapping[str, Tensor], head: HeadConfig) -> Tensor:
    """Pool and classify: [B, L, H] → logits [B, labels]. ``tensors`` holds the head.* entries."""
    if head.pooling == "cls":
        pooled = x[:, 0]
    else:
        real = attention_mask(lengths, x.shape[1])[:, 0, 0].to(x.dtype).unsqueeze(-1)
        pooled = (x * real).sum(1) / lengths[:, None].to(x.dtype)
    if head.activation != "none":
        pooled = F.linear(pooled, tensors["head.pooler.weight"], tensors["head.pooler.bias"])
        pooled = torch.tanh(pooled) if head.activation == "tanh" else F.relu(pooled)
    return F.linear(pooled, tensors["head.classifier.weight"], tensors["head.classifier.bias"])


def embed_tokens(
    tensors: Mapping[str, Tensor], config: ModelConfig, input_ids: Tensor, token_types: Tensor
) -> Tensor:
    """Embedding output from canonical tensors held in memory: ids [B, L] → [B, L, H]."""
    start, tokens = config.position_offset, input_ids.shape[1]
    types = F.embedding(token_types, tensors["embeddings.token_type.weight"]) if config.token_types else None
    return embed(
        F.embedding(input_ids, tensors["embeddings.word.weight"]),
        tensors["embeddings.position.weight"][start : start + tokens],
        types,
        (tensors["embeddings.norm.weight"], tensors["embeddings.norm.bias"]),
        config.layer_norm_eps,
    )


def model_forward(
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    submodel: Submodel,
    input_ids: Tensor,
    token_types: Tensor,
    lengths: Tensor,
) -> tuple[Tensor | None, Tensor]:
    """A whole submodel with weights in memory: (logits [B, labels] or None, last hidden [B, L, H])."""
    x = embed_tokens(tensors, config, input_ids, token_types)
    mask = attention_mask(lengths, input_ids.shape[1])
    for layer in submodel.kept:
        x = layer_forward(x, mask, layer_weights(tensors, config, layer, submodel.width), config)
    logits = None if config.head is None else head_forward(x, lengths, tensors, config.head)
    return logits, x
