"""The model as STI sees it: configuration, canonical tensor names, submodels.

Canonical tensors (float32; ``weight`` is [out, in] as in ``torch.nn.Linear``)::

    embeddings.word.weight        [vocab, hidden]
    embeddings.position.weight    [positions, hidden]
    embeddings.token_type.weight  [token_types, hidden]     absent when token_types == 0
    embeddings.norm.{weight,bias} [hidden]
    layers.{l}.attention.{q,k,v,o}.{weight,bias}            [hidden, hidden], [hidden]
    layers.{l}.attention.norm.{weight,bias}                 [hidden]
    layers.{l}.ffn.in.{weight,bias}                         [ffn, hidden], [ffn]
    layers.{l}.ffn.out.{weight,bias}                        [hidden, ffn], [hidden]
    layers.{l}.ffn.norm.{weight,bias}                       [hidden]
    head.pooler.{weight,bias}     [hidden, hidden], [hidden] absent when head.activation == "none"
    head.classifier.{weight,bias} [labels, hidden], [labels] absent when there is no head

The encoder is post-LayerNorm (BERT): x = norm(x + attention(x)); x = norm(x + ffn(x)).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from sti_runtime.records import Count, Index, NonNegative, Positive, Record

Family = Literal["bert", "distilbert", "roberta"]
MatrixSize = Annotated[int, Field(gt=0, le=2**24)]


class HeadConfig(Record):
    """The classification head: pool, optional dense + activation, classifier.

    ``pooling`` "cls" takes the first token, "mean" the mean over real tokens.
    """

    pooling: Literal["cls", "mean"]
    activation: Literal["none", "tanh", "relu"]
    labels: tuple[str, ...] = Field(min_length=2, max_length=4096)


class ModelConfig(Record):
    """Shape and arithmetic of one encoder. Position ids start at ``position_offset``."""

    family: Family
    layers: Count
    heads: Count
    hidden: MatrixSize
    ffn: MatrixSize
    vocab: Positive
    positions: Positive
    position_offset: NonNegative
    token_types: NonNegative
    layer_norm_eps: float = Field(gt=0, lt=1)
    activation: Literal["gelu", "gelu_tanh", "relu"]
    pad_id: NonNegative
    head: HeadConfig | None

    @model_validator(mode="after")
    def _divisible(self) -> ModelConfig:
        if self.hidden % self.heads or self.ffn % self.heads:
            raise ValueError(
                f"hidden ({self.hidden}) and ffn ({self.ffn}) must be multiples of heads ({self.heads})"
            )
        return self

    @property
    def head_size(self) -> int:
        """d: rows of Q, K and V that one shard holds."""
        return self.hidden // self.heads

    @property
    def ffn_slice(self) -> int:
        """f: FFN neurons that one shard holds."""
        return self.ffn // self.heads

    @property
    def max_tokens(self) -> int:
        """The longest sequence the position table allows."""
        return self.positions - self.position_offset


class Submodel(Record):
    """n kept layers (original indices, ascending), each ``width`` slices wide (slices 0…width-1)."""

    kept: tuple[Index, ...] = Field(min_length=1)
    width: Count

    @property
    def depth(self) -> int:
        """n, the number of layers."""
        return len(self.kept)

    @property
    def shards(self) -> int:
        """n · m."""
        return self.depth * self.width

    def __str__(self) -> str:
        return f"{self.depth}×{self.width}"


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every canonical tensor's name and shape, in file order."""
    h, f = config.hidden, config.ffn
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word.weight": (config.vocab, h),
        "embeddings.position.weight": (config.positions, h),
    }
    if config.token_types:
        shapes["embeddings.token_type.weight"] = (config.token_types, h)
    shapes |= {"embeddings.norm.weight": (h,), "embeddings.norm.bias": (h,)}
    for layer in range(config.layers):
        p = f"layers.{layer}."
        for name in "qkvo":
            shapes |= {f"{p}attention.{name}.weight": (h, h), f"{p}attention.{name}.bias": (h,)}
        shapes |= {f"{p}attention.norm.weight": (h,), f"{p}attention.norm.bias": (h,)}
        shapes |= {f"{p}ffn.in.weight": (f, h), f"{p}ffn.in.bias": (f,)}
        shapes |= {f"{p}ffn.out.weight": (h, f), f"{p}ffn.out.bias": (h,)}
        shapes |= {f"{p}ffn.norm.weight": (h,), f"{p}ffn.norm.bias": (h,)}
    if config.head is not None:
        if config.head.activation != "none":
            shapes |= {"head.pooler.weight": (h, h), "head.pooler.bias": (h,)}
        labels = len(config.head.labels)
        shapes |= {"head.classifier.weight": (labels, h), "head.classifier.bias": (labels,)}
    return shapes


def all_submodels(layers: int, heads: int) -> tuple[Submodel, ...]:
    """Every n × m with the kept layers floor(i·N/n): what an untrained import offers."""
    return tuple(
        Submodel(kept=kept_layers(layers, n), width=m)
        for n in range(1, layers + 1)
        for m in range(1, heads + 1)
    )


def kept_layers(layers: int, depth: int) -> tuple[int, ...]:
    """Original layers that an n-deep submodel keeps: floor(i·N/n). Source: DynaBERT, section 2.2."""
    return tuple(i * layers // depth for i in range(depth))


def elastic_submodels(layers: int, heads: int) -> tuple[Submodel, ...]:
    """DynaBERT's grid: widths {1, ¾, ½, ¼} of M, depths floor(N·{1, ¾, ½}), largest first."""
    widths = sorted({max(1, heads * q // 4) for q in (4, 3, 2, 1)}, reverse=True)
    depths = sorted({max(1, layers * q // 4) for q in (4, 3, 2)}, reverse=True)
    return tuple(Submodel(kept=kept_layers(layers, n), width=m) for n in depths for m in widths)
