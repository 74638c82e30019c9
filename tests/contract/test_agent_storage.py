"""Storage that fails below the agents, with the kernel's own errors: EIO of a read, ENOSPC of a full disk."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.open_unit import OPEN_UNIT_FILE
from agent.spool import Spool
from sti_runtime.manifest import MANIFEST_NAME
from sti_runtime.messages import ComputeProfileUnit, FailureRecord, ProbeUnit, ResultRecord
from tests.agent_data import make_pack, probes
from tests.agents import Agent
from tests.contract.agent_world import (
    Content,
    a_job,
    execute,
    job_path,
    journal_of,
    numbered,
    run,
    units_of,
)

READS = "preadv,preadv2,pread64,readv,read"
"""Every call that a program here could read a file with."""


def failing_reads(file: Path, first: int, trace: Path) -> tuple[str, ...]:
    """argv that, before a command's own, makes each of its threads' reads of ``file`` an EIO, from the
    thread's ``first`` on; ``trace`` then names them. Skips where strace cannot do it."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("needs strace, which makes the kernel's errors (Debian package strace)")
    inject = f"inject={READS}:error=EIO:when={first}+"
    argv = (strace, "-f", "-qq", "-o", str(trace), "-P", str(file), "-e", f"trace={READS}", "-e", inject)
    tried = subprocess.run([*argv, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"strace cannot trace and inject here: {tried.stderr.strip()}")
    return argv


@pytest.mark.parametrize("first", [1, 2])
def test_a_read_error_of_the_kernel_fails_the_unit_and_the_next_runs(
    agent: Agent, spool: Spool, content: Content, tmp_path: Path, first: int
) -> None:
    """The file was opened by an earlier unit. One read in flight is one thread, with one read per layer: so
    it is known which read fails."""
    other, plan = content.plan(32), content.plan(4)
    file = spool.bundle(content.bundle.digest) / content.bundle.region_path(4).name
    units = numbered(
        [execute(0, other), execute(0, plan), ProbeUnit(number=0, kind="probe"), execute(0, other)]
    )
    job = a_job(agent, spool, content, units=units, queue_depth=1)
    trace = tmp_path / "trace"
    argv = (*failing_reads(file, first, trace), *agent.argv)
    failing = Agent(agent.name, argv, emulated=agent.emulated, environment=agent.environment)
    assert run(failing, spool, job) == (0, {"state": "ended", "done": 3, "failed": 1})
    assert "(INJECTED)" in trace.read_text()
    found = [record.payload for record in journal_of(spool, job)[1:-1]]
    assert [type(item) for item in found] == [ResultRecord, FailureRecord, ResultRecord, ResultRecord]
    failure = found[1]
    assert isinstance(failure, FailureRecord)
    assert failure.error == "StorageReadError"
    shards = [shard for shard in plan.shards if shard.layer == first - 1]
    offset, size = min(shard.offset for shard in shards), sum(shard.length for shard in shards)
    assert f"{file}: reading {size} bytes at {offset} failed: " in failure.what
    assert "Verify the bundle" in failure.remedy
    mended = a_job(agent, spool, content, units=units, id="mended")
    assert run(agent, spool, mended)[1] == {"state": "ended", "done": 4, "failed": 0}


def test_a_read_error_beside_compute_fails_the_unit_and_the_next_runs(
    agent: Agent, spool: Spool, content: Content, tmp_path: Path
) -> None:
    """The layer is read, then another for the memory, then three beside compute: the first of these fails."""
    file = spool.bundle(content.bundle.digest) / content.bundle.region_path(4).name
    compute = ComputeProfileUnit(
        number=0, kind="profile-compute", width=2, fidelities=(4,), warmups=1, repeats=3
    )
    units = numbered([execute(0, content.plan(32)), compute, ProbeUnit(number=0, kind="probe")])
    job = a_job(agent, spool, content, units=units, queue_depth=1)
    argv = (*failing_reads(file, 3, tmp_path / "trace"), *agent.argv)
    failing = Agent(agent.name, argv, emulated=agent.emulated, environment=agent.environment)
    assert run(failing, spool, job) == (0, {"state": "ended", "done": 2, "failed": 1})
    found = [record.payload for record in journal_of(spool, job)[1:-1]]
    assert [type(item) for item in found] == [ResultRecord, FailureRecord, ResultRecord]
    failure = found[1]
    assert isinstance(failure, FailureRecord)
    assert (failure.error, f"{file}: reading" in failure.what) == ("StorageReadError", True), failure


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 2 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"needs root: mounts a tmpfs ({mounted.stderr.strip()})")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.root
def test_a_full_disk_ends_the_run_and_with_space_the_job_goes_on(agent: Agent, small_disk: Path) -> None:
    spool = Spool.open(small_disk / "spool")
    job = a_job(agent, spool, units=probes(400))
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - (96 << 10)))
    code, report = run(agent, spool, job)
    assert (code, report["error"]["type"]) == (4, "StorageFullError")
    journal = job_path(spool, job).with_name("journal.log")
    assert f"{journal}: no space left to write (No space left on device)" in report["error"]["what"]
    assert "Free space on the device" in report["error"]["remedy"]
    kept = units_of(journal_of(spool, job))
    assert kept == list(range(len(kept)))
    assert 0 < len(kept) < 400
    assert not journal.with_name(OPEN_UNIT_FILE).exists(), "the agent was not killed in the unit"
    ballast.unlink()
    assert run(agent, spool, job) == (0, {"state": "ended", "done": 400, "failed": 0})
    assert units_of(journal_of(spool, job)) == list(range(400))


@pytest.mark.root
def test_a_full_disk_ends_the_intake_and_with_space_it_goes_on(
    agent: Agent, content: Content, small_disk: Path, tmp_path: Path
) -> None:
    spool = Spool.open(small_disk / "spool")
    digest, manifest = content.bundle.digest, content.bundle.path / MANIFEST_NAME
    wanted = agent.call("missing", manifest, "--spool", spool.root)[1]["missing"]
    pack = make_pack(Spool(tmp_path / "elsewhere"), content.bundle.path, wanted)
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free))
    words = ("accept", digest, "--commit", "--spool", spool.root)
    code, report = agent.call(*words, stdin=pack)
    assert (code, report["error"]["type"]) == (4, "StorageFullError")
    assert "Free space on the device" in report["error"]["remedy"]
    ballast.unlink()
    left = agent.call("missing", manifest, "--spool", spool.root)[1]["missing"]
    assert set(left) <= set(wanted)  # room was set aside for the chunks; what came whole is kept
    assert agent.call(*words, stdin=pack)[1]["state"] == "committed"
