"""Cross-compiles the native agent: one static Linux executable per architecture.

The compiler is the PyPI package ``ziglang`` (clang with the C library of every target), so a host needs
nothing else. What is built is kept below the user's cache folder, under the digest of what it was made from::

    <cache>/stifarm/agents/<digest>/stifarm-agent-<arch>   executables; of sources, flags, compiler version
    <cache>/stifarm/agents/objects/<digest>.o              one source file compiled for one architecture
    <cache>/stifarm/agents/zig/                            the compiler's own cache (the targets' C library)
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import version as package_version
from pathlib import Path

from orchestrator.errors import ToolchainError
from orchestrator.transports.base import Progress

ARCHITECTURES = ("x86_64", "aarch64", "armv7")

SIZE_CAP_BYTES = 500_000
"""What an executable must stay below; a test builds all three and compares."""

_TREE = Path(__file__).resolve().parent.parent
SOURCE_FOLDERS = (_TREE / "sti_runtime" / "native", _TREE / "agent" / "native")

_COMPILE_LIMIT_S = 600.0
_PARALLEL = 2

FLAGS = (
    "-std=gnu17",
    "-D_GNU_SOURCE",
    "-D_FILE_OFFSET_BITS=64",
    "-pthread",
    "-ffunction-sections",
    "-fdata-sections",
    "-fno-asynchronous-unwind-tables",
    "-fno-unwind-tables",
    "-fomit-frame-pointer",
    "-Wall",
    "-Wextra",
    "-Wshadow",
    "-Wvla",
)
EXACT_FLAGS = ("-Os", "-ffp-contract=off")
"""Small, for no time is spent there that anybody measures; and fit and plan must give the host's digests:
no fused multiply-add."""
START_FLAGS = ("-O2", "-ffp-contract=off")
START_PREFIXES = ("bundle", "digest", "json", "manifest", "records")
"""What reads the manifest: most of what a process computes before it is ready."""
FAST_FLAGS = ("-O3", "-ffp-contract=fast")
FAST_PREFIXES = ("kernels", "engine")
SPEEDS = ((FAST_PREFIXES, FAST_FLAGS), (START_PREFIXES, START_FLAGS))
LINK_FLAGS = ("-static", "-s", "-Wl,--gc-sections")


@dataclass(frozen=True)
class Target:
    """One architecture: what the compiler calls it, its baseline CPU, more flags by a file's name."""

    triple: str
    cpu: str
    by_suffix: Mapping[str, tuple[str, ...]]


TARGETS: Mapping[str, Target] = {
    "x86_64": Target(
        "x86_64-linux-musl",
        "-mcpu=x86_64",
        {
            "_avx2": ("-mavx2", "-mfma", "-mf16c"),
            "_avx512": (
                *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mavx512vbmi"),
                *("-mavx2", "-mfma"),
            ),
        },
    ),
    "aarch64": Target("aarch64-linux-musl", "-mcpu=generic", {"_dotprod": ("-mcpu=generic+v8_2a+dotprod",)}),
    # Every ARMv7 phone has NEON; fused multiply-add came with the Cortex-A7 and A15.
    "armv7": Target("arm-linux-musleabihf", "-mcpu=generic+v7a", {"_neon": ("-mcpu=cortex_a7",)}),
}


@dataclass(frozen=True)
class Sources:
    """The C files of the agent: what is compiled, and the headers that all of them may include."""

    files: tuple[Path, ...]
    headers: tuple[Path, ...]

    @classmethod
    def below(cls, folders: tuple[Path, ...]) -> Sources:
        """All of some folders, in the order of their names. Raises: ToolchainError when there is none."""
        files = tuple(path for folder in folders for path in sorted(folder.glob("*.c")))
        if not files:
            raise ToolchainError(
                f"There are no C sources of the agent in {' or '.join(map(str, folders))}.",
                "Install stifarm again: the sources belong to the package.",
            )
        return cls(files, tuple(path for folder in folders for path in sorted(folder.glob("*.h"))))


def agent_sources() -> Sources:
    """The native agent's own sources."""
    return Sources.below(SOURCE_FOLDERS)


def build_agent(
    architecture: str, *, progress: Progress | None = None, sources: Sources | None = None
) -> Path:
    """The agent's executable for an architecture, compiled if it is not in the cache.

    ``progress`` gets (steps done, steps); a target's first link also compiles its C library (about 35 s).
    Safe to call from several processes at once. Raises: ToolchainError.
    """
    if architecture not in TARGETS:
        raise ToolchainError(
            f"There is no agent for the architecture {architecture!r}.",
            f"Choose one of {', '.join(ARCHITECTURES)}.",
        )
    build = _Build(architecture, sources or agent_sources(), _compiler_version())
    with _explained():
        path = build.executable()
        if not path.exists():
            build.folder.mkdir(parents=True, exist_ok=True)
            with _locked(build.cache / f"lock-{architecture}"):
                if not path.exists():
                    build.make(path, progress)
    return path


def is_built(architecture: str) -> bool:
    """Whether ``build_agent`` has nothing to do. Raises: ToolchainError."""
    with _explained():
        return _Build(architecture, agent_sources(), _compiler_version()).executable().exists()


def cache_folder() -> Path:
    """Where built agents are kept: below XDG_CACHE_HOME, else ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "stifarm" / "agents"


def compile_flags(architecture: str, source: Path) -> tuple[str, ...]:
    """All flags for one file: the tree's, the target's baseline, then those its name asks for."""
    target = TARGETS[architecture]
    special = [flags for suffix, flags in target.by_suffix.items() if source.stem.endswith(suffix)]
    speed = next((flags for names, flags in SPEEDS if source.stem.startswith(names)), EXACT_FLAGS)
    cpu = () if any(flag.startswith("-mcpu") for flags in special for flag in flags) else (target.cpu,)
    return (*FLAGS, *speed, "-target", target.triple, *cpu, *(flag for flags in special for flag in flags))


@dataclass(frozen=True)
class _Build:
    architecture: str
    sources: Sources
    compiler: str

    @property
    def cache(self) -> Path:
        return cache_folder()

    @property
    def folder(self) -> Path:
        digest = hashlib.sha256()
        headers = _contents(self.sources.headers)
        for architecture in ARCHITECTURES:
            for source in self.sources.files:
                digest.update(self._key(source, architecture, headers).encode())
        digest.update(repr(LINK_FLAGS).encode())
        return self.cache / digest.hexdigest()

    def executable(self) -> Path:
        return self.folder / f"stifarm-agent-{self.architecture}"

    def make(self, path: Path, progress: Progress | None) -> None:
        """Compile what has no object yet, then link into ``path``. Raises: ToolchainError, OSError."""
        (self.cache / "objects").mkdir(parents=True, exist_ok=True)
        total = len(self.sources.files) + 1
        with ThreadPoolExecutor(_PARALLEL) as pool:
            jobs = {pool.submit(self._object, source): source for source in self.sources.files}
            try:
                for done, job in enumerate(as_completed(jobs), 1):
                    job.result()
                    if progress is not None:
                        progress(done, total)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        objects = [self._object(source) for source in self.sources.files]
        if self.executable() != path:
            raise _changed()
        target = TARGETS[self.architecture]
        link = ("-target", target.triple, target.cpu, *LINK_FLAGS, *map(str, objects))
        with _published(path) as partial:
            self._zig(*link, "-o", str(partial), what=f"The agent for {self.architecture} cannot be linked")
            partial.chmod(0o755)
        if progress is not None:
            progress(total, total)

    def _key(self, source: Path, architecture: str, headers: bytes) -> str:
        digest = hashlib.sha256()
        flags = compile_flags(architecture, source)
        digest.update(repr((self.compiler, flags, source.name)).encode())
        digest.update(_contents([source]))
        digest.update(headers)
        return digest.hexdigest()

    def _object(self, source: Path) -> Path:
        """The file's object, compiled if its sources, flags or compiler are new."""
        key = self._key(source, self.architecture, _contents(self.sources.headers))
        path = self.cache / "objects" / f"{key}.o"
        if not path.exists():
            flags = compile_flags(self.architecture, source)
            # Without the machine's paths inside, the same sources give the same executable everywhere.
            prefix = f"-ffile-prefix-map={source.parent}=native"
            with _published(path) as partial:
                self._zig(
                    *flags,
                    *(prefix, "-c", str(source), "-o", str(partial)),
                    what=f"{source} cannot be compiled for {self.architecture}",
                )
                if self._key(source, self.architecture, _contents(self.sources.headers)) != key:
                    raise _changed()
        return path

    def _zig(self, *arguments: str, what: str) -> None:
        environment = {"ZIG_GLOBAL_CACHE_DIR": str(self.cache / "zig"), **os.environ}
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-m", "ziglang", "cc", *arguments],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env=environment,
                timeout=_COMPILE_LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ToolchainError(
                f"{what}: the compiler did not end within {_COMPILE_LIMIT_S:g} s.", "Run the command again."
            ) from error
        if done.returncode != 0:
            said = done.stderr.decode(errors="replace").strip() or f"exit code {done.returncode}"
            # On a full disk the linker dies of a signal: it writes through a mapping.
            if "NoSpaceLeft" in said or shutil.disk_usage(self.cache).free < SIZE_CAP_BYTES:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.cache))
            raise ToolchainError(
                f"{what}:\n{said[-4000:]}\n",
                "An unchanged stifarm with the pinned ziglang compiles: undo changes to the sources, or "
                "install the versions of requirements.lock.",
            )


def _contents(paths: Sequence[Path]) -> bytes:
    """What some files hold, with their names and lengths."""
    held = ((path.name, path.read_bytes()) for path in paths)
    return b"".join(f"{name} {len(data)}\n".encode() + data for name, data in held)


def _changed() -> ToolchainError:
    return ToolchainError("The agent's C sources changed while they were compiled.", "Run the command again.")


def _compiler_version() -> str:
    if importlib.util.find_spec("ziglang") is None:
        raise ToolchainError(
            "The compiler for the native agent is missing: the Python package ziglang is not installed.",
            f"Install it: {sys.executable} -m pip install ziglang",
        )
    return package_version("ziglang")


@contextlib.contextmanager
def _published(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its name when the block ends well and is gone otherwise."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn the operating system's refusals below the cache folder into ours."""
    try:
        yield
    except OSError as error:
        where = error.filename or cache_folder()
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "Free space there (about 300 MB), or set XDG_CACHE_HOME to a folder with more."
        else:
            remedy = "Make it writable, or set XDG_CACHE_HOME to a folder that is."
        raise ToolchainError(
            f"The agent cannot be built in {cache_folder()}: {error.strerror} ({where}).", remedy
        ) from error
