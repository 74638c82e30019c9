"""The native agent with large bundles, on kernels that lack a call, and at its housekeeping, beside the
Python agent.

The executable is built with sanitizers; a test that needs the real one says why. Python's half of each
comparison runs in this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from agent import housekeeping, identity
from agent.fence import admit
from agent.locks import hold, hold_machine
from agent.spool import Spool
from sti_runtime.messages import Lease
from sti_runtime.records import sha256_hex
from tests.agent_data import (
    accept_held,
    last_piece,
    make_job,
    make_pack,
    manifest_of,
    probes,
    push_job,
)
from tests.agents import Agent, agent_called
from tests.bundles import make_bundle, small_config
from tests.machine import Machine
from tests.native.core import (
    call,
    files_below,
    finish,
    journal_lines,
    native_job,
    same_answer,
    sanitized_agent,
    wait_for,
)

# ------------------------------------------------------------------ large bundles


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that several threads hash it: 24 MiB."""
    config = small_config(layers=2, heads=4, hidden=256, ffn=1024)
    config = config.model_copy(update={"vocab": 14_000})
    made, _ = make_bundle(config, tmp_path_factory.mktemp("large"))
    assert sum(path.stat().st_size for path in made.path.iterdir()) > 20 << 20
    return made.path


def damage(spool: Spool, bundle: Path, rng: random.Random) -> list[int]:
    """Flip a byte in some chunks of a finished bundle; their numbers."""
    listed = manifest_of(bundle).all_chunks()
    hit = sorted(rng.sample(range(len(listed)), 5))
    for index in hit:
        file, chunk = listed[index]
        with (spool.bundle(bundle.name) / file).open("r+b") as stream:
            stream.seek(chunk.offset + rng.randrange(chunk.length))
            byte = stream.read(1)
            stream.seek(-1, os.SEEK_CUR)
            stream.write(bytes([byte[0] ^ 1]))
    return hit


def test_several_threads_find_exactly_the_damaged_chunks(agent: Agent, spool: Spool, large: Path) -> None:
    shutil.copytree(large, spool.bundle(large.name))
    assert call(agent, spool, "verify", large.name)[1]["damaged"] == []
    hit = damage(spool, large, random.Random(2))
    report = call(agent, spool, "verify", large.name)[1]
    assert (report["state"], report["damaged"]) == ("damaged", hit)
    missing = call(agent, spool, "missing", large / "manifest.json")[1]
    assert missing["missing"] == hit
    call(agent, spool, "accept", large.name, stdin=make_pack(spool, large, hit))
    assert call(agent, spool, "commit", large.name)[1]["state"] == "committed"


def test_the_thread_sanitizer_finds_nothing(spool: Spool, large: Path, tmp_path: Path) -> None:
    """Hashing in several threads, flushing beside taking in, and waiting for the machine's lock."""
    agent = sanitized_agent("thread")
    wanted = call(agent, spool, "missing", large / "manifest.json")[1]["missing"]
    pack = make_pack(spool, large, wanted)
    assert call(agent, spool, "accept", large.name, "--commit", stdin=pack)[1]["state"] == "committed"
    assert call(agent, spool, "verify", large.name)[1]["state"] == "intact"
    lock = tmp_path / "machine.lock"
    job = native_job(spool, machine_lock=str(lock), units=probes(2))
    words = ("run", spool.job("probe", 1) / "job.json", "--spool", spool.root)
    with hold_machine(lock, timed=True, stopping=lambda: False):
        started = agent.start(*words)
        wait_for(lambda: journal_lines(spool, job) == 1, "the start record")
        time.sleep(0.2)
        started.send_signal(signal.SIGTERM)
        assert finish(started)[0] == 143
        started = agent.start(*words)
        wait_for(lambda: journal_lines(spool, job) == 2, "the second start record")
        time.sleep(0.2)
    assert finish(started)[0] == 0


@pytest.mark.parametrize("native", [True, False])
def test_a_lease_that_becomes_stale_stops_the_intake(
    agent: Agent, spool: Spool, large: Path, native: bool
) -> None:
    """Another controller takes the device while chunks come in: it need not wait for the last one."""
    taking = agent if native else agent_called("torch")
    words = ("--lease", "store:1", "--spool", spool.root)
    wanted = taking.call("missing", large / "manifest.json", *words)[1]["missing"]
    data = make_pack(spool, large, wanted).read_bytes()
    started = taking.start("accept", large.name, *words, stdin=subprocess.PIPE)
    assert started.stdin is not None
    started.stdin.write(data[: 4 << 20])
    started.stdin.flush()
    wait_for(lambda: spool.arrived_list(large.name).exists(), "the first chunk")
    admit(spool, Lease(store="store", counter=2, takeover=False))
    with contextlib.suppress(BrokenPipeError):
        started.stdin.write(data[4 << 20 :])
    output = started.communicate(timeout=300)[0]
    assert started.returncode == 3
    assert b"its controller is stale" in output
    rest = taking.call("missing", large / "manifest.json", "--spool", spool.root)[1]["missing"]
    assert 0 < len(rest) < len(wanted)


def test_hashing_needs_little_memory(spool: Spool, large: Path) -> None:
    """The executable itself, in an address space much smaller than the bundle."""
    executable = agent_called("x86_64")
    shutil.copytree(large, spool.bundle(large.name))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (12 << 20, 12 << 20))

    assert call(executable, spool, "verify", large.name, preexec_fn=limit)[1]["state"] == "intact"


# ------------------------------------------------------------------ kernels that lack a call


def refusing(number: int, error: int) -> None:
    """In a process about to start: have the kernel refuse one system call of x86-64 (seccomp(2))."""
    load, jump_equal, give = 0x20, 0x15, 0x06
    allow, refuse = 0x7FFF0000, 0x00050000 | error
    steps = ((load, 0, 0, 0), (jump_equal, 0, 1, number), (give, 0, 0, refuse), (give, 0, 0, allow))
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    no_new_privileges, set_seccomp, filter_mode = 38, 22, 2
    if libc.prctl(no_new_privileges, 1, 0, 0, 0) or libc.prctl(set_seccomp, filter_mode, program):
        raise OSError(ctypes.get_errno(), "no seccomp here")


def test_a_file_system_that_cannot_allocate_ahead_gets_zeros(spool: Spool, bundle: Path) -> None:
    """With the executable's own C library, which does not do this by itself."""
    executable = agent_called("x86_64")
    fallocate = 285
    options = {"preexec_fn": partial(refusing, fallocate, errno.EOPNOTSUPP)}
    wanted = call(executable, spool, "missing", bundle / "manifest.json", **options)[1]["missing"]
    for path in bundle.iterdir():
        grown = spool.incoming_bundle(bundle.name) / path.name
        assert grown.stat().st_size == path.stat().st_size
        assert grown.stat().st_blocks * 512 >= path.stat().st_size
    call(executable, spool, "accept", bundle.name, stdin=make_pack(spool, bundle, wanted[:3]))
    rest = call(executable, spool, "missing", bundle / "manifest.json", **options)[1]["missing"]
    call(executable, spool, "accept", bundle.name, stdin=make_pack(spool, bundle, rest))
    assert call(executable, spool, "commit", bundle.name)[1]["state"] == "committed"


def test_a_kernel_without_process_handles_stops_the_agent_too(
    agent: Agent, spool: Spool, tmp_path: Path
) -> None:
    machine = Machine(tmp_path / "machine.lock")
    job = native_job(spool, units=probes(1), machine_lock=str(machine.path))
    with machine:
        started = agent.start("run", spool.job(job.id, 1) / "job.json", "--spool", spool.root)
        wait_for(lambda: journal_lines(spool, job) == 1, "the start record")
        pidfd_open = 434
        options = {"preexec_fn": partial(refusing, pidfd_open, errno.ENOSYS)}
        assert call(agent, spool, "stop", job.id, 1, **options)[1] == {"signalled": started.pid}
        assert finish(started)[0] == 143


# ------------------------------------------------------------------ housekeeping


def fill(spool: Spool, bundle: Path) -> None:
    """Bundles, half a bundle, task data, strays and a job; the same in every spool."""
    shutil.copytree(bundle, spool.bundle(bundle.name))
    for digit in "123":
        spool.bundle(digit * 64).mkdir()
        spool.task(digit * 64).write_bytes(b"rows")
        spool.task_partial(digit * 64).write_bytes(b"ro")
        spool.incoming_bundle(digit * 64).mkdir()
        (spool.incoming_bundle(digit * 64) / "k2.bin").write_bytes(b"x")
        spool.done_list(digit * 64).write_bytes(b"1\n")
        (spool.incoming / f"{digit * 64}.manifest").write_bytes(b"{}")
    (spool.incoming / "stray.pack").write_bytes(b"x")
    (spool.incoming / os.fsdecode(b"\xff\xfe")).write_bytes(b"x")
    (spool.incoming / ("3" * 64 + ".other")).write_bytes(b"x")
    (spool.bundles / f".{'1' * 64}.77.removed" / "deep" / "deeper").mkdir(parents=True)


def test_collect_and_clean_remove_the_same_as_pythons(agent: Agent, bundle: Path, tmp_path: Path) -> None:
    spools = (Spool.open(tmp_path / "native"), Spool.open(tmp_path / "python"))
    both = partial(same_answer, agent, spools)
    for spool in spools:
        fill(spool, bundle)
        push_job(spool, make_job(spool, bundle="2" * 64, task_data="3" * 64))
    with (
        hold(spools[0].run_lock, wait_s=0, what="test", label="probe/1"),
        hold(spools[1].run_lock, wait_s=0, what="test", label="probe/1"),
    ):
        both(("collect", "--keep", bundle.name), lambda s: housekeeping.collect(s, [bundle.name]))
        for spool in spools:
            spool.run_lock.write_text("")
        assert both(("collect",), lambda s: housekeeping.collect(s, []))["error"]["type"] == "BusyError"
    assert {path.name for path in spools[0].bundles.iterdir()} == {"2" * 64, "3" * 64, bundle.name}
    assert files_below(spools[0].root).keys() == files_below(spools[1].root).keys()
    assert both(("collect",), lambda s: housekeeping.collect(s, []))["removed"]["tasks"] == [
        "2" * 64,
        "3" * 64,
    ]
    assert both(("forget", "probe", 1), lambda s: housekeeping.forget(s, "probe", "1")) == {"removed": True}
    assert both(("forget", "probe", 1), lambda s: housekeeping.forget(s, "probe", "1")) == {"removed": False}
    assert list(spools[0].jobs.iterdir()) == []
    for spool in spools:
        identity.mark_emulated(spool)
        push_job(spool, make_job(spool))
        (spool.root / "notes.txt").write_text("mine")
        (spool.root / ".hidden").write_text("mine")
        (spool.root / ".fence.json.123.partial").write_text("left by a killed agent")
        (spool.root / ".probe.77.partial").write_text("likewise")
    both(("clean",), housekeeping.clean)
    assert sorted(path.name for path in spools[0].root.iterdir()) == [".hidden", "notes.txt"]


def test_task_data_is_verified_before_it_is_visible(agent: Agent, tmp_path: Path) -> None:
    spools = (Spool.open(tmp_path / "native"), Spool.open(tmp_path / "python"))
    both = partial(same_answer, agent, spools)
    digest = sha256_hex(b"rows" * 1_000_000)

    def ask() -> Any:
        kinds = ("bundles", "incoming", "partial", "tasks")
        code, answer = call(agent, spools[0], "has", digest)
        twin = housekeeping.has(spools[1], [digest])
        assert (code, answer.keys()) == (0, twin.keys())
        assert {kind: answer[kind] for kind in kinds} == {kind: twin[kind] for kind in kinds}
        assert answer["agent_digest"] == sha256_hex(Path(agent.argv[0]).read_bytes())
        return answer["tasks"]

    def take() -> dict[str, Any]:
        piece = last_piece(spools[0], digest)
        return both(("accept-task", digest), lambda s: accept_held(s, digest), stdin=piece)

    assert ask() == []
    assert take()["error"]["type"] == "DigestError"
    for spool in spools:
        spool.task_partial(digest).write_bytes(b"rows" * 999_999)
    assert take()["error"]["type"] == "DigestError"
    assert not spools[0].task_partial(digest).exists()
    for spool in spools:
        spool.task_partial(digest).write_bytes(b"rows" * 1_000_000)
    assert ask() == []
    assert take()["state"] == "accepted"
    for spool in spools:
        spool.task_partial(digest).write_bytes(b"late")
    assert take()["state"] == "already"
    assert ask() == [digest]
    assert not spools[0].task_partial(digest).exists()
