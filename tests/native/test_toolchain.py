"""Building the agent's executables: what is kept, what is compiled again, and what is said when it fails."""

from __future__ import annotations

import os
import platform
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from orchestrator.errors import ToolchainError
from orchestrator.toolchain import (
    ARCHITECTURES,
    SIZE_CAP_BYTES,
    Sources,
    agent_sources,
    build_agent,
    cache_folder,
    compile_flags,
)

HERE = platform.machine()
LOADED, INTERPRETER = 1, 3  # PT_LOAD; PT_INTERP: the dynamic loader that a program needs


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own; the compiler's (the C library of each target) stays the user's."""
    monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", str(cache_folder() / "zig"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "stifarm" / "agents"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small program of two files and a header."""
    folder = tmp_path / "native"
    folder.mkdir()
    (folder / "answer.h").write_text("int answer(void);\n")
    (folder / "answer.c").write_text('#include "answer.h"\nint answer(void) { return 42; }\n')
    (folder / "main.c").write_text(
        '#include <stdio.h>\n#include "answer.h"\nint main(void) { return printf("%d\\n", answer()) < 0; }\n'
    )
    return folder


def sources(folder: Path) -> Sources:
    return Sources.below((folder,))


def objects(cache: Path) -> set[str]:
    return {path.name for path in (cache / "objects").iterdir()}


@pytest.mark.skipif(HERE != "x86_64", reason="runs the x86_64 executable itself")
def test_builds_a_static_program_once(cache: Path, folder: Path) -> None:
    steps: list[tuple[int, int]] = []
    path = build_agent(
        "x86_64", sources=sources(folder), progress=lambda done, total: steps.append((done, total))
    )
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert path.parent.parent == cache
    assert path.name == "stifarm-agent-x86_64"
    assert subprocess.run([path], capture_output=True, check=True).stdout == b"42\n"
    assert INTERPRETER not in segment_types(path.read_bytes())
    stamp = path.stat().st_mtime_ns
    steps.clear()
    assert build_agent("x86_64", sources=sources(folder), progress=lambda *step: steps.append(step)) == path
    assert steps == []
    assert path.stat().st_mtime_ns == stamp


def test_an_edit_compiles_one_file_again(cache: Path, folder: Path) -> None:
    first = build_agent("x86_64", sources=sources(folder))
    before = objects(cache)
    (folder / "answer.c").write_text('#include "answer.h"\nint answer(void) { return 43; }\n')
    second = build_agent("x86_64", sources=sources(folder))
    assert second.parent != first.parent
    assert first.read_bytes() != second.read_bytes()
    assert len(objects(cache) - before) == 1
    between = objects(cache)
    (folder / "answer.h").write_text("int answer(void); /* a header is in every file */\n")
    build_agent("x86_64", sources=sources(folder))
    assert len(objects(cache) - between) == 2


def test_the_folder_of_the_sources_leaves_no_trace(
    cache: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "main.c").write_text("#include <stdio.h>\nint main(void) { return puts(__FILE__) < 0; }\n")
    here = build_agent("x86_64", sources=sources(folder)).read_bytes()
    folder.rename(tmp_path / "elsewhere")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another-cache"))
    there = build_agent("x86_64", sources=sources(tmp_path / "elsewhere")).read_bytes()
    assert here == there
    assert str(tmp_path).encode() not in here


def test_two_at_once_give_one_executable(cache: Path, folder: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from orchestrator.toolchain import *;"
        "print(build_agent('x86_64', sources=Sources.below((Path(sys.argv[1]),))))"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", script, str(folder)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    paths = {run.communicate()[0].strip() for run in runs}
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert len(paths) == 1
    assert [path.name for path in Path(paths.pop()).parent.iterdir()] == ["stifarm-agent-x86_64"]


def test_threads_of_one_process_build_once_too(cache: Path, folder: Path) -> None:
    steps: list[object] = []
    threads = [
        threading.Thread(
            target=build_agent,
            args=("x86_64",),
            kwargs={"sources": sources(folder), "progress": lambda *step: steps.append(step)},
        )
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(steps) == 3


def test_a_compile_error_shows_the_compilers_words(cache: Path, folder: Path) -> None:
    (folder / "answer.c").write_text("int answer(void) { return forty_two; }\n")
    with pytest.raises(ToolchainError) as caught:
        build_agent("x86_64", sources=sources(folder))
    assert "answer.c cannot be compiled for x86_64" in caught.value.what
    assert "forty_two" in caught.value.what
    assert "requirements.lock" in caught.value.remedy
    leftovers = [path for path in cache.rglob("*") if path.name.startswith(".")]
    assert leftovers == []


def test_a_link_error_shows_the_missing_name(cache: Path, folder: Path) -> None:
    (folder / "answer.c").write_text("typedef int nothing;\n")
    with pytest.raises(ToolchainError, match=r"(?s)cannot be linked.*answer"):
        build_agent("x86_64", sources=sources(folder))


def test_no_sources(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ToolchainError, match="There are no C sources"):
        build_agent("x86_64", sources=sources(tmp_path / "nothing"))


def test_an_unknown_architecture_names_the_known(cache: Path) -> None:
    with pytest.raises(ToolchainError, match=r"'riscv64'.*x86_64, aarch64, armv7"):
        build_agent("riscv64")


def test_a_cache_that_is_a_file(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ToolchainError, match="XDG_CACHE_HOME"):
        build_agent("x86_64", sources=sources(folder))


def test_a_full_cache(cache: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: mounts a small tmpfs")
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", small], check=False)
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        (small / "filler").write_bytes(bytes(8 << 10))
        monkeypatch.setenv("XDG_CACHE_HOME", str(small))
        with pytest.raises(ToolchainError, match="No space left") as caught:
            build_agent("x86_64", sources=sources(folder))
        assert "Free space" in caught.value.remedy
    finally:
        subprocess.run(["umount", small], check=True)


def test_without_the_compiler_the_remedy_is_a_command(folder: Path, tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['ziglang'] = None\n"
        "from pathlib import Path\nfrom orchestrator.toolchain import *\n"
        "from orchestrator.errors import ToolchainError\n"
        "try: build_agent('x86_64', sources=Sources.below((Path(sys.argv[1]),)))\n"
        "except ToolchainError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, check=True
    )
    assert "ziglang is not installed" in done.stdout
    assert "pip install ziglang" in done.stdout


def test_flags_by_the_end_of_a_files_name() -> None:
    assert "-mavx512vnni" in compile_flags("x86_64", Path("kernels_avx512.c"))
    assert "-mavx512f" not in compile_flags("x86_64", Path("kernels_avx2.c"))
    assert "-mavx2" not in compile_flags("aarch64", Path("kernels_avx2.c"))
    assert "-mcpu=generic+v8_2a+dotprod" in compile_flags("aarch64", Path("kernels_dotprod.c"))
    assert "-mcpu=cortex_a7" in compile_flags("armv7", Path("kernels_neon.c"))
    assert "-mcpu=generic+v7a" in compile_flags("armv7", Path("kernels.c"))
    assert {"-Os", "-ffp-contract=off"} < set(compile_flags("x86_64", Path("fit.c")))
    assert "-ffp-contract=fast" in compile_flags("x86_64", Path("engine.c"))


def segment_types(elf: bytes) -> set[int]:
    """Types of a little-endian ELF file's program headers. Source: elf(5)."""
    layout = "<32xQ14xHH" if elf[4] == 2 else "<28xI10xHH"  # 64 or 32 bits: e_phoff, e_phentsize, e_phnum
    table, size, count = struct.unpack_from(layout, elf)
    return {int.from_bytes(elf[table + i * size :][:4], "little") for i in range(count)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_agent_is_small_and_for_its_architecture(architecture: str) -> None:
    data = build_agent(architecture).read_bytes()
    assert len(data) < SIZE_CAP_BYTES
    machine = {"x86_64": 62, "aarch64": 183, "armv7": 40}[architecture]
    assert data[:4] == b"\x7fELF"
    assert int.from_bytes(data[18:20], "little") == machine
    assert LOADED in segment_types(data)
    assert INTERPRETER not in segment_types(data)


@pytest.mark.parametrize("sanitized", [True, False])
def test_clangs_address_sanitizer_sees_what_an_arena_has_not_handed_out(
    tmp_path: Path, sanitized: bool
) -> None:
    (base,) = (path for path in agent_sources().files if path.name == "base.c")
    flags = [*compile_flags("x86_64", base), *(["-fsanitize=address"] if sanitized else [])]
    made = tmp_path / "base.o"
    subprocess.run([sys.executable, "-m", "ziglang", "cc", *flags, "-c", base, "-o", made], check=True)
    assert (b"__asan_poison_memory_region" in made.read_bytes()) == sanitized


def test_the_sources_are_package_data() -> None:
    here = Path(__file__).resolve().parents[2]
    text = (here / "pyproject.toml").read_text()
    for path in {path.parent for path in agent_sources().files}:
        package = path.parent.name
        assert f'{package} = ["native/*"]' in text
