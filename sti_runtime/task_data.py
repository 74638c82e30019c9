"""Task data as devices get it: one safetensors file ``<sha256 of the file>.safetensors``.

Tensors ``input_ids`` and ``token_types`` [R, L], ``lengths`` and ``labels`` [R], all int32, little-endian;
label -1 is unknown; rows are padded on the right. The header's metadata has one key, ``stifarm``:
the canonical JSON of a ``TaskDataInfo``. Same content, same bytes.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sti_runtime.errors import FormatError, ResourceError
from sti_runtime.metrics import UNKNOWN_LABEL
from sti_runtime.records import Digest, Record, sha256_hex

I32 = npt.NDArray[np.int32]

_METADATA_KEY = "stifarm"
_TENSORS = ("input_ids", "token_types", "lengths", "labels")
_AGAIN = "It is damaged or not task data; make it again."


class TaskDataInfo(Record):
    """Which task and split the rows are of; ``tokenizer``: digest of the tokenizer.json that made them."""

    format: Literal["stifarm-task-data"]
    version: Literal[1]
    task: str
    split: str
    labels: tuple[str, ...] = Field(min_length=2)
    tokenizer: Digest | None


@dataclass(frozen=True, slots=True)
class TaskData:
    """R tokenized rows of a split. Shapes: ids and types [R, L], lengths and labels [R]."""

    info: TaskDataInfo
    input_ids: I32
    token_types: I32
    lengths: I32
    labels: I32

    def __post_init__(self) -> None:
        """Raises: FormatError when the arrays do not fit each other."""
        rows, tokens = self.input_ids.shape if self.input_ids.ndim == 2 else (0, 0)
        shapes = {
            "input_ids": (rows, tokens),
            "token_types": (rows, tokens),
            "lengths": (rows,),
            "labels": (rows,),
        }
        for name, shape in shapes.items():
            array = getattr(self, name)
            if not rows or not tokens or array.shape != shape or array.dtype != np.int32:
                raise FormatError(
                    f"Task data: {name} is {array.dtype}{list(array.shape)}, not int32{list(shape)}.", _AGAIN
                )
        bounds = {
            "input_ids": (0, 2**31 - 1),
            "token_types": (0, 255),
            "lengths": (1, tokens),
            "labels": (UNKNOWN_LABEL, len(self.info.labels) - 1),
        }
        for name, (low, high) in bounds.items():
            array = getattr(self, name)
            if int(array.min()) < low or int(array.max()) > high:
                raise FormatError(f"Task data: {name} has values outside {low} to {high}.", _AGAIN)

    @property
    def rows(self) -> int:
        """R, the number of rows."""
        return int(self.input_ids.shape[0])

    @property
    def tokens(self) -> int:
        """L, the padded length."""
        return int(self.input_ids.shape[1])


def task_data_bytes(data: TaskData) -> bytes:
    """The file's bytes; equal data gives equal bytes."""
    tensors = {name: np.ascontiguousarray(getattr(data, name), dtype="<i4") for name in _TENSORS}
    # One metadata key only: the library writes several in no fixed order.
    return save(tensors, metadata={_METADATA_KEY: data.info.to_json().decode()})


def task_data_digest(data: TaskData) -> str:
    """SHA-256 of the file's bytes: the name it is stored and deployed by."""
    return sha256_hex(task_data_bytes(data))


def save_task_data(data: TaskData, path: Path) -> str:
    """Write the file (atomically) and return its digest. Raises: ResourceError when it cannot be."""
    content = task_data_bytes(data)
    _write(content, path)
    return sha256_hex(content)


def store_task_data(data: TaskData, folder: Path) -> Path:
    """Write ``<folder>/<digest>.safetensors`` and return its path. Raises: ResourceError."""
    content = task_data_bytes(data)
    path = folder / f"{sha256_hex(content)}.safetensors"
    if not path.is_file() or path.read_bytes() != content:
        _write(content, path)
    return path


def load_task_data(path: Path) -> TaskData:
    """Read and validate a task-data file. Raises: FormatError naming the file and the cause."""
    try:
        with safe_open(path, framework="np") as handle:
            metadata = handle.metadata() or {}
            names = set(handle.keys())
            if names != set(_TENSORS) or _METADATA_KEY not in metadata:
                raise FormatError(f"{path}: holds {sorted(names)}, not task data.", _AGAIN)
            info = TaskDataInfo.from_json(metadata[_METADATA_KEY].encode(), source=str(path))
            arrays = {name: handle.get_tensor(name) for name in _TENSORS}
    except (OSError, SafetensorError) as error:
        raise FormatError(f"{path}: cannot be read: {error}.", _AGAIN) from error
    try:
        return TaskData(info=info, **arrays)
    except FormatError as error:
        raise FormatError(f"{path}: {error.what}", error.remedy) from error


def _write(content: bytes, path: Path) -> None:
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".new-", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise ResourceError(
            f"{path}: {len(content)} bytes of task data could not be written: {error.strerror}.",
            "Free some space there or choose another place, then run the same command again.",
        ) from error
