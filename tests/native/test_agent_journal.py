"""The native agent's journal: what both agents recover of it, who goes on with it, and how it is appended to.

The executable is built with sanitizers. Python's half of each comparison runs in this process.
"""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from agent import identity, process
from agent.journal import Journal, scan
from agent.locks import hold
from agent.spool import Spool
from sti_runtime.journal_format import LINE_CAP_BYTES, PROTOCOL_VERSION, encode_line, read_records
from sti_runtime.messages import (
    RECORD_CAP_BYTES,
    EndRecord,
    FailureRecord,
    JournalRecord,
    StartRecord,
)
from sti_runtime.records import canonical_json
from tests.agent_data import (
    probes,
    push_job,
)
from tests.agents import Agent
from tests.machine import Machine
from tests.native.core import (
    AGENT_SOURCES,
    LEASE,
    call,
    done_by_python,
    finish,
    journal_lines,
    journal_of,
    journal_path,
    native_job,
    run,
    start_record,
    units_done,
    wait_for,
    write_journal,
)
from tests.native.sanitized import ENVIRONMENT, build_sanitized

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
