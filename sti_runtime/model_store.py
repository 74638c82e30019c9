"""Models at rest: a *model folder* ``<root>/models/<digest>/`` and how it is written and read.

Three files::

    model.json          a ModelInfo; its digest names the folder
    model.safetensors   every canonical tensor (``model.tensor_shapes``), float32
    tokenizer.json      for the tokenizers library, padding set, truncation unset; absent without one

A folder is complete or it is not there: it is written beside its place and renamed into it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from sti_runtime.errors import DigestError, FormatError, ResourceError
from sti_runtime.model import ModelConfig, Submodel, tensor_shapes
from sti_runtime.records import Digest, NonNegative, Positive, Record, canonical_json, sha256_hex
from sti_runtime.shard import F32

MODELS_FOLDER = "models"
INFO_FILE = "model.json"
TENSORS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
_TEMPORARY = ".new-"


TRUNCATED = "-truncated"
"""Ends the split of a score of the fine-tuned model cut to the submodel, without elastic training."""


class SubmodelScore(Record):
    """Accuracy of one submodel at 32 bits: ``correct`` of ``rows`` rows of ``split``.

    A split that ends in ``TRUNCATED`` says: the model before elastic training, cut to the submodel.
    """

    submodel: Submodel
    split: str
    correct: NonNegative
    rows: Positive


class ModelInfo(Record):
    """Everything about a model but its bytes.

    ``untrained``: the submodels were never trained as such. ``source``: a hub id or folder name.
    ``provenance``: what made it (seed, epochs, digest of the train split, …).
    """

    format: Literal["stifarm-model"]
    version: Literal[1]
    config: ModelConfig
    untrained: bool
    submodels: Annotated[tuple[Submodel, ...], Field(min_length=1)]
    tensors_digest: Digest
    tokenizer_digest: Digest | None
    source: str
    provenance: dict[str, str | int]
    scores: tuple[SubmodelScore, ...]


@dataclass(frozen=True, slots=True)
class Model:
    """A model in memory: canonical float32 tensors (``model.tensor_shapes``) and its tokenizer."""

    info: ModelInfo
    tensors: Mapping[str, F32]
    tokenizer_json: bytes | None

    @property
    def digest(self) -> str:
        """Digest of the info, which names the folder and covers tensors and tokenizer."""
        return self.info.digest

    @property
    def config(self) -> ModelConfig:
        """Shape and arithmetic."""
        return self.info.config


def tensors_digest(tensors: Mapping[str, F32], config: ModelConfig) -> str:
    """SHA-256 over name, shape and little-endian bytes of every canonical tensor, in file order."""
    state = hashlib.sha256()
    for name, shape in tensor_shapes(config).items():
        state.update(canonical_json([name, list(shape)]))
        state.update(np.ascontiguousarray(tensors[name], dtype="<f4").data)
    return state.hexdigest()


def make_model(
    config: ModelConfig,
    tensors: Mapping[str, F32],
    tokenizer_json: bytes | None,
    *,
    submodels: tuple[Submodel, ...],
    untrained: bool,
    source: str,
    provenance: Mapping[str, str | int] | None = None,
    scores: tuple[SubmodelScore, ...] = (),
) -> Model:
    """Put a model together and compute its digests.

    Raises: FormatError when a tensor is missing, superfluous, of a wrong shape or not float32.
    """
    _check_tensors(tensors, config, "this model")
    info = ModelInfo(
        format="stifarm-model",
        version=1,
        config=config,
        untrained=untrained,
        submodels=submodels,
        tensors_digest=tensors_digest(tensors, config),
        tokenizer_digest=None if tokenizer_json is None else sha256_hex(tokenizer_json),
        source=source,
        provenance=dict(provenance or {}),
        scores=scores,
    )
    return Model(info=info, tensors=dict(tensors), tokenizer_json=tokenizer_json)


def save_model(model: Model, root: Path) -> Path:
    """Write ``<root>/models/<digest>/`` and return it; an intact one already there is kept.

    Raises: ResourceError when the storage is full or cannot be written.
    """
    folder = root / MODELS_FOLDER
    target = folder / model.digest
    if target.is_dir() and _is_intact(target):
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        temporary = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{os.getpid()}-", dir=folder))
        try:
            _write_files(model, temporary)
            _put_in_place(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise ResourceError(
            f"{target}: the model could not be written: {error}.",
            "Free some space there or choose another place, then run the same command again.",
        ) from error
    return target


def load_model(path: Path, *, verify: bool = True) -> Model:
    """Read a model folder; ``verify`` recomputes the digests of tensors and tokenizer.

    Raises: FormatError when files are missing or malformed; DigestError when bytes were changed.
    """
    info = ModelInfo.read(path / INFO_FILE)
    if len(path.name) == len(info.digest) and path.name != info.digest:
        raise DigestError(f"{path / INFO_FILE}: its digest is {info.digest}, not its folder's name.", _AGAIN)
    file = path / TENSORS_FILE
    try:
        tensors: dict[str, F32] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{file}: cannot be read: {error}.", _AGAIN) from error
    _check_tensors(tensors, info.config, str(file))
    tokenizer_json = _read_tokenizer(path / TOKENIZER_FILE, info)
    if verify and tensors_digest(tensors, info.config) != info.tensors_digest:
        raise DigestError(f"{file}: its tensors do not have the digest in {INFO_FILE}.", _AGAIN)
    return Model(info=info, tensors=tensors, tokenizer_json=tokenizer_json)


# ------------------------------------------------------------------ parts

_AGAIN = "The model folder is damaged; import or train the model again."


def _check_tensors(tensors: Mapping[str, F32], config: ModelConfig, where: str) -> None:
    shapes = tensor_shapes(config)
    if missing := [name for name in shapes if name not in tensors]:
        raise FormatError(f"{where}: {len(missing)} tensors are missing, {missing[0]} first.", _AGAIN)
    if extra := [name for name in tensors if name not in shapes]:
        raise FormatError(f"{where}: tensor {extra[0]} is not one of this architecture.", _AGAIN)
    for name, shape in shapes.items():
        found = tensors[name]
        if found.shape != shape or found.dtype != np.float32:
            raise FormatError(
                f"{where}: tensor {name} is {found.dtype}{list(found.shape)}, not float32{list(shape)}.",
                _AGAIN,
            )


def _read_tokenizer(file: Path, info: ModelInfo) -> bytes | None:
    if info.tokenizer_digest is None:
        return None
    try:
        data = file.read_bytes()
    except OSError as error:
        raise FormatError(f"{file}: cannot be read: {error.strerror}.", _AGAIN) from error
    if sha256_hex(data) != info.tokenizer_digest:
        raise DigestError(f"{file}: does not have the digest in {INFO_FILE}.", _AGAIN)
    return data


def _is_intact(path: Path) -> bool:
    try:
        load_model(path)
    except FormatError:
        return False
    return True


def _write_files(model: Model, folder: Path) -> None:
    names = tensor_shapes(model.config)
    save_file(
        {name: np.ascontiguousarray(model.tensors[name], dtype="<f4") for name in names},
        folder / TENSORS_FILE,
    )
    if model.tokenizer_json is not None:
        (folder / TOKENIZER_FILE).write_bytes(model.tokenizer_json)
    (folder / INFO_FILE).write_bytes(model.info.to_json())
    folder.chmod(0o755)
    for file in folder.iterdir():
        file.chmod(0o644)
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def _put_in_place(temporary: Path, target: Path) -> None:
    """Rename ``temporary`` to ``target``; a damaged folder there makes way, an intact one wins."""
    try:
        temporary.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if _is_intact(target):  # another process wrote the same model meanwhile
            return
        aside = Path(tempfile.mkdtemp(prefix=f"{_TEMPORARY}{os.getpid()}-", dir=target.parent))
        target.rename(aside / "damaged")
        temporary.rename(target)
        shutil.rmtree(aside)
    descriptor = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sweep(folder: Path) -> None:
    """Remove what processes that were killed while writing have left behind."""
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        pid = leftover.name.removeprefix(_TEMPORARY).split("-")[0]
        if pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it lives, under another user
        return True
    return True
