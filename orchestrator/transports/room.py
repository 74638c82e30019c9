"""What a device states of a file's size, held against the space that the host has for it."""

from __future__ import annotations

import shutil
from pathlib import Path

from orchestrator.errors import StableError


def check_room(source: str, size_bytes: int, destination: Path, device: str) -> None:
    """Refuse to begin with a file for which the host has no space. Raises: StableError."""
    folder = next((each for each in destination.absolute().parents if each.exists()), Path("/"))
    if size_bytes > shutil.disk_usage(folder).free:
        raise StableError(
            f"{source} states a size of {size_bytes} bytes, for which {folder} on the host has no space.",
            "Free space there, if the device is to be believed.",
            device=device,
        )
