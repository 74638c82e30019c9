"""The demo model: its shape, and the committed weights as a ``Model``.

``weights.safetensors`` holds float16, to be small; every use is of the float32 it is widened to.
Its metadata has one key, ``stifarm_demo``: the canonical JSON of a ``DemoWeightsInfo``.
``python -m orchestrator.demo.train --out FILE`` makes the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from orchestrator.demo.demo_task import LABELS, tokenizer_json, vocabulary, vocabulary_digest
from sti_runtime.errors import FormatError
from sti_runtime.model import HeadConfig, ModelConfig, elastic_submodels, tensor_shapes
from sti_runtime.model_store import Model, SubmodelScore, make_model
from sti_runtime.records import Digest, Record
from sti_runtime.shard import F32
from sti_runtime.tensor_files import save_tensors_atomically

WEIGHTS_FILE = Path(__file__).with_name("weights.safetensors")
SOURCE = "stifarm demo"
_METADATA_KEY = "stifarm_demo"


class DemoWeightsInfo(Record):
    """What made the weights, and the accuracy of every trained submodel on the demo's dev split.

    ``vocabulary_digest``: of the vocabulary (``demo_task.vocabulary_digest``) the weights belong to.
    """

    version: Literal[1]
    command: str
    provenance: dict[str, str | int]
    vocabulary_digest: Digest
    scores: tuple[SubmodelScore, ...]


def demo_config() -> ModelConfig:
    """BERT's shape at 6 layers × 4 heads, hidden 128, FFN 512."""
    return ModelConfig(
        family="bert",
        layers=6,
        heads=4,
        hidden=128,
        ffn=512,
        vocab=len(vocabulary()),
        positions=64,
        position_offset=0,
        token_types=2,
        layer_norm_eps=1e-12,
        activation="gelu",
        pad_id=0,
        head=HeadConfig(pooling="cls", activation="tanh", labels=LABELS),
    )


def to_half(tensors: Mapping[str, F32]) -> dict[str, F32]:
    """The tensors as they will be loaded again: rounded to float16, as float32."""
    return {name: tensor.astype(np.float16).astype(np.float32) for name, tensor in tensors.items()}


def save_weights(tensors: Mapping[str, F32], info: DemoWeightsInfo, file: Path) -> None:
    """Write the weight file; equal input gives equal bytes. Raises: ResourceError."""
    halves = {name: tensors[name].astype(np.float16) for name in tensor_shapes(demo_config())}
    save_tensors_atomically(file, halves, {_METADATA_KEY: info.to_json().decode()})


def load_demo_model(file: Path = WEIGHTS_FILE) -> Model:
    """The trained elastic demo model with its tokenizer, submodels, scores and provenance.

    Raises: FormatError if the file is missing, damaged, or belongs to another version of the task.
    """
    again = "Restore the file, or make it: python -m orchestrator.demo.train --out FILE."
    try:
        with safe_open(file, framework="np") as archive:
            metadata = archive.metadata() or {}
            tensors = {n: archive.get_tensor(n).astype(np.float32) for n in archive.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{file}: the demo's weights cannot be read: {error}.", again) from error
    info = DemoWeightsInfo.from_json(metadata.get(_METADATA_KEY, "").encode(), source=str(file))
    config, tokenizer = demo_config(), tokenizer_json()
    if info.vocabulary_digest != vocabulary_digest():
        raise FormatError(f"{file}: these weights belong to another vocabulary of the demo task.", again)
    return make_model(
        config,
        tensors,
        tokenizer,
        submodels=elastic_submodels(config.layers, config.heads),
        untrained=False,
        source=SOURCE,
        provenance=info.provenance,
        scores=info.scores,
    )
