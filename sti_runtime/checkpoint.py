"""Import of checkpoints as their users have them: a Hugging Face folder becomes a ``Model``.

Read are ``config.json``, ``model.safetensors`` (or the shards that ``model.safetensors.index.json``
lists) and the tokenizer's files. Pickled weights (``pytorch_model.bin``) are never opened.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sti_runtime.checkpoint_families import ACTIVATIONS, FAMILIES, FamilyNames, source_name
from sti_runtime.checkpoint_weights import (
    CONFIG_FILE,
    Located,
    check_leftovers,
    check_present,
    locate_tensors,
    read_json,
    read_tensors,
)
from sti_runtime.errors import CheckpointError
from sti_runtime.model import HeadConfig, ModelConfig, all_submodels, tensor_shapes
from sti_runtime.model_store import Model, make_model
from sti_runtime.tokenization import tokenizer_from_folder

_MAX_LABELS = 4096

log = logging.getLogger(__name__)


def import_checkpoint(folder: Path, *, source: str | None = None, need_tokenizer: bool = True) -> Model:
    """Import a BERT, DistilBERT or RoBERTa checkpoint: untrained, every submodel listed.

    A checkpoint with a sequence-classification head keeps it; any other head is left out (and named
    in the provenance) and the model has none. ``source`` names the origin, by default the folder.
    Without ``need_tokenizer`` a folder that lacks tokenizer files gives a model without a tokenizer.
    Raises: CheckpointError.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder}: there is no such folder.", "Give the folder that holds config.json."
        )
    raw = read_json(folder / CONFIG_FILE)
    names = _family(raw, folder)
    located = locate_tensors(folder)
    prefix = names.prefix if any(name.startswith(names.prefix) for name in located) else ""
    config = _model_config(raw, names, located, folder / CONFIG_FILE)
    wanted = {ours: source_name(ours, names, prefix) for ours in tensor_shapes(config)}
    check_present(wanted, located, folder)
    ignored = check_leftovers(set(located) - set(wanted.values()), names, prefix, folder)
    tensors = read_tensors(wanted, located, config)
    if ignored:
        log.info("%s: left out %d tensors no classifier here uses: %s", folder, len(ignored), ignored)
    return make_model(
        config,
        tensors,
        tokenizer_from_folder(folder, config, required=need_tokenizer),
        submodels=all_submodels(config.layers, config.heads),
        untrained=True,
        source=source or folder.resolve().name,
        provenance={
            "architecture": ", ".join(_architectures(raw)) or names.family,
            "ignored_tensors": ", ".join(ignored),
        },
    )


# ------------------------------------------------------------------ configuration


def _architectures(raw: Mapping[str, Any]) -> list[str]:
    value = raw.get("architectures")
    return [str(item) for item in value] if isinstance(value, list) else []


def _family(raw: Mapping[str, Any], folder: Path) -> FamilyNames:
    kind = raw.get("model_type")
    if kind is None:  # configurations older than Transformers 2 do not state it
        stems = {names.classifier_architecture.partition("For")[0]: names for names in FAMILIES.values()}
        for architecture in _architectures(raw):
            for stem, names in stems.items():
                if architecture == f"{stem}Model" or architecture.startswith(f"{stem}For"):
                    return names
    if not isinstance(kind, str) or kind not in FAMILIES:
        named = f"{kind or 'unstated'} ({', '.join(_architectures(raw)) or 'no architectures'})"
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: architecture {named} is not supported.",
            f"Supported are {', '.join(FAMILIES)}.",
        )
    return FAMILIES[kind]


def _model_config(
    raw: Mapping[str, Any], names: FamilyNames, located: Mapping[str, Located], file: Path
) -> ModelConfig:
    _refuse_variants(raw, file)
    sizes = {
        ours: _positive(raw, theirs, file)
        for ours, theirs in names.config_keys.items()
        if ours != "activation"
    }
    activation = raw.get(names.config_keys["activation"], "gelu")
    if activation not in ACTIVATIONS:
        raise CheckpointError(
            f"{file}: activation {activation!r} is not supported.", f"Supported are {', '.join(ACTIVATIONS)}."
        )
    pad_id = raw.get("pad_token_id", 1 if names.family == "roberta" else 0)
    if not isinstance(pad_id, int) or not 0 <= pad_id < sizes["vocab"]:
        raise CheckpointError(
            f"{file}: pad_token_id is {pad_id!r}, not an index below vocab_size.", "Correct config.json."
        )
    for key in ("hidden", "ffn"):
        if sizes[key] % sizes["heads"]:
            raise CheckpointError(
                f"{file}: {names.config_keys[key]} ({sizes[key]}) is not a multiple of "
                f"{names.config_keys['heads']} ({sizes['heads']}).",
                "Such a model cannot be cut into one slice per head; choose another.",
            )
    values = {
        "family": names.family,
        "layer_norm_eps": raw.get("layer_norm_eps", 1e-12),
        "activation": ACTIVATIONS[activation],
        "pad_id": pad_id,
        "position_offset": pad_id + 1 if names.family == "roberta" else 0,
        "head": _head(raw, names, located, file),
        "token_types": 0,
    } | sizes
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{file}: {where}: {first['msg']}.", "Correct config.json.") from error


def _refuse_variants(raw: Mapping[str, Any], file: Path) -> None:
    """Refuse settings under which the same tensors mean another computation."""
    found = [
        f"{key} = {raw[key]!r}"
        for key, plain in {
            "position_embedding_type": ("absolute",),
            "is_decoder": (False,),
            "add_cross_attention": (False,),
            "is_encoder_decoder": (False,),
            "pruned_heads": ({}, []),
            "quantization_config": (),
        }.items()
        if raw.get(key) is not None and raw[key] not in plain
    ]
    if found:
        raise CheckpointError(
            f"{file}: {'; '.join(found)} is not supported.",
            "Supported are plain encoders with absolute positions and unquantized weights.",
        )


def _positive(raw: Mapping[str, Any], key: str, file: Path) -> int:
    value = raw.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise CheckpointError(f"{file}: {key} is {value!r}, not a positive integer.", "Correct config.json.")
    return value


def _head(
    raw: Mapping[str, Any], names: FamilyNames, located: Mapping[str, Located], file: Path
) -> HeadConfig | None:
    classifier = f"{names.head['head.classifier']}.weight"
    architectures = _architectures(raw)
    if architectures and names.classifier_architecture not in architectures:
        return None
    if classifier not in located:
        if architectures:
            raise CheckpointError(
                f"{file.parent}: {names.classifier_architecture} without the tensor {classifier}.",
                "The checkpoint is incomplete; download it again.",
            )
        return None
    rows = located[classifier].shape[0] if located[classifier].shape else 0
    if not 2 <= rows <= _MAX_LABELS or raw.get("problem_type") in (
        "regression",
        "multi_label_classification",
    ):
        raise CheckpointError(
            f"{file}: a head with {rows} outputs and problem_type {raw.get('problem_type')!r} is no "
            "single-label classifier.",
            f"Choose a checkpoint that assigns one of 2 to {_MAX_LABELS} labels.",
        )
    return HeadConfig(
        pooling="cls", activation=names.head_activation, labels=_labels(raw.get("id2label"), rows, file)
    )


def _labels(id2label: object, rows: int, file: Path) -> tuple[str, ...]:
    if id2label is None:
        return tuple(f"LABEL_{index}" for index in range(rows))
    if not isinstance(id2label, dict) or sorted(id2label) != sorted(str(index) for index in range(rows)):
        raise CheckpointError(
            f"{file}: id2label does not name the classifier's outputs 0 to {rows - 1}.",
            "Correct id2label in config.json.",
        )
    labels = tuple(str(id2label[str(index)]) for index in range(rows))
    if len(set(labels)) != rows:
        raise CheckpointError(
            f"{file}: id2label names two outputs alike.", "Correct id2label in config.json."
        )
    return labels
