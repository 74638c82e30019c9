"""What tests of the native agent's core share: the sanitized executable, jobs, journals, comparisons."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from agent import identity
from agent.journal import Journal
from agent.sensors import read_sensors
from agent.spool import Spool
from orchestrator.toolchain import SOURCE_FOLDERS
from sti_runtime.errors import StifarmError
from sti_runtime.journal_format import PROTOCOL_VERSION, parse_lines
from sti_runtime.messages import (
    FailureRecord,
    Job,
    JournalRecord,
    Lease,
    Payload,
    ProbeResult,
    ResultRecord,
    StartRecord,
)
from sti_runtime.records import canonical_json
from tests.agent_data import make_job, push_job
from tests.agents import Agent
from tests.native.sanitized import ENVIRONMENT, Sanitizer, build_sanitized

AGENT_SOURCES = sorted(SOURCE_FOLDERS[1].glob("*.c"))
LEASE = Lease(store="store-a", counter=1, takeover=False)


@cache
def sanitized_agent(sanitizer: Sanitizer = "address,undefined") -> Agent:
    """The whole agent with the compiler's sanitizers; skips where there is no gcc."""
    program = build_sanitized(sanitizer, *AGENT_SOURCES)
    return Agent("x86_64", (str(program),), emulated=False, environment=ENVIRONMENT)


def finish(started: subprocess.Popen[bytes]) -> tuple[int, dict[str, Any]]:
    """Wait for a verb; its exit code and report. A sanitizer's report fails the test."""
    output, errors = started.communicate(timeout=300)
    assert b"Sanitizer" not in errors, errors.decode()
    assert b"runtime error" not in errors, errors.decode()
    assert output, errors.decode()
    report: dict[str, Any] = json.loads(output)
    assert output == canonical_json(report) + b"\n"
    return started.returncode, report


def call(agent: Agent, spool: Spool | Path, *words: object, **options: Any) -> tuple[int, dict[str, Any]]:
    root = spool.root if isinstance(spool, Spool) else spool
    return finish(agent.start(*words, "--spool", root, **options))


def done_by_python(function: Callable[..., dict[str, Any]], *arguments: Any) -> tuple[int, dict[str, Any]]:
    """What the Python agent would answer."""
    try:
        return 0, function(*arguments)
    except StifarmError as error:
        return error.exit_code, {
            "error": {"type": type(error).__name__, "what": error.what, "remedy": error.remedy}
        }


def wait_for(condition: Callable[[], bool], what: str, limit_s: float = 120) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s} s for {what}"
        time.sleep(0.005)


def native_job(spool: Spool, **changes: Any) -> Job:
    job = make_job(spool, **({"engine": "native"} | changes))
    push_job(spool, job)
    return job


def run(agent: Agent, spool: Spool, job: Job, **options: Any) -> tuple[int, dict[str, Any]]:
    return call(agent, spool, "run", spool.job(job.id, job.attempt) / "job.json", **options)


def journal_path(spool: Spool, job: Job) -> Path:
    return spool.job(job.id, job.attempt) / "journal.log"


def journal_of(spool: Spool, job: Job) -> list[JournalRecord]:
    """All records, validated as the host does it; the journal must be whole."""
    path = journal_path(spool, job)
    found = parse_lines(path.read_bytes(), offset=0, source=str(path))
    assert found.problem is None
    assert found.next_offset == path.stat().st_size
    return list(found.records)


def units_done(records: Sequence[JournalRecord]) -> list[int]:
    return [r.payload.unit for r in records if isinstance(r.payload, ResultRecord | FailureRecord)]


def journal_lines(spool: Spool, job: Job) -> int:
    path = journal_path(spool, job)
    return path.read_bytes().count(b"\n") if path.exists() else 0


def start_record(spool: Spool, job: Job) -> StartRecord:
    return StartRecord(
        type="start", job=job.id, attempt=job.attempt, lease=job.lease, first_unit=0, agent="test",
        agent_digest="0" * 64, protocol=PROTOCOL_VERSION, emulated=False, sensors=read_sensors(spool.root),
    )  # fmt: skip


def write_journal(spool: Spool, job: Job, *, units: int, fail: int | None = None) -> Path:
    """A journal by the Python agent in which the first units are done."""
    journal = Journal(journal_path(spool, job), identity.boot_id())
    journal.append(start_record(spool, job))
    for unit in range(units):
        payload: Payload = ResultRecord(
            type="result",
            unit=unit,
            result=ProbeResult(kind="probe", sensors=read_sensors(spool.root), verified=None),
        )
        if unit == fail:
            payload = FailureRecord(type="failure", unit=unit, error="internal", what="\0ä\n", remedy="")
        journal.append(payload)
    journal.close()
    return journal.path


def same_answer(
    agent: Agent,
    spools: tuple[Spool, Spool],
    words: Sequence[object],
    python: Callable[[Spool], dict[str, Any]],
    **options: Any,
) -> dict[str, Any]:
    """The verb on the native spool, and its twin on the Python one; code and report must be equal."""
    code, report = call(agent, spools[0], *words, **options)
    wanted = done_by_python(python, spools[1])
    assert code == wanted[0], (report, wanted)
    if code == 0:
        assert report == wanted[1]
    else:
        assert report["error"]["type"] == wanted[1]["error"]["type"]
    return report


def files_below(folder: Path) -> dict[str, bytes]:
    """Contents by path; done lists as the set they mean; lock files apart."""
    found: dict[str, bytes] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and not name.startswith("locks/"):
            data = path.read_bytes()
            if path.suffix == ".done":
                data = repr(sorted({int(line) for line in data.split(b"\n") if line.isdigit()})).encode()
            found[name] = data
    return found
