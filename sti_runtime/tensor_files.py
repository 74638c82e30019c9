"""Writing safetensors files whole or not at all; needs no PyTorch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import save_file

from sti_runtime.errors import ResourceError


def save_tensors_atomically(
    file: Path, tensors: Mapping[str, npt.NDArray[Any]], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file so that ``file`` is either as before or complete. Raises: ResourceError."""
    temporary = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # the library writes private files; the umask decides here
        save_file(dict(tensors), temporary, dict(metadata))
        temporary.chmod(mode)
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(file)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise ResourceError(
            f"{file}: cannot be written: {error}.",
            "Free some space or choose another folder, then run the same command again.",
        ) from error
