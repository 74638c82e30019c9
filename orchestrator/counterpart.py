"""Whether what answers under a name of the inventory is what is expected there: hardware and protocol."""

from __future__ import annotations

from orchestrator.errors import StableError
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


def other_protocol(device: str, spoken: str) -> StableError:
    """The error for an installed agent of another version than this host's."""
    return StableError(
        f"its agent speaks protocol {spoken}, this stifarm {PROTOCOL_VERSION}.",
        "Install the same version of stifarm on both sides.",
        device=device,
    )
