"""A limit on memory that the kernel enforces by killing: a control group of our own, for one test."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class MemoryLimit:
    """A group whose processes may have so much memory together, and no swap."""

    folder: Path
    events: str

    def enter(self) -> None:
        """Put this process in, as ``preexec_fn`` does it."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def kills(self) -> int:
        """How many of its processes the kernel has killed."""
        lines = (self.folder / self.events).read_text().splitlines()
        return int(dict(line.split() for line in lines)["oom_kill"])


def _hierarchy() -> tuple[Path, str]:
    """Where groups with a memory limit are made, and which version's they are. Skips where there is none."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount_point, kind, options, *_ = line.split(" ")
        root = Path(mount_point)
        if kind == "cgroup" and "memory" in options.split(","):
            return root, "v1"
        if kind == "cgroup2" and "memory" in (root / "cgroup.subtree_control").read_text().split():
            return root, "v2"
    pytest.skip("needs a control group hierarchy with the memory controller")


@contextmanager
def memory_limit(size_bytes: int) -> Iterator[MemoryLimit]:
    """A group with this limit. Skips where none can be made."""
    if os.geteuid() != 0:
        pytest.skip("needs root: makes a control group")
    parent, version = _hierarchy()
    folder = parent / f"stifarm-test-{uuid.uuid4().hex[:12]}"
    limits = (
        {"memory.limit_in_bytes": size_bytes, "memory.swappiness": 0}
        if version == "v1"
        else {"memory.max": size_bytes, "memory.swap.max": 0}
    )
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made below {parent}: {error.strerror}")
    try:
        for name, value in limits.items():
            file = folder / name
            if "swap" not in name or file.exists():  # a kernel without swap has no limit of it
                file.write_text(str(value))
        yield MemoryLimit(folder, "memory.oom_control" if version == "v1" else "memory.events")
    finally:
        folder.rmdir()
