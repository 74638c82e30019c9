"""Whether what answers under a name of the inventory is what is expected: hardware, engine, protocol."""

from __future__ import annotations

from orchestrator.errors import StableError, new_agent_remedy
from orchestrator.inventory import Device
from sti_runtime.device_facts import DeviceFacts
from sti_runtime.journal_format import PROTOCOL_VERSION


def refuse_replaced(device: str, *, before: str, now: str) -> None:
    """Nothing where both identities are of one machine. Raises: StableError for other hardware."""
    if _machine(before) == _machine(now):
        return
    raise StableError(
        f"it is now other hardware ({now}); before it was {before}.",
        f"If that is on purpose: stifarm devices probe --devices {device}. What was measured on the "
        "other device is kept.",
        device=device,
    )


def _machine(identity: str) -> str:
    """The hardware's part of an identity; behind it stands what tells emulated devices of a machine apart."""
    return identity.partition("/")[0]


def missing_engine(device: Device, facts: DeviceFacts) -> StableError | None:
    """The error for an agent without the engine that the inventory wants; None where it has it."""
    if device.engine in facts.engines:
        return None
    have = ", ".join(facts.engines) or "none"
    remedy = (
        "Choose another engine in the inventory."
        if device.native
        else "Install PyTorch for the Python that runs the agent there, or write engine: native."
    )
    return StableError(
        f"its agent has no {device.engine} engine (it has: {have}).", remedy, device=device.name
    )


def other_protocol(device: str, spoken: str) -> StableError:
    """The error for an installed agent of another version than this host's."""
    return StableError(
        f"its agent speaks protocol {spoken}, this stifarm {PROTOCOL_VERSION}.",
        new_agent_remedy(device),
        device=device,
    )
