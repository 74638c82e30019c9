"""The peers' environment below the user's cache folder: pinned packages, llama.cpp built for this CPU from
its Python package's source, the benchmark's model in every peer's format."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PINS = ROOT / "bench" / "peers.txt"
DRIVER_SOURCE = ROOT / "bench" / "native" / "llama_driver.c"
LLAMA = "llama-cpp-python"
_CMAKE_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=ON",
    *(f"-DLLAMA_BUILD_{part}=OFF" for part in ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP")),
    "-DLLAMA_OPENSSL=OFF",
)
_LIBRARIES = ("src/libllama.a", "ggml/src/libggml.a", "ggml/src/libggml-cpu.a", "ggml/src/libggml-base.a")


class SetupError(Exception):
    """What is missing for the peers, and what to do."""


@dataclass(frozen=True)
class PeersHome:
    """Where the peers live."""

    folder: Path

    @property
    def python(self) -> Path:
        """Interpreter of their environment."""
        return self.folder / "venv" / "bin" / "python"

    @property
    def models(self) -> Path:
        """The model in their formats."""
        return self.folder / "models"

    @property
    def llama_driver(self) -> Path:
        """The program that runs llama.cpp."""
        return self.folder / "llama_driver"

    def check(self) -> None:
        """Raises: SetupError when something is missing."""
        missing = [
            path for path in (self.python, self.models / "complete", self.llama_driver) if not path.exists()
        ]
        if missing:
            raise SetupError(f"{missing[0]} is missing. Run: python -m bench.engines --setup")


def pins() -> dict[str, str]:
    """Package → version of peers.txt."""
    lines = [line for line in PINS.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def set_up(home: PeersHome, model: Path) -> None:
    """Install, build and export what is missing. Raises: SetupError."""
    home.folder.mkdir(parents=True, exist_ok=True)
    _environment(home)
    if not home.llama_driver.exists() or home.llama_driver.stat().st_mtime < DRIVER_SOURCE.stat().st_mtime:
        _llama(home)
    done = home.models / "complete"
    if not done.exists() or done.read_text() != model.name:
        shutil.rmtree(home.models, ignore_errors=True)
        _call(
            [
                str(home.python),
                "-m",
                "bench.peers.export",
                str(model),
                str(home.models),
                str(home.llama_driver),
            ]
        )
        done.write_text(model.name)


def _environment(home: PeersHome) -> None:
    """A venv with the pinned packages; this one's (torch, transformers) are visible behind its own."""
    marker = home.folder / "venv" / "peers.txt"
    if marker.exists() and marker.read_text() == PINS.read_text():
        return
    venv.create(home.folder / "venv", with_pip=True)
    behind = sysconfig.get_paths()["purelib"]
    found = sysconfig.get_path("purelib", vars={"base": str(home.folder / "venv")})
    (Path(found) / "stifarm-bench.pth").write_text(behind + "\n")
    wanted = [f"{name}=={version}" for name, version in pins().items() if name != LLAMA]
    _call([str(home.python), "-m", "pip", "install", "--quiet", "--only-binary", ":all:", *wanted])
    marker.write_text(PINS.read_text())


def _llama(home: PeersHome) -> None:
    """Build libllama and link the driver statically: nothing but itself is loaded when it starts."""
    for program in ("cmake", "gcc", "g++"):
        if shutil.which(program) is None:
            raise SetupError(
                f"{program} is missing; llama.cpp is built from source. Install it and try again."
            )
    source = home.folder / "src" / f"{LLAMA.replace('-', '_')}-{pins()[LLAMA]}" / "vendor" / "llama.cpp"
    build = home.folder / "build"
    if not source.exists():
        _download(source.parents[2])
    _call(["cmake", "-S", str(source), "-B", str(build), *_CMAKE_OPTIONS])
    _call(["cmake", "--build", str(build), "--target", "llama", "--parallel", "2"])
    item = str(home.folder / "llama_driver.o")
    includes = (f"-I{source}/include", f"-I{source}/ggml/include")
    _call(["gcc", "-std=gnu17", "-O2", "-Wall", "-Wextra", *includes, "-c", str(DRIVER_SOURCE), "-o", item])
    libraries = [str(build / library) for library in _LIBRARIES]
    _call(["g++", "-static", item, *libraries, "-fopenmp", "-ldl", "-o", str(home.llama_driver)])


def _download(to: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        wanted = f"{LLAMA}=={pins()[LLAMA]}"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", LLAMA, wanted]
        _call([*pip, "--dest", folder])
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as stream:
            stream.extractall(to, filter="data")


def _call(argv: Sequence[str]) -> None:
    print("$", " ".join(argv), flush=True)
    done = subprocess.run(argv, cwd=ROOT, check=False)
    if done.returncode != 0:
        raise SetupError(f"{argv[0]} ended with exit code {done.returncode}: {' '.join(argv)}")
