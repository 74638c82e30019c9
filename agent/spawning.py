"""Requests in processes of their own: ``spawn-cold``, from the start of the process to the logits.

The parent notes the time and starts ``python -m agent.spawning SPOOL``, which gets a job of one request on
its standard input and answers with one record on its standard output. CLOCK_MONOTONIC is the same in
both, so the child's times are the parent's.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from sti_runtime.errors import FormatError, StifarmError
from sti_runtime.messages import (
    JOB_CAP_BYTES,
    ExecuteUnit,
    IoMode,
    Job,
    LayerTrace,
    MemoryParts,
    RequestSample,
)
from sti_runtime.records import NonNegative, Record

if TYPE_CHECKING:
    from agent.context import Context

_TIMEOUT_S = 600
_ERROR_TAIL = 500


class SpawnReply(Record):
    """The child's answer. The sample's times count from ``started_ns``, when the child was ready."""

    sample: RequestSample
    memory: MemoryParts
    io_mode: IoMode
    started_ns: NonNegative
    ended_ns: NonNegative


class SpawnFailure(Record):
    """The child's answer when the request raised an error of the tree."""

    what: str
    remedy: str


class SpawnedRequestError(StifarmError):
    """A request in a process of its own failed."""


def run_spawned(unit: ExecuteUnit, index: int, context: Context) -> SpawnReply:
    """Request ``index`` of the unit in a new process; its times count from before the process started.

    Raises: SpawnedRequestError with the child's own words.
    """
    alone = unit.model_copy(update={"number": 0, "rows": (unit.rows[index],), "warmups": 0})
    job = context.job.model_copy(update={"units": (alone,)}).to_json()
    command = [sys.executable, "-m", "agent.spawning", str(context.spool)]
    root = Path(__file__).parent.parent
    started_ns = time.monotonic_ns()
    try:
        child = subprocess.run(
            command, input=job, capture_output=True, timeout=_TIMEOUT_S, cwd=root, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SpawnedRequestError(f"{' '.join(command)}: {error}.") from error
    if child.returncode:
        raise _failure(child)
    reply = SpawnReply.from_json(child.stdout, source="the answer of agent.spawning")
    ready_ns = reply.started_ns - started_ns
    sample = reply.sample.model_copy(
        update={
            "warmup": index < unit.warmups,
            "latency_ns": reply.ended_ns - started_ns,
            "trace": tuple(_shifted(row, ready_ns) for row in reply.sample.trace),
        }
    )
    return reply.model_copy(update={"sample": sample})


def _failure(child: subprocess.CompletedProcess[bytes]) -> SpawnedRequestError:
    try:
        failure = SpawnFailure.from_json(child.stdout, source="the answer of agent.spawning")
    except FormatError:
        tail = child.stderr.decode(errors="replace")[-_ERROR_TAIL:]
        return SpawnedRequestError(
            f"A request's process ended with code {child.returncode}: {tail}", "See agent.log."
        )
    return SpawnedRequestError(failure.what, failure.remedy)


def _shifted(row: LayerTrace, by_ns: int) -> LayerTrace:
    io = {"io_start_ns": row.io_start_ns + by_ns, "io_end_ns": row.io_end_ns + by_ns} if row.bytes else {}
    compute = {
        "compute_start_ns": row.compute_start_ns + by_ns,
        "compute_end_ns": row.compute_end_ns + by_ns,
    }
    return row.model_copy(update=io | compute)


def _one_request(job: Job, spool: Path) -> SpawnReply:
    from agent.context import Context
    from agent.measure import request_sample
    from agent.profiling import evict_if_buffered
    from sti_runtime.torch_engine import gpu_memory_errors

    unit = job.units[0]
    if not isinstance(unit, ExecuteUnit):
        raise FormatError(f"A {unit.kind} unit is not a request.", "Spawn execute units only.")
    context = Context(job, spool)
    try:
        with gpu_memory_errors():
            executor, request = context.executor, context.request(unit.rows[0])
            evict_if_buffered(executor, unit.io_mode)
            started_ns = time.monotonic_ns()
            outcome = executor.run(unit.plan, request, unit.request_kind, unit.io_mode)
            ended_ns = time.monotonic_ns()
        return SpawnReply(
            sample=request_sample(unit.rows[0], False, unit.io_mode, outcome),
            memory=executor.memory(),
            io_mode=outcome.io_mode,
            started_ns=started_ns,
            ended_ns=ended_ns,
        )
    finally:
        context.close()


def main() -> int:
    """Body of the child process."""
    job = Job.from_json(sys.stdin.buffer.read(JOB_CAP_BYTES + 1), source="stdin", cap_bytes=JOB_CAP_BYTES)
    try:
        answer: Record = _one_request(job, Path(sys.argv[1]))
    except StifarmError as error:
        answer = SpawnFailure(what=error.what, remedy=error.remedy)
    sys.stdout.buffer.write(answer.to_json())
    return 1 if isinstance(answer, SpawnFailure) else 0


if __name__ == "__main__":
    sys.exit(main())
