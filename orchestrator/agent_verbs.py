"""Calling the agent's short verbs: JSON on stdout, an exit code with a meaning (docs/job-and-journal.md)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from orchestrator.errors import (
    AgentError,
    DeviceError,
    DeviceFullError,
    StableError,
    TransientError,
    new_agent_remedy,
)
from orchestrator.transports.base import Completed, Transport
from sti_runtime.errors import ResourceError
from sti_runtime.messages import Lease

VERB_TIMEOUT_S = 120.0
ANSWER_CAP_BYTES = 4 << 20
TEXT_CAP = 2000
"""Characters that are kept of a text of the agent's: it goes into messages."""

FENCE = "fence.json"
"""Whose a device is, below its spool (docs/job-and-journal.md, 5)."""

_ERRORS: dict[int, type[DeviceError]] = {4: DeviceFullError, 5: TransientError}


def lease_arguments(lease: Lease | None) -> tuple[str, ...]:
    """The option that fences a verb which changes the device; nothing without a lease."""
    if lease is None:
        return ()
    takeover = ":takeover" if lease.takeover else ""
    return ("--lease", f"{lease.store}:{lease.counter}{takeover}")


def call_agent(
    transport: Transport,
    spool: str,
    verb: str,
    *arguments: str,
    timeout_s: float = VERB_TIMEOUT_S,
    stdin: Iterable[bytes] | None = None,
    stdin_file: str | None = None,
) -> dict[str, Any]:
    """Run one verb, with ``stdin`` as its input, and return its JSON object. ``stdin_file``: see
    ``Transport.run``.

    Raises: AgentError with the agent's own cause, DeviceFullError, TransientError (busy, link, timeout),
    StableError when the answer is no JSON object.
    """
    completed = call_raw(
        transport, spool, verb, *arguments, timeout_s=timeout_s, stdin=stdin, stdin_file=stdin_file
    )
    try:
        answer = json.loads(completed.stdout)
    except (ValueError, RecursionError) as error:
        raise _not_an_answer(transport, verb, completed) from error
    if not isinstance(answer, dict) or completed.truncated:
        raise _not_an_answer(transport, verb, completed)
    return answer


def call_raw(
    transport: Transport,
    spool: str,
    verb: str,
    *arguments: str,
    timeout_s: float = VERB_TIMEOUT_S,
    stdin: Iterable[bytes] | None = None,
    stdin_file: str | None = None,
) -> Completed:
    """Run one verb and return what it said. Raises: as ``call_agent``."""
    argv = (*transport.agent_argv, verb, *arguments, "--spool", spool)
    completed = transport.run(
        argv,
        timeout_s=timeout_s,
        output_cap_bytes=ANSWER_CAP_BYTES,
        stdin=stdin,
        stdin_file=stdin_file,
    )
    if not completed.ok:
        raise _failure(transport.device, verb, completed)
    return completed


def _failure(device: str, verb: str, completed: Completed) -> DeviceError:
    """The error for a verb that did not end with 0, from the object that it printed."""
    said = _said(completed.stdout)
    what = str(said.get("what") or completed.error_text() or "it said nothing.")[:TEXT_CAP]
    remedy = str(said.get("remedy") or "Check that the agent runs there: stifarm doctor.")[:TEXT_CAP]
    text = f"the agent's {verb} failed (exit code {completed.exit_code}): {what}"
    name = str(said.get("type", ""))[:TEXT_CAP]
    kind = DeviceFullError if name == ResourceError.__name__ else _ERRORS.get(completed.exit_code)
    if name in ("RefusedError", "FormatError"):
        remedy = take_over_remedy(device, what) or remedy
    if kind is not None:
        return kind(text, remedy, device=device)
    return AgentError(text, remedy, device=device, error=name)


def take_over_remedy(device: str, refusal: str) -> str | None:
    """What to do when an agent refused because its device belongs to another farm, or nobody knows to which;
    None for other causes."""
    command = f"stifarm devices take-over --devices {device}"
    if FENCE in refusal:
        return f"Take it over, which writes that file anew: {command}"
    if "belongs to store" not in refusal:
        return None
    return f"If that farm is done with it, take it over: {command}"


def _said(stdout: bytes) -> dict[str, Any]:
    """The agent's error object; empty when these are not our agent's words (a crash, no Python there)."""
    try:
        error = json.loads(stdout)["error"]
    except (ValueError, RecursionError, LookupError, TypeError):
        return {}
    return error if isinstance(error, dict) else {}


def _not_an_answer(transport: Transport, verb: str, completed: Completed) -> StableError:
    return StableError(
        f"the agent's {verb} gave no JSON object but {completed.stdout[:80]!r}.",
        new_agent_remedy(transport.device),
        device=transport.device,
    )
