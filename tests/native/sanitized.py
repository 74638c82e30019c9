"""C test programs over the runtime's native sources, built with the compiler's sanitizers."""

from __future__ import annotations

import fcntl
import hashlib
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pytest

from orchestrator.toolchain import FAST_PREFIXES, FLAGS, SOURCE_FOLDERS, TARGETS, cache_folder

Sanitizer = Literal["address,undefined", "thread"]

RUNTIME = SOURCE_FOLDERS[0]
ENVIRONMENT = {
    "ASAN_OPTIONS": "halt_on_error=1:detect_leaks=1",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def build_sanitized(sanitizer: Sanitizer, *programs: Path, runtime: Sequence[Path] | None = None) -> Path:
    """``programs`` with all of the runtime, or these files of it, as one executable.

    Objects are kept in the builder's cache. Skips the test where there is no gcc for x86-64.
    """
    if platform.machine() != "x86_64":
        pytest.skip("sanitized builds run on x86-64")
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs gcc (Debian packages gcc and libc6-dev)")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    folder = cache_folder() / "sanitized"
    folder.mkdir(parents=True, exist_ok=True)
    mode = (f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-g", "-fno-omit-frame-pointer")

    def build_object(source: Path) -> Path:
        flags = (*FLAGS, "-Werror", *file_flags(source), *mode)
        folders = {RUNTIME} if source.parent == RUNTIME else set(SOURCE_FOLDERS)
        headers = b"".join(path.read_bytes() for part in sorted(folders) for path in sorted(part.glob("*.h")))
        key = hashlib.sha256(repr((version, flags, str(source))).encode() + headers + source.read_bytes())
        return _made_once(
            folder / f"{key.hexdigest()}.o", lambda to: (compiler, *flags, "-c", source, "-o", to)
        )

    sources = (*programs, *(sorted(RUNTIME.glob("*.c")) if runtime is None else runtime))
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build_object, sources))
    name = hashlib.sha256(repr(objects).encode()).hexdigest()
    return _made_once(folder / name, lambda to: (compiler, *mode, "-pthread", *objects, "-lm", "-o", to))


def _made_once(path: Path, command: Callable[[Path], Sequence[str | Path]]) -> Path:
    """``path``, made by the command unless it is there; of several processes that want it one makes it."""
    if path.exists():
        return path
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            partial = path.with_suffix(".partial")
            _run(*command(partial))
            partial.replace(path)
    return path


def file_flags(source: Path) -> tuple[str, ...]:
    """What a source is compiled with beside the flags of all."""
    special = [flags for suffix, flags in TARGETS["x86_64"].by_suffix.items() if source.stem.endswith(suffix)]
    contract = "fast" if source.stem.startswith(FAST_PREFIXES) else "off"
    # -O1: checked kernels take minutes to compile at -O3.
    return ("-O1", f"-ffp-contract={contract}", *(flag for flags in special for flag in flags))


def _run(*command: str | Path) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
