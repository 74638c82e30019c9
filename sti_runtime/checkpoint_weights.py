"""The files of a checkpoint folder: which tensors they hold, and reading those that are wanted.

Headers first, so that everything wrong with a checkpoint is said before gigabytes are read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sti_runtime.checkpoint_families import IGNORED_BUFFERS, MODULE_ALIASES, FamilyNames
from sti_runtime.errors import CheckpointError
from sti_runtime.model import ModelConfig, tensor_shapes
from sti_runtime.shard import F32

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_FLOATS = ("F16", "BF16", "F32", "F64")
_NAMED = 3  # how many tensors an error spells out


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises: CheckpointError when it is missing or not one."""
    try:
        value = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{file.parent}: there is no {file.name}.",
            "Give the folder of a Hugging Face checkpoint: config.json, model.safetensors, tokenizer files.",
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file}: not readable as JSON: {error}.", "Download the file again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: holds no JSON object.", "Download the file again.")
    return value


@dataclass(frozen=True, slots=True)
class Located:
    """Where a tensor is: its file, its name there, what the header says of it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def locate_tensors(folder: Path) -> dict[str, Located]:
    """Every tensor of the checkpoint by its name (TensorFlow endings replaced), from the headers.

    Raises: CheckpointError.
    """
    located: dict[str, Located] = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as handle:
                for name in handle.keys():  # noqa: SIM118 - a handle is no mapping
                    view = handle.get_slice(name)
                    located[_modern(name)] = Located(
                        file, name, tuple(view.get_shape()), str(view.get_dtype())
                    )
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{file}: not a whole safetensors file: {error}.",
                "It is truncated or damaged; download it again.",
            ) from error
    return located


def _modern(name: str) -> str:
    for old, new in MODULE_ALIASES.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if (folder / INDEX_FILE).is_file():
        weight_map = read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{folder / INDEX_FILE}: holds no weight_map.", "Download the file again.")
        shards = sorted({str(name) for name in weight_map.values()})
        for name in shards:
            if Path(name).name != name:
                raise CheckpointError(
                    f"{folder / INDEX_FILE}: shard {name!r} is not a file of this folder.",
                    "The index is damaged or malicious; download it from a source you trust.",
                )
            if not (folder / name).is_file():
                raise CheckpointError(
                    f"{folder}: shard {name} that {INDEX_FILE} lists is missing.", "Download it again."
                )
        return [folder / name for name in shards]
    pickled = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if pickled:
        raise CheckpointError(
            f"{folder}: holds {pickled[0]} but no {WEIGHTS_FILE}; "
            "pickled weights can run code and are not read.",
            "Convert it where you trust it, with Transformers: "
            "AutoModelForSequenceClassification.from_pretrained(folder).save_pretrained(folder) "
            "(AutoModel for one without a classifier).",
        )
    raise CheckpointError(
        f"{folder}: there is no {WEIGHTS_FILE} and no {INDEX_FILE}.", "Download the weights as safetensors."
    )


def check_present(wanted: Mapping[str, str], located: Mapping[str, Located], folder: Path) -> None:
    """Raise CheckpointError naming the tensors of ``wanted`` (ours → theirs) that are not there."""
    missing = [theirs for theirs in wanted.values() if theirs not in located]
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(wanted)} tensors are missing: "
            f"{', '.join(missing[:_NAMED])}{more}.",
            "The checkpoint is incomplete or config.json is another model's; download it again.",
        )


def check_leftovers(unused: set[str], names: FamilyNames, prefix: str, folder: Path) -> list[str]:
    """Names of tensors left out: those outside the encoder. One inside means another computation.

    Raises: CheckpointError for an unused tensor of the encoder.
    """
    inside = tuple(f"{prefix}{part}." for part in ("embeddings", names.layer_prefix.split(".")[0]))
    buffers = {f"{prefix}{name}" for name in IGNORED_BUFFERS}
    strange = sorted(name for name in unused - buffers if name.startswith(inside))
    if strange:
        raise CheckpointError(
            f"{folder}: {len(strange)} tensors do not belong to the {names.family} encoder "
            f"that {CONFIG_FILE} describes: {', '.join(strange[:_NAMED])}.",
            "config.json is another model's, or the model has parts (adapters, more layers, relative "
            "positions) that are not supported.",
        )
    return sorted(unused - buffers)


def read_tensors(
    wanted: Mapping[str, str], located: Mapping[str, Located], config: ModelConfig
) -> dict[str, F32]:
    """Read ``wanted`` (ours → theirs) as float32, checking shape, type and that all is finite.

    Shapes: ``model.tensor_shapes(config)``. Raises: CheckpointError.
    """
    tensors: dict[str, F32] = {}
    shapes = tensor_shapes(config)
    by_file: dict[Path, list[str]] = {}
    for ours, theirs in wanted.items():
        entry = located[theirs]
        if entry.shape != shapes[ours]:
            raise CheckpointError(
                f"{entry.file}: tensor {entry.name} is {list(entry.shape)}, {CONFIG_FILE} calls for "
                f"{list(shapes[ours])}.",
                "config.json and the weights are of different models; download both again.",
            )
        if entry.dtype not in _FLOATS:
            raise CheckpointError(
                f"{entry.file}: tensor {entry.name} is stored as {entry.dtype}.",
                f"Supported are {', '.join(_FLOATS)}; export the model unquantized.",
            )
        by_file.setdefault(entry.file, []).append(ours)
    for file, group in by_file.items():
        try:
            with safe_open(file, framework="pt") as handle:
                for ours in group:
                    name = located[wanted[ours]].name
                    tensors[ours] = _finite(handle.get_tensor(name), file, name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file}: cannot be read: {error}.", "Download it again.") from error
    return tensors


def _finite(tensor: torch.Tensor, file: Path, name: str) -> F32:
    values = tensor.to(torch.float32).contiguous()
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(
            f"{file}: tensor {name} holds values that are not finite (NaN, infinity or beyond float32).",
            "The training run diverged or the file is damaged; use another checkpoint.",
        )
    array: F32 = values.numpy().copy()
    return array
