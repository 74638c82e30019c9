"""What is the torch agent's own; what it shares with every agent is in tests/contract."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.spool import Spool
from sti_runtime.journal_format import read_records
from sti_runtime.messages import EndRecord, ExecuteUnit, ProbeUnit
from sti_runtime.model import Submodel
from tests.agent_data import (
    REPO,
    call_agent,
    make_job,
    make_pack,
    manifest_of,
    probes,
    push_job,
    start_agent,
    tiny_bundle,
)
from tests.bundles import hand_plan


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool.open(tmp_path / "spool")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_deploy_killed_at_random_moments_ends_in_the_same_bundle(spool: Spool, tmp_path: Path) -> None:
    bundle = tiny_bundle(tmp_path)
    rng = random.Random(7)
    verbs = ("missing", "accept", "commit")
    for attempt in range(9):
        verb = verbs[attempt % 3]
        pack = make_pack(spool, bundle, range(len(manifest_of(bundle).all_chunks())))
        subject: dict[str, tuple[object, ...]] = {
            "missing": (bundle / "manifest.json",),
            "accept": (bundle.name,),
            "commit": (bundle.name,),
        }
        agent = start_agent(verb, *subject[verb], "--spool", spool.root, stdin=pack)
        time.sleep(rng.uniform(0.1, 0.4))
        agent.kill()
        agent.communicate()
        visible = spool.bundle(bundle.name)
        assert not visible.exists() or names(visible) == names(bundle)
    report = call_agent("missing", bundle / "manifest.json", "--spool", spool.root)[1]
    if report["missing"]:
        pack = make_pack(spool, bundle, report["missing"])
        call_agent("accept", bundle.name, "--spool", spool.root, stdin=pack)
    code, report = call_agent("commit", bundle.name, "--spool", spool.root)
    assert (code, report["state"] in ("committed", "already")) == (0, True)
    for path in bundle.iterdir():
        assert (spool.bundle(bundle.name) / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "arguments",
    [
        ("version",),
        ("facts", "--spool", "."),
        ("collect", "--spool", "."),
        ("status", "probe", "1", "--spool", "."),
        ("has", "0" * 64, "--spool", "."),
    ],
)
def test_only_run_imports_an_engine(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    script = (
        "import sys; from agent.__main__ import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'numpy'} & set(sys.modules); sys.exit(f'imported {heavy}' if heavy else code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPO)}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=tmp_path, env=environment, capture_output=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()


def test_an_engine_that_cannot_be_imported_ends_the_job_at_the_first_unit_that_needs_it(
    spool: Spool, tmp_path: Path
) -> None:
    """A probe needs none. The units before it count, and the next attempt may run on a repaired device."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "torch.py").write_text("raise ImportError('libtorch.so is gone')\n")
    bundle = tiny_bundle(spool.bundles)
    manifest = manifest_of(bundle)
    plan = hand_plan(manifest, Submodel(kept=(0,), width=1), lambda _layer, _slice: 2)
    units = (
        ProbeUnit(number=0, kind="probe"),
        ExecuteUnit(
            number=1, kind="execute", plan=plan, request_kind="cold", io_mode="direct", warmups=0, rows=(0,)
        ),
        ProbeUnit(number=2, kind="probe"),
    )
    job = make_job(spool, bundle=bundle.name, units=units)
    path = push_job(spool, job)
    environment = {**os.environ, "PYTHONPATH": str(broken)}
    code, report = call_agent("run", path, "--spool", spool.root, env=environment)
    assert (code, report) == (3, {"state": "refused", "done": 1, "failed": 0})
    end = read_records(path.with_name("journal.log"), 0).records[-1].payload
    assert isinstance(end, EndRecord)
    assert end.refused == "the engine cannot be imported: libtorch.so is gone"


def test_a_job_of_probes_imports_no_engine(spool: Spool, tmp_path: Path) -> None:
    path = push_job(spool, make_job(spool, units=probes(2)))
    script = (
        "import sys; from agent.__main__ import main; code = main(sys.argv[1:]);"
        "sys.exit('imported torch' if 'torch' in sys.modules else code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "run", str(path), "--spool", str(spool.root)],
        cwd=REPO, capture_output=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    assert b'"done":2' in done.stdout
