"""The native agent's command line, fence, locks, pids and journal: the Python agent's, on the same spool.

The executable is built with sanitizers. Python's half of each comparison runs in this process.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
import zlib
from collections.abc import Iterator, Sequence
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import pytest

from agent import housekeeping, identity, process
from agent.errors import BusyError, RefusedError
from agent.fence import admit
from agent.journal import Journal, scan
from agent.locks import hold, hold_machine
from agent.spool import Spool
from sti_runtime.errors import FormatError, StifarmError
from sti_runtime.journal_format import LINE_CAP_BYTES, PROTOCOL_VERSION, encode_line, read_records
from sti_runtime.messages import (
    RECORD_CAP_BYTES,
    EndRecord,
    EvaluateUnit,
    FailureRecord,
    JournalRecord,
    Lease,
    StartRecord,
)
from sti_runtime.records import canonical_json
from tests.agent_data import (
    OPEN_GATES,
    agent_emulation,
    make_job,
    probes,
    push_job,
)
from tests.agents import Agent, abandon
from tests.bundles import hand_plan, make_bundle, small_config
from tests.machine import Machine
from tests.native.core import (
    AGENT_SOURCES,
    call,
    done_by_python,
    finish,
    journal_lines,
    journal_of,
    journal_path,
    native_job,
    run,
    sanitized_agent,
    start_record,
    units_done,
    wait_for,
    write_journal,
)
from tests.native.sanitized import ENVIRONMENT, build_sanitized

LEASE = Lease(store="store-a", counter=1, takeover=False)


@pytest.fixture(scope="module")
def agent() -> Agent:
    return sanitized_agent()


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool.open(tmp_path / "spool")


# ------------------------------------------------------------------ command line, identity


def test_version_is_the_packages_and_the_digest_the_files(agent: Agent) -> None:
    code, report = finish(agent.in_environment(STIFARM_ISA="portable").start("version"))
    assert (code, report["protocol"]) == (0, PROTOCOL_VERSION)
    assert report["agent"] == f"stifarm-agent-native {package_version('stifarm')} x86_64 portable"
    assert report["agent_digest"] == hashlib.sha256(Path(agent.argv[0]).read_bytes()).hexdigest()


def test_the_usage_text_names_every_verb(agent: Agent) -> None:
    done = agent.start("--help")
    text = done.communicate(timeout=300)[0].decode()
    assert done.returncode == 0
    contract = (
        "version facts run status stop forget missing accept commit verify has accept-task accept-job collect"
    )
    for verb in f"{contract} restore clean fit plan profile infer score session".split():
        assert f"\n  {verb}" in text
        one = agent.start(verb, "--help")
        assert one.communicate(timeout=300)[0].decode().startswith(f"usage: stifarm-agent {verb}")
        assert one.returncode == 0
    bare = agent.start()
    assert "usage: stifarm-agent VERB" in bare.communicate(timeout=300)[1].decode()
    assert bare.returncode == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "No verb"),
        (("frobnicate",), "'frobnicate'"),
        (("facts",), "--spool is missing"),
        (("status", "a", "--spool", "SPOOL"), "an argument is missing"),
        (("status", "a", "1", "2", "--spool", "SPOOL"), "2 is one argument too many"),
        (("status", "a", "1", "--spool"), "--spool wants a value"),
        (("clean", "--spool", "--lease"), "--spool wants a value"),
        (("status", "a", "1", "--lease", "store:1", "--spool", "SPOOL"), "--lease is no option"),
        (("clean", "--force", "--spool", "SPOOL"), "--force is no option"),
        (("has", "--", "--spool"), "--spool is missing"),
        (("status", "../../etc", "1", "--spool", "SPOOL"), "'../../etc' is not a job id"),
        (("status", "a", "01", "--spool", "SPOOL"), "'01' is not an attempt"),
        (("status", "a", "1" * 19, "--spool", "SPOOL"), "is not an attempt"),
        (("commit", "../../etc", "--spool", "SPOOL"), "'../../etc' is not a digest"),
        (("commit", "A" * 64, "--spool", "SPOOL"), "is not a digest"),
        (("collect", "--keep", "0" * 63, "--spool", "SPOOL"), "is not a digest"),
        (("clean", "--spool", "SPOOL", "--lease", "store"), "'store' is not a lease"),
        (("clean", "--spool", "SPOOL", "--lease", "store:1:take"), "is not a lease"),
        (("clean", "--spool", "SPOOL", "--lease", f"store:{2**63}"), "is not a lease"),
        (("clean", "--spool", "SPOOL", "--lease", ":1"), "is not a lease"),
        (("clean", "--spool", "SPOOL", "--lease", f"{'ü' * 65}:1"), "is not a lease"),
        (("clean", "--spool", "/proc/nowhere"), "the spool cannot be made"),
        (("clean", "--spool", "/" + "x/" * 1800), "the spool cannot be made"),
    ],
)
def test_usage_errors_are_json_and_change_nothing(
    agent: Agent, spool: Spool, words: tuple[str, ...], said: str
) -> None:
    shutil.rmtree(spool.root)
    code, report = finish(agent.start(*[spool.root if word == "SPOOL" else word for word in words]))
    assert code == 2
    assert (report["error"]["type"], set(report["error"])) == ("InputError", {"type", "what", "remedy"})
    assert said in report["error"]["what"]
    assert not spool.fence.exists()


def test_options_are_taken_in_any_order_and_form(agent: Agent, spool: Spool) -> None:
    keep = [character * 64 for character in "0123"]
    for name in (*keep, "4" * 64):
        spool.bundle(name).mkdir()
    words = ("collect", "--keep", keep[0], keep[1], "--lease=store-a:4", "--keep", keep[2])
    code, report = finish(agent.start(*words, f"--spool={spool.root}", "--keep", keep[3]))
    assert (code, report) == (0, {"removed": {"bundles": ["4" * 64], "incoming": [], "tasks": []}})
    assert json.loads(spool.fence.read_bytes())["counters"] == {"store-a": 4}


def test_relative_spools_are_those_of_python(agent: Agent, tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    in_folder = ("sh", "-c", 'cd "$0" && exec "$@"', str(tmp_path), *agent.argv)
    for given in ("spool", "./a//b/.", "c/../d"):
        started = Agent(agent.name, in_folder, emulated=False).start("facts", "--emulated", "--spool", given)
        code, report = finish(started)
        assert (code, report["storage"]["path"]) == (0, str(tmp_path / given))
        assert report["identity"] == identity.device_identity(Spool(tmp_path / given))[0]


def test_a_damaged_mark_of_an_emulated_device_is_an_error_for_both(agent: Agent, spool: Spool) -> None:
    spool.device_id.write_text("0123")
    job = make_job(Spool.open(spool.root.with_name("other")), engine="native")
    push_job(spool, job)
    code, report = run(agent, spool, job)
    assert (code, report["error"]["type"]) == (2, "InputError")
    with pytest.raises(StifarmError) as caught:
        identity.device_identity(spool)
    assert report["error"]["what"] == caught.value.what


def test_an_instruction_set_that_is_not_there_stops_a_run_before_it_begins(
    agent: Agent, spool: Spool
) -> None:
    job = native_job(spool)
    for name in ("sse9", "neon"):
        code, report = run(agent.in_environment(STIFARM_ISA=name), spool, job)
        assert (code, report["error"]["type"]) == (2, "InputError")
        assert "portable" in report["error"]["what"]
        assert f"not '{name}'" in report["error"]["what"]
        assert not journal_path(spool, job).exists()


# ------------------------------------------------------------------ fence


def test_leases_of_both_agents_give_one_fence(agent: Agent, tmp_path: Path) -> None:
    """Random leases, each given to a Python and a native spool; half-way the two are exchanged."""
    rng = random.Random(3)
    spools = [Spool.open(tmp_path / name) for name in ("python", "native")]
    stores = ("store-a", "ß – 2", 'quo"te\\', "z" * 64)
    for step in range(40):
        counter = rng.choice((0, 1, 1, 2, 3, 3, 4, 2**63 - 1))
        lease = Lease(store=rng.choice(stores), counter=counter, takeover=rng.random() < 0.3)
        text = f"{lease.store}:{lease.counter}" + (":takeover" if lease.takeover else "")
        try:
            admit(spools[0], lease)
            wanted = (0, "")
        except RefusedError as error:
            wanted = (3, error.what)
        code, report = call(agent, spools[1], "collect", "--lease", text)
        assert code == wanted[0], (lease, report)
        if code:
            assert ("belongs to store" in report["error"]["what"]) == ("belongs to store" in wanted[1])
        files = [spool.fence.read_bytes() if spool.fence.exists() else None for spool in spools]
        assert files[0] == files[1]
        if step == 20:
            spools.reverse()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[" * 100_000,
        b'{"format":"stifarm-fence","version":2,"owner":"a","counters":{}}',
        b'{"format":"stifarm-fence","version":1,"owner":"","counters":{}}',
        b'{"format":"stifarm-fence","version":1,"owner":"a","counters":{"a":-1}}',
        b'{"format":"stifarm-fence","version":1,"owner":"a","counters":{"a":1.5}}',
        b'{"format":"stifarm-fence","version":1,"owner":"a","counters":[]}',
        b'{"format":"stifarm-fence","version":1,"owner":"a","counters":{},"more":1}',
        b'{"format":"stifarm-fence","version":1,"owner":"a"}',
    ],
)
def test_a_fence_that_cannot_be_parsed_admits_no_lease(agent: Agent, spool: Spool, content: bytes) -> None:
    spool.fence.write_bytes(content)
    code, report = call(agent, spool, "clean", "--lease", "a:9")
    assert (code, report["error"]["type"]) == (1, "FormatError")
    job = native_job(spool)
    assert run(agent, spool, job)[0] == 1
    assert not journal_path(spool, job).exists()
    assert spool.fence.read_bytes() == content
    with pytest.raises(FormatError):
        admit(spool, LEASE)


def test_a_fence_of_many_stores_is_kept(agent: Agent, spool: Spool) -> None:
    """More stores than a record may have fields."""
    counters = {f"store-{number}": number for number in range(500)}
    fence = {"format": "stifarm-fence", "version": 1, "owner": "store-7", "counters": counters}
    spool.fence.write_bytes(canonical_json(fence))
    assert call(agent, spool, "collect", "--lease", "store-499:600:takeover")[0] == 0
    fence |= {"owner": "store-499", "counters": counters | {"store-499": 600}}
    assert spool.fence.read_bytes() == canonical_json(fence)


# ------------------------------------------------------------------ locks


def test_either_agents_locks_keep_the_other_out(agent: Agent, spool: Spool, tmp_path: Path) -> None:
    job = native_job(spool)
    with hold(spool.run_lock, wait_s=0, what="test", label="other/3"):
        for words in (("clean",), ("verify", "0" * 64)):
            code, report = call(agent, spool, *words)
            assert (code, report["error"]["type"]) == (5, "BusyError")
            assert "in use by other/3" in report["error"]["what"]
    machine = Machine(tmp_path / "machine.lock")
    slow = native_job(spool, id="slow", units=probes(1), machine_lock=str(machine.path))
    with machine:
        started = agent.start("run", spool.job("slow", 1) / "job.json", "--spool", spool.root)
        wait_for(lambda: journal_lines(spool, slow) == 1, "the start record")
        with pytest.raises(BusyError, match="in use by slow/1"), hold(spool.run_lock, wait_s=0, what="It"):
            pass
        with pytest.raises(BusyError, match="is running"):
            housekeeping.forget(spool, "slow", "1")
        code, report = call(agent, spool, "forget", "slow", 1)
        assert (code, report["error"]["type"]) == (5, "BusyError")
        assert process.job_status(spool, "slow", "1")["pid"] == started.pid
        assert process.stop_job(spool, "slow", "1") == {"signalled": started.pid}
        assert finish(started)[0] == 143
    assert run(agent, spool, job)[0] == 0


def test_a_run_waits_a_moment_for_a_lock_that_collect_holds(agent: Agent, spool: Spool) -> None:
    job = native_job(spool)
    with hold(spool.run_lock, wait_s=0, what="test"):
        started = agent.start("run", spool.job("probe", 1) / "job.json", "--spool", spool.root)
        log = spool.job("probe", 1) / "agent.log"
        wait_for(lambda: spool.fence.exists() and log.exists(), "the lease to be admitted")
        assert started.poll() is None
    assert finish(started) == (0, {"state": "ended", "done": 10, "failed": 0})
    assert units_done(journal_of(spool, job)) == list(range(10))


def test_a_lock_file_is_no_link_and_belongs_to_everybody(agent: Agent, spool: Spool, tmp_path: Path) -> None:
    shared = tmp_path / "sticky"
    shared.mkdir()
    shared.chmod(0o1777)
    lock = shared / "machine.lock"
    assert run(agent, spool, native_job(spool, machine_lock=str(lock), units=probes(1)))[0] == 0
    assert lock.stat().st_mode & 0o777 == 0o666
    target = tmp_path / "target"
    target.touch()
    lock.unlink()
    lock.symlink_to(target)
    linked = native_job(spool, id="linked", machine_lock=str(lock), units=probes(1))
    assert run(agent, spool, linked) == (0, {"state": "ended", "done": 0, "failed": 1})
    failure = journal_of(spool, linked)[1].payload
    assert isinstance(failure, FailureRecord)
    assert (failure.error, "symbolic link" in failure.remedy) == ("FormatError", True)
    spool.deploy_lock.symlink_to(target)
    assert call(agent, spool, "collect")[1]["error"]["type"] == "FormatError"


def test_timed_units_have_the_machine_alone_and_others_share_it(
    agent: Agent, spool: Spool, tmp_path: Path
) -> None:
    """An untimed unit runs beside another one's shared lock; a timed one waits for it."""
    lock = tmp_path / "machine.lock"
    made, _ = make_bundle(small_config(), tmp_path)
    plan = hand_plan(made.manifest, made.manifest.submodels[0], lambda layer, index: 2)
    units = (EvaluateUnit(number=0, kind="evaluate", plan=plan, batch=1), probes(2)[1])
    job = native_job(spool, units=units, machine_lock=str(lock))
    with hold_machine(lock, timed=False, stopping=lambda: False):
        started = agent.start("run", spool.job("probe", 1) / "job.json", "--spool", spool.root)
        wait_for(lambda: journal_lines(spool, job) == 2, "the untimed unit")
        time.sleep(0.3)
        assert journal_lines(spool, job) == 2, "a timed unit ran beside another one"
    assert finish(started) == (0, {"state": "ended", "done": 1, "failed": 1})


def locked(path: Path) -> bool:
    with path.open() as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_the_machine_is_held_in_a_unit_and_not_while_a_gate_is_shut(
    agent: Agent, spool: Spool, tmp_path: Path
) -> None:
    machine = Machine(tmp_path / "machine.lock")
    lock = machine.path
    slow = native_job(spool, units=probes(1), machine_lock=str(lock), emulation=agent_emulation(500_000))
    started = agent.start("run", spool.job(slow.id, 1) / "job.json", "--spool", spool.root)
    log = spool.job(slow.id, 1) / "agent.log"
    wait_for(lambda: log.exists() and "Unit 0 (probe) begins" in log.read_text(), "the unit to begin")
    assert locked(lock)
    abandon(started)
    assert finish(started)[0] == 143
    assert not locked(lock)

    gates = OPEN_GATES.model_copy(update={"min_free_bytes": 2**62, "wait_limit_s": 1000})
    shut = native_job(spool, id="shut", units=probes(1), gates=gates, machine_lock=str(lock))
    with machine:
        started = agent.start("run", spool.job(shut.id, 1) / "job.json", "--spool", spool.root)
        wait_for(lambda: machine.is_open_in(started.pid), "the agent to ask for the machine")
        machine.let_through(lambda: not machine.is_open_in(started.pid), "the machine to be let go")
    assert journal_lines(spool, shut) == 1
    started.send_signal(signal.SIGINT)
    assert finish(started) == (130, {"state": "stopped", "done": 0, "failed": 0})


def test_a_signal_ends_the_wait_for_the_machine_at_once(agent: Agent, spool: Spool, tmp_path: Path) -> None:
    lock = tmp_path / "machine.lock"
    job = native_job(spool, machine_lock=str(lock))
    with hold_machine(lock, timed=False, stopping=lambda: False):
        started = agent.start("run", spool.job("probe", 1) / "job.json", "--spool", spool.root)
        wait_for(lambda: journal_lines(spool, job) == 1, "the start record")
        assert call(agent, spool, "stop", "probe", 1) == (0, {"signalled": started.pid})
        assert finish(started) == (143, {"state": "stopped", "done": 0, "failed": 0})
    assert not (spool.job("probe", 1) / "pid").exists()
    assert run(agent, spool, job) == (0, {"state": "ended", "done": 10, "failed": 0})


# ------------------------------------------------------------------ pid files


def test_a_stale_pid_is_neither_running_nor_signalled(agent: Agent, spool: Spool) -> None:
    """Another program got the pid: other start time, then another boot; then files that are nonsense."""
    native_job(spool)
    path = spool.job("probe", 1) / "pid"
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as innocent:
        ticks = process.start_ticks(innocent.pid)
        boot = identity.boot_id()
        stale: list[Any] = [
            {"pid": innocent.pid, "start_ticks": 1, "boot_id": boot},
            {"pid": innocent.pid, "start_ticks": ticks, "boot_id": "another"},
            {"pid": str(innocent.pid), "start_ticks": ticks, "boot_id": boot},
            {"pid": True, "start_ticks": ticks, "boot_id": boot},
            {"pid": -1, "start_ticks": ticks, "boot_id": boot},
            {"pid": 2**40, "start_ticks": ticks, "boot_id": boot},
            {"pid": innocent.pid, "start_ticks": None, "boot_id": boot},
            [innocent.pid],
            None,
        ]
        for record in stale:
            path.write_bytes(canonical_json(record))
            assert call(agent, spool, "stop", "probe", 1) == (0, {"signalled": None}), record
            status = call(agent, spool, "status", "probe", 1)[1]
            assert (status["state"], status["pid"]) == ("stopped", None)
        path.write_bytes(canonical_json({"pid": innocent.pid, "start_ticks": ticks, "boot_id": boot}))
        assert call(agent, spool, "status", "probe", 1)[1]["pid"] == innocent.pid
        assert innocent.poll() is None
        assert call(agent, spool, "stop", "probe", 1) == (0, {"signalled": innocent.pid})
        assert innocent.wait(timeout=300) == -signal.SIGTERM
        assert call(agent, spool, "stop", "probe", 1) == (0, {"signalled": None})


def test_both_agents_say_the_same_of_a_job(agent: Agent, spool: Spool) -> None:
    """Absent, stopped, half done, ended, refused, damaged."""

    def same(job_id: str = "probe") -> dict[str, Any]:
        code, report = call(agent, spool, "status", job_id, 1)
        wanted = done_by_python(process.job_status, spool, job_id, "1")
        assert (code, report.get("error", {}).get("type")) == (
            wanted[0],
            wanted[1].get("error", {}).get("type"),
        )
        if code == 0:
            assert report == wanted[1]
        return report

    assert same()["state"] == "absent"
    job = native_job(spool)
    assert same()["state"] == "stopped"
    write_journal(spool, job, units=4, fail=2)
    assert (same()["done"], same()["failed"]) == (3, 1)
    assert run(agent, spool, job) == (0, {"state": "ended", "done": 9, "failed": 1})
    assert same()["state"] == "ended"
    path = journal_path(spool, job)
    path.write_bytes(path.read_bytes().replace(b"store-a", b"store-b", 1))
    assert same()["error"]["type"] == "FormatError"
    native_job(spool, id="refused", device="somewhere-else")
    run(agent, spool, make_job(spool, id="refused"))
    assert "is for device somewhere-else" in same("refused")["refused"]
    broken = spool.job("newer", 1)
    broken.mkdir(parents=True)
    (broken / "job.json").write_bytes(canonical_json(json.loads(job.to_json()) | {"version": 2}))
    assert same("newer")["error"]["type"] == "FormatError"


# ------------------------------------------------------------------ journal


def damaged_journals(whole: bytes, rng: random.Random) -> Iterator[bytes]:
    lines = whole.splitlines(keepends=True)
    for _ in range(25):
        yield whole[: rng.randrange(len(whole) + 1)]
    for _ in range(25):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        yield bytes(flipped)
    for tail in (
        b"\0" * 4096,
        b"11 0000",
        lines[-1][:-9] + b"\n",
        b"\0\0\n\0\0\n",
        b"\n",
        b"\n\n",
        b" ",
        whole[:-1],
    ):
        yield whole + tail
        yield b"".join(lines[:-1]) + tail
    yield b"".join([*lines[:3], *lines[4:]])
    yield b"".join([*lines[:3], lines[2], *lines[3:]])
    yield b"".join([*lines[:-2], b"x" + lines[-2], lines[-1][:-1]])
    yield b"0" + whole
    yield whole.replace(b" ", b"  ", 1)


def test_both_agents_recover_the_same_of_any_damaged_journal(agent: Agent, spool: Spool) -> None:
    job = native_job(spool)
    path = write_journal(spool, job, units=8, fail=5)
    cases = list(damaged_journals(path.read_bytes(), random.Random(11)))
    kinds = set()
    for content in cases:
        path.write_bytes(content)
        wanted = done_by_python(process.job_status, spool, job.id, "1")
        code, report = call(agent, spool, "status", job.id, 1)
        kinds.add(code)
        assert code == wanted[0], content
        if code == 0:
            assert report == wanted[1], content
        else:
            assert report["error"]["type"] == "FormatError"
        assert path.read_bytes() == content
    assert kinds == {0, 1}


def raw_line(seq: int, body: bytes) -> bytes:
    return b"%d %08x %s\n" % (seq, zlib.crc32(body), body)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"wall_ns": -1}, "wall_ns"),
        ({"boot_id": ""}, "boot_id"),
        ({"seq": 1}, "its JSON 1"),
        ({"more": 1}, "more"),
        ({"payload": {"type": "end", "done": 1, "failed": 0}}, "refused"),
        ({"payload": {"type": "stop", "done": 1, "failed": 0, "refused": None}}, "type"),
        ({"payload": {"type": "failure", "unit": -1, "error": "", "what": "", "remedy": ""}}, "unit"),
        ({"payload": {"type": "failure", "unit": 100_000, "error": "", "what": "", "remedy": ""}}, "unit"),
        ({"payload": {"type": "failure", "unit": 1, "error": 1, "what": "", "remedy": ""}}, "error"),
        ({"payload": {"type": "result", "unit": 1, "result": {"kind": "poem"}}}, "kind"),
        ({"payload": []}, "payload"),
    ],
)
def test_a_good_checksum_over_an_invalid_record_is_damage(
    agent: Agent, spool: Spool, change: dict[str, Any], said: str
) -> None:
    job = native_job(spool)
    record = JournalRecord(seq=0, boot_id="b", wall_ns=0, payload=start_record(spool, job))
    content = raw_line(0, canonical_json(json.loads(record.to_json()) | change))
    journal_path(spool, job).write_bytes(content)
    code, report = run(agent, spool, job)
    assert (code, report["error"]["type"]) == (1, "FormatError")
    assert said in report["error"]["what"]
    assert journal_path(spool, job).read_bytes() == content


def test_the_longest_line_and_the_longest_tail(agent: Agent, spool: Spool) -> None:
    """A record of exactly 4 MiB counts; what one append can leave is cut off; a byte more is damage."""
    job = native_job(spool, units=probes(2))
    path = journal_path(spool, job)
    first = encode_line(JournalRecord(seq=0, boot_id="b", wall_ns=0, payload=start_record(spool, job)))

    def longest(extra: int) -> bytes:
        def record(size: int) -> JournalRecord:
            what = "w" * size
            return JournalRecord(
                seq=1, boot_id="b", wall_ns=0,
                payload=FailureRecord(type="failure", unit=0, error="internal", what=what, remedy=""),
            )  # fmt: skip

        body = record(RECORD_CAP_BYTES - len(record(0).to_json()) + extra).to_json()
        return raw_line(1, body)

    for content, state in (
        (first + longest(0), (0, 1)),
        (first + longest(0)[:-1], (0, 0)),
        (first + b"x" * LINE_CAP_BYTES, (0, 0)),
        (first + b"x" * (LINE_CAP_BYTES + 1), (1, None)),
        (first + b"\n" * LINE_CAP_BYTES, (0, 0)),
        (first + longest(0)[:-1] + b"x" * 40, (1, None)),
    ):
        path.write_bytes(content)
        wanted = done_by_python(process.job_status, spool, job.id, "1")
        code, report = call(agent, spool, "status", job.id, 1)
        assert (code, report.get("failed")) == (wanted[0], wanted[1].get("failed")) == state
    path.write_bytes(first + longest(0)[:-1])
    assert run(agent, spool, job) == (0, {"state": "ended", "done": 2, "failed": 0})
    assert units_done(journal_of(spool, job)) == [0, 1]


def test_a_journal_is_begun_by_one_agent_and_ended_by_the_other(agent: Agent, spool: Spool) -> None:
    """Torn by a crash of either. The Python agent reads the native one's records and resumes behind them."""
    job = native_job(spool)
    path = write_journal(spool, job, units=3)
    with path.open("ab") as stream:
        stream.write(b"4 0123")
    kept = path.read_bytes()[:-6]
    assert run(agent, spool, job)[0] == 0
    assert path.read_bytes().startswith(kept)
    records = journal_of(spool, job)
    assert units_done(records) == list(range(10))
    assert [r.payload.first_unit for r in records if isinstance(r.payload, StartRecord)] == [0, 3]
    start = next(r.payload for r in records[4:] if isinstance(r.payload, StartRecord))
    assert (start.lease, start.protocol, start.emulated) == (job.lease, PROTOCOL_VERSION, False)
    assert "cut off 6 bytes" in (path.parent / "agent.log").read_text()

    whole = path.read_bytes()
    path.write_bytes(whole[: -len(whole.splitlines()[-1]) - 1 - 30])
    state = scan(path)
    assert state.done == set(range(9))
    journal = Journal(path, identity.boot_id())
    journal.append(records[-2].payload)
    journal.append(EndRecord(type="end", done=10, failed=0, refused=None))
    journal.close()
    assert run(agent, spool, job) == (0, {"state": "ended", "done": 10, "failed": 0})
    assert units_done(journal_of(spool, job)) == list(range(10))


@pytest.mark.parametrize("lease", [{"counter": 2}, {"store": "store-b", "takeover": True}])
def test_a_journal_of_another_lease_is_not_gone_on_with(
    agent: Agent, spool: Spool, lease: dict[str, Any]
) -> None:
    job = native_job(spool)
    path = write_journal(spool, job, units=3)
    before = path.read_bytes()
    push_job(spool, job.model_copy(update={"lease": LEASE.model_copy(update=lease)}))
    code, report = run(agent, spool, job)
    assert (code, report["error"]["type"]) == (3, "RefusedError")
    assert "another lease" in report["error"]["what"]
    assert path.read_bytes() == before


def test_refusals_are_journalled_where_the_journal_is_the_leases_to_write(agent: Agent, spool: Spool) -> None:
    """Not over another lease's start, not behind an end, not while a job runs."""
    job = native_job(spool, device="elsewhere")
    write_journal(spool, job, units=2)
    assert run(agent, spool, job)[0] == 3
    end = journal_of(spool, job)[-1].payload
    assert isinstance(end, EndRecord)
    assert (end.done, end.failed) == (2, 0)
    assert "is for device elsewhere" in (end.refused or "")
    assert "Probe the device again" in (end.refused or "")
    before = journal_path(spool, job).read_bytes()
    assert run(agent, spool, job)[0] == 3
    assert journal_path(spool, job).read_bytes() == before

    begun = native_job(spool, id="begun", device="elsewhere")
    other = begun.model_copy(update={"lease": LEASE.model_copy(update={"counter": 9})})
    before = write_journal(spool, other, units=2).read_bytes()
    assert run(agent, spool, begun)[0] == 3
    newer = spool.job("begun", 1) / "job.json"
    newer.write_bytes(canonical_json(json.loads(begun.to_json()) | {"version": 2}))
    assert run(agent, spool, begun)[0] == 3
    assert journal_path(spool, begun).read_bytes() == before

    busy = native_job(spool, id="busy", engine="torch")
    with hold(spool.run_lock, wait_s=0, what="test", label="other/1"):
        code, report = run(agent, spool, busy)
    assert (code, "engine 'torch'" in report["error"]["what"]) == (3, True)
    assert not journal_path(spool, busy).exists()
    assert "not journalled" in (spool.job("busy", 1) / "agent.log").read_text()
    assert run(agent, spool, busy)[0] == 3
    assert journal_lines(spool, busy) == 1


def test_cpus_that_are_not_there_are_refused(agent: Agent, spool: Spool) -> None:
    code, report = run(agent, spool, native_job(spool, cpus=(4095,)))
    assert (code, report["error"]["type"]) == (3, "RefusedError")
    assert "pinned to CPUs [4095]" in report["error"]["what"]


def test_a_job_on_one_cpu_is_pinned_to_it(agent: Agent, spool: Spool, tmp_path: Path) -> None:
    cpu = max(os.sched_getaffinity(0))
    machine = Machine(tmp_path / "machine.lock")
    job = native_job(spool, cpus=(cpu,), units=probes(1), machine_lock=str(machine.path))
    with machine:
        started = agent.start("run", spool.job(job.id, 1) / "job.json", "--spool", spool.root)
        wait_for(lambda: journal_lines(spool, job) == 1, "the start record")
        assert os.sched_getaffinity(started.pid) == {cpu}
    assert finish(started)[0] == 0


# ------------------------------------------------------------------ appending


@pytest.fixture(scope="module")
def journal_program() -> Path:
    agent_parts = [path for path in AGENT_SOURCES if path.name != "main.c"]
    return build_sanitized("address,undefined", Path(__file__).with_name("journal_program.c"), *agent_parts)


def append(program: Path, path: Path, payloads: Sequence[bytes], **options: Any) -> list[str]:
    files = []
    for number, payload in enumerate(payloads):
        files.append(path.with_name(f"payload-{number}"))
        files[-1].write_bytes(payload)
    done = subprocess.run(
        [program, path, *files], capture_output=True, env=os.environ | ENVIRONMENT, check=False, **options
    )  # fmt: skip
    assert b"Sanitizer" not in done.stderr, done.stderr.decode()
    said: list[str] = done.stdout.decode().splitlines()
    return said


def evaluation(loss: bytes, rows: int = 1) -> bytes:
    result = b'{"content_digest":"%s","correct":0,"kind":"evaluate","loss":%s,"predictions":[%s],"rows":%d}'
    body = result % (b"0" * 64, loss, b"1," * (rows - 1) + b"1", rows)
    return b'{"result":%s,"type":"result","unit":0}' % body


def test_a_result_that_is_not_finite_or_too_long_is_refused_and_leaves_no_trace(
    journal_program: Path, tmp_path: Path
) -> None:
    path = tmp_path / "journal.log"
    bad = [evaluation(b"NaN"), evaluation(b"-Infinity"), evaluation(b"0.5", 2_200_000), b"", b"\xff"]
    said = append(journal_program, path, [*bad, evaluation(b"0.5")])
    assert all(line.startswith("FormatError: journal record 0 ") for line in said[:5]), said
    assert "more than the 4194304 a record may have" in said[2]
    assert said[5:] == ["ok", "1 1 0"]
    assert scan(path).done == {0}
    assert len(read_records(path, 0).records) == 1


def test_no_space_cuts_the_journal_back_to_its_last_good_record(
    journal_program: Path, tmp_path: Path
) -> None:
    """The kernel lets the file grow to a limit: the record that would cross it is written in part."""
    path = tmp_path / "journal.log"
    failure = b'{"error":"internal","remedy":"","type":"failure","unit":%d,"what":"%s"}'
    payloads = [failure % (unit, b"w" * 300) for unit in range(10)]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500))

    said = append(journal_program, path, payloads, preexec_fn=limit)
    written = said.count("ok")
    assert 0 < written < 10
    assert all(line.startswith("StorageFullError: ") for line in said[written:10])
    found = read_records(path, 0)
    assert (len(found.records), found.next_offset, found.problem) == (written, path.stat().st_size, None)
    assert append(journal_program, path, payloads[written:]) == ["ok"] * (10 - written) + ["10 0 10"]
    assert scan(path).failed == set(range(10))


def test_full_storage_ends_the_run_with_its_own_code_and_it_resumes(agent: Agent, spool: Spool) -> None:
    job = native_job(spool, units=probes(100))

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))

    code, report = run(agent, spool, job, preexec_fn=limit)
    assert (code, report["error"]["type"]) == (4, "StorageFullError")
    kept = units_done(journal_of(spool, job))
    assert kept == list(range(len(kept)))
    assert 0 < len(kept) < 100
    assert "no space left" in (spool.job(job.id, 1) / "agent.log").read_text()
    assert not (spool.job(job.id, 1) / "pid").exists()
    assert run(agent, spool, job)[0] == 0
    assert units_done(journal_of(spool, job)) == list(range(100))


# ------------------------------------------------------------------ running


def test_killed_at_random_moments_nothing_is_lost_and_nothing_counted_twice(
    agent: Agent, spool: Spool, tmp_path: Path
) -> None:
    """While a unit begins, runs or is journalled; units come one by one, so the job cannot be over."""
    machine = Machine(tmp_path / "machine.lock")
    job = native_job(spool, units=probes(120), machine_lock=str(machine.path))
    rng = random.Random(5)
    with machine:
        for _ in range(12):
            before = journal_lines(spool, job)
            started = agent.start("run", spool.job("probe", 1) / "job.json", "--spool", spool.root)
            machine.let_through(lambda at=before: journal_lines(spool, job) > at + 2, "some units")  # type: ignore[misc]
            machine.let_one_through()
            time.sleep(rng.uniform(0, 0.004))
            started.kill()
            started.communicate()
    assert call(agent, spool, "status", "probe", 1)[1]["state"] == "stopped"
    assert run(agent, spool, job) == (0, {"state": "ended", "done": 120, "failed": 0})
    records = journal_of(spool, job)
    assert units_done(records) == list(range(120))
    assert [record.seq for record in records] == list(range(len(records)))
    assert sum(isinstance(record.payload, StartRecord) for record in records) == 13


def test_the_log_has_a_time_on_every_line_and_hangup_is_ignored(agent: Agent, spool: Spool) -> None:
    job = native_job(spool, units=probes(1), emulation=agent_emulation(20_000_000))
    started = agent.start("run", spool.job("probe", 1) / "job.json", "--spool", spool.root)
    wait_for(lambda: journal_lines(spool, job) == 1, "the start record")
    started.send_signal(signal.SIGHUP)
    assert finish(started)[0] == 0
    lines = (spool.job("probe", 1) / "agent.log").read_text().splitlines()
    assert len(lines) >= 2
    for line in lines:
        time.strptime(line.split(".")[0], "%Y-%m-%dT%H:%M:%S")
        assert line.split()[1] in ("INFO", "WARNING", "ERROR")


def test_a_job_stops_when_the_other_agent_let_a_younger_lease_in(
    agent: Agent, spool: Spool, tmp_path: Path
) -> None:
    machine = Machine(tmp_path / "machine.lock")
    job = native_job(spool, machine_lock=str(machine.path))
    with machine:
        started = agent.start("run", spool.job("probe", 1) / "job.json", "--spool", spool.root)
        wait_for(lambda: machine.is_open_in(started.pid), "the first unit to wait for the machine")
        admit(spool, LEASE.model_copy(update={"counter": 2}))
    code, report = finish(started)
    assert (code, report["state"]) == (3, "refused")
    end = journal_of(spool, job)[-1].payload
    assert isinstance(end, EndRecord)
    assert (end.refused or "").startswith("superseded: the lease has counter 1, 2 was seen already")
    assert len(units_done(journal_of(spool, job))) == 1


def test_a_takeover_counts_once(agent: Agent, spool: Spool, tmp_path: Path) -> None:
    """The job took the device over; another store took it back: the job's flag opens nothing now."""
    machine = Machine(tmp_path / "machine.lock")
    lease = Lease(store="store-b", counter=5, takeover=True)
    admit(spool, LEASE)
    native_job(spool, machine_lock=str(machine.path), lease=lease)
    with machine:
        started = agent.start("run", spool.job("probe", 1) / "job.json", "--spool", spool.root)
        wait_for(lambda: b"store-b" in spool.fence.read_bytes(), "the take-over")
        wait_for(lambda: machine.is_open_in(started.pid), "the first unit to wait for the machine")
        admit(spool, Lease(store="store-a", counter=1, takeover=True))
    assert finish(started)[0] == 3


@pytest.mark.parametrize("kind", ["elsewhere", "link", "other-name", "folder", "absent", "swapped"])
def test_only_job_files_of_the_spool_run(agent: Agent, spool: Spool, tmp_path: Path, kind: str) -> None:
    native_job(spool)
    real = spool.job("probe", 1) / "job.json"
    wrong = spool.job("wrong", 1) / "job.json"
    wrong.parent.mkdir(parents=True)
    if kind == "elsewhere":
        wrong = tmp_path / "jobs" / "probe" / "1" / "job.json"
        wrong.parent.mkdir(parents=True)
        wrong.write_bytes(real.read_bytes())
    elif kind == "link":
        wrong.symlink_to(real)
        wrong = spool.job("probe", 1) / "linked.json"
        wrong.symlink_to(tmp_path / "nothing")
    elif kind == "other-name":
        wrong = real.rename(real.with_name("work.json"))
    elif kind == "folder":
        wrong.mkdir()
    elif kind == "swapped":
        wrong.write_bytes(real.read_bytes())
    code, report = call(agent, spool, "run", wrong)
    assert (code, report["error"]["type"]) == (
        (3, "RefusedError") if kind == "swapped" else (2, "InputError")
    )
    assert not (tmp_path / "jobs" / "probe" / "1" / "agent.log").exists()
