"""A job file to a device: the agent takes it in whole and flushed, or not at all."""

from __future__ import annotations

from collections.abc import Iterator

import structlog

from orchestrator.agent_verbs import call_agent, lease_arguments
from orchestrator.deploy import COMMIT_TIMEOUT_S, PACK_FILE
from orchestrator.errors import AgentError, StableError, new_agent_remedy
from orchestrator.transports.base import Transport
from sti_runtime.errors import DigestError
from sti_runtime.messages import Job
from sti_runtime.records import sha256_hex

_BLOCK_BYTES = 1 << 18
_log = structlog.get_logger(__name__)


def push_job(transport: Transport, spool: str, job: Job) -> bool:
    """Have the job's file on the device, its lease let in first; whether it was sent now: False where it was
    there before.

    Raises: AgentError when the lease is refused; StableError when this attempt's folder holds another job;
    DeviceError.
    """
    data = job.to_json()
    digest = sha256_hex(data)
    state = _send(transport, spool, job, data, digest)
    if state == "other":
        raise StableError(
            f"attempt {job.attempt} of job {job.id} on the device has another content.",
            "Start the job with a higher attempt number.",
            device=transport.device,
        )
    if state not in ("accepted", "already"):
        raise StableError(
            f"the agent was given a job and calls it {state[:20]!r}.",
            new_agent_remedy(transport.device),
            device=transport.device,
        )
    return state == "accepted"


def _send(transport: Transport, spool: str, job: Job, data: bytes, digest: str) -> str:
    """The agent's word for it; what arrives damaged is sent once more."""
    for last in (False, True):
        try:
            answer = call_agent(
                transport,
                spool,
                "accept-job",
                job.id,
                str(job.attempt),
                digest,
                *lease_arguments(job.lease),
                timeout_s=COMMIT_TIMEOUT_S,
                stdin=_blocks(data),
                stdin_file=f"{spool}/{PACK_FILE}",
            )
        except AgentError as error:
            if last or error.error != DigestError.__name__:
                raise
            _log.warning("a damaged job file is sent again", device=transport.device, cause=error.what)
        else:
            return str(answer.get("state"))
    raise AssertionError("unreachable")


def _blocks(data: bytes) -> Iterator[bytes]:
    for at in range(0, len(data), _BLOCK_BYTES):
        yield data[at : at + _BLOCK_BYTES]
