"""The fence: which controller may start things here, by the lease counters seen so far.

``fence.json`` holds the store that owns the device and the highest counter seen of every store. A lower
counter of the same store is a stale controller; another store needs an explicit take-over. So does a fence
that is damaged: nobody knows whose the device is.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from agent.errors import RefusedError
from agent.locks import hold
from agent.spool import Spool, write_atomic
from sti_runtime.errors import FormatError, InputError
from sti_runtime.messages import Lease
from sti_runtime.records import NonNegative, Record

_LOCK_WAIT_S = 10.0
_DAMAGED = "Nobody knows whose the device is. Take it over explicitly: that writes the file anew."


class Fence(Record):
    """Content of ``fence.json``."""

    format: Literal["stifarm-fence"]
    version: Literal[1]
    owner: str = Field(min_length=1, max_length=64)
    counters: dict[str, NonNegative]


def parse_lease(text: str) -> Lease:
    """A lease from ``STORE:COUNTER`` or ``STORE:COUNTER:takeover``. Raises: InputError."""
    parts = text.split(":")
    takeover = len(parts) == 3 and parts[2] == "takeover"
    if len(parts) not in (2, 3) or (len(parts) == 3 and not takeover) or not parts[1].isdecimal():
        raise InputError(f"{text[:80]!r} is not a lease.", "Write STORE:COUNTER or STORE:COUNTER:takeover.")
    if not 1 <= len(parts[0]) <= 64 or int(parts[1]) >= 2**63:
        raise InputError(f"{text[:80]!r} is not a lease.", "The store's id has 1–64 characters.")
    return Lease(store=parts[0], counter=int(parts[1]), takeover=takeover)


def refusal(fence: Fence | None, lease: Lease) -> str | None:
    """Why ``lease`` is refused under ``fence``; None when it is not."""
    if fence is None:
        return None
    if lease.store != fence.owner and not lease.takeover:
        return f"the device belongs to store {fence.owner!r}, this lease is of store {lease.store!r}"
    highest = fence.counters.get(lease.store, 0)
    if lease.counter < highest:
        return f"the lease has counter {lease.counter}, {highest} was seen already: its controller is stale"
    return None


def admitted(fence: Fence | None, lease: Lease) -> Fence:
    """The fence after ``lease`` was let in."""
    counters = dict(fence.counters) if fence is not None else {}
    counters[lease.store] = lease.counter
    return Fence(format="stifarm-fence", version=1, owner=lease.store, counters=counters)


def read_fence(spool: Spool) -> Fence | None:
    """The persisted fence; None before first contact. Raises: FormatError."""
    return Fence.read(spool.fence) if spool.fence.exists() else None


def admit(spool: Spool, lease: Lease) -> None:
    """Let ``lease`` in and remember it durably, or refuse. A take-over writes a damaged fence anew.

    Raises: RefusedError, StorageFullError, FormatError (a damaged fence).
    """
    with hold(spool.fence_lock, wait_s=_LOCK_WAIT_S, what="The fence"):
        try:
            fence = read_fence(spool)
        except FormatError as error:
            if not lease.takeover:
                raise FormatError(error.what, _DAMAGED) from error
            fence = None
        reason = refusal(fence, lease)
        if reason is not None:
            raise refused(reason)
        after = admitted(fence, lease)
        if after != fence:
            write_atomic(spool.fence, after.to_json())


def still_admitted(spool: Spool, lease: Lease) -> str | None:
    """Why a job that was let in with ``lease`` must stop now; None while it may go on.

    A take-over counts once: after another store has taken the device, the flag opens nothing.
    """
    fence = read_fence(spool)
    return refusal(fence, lease.model_copy(update={"takeover": False}))


def refused(reason: str) -> RefusedError:
    """The error for a lease that is not let in."""
    return RefusedError(
        f"Refused: {reason}.",
        "Take a new lease; to move the device to another store, take it over explicitly.",
    )
