"""Fuzz targets over what an agent reads, bounded: small corpora and the same mutations of them each time.

With clang the targets also run unbounded, under libFuzzer: build them with ``-fsanitize=fuzzer`` instead of
``fuzz_driver.c``.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from sti_runtime.manifest import Manifest
from sti_runtime.shard import FIDELITIES
from tests.native.formats_probe import AGENT, PARSERS, Ask, formats_probe
from tests.native.make_corpus import CORPUS, SPARSE, config, corpora, small_bundle
from tests.native.sanitized import ENVIRONMENT, build_sanitized

HERE = Path(__file__).parent
LIMIT_S = 300.0

TARGETS = {
    "bundle": ("manifest", (), 8000),
    "plan": ("plan", (), 12000),
    "job": ("job", (AGENT / "job.c", AGENT / "job_settings.c"), 12000),
}
"""Target: its corpus, what it needs besides the parsers, mutations in all."""


def fuzz(program: Path, files: list[Path], mutations: int, **environment: str) -> None:
    """``mutations``: in all; the files share them evenly."""
    done = subprocess.run(
        [program, str(-(-mutations // len(files))), "1", *files],
        capture_output=True,
        timeout=LIMIT_S,
        env=os.environ | ENVIRONMENT | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode(errors="replace")[-4000:]


def corpus(kind: str) -> list[Path]:
    return sorted((CORPUS / kind).iterdir())


@pytest.mark.parametrize("target", TARGETS)
def test_parsers(target: str) -> None:
    kind, sources, mutations = TARGETS[target]
    program = build_sanitized(
        "address,undefined", HERE / f"fuzz_{target}.c", HERE / "fuzz_driver.c", *sources, runtime=PARSERS
    )
    fuzz(program, corpus(kind), mutations)


def test_journal_recovery() -> None:
    sources = sorted(path for path in AGENT.glob("*.c") if path.stem != "main")
    program = build_sanitized("address,undefined", HERE / "fuzz_journal.c", HERE / "fuzz_driver.c", *sources)
    fuzz(program, corpus("journal"), 4500)


def test_packs() -> None:
    sources = sorted(path for path in AGENT.glob("*.c") if path.stem != "main")
    program = build_sanitized("address,undefined", HERE / "fuzz_pack.c", HERE / "fuzz_driver.c", *sources)
    fuzz(program, corpus("pack"), 8000)


def test_payloads(tmp_path: Path) -> None:
    """Stored versions of every fidelity and codec, with outliers and without, and mutations of them."""
    model = config(hidden=24, ffn=40)
    plain, sparse = small_bundle(tmp_path, model, FIDELITIES), small_bundle(tmp_path, model, (2, 5), SPARSE)
    files = []
    for bundle in (plain, sparse):
        for region in bundle.manifest.regions:
            version = region.versions[1]
            stored = (bundle.path / region.file).read_bytes()[version.offset :][: version.payload_bytes]
            head = bytes([FIDELITIES.index(region.fidelity)]) + np.array(version.outliers, "<u2").tobytes()
            files.append(tmp_path / f"payload-{region.fidelity}-{bundle.manifest.quantizer.name}")
            files[-1].write_bytes(head + stored)
    program = build_sanitized("address,undefined", HERE / "fuzz_payload.c", HERE / "fuzz_driver.c")
    fuzz(program, files, 250 * len(files), STIFARM_FUZZ_BUNDLE=str(plain.path))


@pytest.fixture(scope="module")
def ask() -> Ask:
    return formats_probe()


@pytest.mark.parametrize("kind", ["manifest", "plan", "job"])
def test_the_corpora_are_documents_of_today(ask: Ask, kind: str) -> None:
    answers = ask(kind, [path.read_bytes() for path in sorted((CORPUS / kind).glob(f"{kind}-*"))])
    assert [answer.error for answer in answers] == [""] * len(corpora()[kind])


def test_the_manifests_of_the_corpus_are_of_every_codec() -> None:
    seeds = sorted((CORPUS / "manifest").glob("manifest-*"))
    made = [Manifest.from_json(path.read_bytes(), source=path.name).quantizer.name for path in seeds]
    assert set(made) == {"gobo", "gobo-converged", "fisher"}
