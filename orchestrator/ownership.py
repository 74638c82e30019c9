"""Whose a device is, read from here: for what is to be done there before an agent can refuse it."""

from __future__ import annotations

import json

from orchestrator.agent_verbs import FENCE, take_over_remedy
from orchestrator.errors import AgentError, MissingFileError, StableError
from orchestrator.transports.base import Transport
from sti_runtime.messages import Lease

_FENCE_CAP_BYTES = 1 << 20


def require_ours(transport: Transport, spool: str, lease: Lease | None) -> None:
    """As the agent's fence, which has the last word, but nothing is remembered; without a lease all goes, and
    of a damaged fence a take-over.

    Raises: AgentError when the lease would be refused; StableError for a damaged fence; DeviceError.
    """
    if lease is None:
        return
    try:
        fence = json.loads(transport.read_from(f"{spool}/{FENCE}", 0, _FENCE_CAP_BYTES))
        owner, highest = str(fence["owner"]), int(fence["counters"].get(lease.store, 0))
    except MissingFileError:
        return
    except (ValueError, OverflowError, RecursionError, LookupError, TypeError, AttributeError) as error:
        if lease.takeover:
            return
        raise StableError(
            f"{spool}/{FENCE} is damaged, so nobody knows whose the device is.",
            take_over_remedy(transport.device, FENCE) or "",
            device=transport.device,
        ) from error
    if owner != lease.store and not lease.takeover:
        refusal = f"the device belongs to store {owner[:64]!r}, this lease is of store {lease.store!r}"
        raise AgentError(
            refusal + ".", take_over_remedy(transport.device, refusal) or "", device=transport.device
        )
    if lease.counter < highest:
        raise AgentError(
            f"the lease has counter {lease.counter}, {highest} was seen already: its controller is stale.",
            "Run the command again.",
            device=transport.device,
        )
