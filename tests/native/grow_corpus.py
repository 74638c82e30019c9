"""Grows the fuzz targets' corpora with libFuzzer and keeps what reaches code that nothing smaller does.

Run after a change of format, behind ``make_corpus``; wants clang with its libFuzzer. Bounded: at most
GROWN_FILES files and GROWN_BYTES bytes of a kind are kept, of all sizes.

::

    python -m tests.native.grow_corpus [--seconds 60] [--kind KIND]
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from orchestrator.toolchain import FLAGS
from tests.native.formats_probe import AGENT, PARSERS, RUNTIME
from tests.native.make_corpus import CORPUS, GROWN
from tests.native.sanitized import file_flags

HERE = Path(__file__).parent
MOST_BYTES = 8192
"""Of one input: longer ones reach nothing new."""
GROWN_FILES = 60
GROWN_BYTES = 48 << 10
_MODE = ("-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=all", "-g")

WHOLE_AGENT = (
    *(path for path in sorted(AGENT.glob("*.c")) if path.stem != "main"),
    *sorted(RUNTIME.glob("*.c")),
)
SOURCES: dict[str, tuple[Path, ...]] = {
    "manifest": (HERE / "fuzz_bundle.c", *PARSERS),
    "plan": (HERE / "fuzz_plan.c", *PARSERS),
    "job": (HERE / "fuzz_job.c", AGENT / "job.c", AGENT / "job_settings.c", *PARSERS),
    "journal": (HERE / "fuzz_journal.c", *WHOLE_AGENT),
    "pack": (HERE / "fuzz_pack.c", *WHOLE_AGENT),
}
"""Corpus → its target and what that needs."""


def build(kind: str, folder: Path) -> Path:
    """The target as a libFuzzer program."""
    program, objects = folder / f"fuzz-{kind}", []
    for source in SOURCES[kind]:  # each with the flags of its instruction set
        objects.append(folder / f"{source.parent.name}-{source.stem}.o")
        run("clang", *FLAGS, *file_flags(source), "-w", *_MODE, "-c", source, "-o", objects[-1])
    run("clang", *_MODE, "-pthread", *objects, "-lm", "-o", program)
    return program


def dictionary(files: Sequence[Path]) -> str:
    """Keys and texts of the documents, as libFuzzer reads them."""
    words = {word for path in files for word in re.findall(rb'"[A-Za-z0-9_.-]{1,30}"', path.read_bytes())}
    edges = [
        b"2147483648",
        b"4294967296",
        b"9223372036854775807",
        b"9223372036854775808",
        b"-1",
        b"null",
        b"\\\\u0000",
    ]
    quoted = [word.replace(b'"', rb"\"") for word in sorted(words)]
    return "".join(f'"{word.decode()}"\n' for word in [*quoted, *edges])


def grow(kind: str, seconds: int, folder: Path) -> list[bytes]:
    """New documents of a kind, smallest first."""
    program, found, kept = build(kind, folder), folder / "found", folder / "kept"
    files = sorted((CORPUS / kind).iterdir())
    words = folder / "words"
    words.write_text(dictionary(files))
    for made in (found, kept):
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir()
    limits = (
        f"-max_len={MOST_BYTES}",
        "-timeout=10",
        "-seed=1",
        "-verbosity=0",
        f"-artifact_prefix={folder}/",
    )
    run(program, f"-max_total_time={seconds}", f"-dict={words}", *limits, found, CORPUS / kind, cwd=folder)
    run(program, "-merge=1", *limits, kept, CORPUS / kind, found, cwd=folder)
    known = {path.read_bytes() for path in files}
    return sorted((data for path in kept.iterdir() if (data := path.read_bytes()) not in known), key=len)


def write(kind: str, documents: Sequence[bytes]) -> None:
    """Replace what was grown before; where there are too many, every n-th by size is kept."""
    for old in (CORPUS / kind).glob(f"{GROWN}-*"):
        old.unlink()
    room = GROWN_BYTES
    for data in documents[:: -(-len(documents) // GROWN_FILES) or 1]:
        room -= len(data)
        if room < 0:
            break
        (CORPUS / kind / f"{GROWN}-{hashlib.sha256(data).hexdigest()[:12]}").write_bytes(data)


def run(*command: str | Path, cwd: Path | None = None) -> None:
    """Raises: SystemExit with what it said, also where a target found a fault."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, cwd=cwd
    )
    if done.returncode != 0:
        raise SystemExit(f"{command[0]} ended with {done.returncode}:\n{done.stderr[-6000:]}")


def main() -> None:
    """Grow all corpora, or those named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", action="append", choices=sorted(SOURCES), help="default: all")
    parser.add_argument("--seconds", type=int, default=60, help="of fuzzing, for each kind")
    options = parser.parse_args()
    for kind in options.kind or SOURCES:
        with tempfile.TemporaryDirectory() as folder:
            write(kind, grow(kind, options.seconds, Path(folder)))


if __name__ == "__main__":
    main()
