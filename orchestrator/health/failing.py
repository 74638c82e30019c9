"""Devices that let their jobs down: the budget of failures, and quarantine when it is used up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from db.clock import database_wall_ns
from db.models import DeviceFailureRow
from db.quarantine import begin_quarantine, failures_since, record_failure
from db.session import Store
from orchestrator.agent_verbs import take_over_remedy
from orchestrator.errors import DeviceError, HostAwayError
from sti_runtime.errors import StifarmError


@dataclass(frozen=True)
class FailureBudget:
    """So many failures within the window are borne; one more is a quarantine."""

    failures: int = 2
    window_ns: int = 6 * 3600 * 10**9


BUDGET = FailureBudget()


def cause_of(failures: Sequence[DeviceFailureRow], budget: FailureBudget = BUDGET) -> str | None:
    """Why a device with these failures, all of one window, goes into quarantine; None: it does not."""
    if len(failures) <= budget.failures:
        return None
    hours = budget.window_ns / 3.6e12
    return f"it failed {len(failures)} times within {hours:g} h; the last time: {failures[-1].what}"


def note_failure(
    store: Store,
    device_id: int,
    error: DeviceError,
    *,
    job_id: str | None,
    budget: FailureBudget = BUDGET,
) -> str | None:
    """Keep a failure of a device; the cause of the quarantine that it leads to, if it does.

    One that refuses because it is another farm's has not failed, nor one whose host is away. The failure
    itself is what its caller tells of: a store that fails here is logged.
    """
    if isinstance(error, HostAwayError) or take_over_remedy(error.device, error.what) is not None:
        return None
    try:
        with store.session() as session:
            record_failure(session, device_id, error=type(error).__name__, what=error.what, job_id=job_id)
            since = database_wall_ns(session) - budget.window_ns
            cause = cause_of(failures_since(session, device_id, since), budget)
            if cause is not None:
                begin_quarantine(session, device_id, cause)
            return cause
    except StifarmError as failed:
        structlog.get_logger(__name__).error(
            "a failure could not be noted", device=error.device, cause=failed.what
        )
        return None
