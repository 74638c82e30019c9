"""Listing what is on a device, where a listing that fails must not pass for "nothing"."""

from __future__ import annotations

from orchestrator.errors import StableError
from orchestrator.transports.base import Transport

_TIMEOUT_S = 60.0


def listed(transport: Transport, script: str, *arguments: str) -> bytes:
    """What a shell script prints that lists something below its first argument.

    Raises: StableError when it fails, or prints more than is kept; DeviceError.
    """
    done = transport.run(["sh", "-c", script, "sh", *arguments], timeout_s=_TIMEOUT_S)
    if not done.ok or done.truncated:
        raise StableError(
            f"{arguments[0]} cannot be listed: {done.error_text() or done.exit_code}.",
            "Check that its user may read there, and the load of the device.",
            device=transport.device,
        )
    return done.stdout
