"""The native agent's command line, fence, locks and pids: the Python agent's, on the same spool.

The executable is built with sanitizers. Python's half of each comparison runs in this process.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import random
import shutil
import signal
import subprocess
import time
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import pytest

from agent import housekeeping, identity, process
from agent.errors import BusyError, RefusedError
from agent.fence import admit
from agent.locks import hold, hold_machine
from agent.spool import Spool
from sti_runtime.errors import FormatError, StifarmError
from sti_runtime.journal_format import PROTOCOL_VERSION
from sti_runtime.messages import (
    EvaluateUnit,
    FailureRecord,
    Lease,
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
    LEASE,
    call,
    done_by_python,
    finish,
    journal_lines,
    journal_of,
    journal_path,
    native_job,
    run,
    units_done,
    wait_for,
    write_journal,
)

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
