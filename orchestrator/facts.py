"""Device facts: one agent command, and a pure function that makes a record of its output.

A device is not trusted: what it says is capped, validated and then believed as its own statement.
"""

from __future__ import annotations

from orchestrator.agent_verbs import call_raw
from orchestrator.errors import StableError, new_agent_remedy
from orchestrator.transports.base import Transport
from sti_runtime.device_facts import FACTS_CAP_BYTES, DeviceFacts
from sti_runtime.errors import FormatError


def parse_facts(output: bytes, *, device: str) -> DeviceFacts:
    """Facts from what the agent printed.

    Raises: StableError when it is not a valid facts record or longer than FACTS_CAP_BYTES.
    """
    try:
        return DeviceFacts.from_json(output, source="the agent's facts", cap_bytes=FACTS_CAP_BYTES)
    except FormatError as error:
        raise StableError(error.what, new_agent_remedy(device), device=device) from error


def read_facts(transport: Transport, spool: str, *, emulated: bool) -> DeviceFacts:
    """Ask the agent for its device's facts; ``emulated`` gives the spool an identity of its own.

    Raises: DeviceError.
    """
    options = ("--emulated",) if emulated else ()
    completed = call_raw(transport, spool, "facts", *options)
    return parse_facts(completed.stdout, device=transport.device)
