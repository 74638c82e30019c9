"""Fresh processes under known conditions: page cache dropped, reads limited by the kernel.

What is timed begins in ``native/spawn.c``, a small process started for each run: neither this interpreter's
fork nor entering a control group is part of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.cgroups import (
    CgroupUnavailableError,
    GroupLimits,
    apply_limits,
    block_device,
    cpu_limits,
    io_limits,
    remove_groups,
    system_hierarchies,
)

SOURCES = Path(__file__).parent / "native"
ROOT = Path(__file__).parents[1]
DROP_CACHES = Path("/proc/sys/vm/drop_caches")
BLOCK = 4096
_RUN_LIMIT_S = 300.0


class RunFailedError(Exception):
    """A run did not end well; the text says which and what it said."""


@dataclass(frozen=True)
class Tools:
    """The compiled helpers."""

    spawn: Path
    disk_read: Path


@dataclass(frozen=True)
class Finished:
    """A run that ended well. ``answer``: its last line of JSON; times of CLOCK_MONOTONIC."""

    answer: dict[str, Any]
    spawned_ns: int
    ended_ns: int
    cpu_us: int


def compile_tools(folder: Path) -> Tools:
    """Compile the helpers that are older than their sources, with the agent's compiler."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("spawn", "disk_read")
    for name in names:
        source, program = SOURCES / f"{name}.c", folder / name
        if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
            compiler = (sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-linux-musl")
            flags = ("-std=gnu17", "-O2", "-static", "-Wall", "-Wextra")
            subprocess.run([*compiler, *flags, str(source), "-o", str(program)], check=True)
    return Tools(*(folder / name for name in names))


@dataclass(frozen=True)
class PageCache:
    """How files are made cold. ``whole``: the kernel drops every clean page (root); else only given files."""

    whole: bool

    @classmethod
    def best(cls) -> PageCache:
        """What this user may do."""
        return cls(os.access(DROP_CACHES, os.W_OK))

    @property
    def description(self) -> str:
        """For the output."""
        if self.whole:
            return (
                "what is dirty is written, then every page dropped, before every cold run "
                "(sync, /proc/sys/vm/drop_caches; directory entries and inodes may stay)"
            )
        return "only the engines' own files evicted (sync, posix_fadvise), shared libraries stay cached"

    def drop(self, files: Sequence[Path]) -> None:
        """Evict; ``files`` are what the run will read. Dirty pages would stay: they are written first."""
        os.sync()
        if self.whole:
            DROP_CACHES.write_text("1")
            return
        for file in files:
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass(frozen=True)
class Board:
    """A machine limited by the kernel; ``None``: not limited. ``groups`` are set up."""

    name: str
    read_bytes_per_s: int | None
    cpu_share_milli: int | None
    groups: tuple[GroupLimits, ...]

    def bytes_read(self) -> int | None:
        """Bytes that the group's processes have read from storage so far; None where it cannot be told."""
        for group in self.groups:
            for file in group.folder.glob("blkio.throttle.io_service_bytes"):
                lines = file.read_text().split("\n")
                return sum(int(line.split()[2]) for line in lines if " Read " in line)
        return None


THIS_MACHINE = Board("this machine", None, None, ())


@contextlib.contextmanager
def limited_board(
    name: str, folder: Path, *, read_bytes_per_s: int | None = None, cpu_share_milli: int | None = None
) -> Iterator[Board]:
    """A board while the block lasts. ``folder``: on the disk to limit. Raises: CgroupUnavailableError."""
    hierarchies, group = (
        system_hierarchies(),
        f"bench-{os.getpid()}-{re.sub('[^a-z0-9]+', '-', name.lower())}",
    )
    limits: list[GroupLimits] = []
    if read_bytes_per_s is not None:
        limits.append(io_limits(hierarchies, group, read_bytes_per_s, block_device(folder)))
    if cpu_share_milli is not None:
        limits.append(cpu_limits(hierarchies, group, cpu_share_milli))
    try:
        apply_limits(limits)
        yield Board(name, read_bytes_per_s, cpu_share_milli, tuple(limits))
    finally:
        with contextlib.suppress(CgroupUnavailableError):
            remove_groups(hierarchies, group)


def run(tools: Tools, argv: Sequence[str], board: Board = THIS_MACHINE) -> Finished:
    """Run a command in a fresh process on a board. Raises: RunFailedError."""
    groups = [part for procs in dict.fromkeys(str(g.procs) for g in board.groups) for part in ("-g", procs)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            [str(tools.spawn), *groups, "--", *argv],
            capture_output=True,
            text=True,
            timeout=_RUN_LIMIT_S,
            check=False,
            env=environment,
            cwd=ROOT,
        )
    except subprocess.TimeoutExpired as error:
        raise RunFailedError(f"{argv[0]} did not end within {_RUN_LIMIT_S:g} s") from error
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or len(lines) < 2 or json.loads(lines[-1])["status"] != 0:
        said = (done.stdout + done.stderr).strip()[-2000:]
        raise RunFailedError(f"{' '.join(argv)}: {said or f'exit code {done.returncode}'}")
    answer, report = json.loads(lines[-2]), json.loads(lines[-1])
    return Finished(
        answer=answer,
        spawned_ns=report["spawned_ns"],
        ended_ns=report["ended_ns"],
        cpu_us=report["user_us"] + report["system_us"],
    )


def direct_read_ns(tools: Tools, file: Path, bytes_: int, board: Board) -> int:
    """Time of direct reads, one after the other, of a file's first ``bytes_`` (rounded up to pages)."""
    bytes_ = min(-(-bytes_ // BLOCK) * BLOCK, file.stat().st_size // BLOCK * BLOCK)
    duration: int = run(tools, [str(tools.disk_read), str(file), str(bytes_)], board).answer["duration_ns"]
    return duration
