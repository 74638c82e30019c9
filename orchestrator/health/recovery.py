"""Getting a device back: takes the steps that the ladder says, keeps each, and quarantines it at the top.

What was tried is rows, so a controller that is killed goes on where the ladder was. No lease is needed: the
steps are for devices that nobody can use, and a job under way there goes on or resumes after a reboot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from db.clock import database_wall_ns
from db.devices import device_by_name
from db.errors import QuarantinedError
from db.quarantine import begin_quarantine, record_step, refuse_quarantined, steps_since
from db.reservations import refuse_reserved
from orchestrator.dispatch import Worker
from orchestrator.errors import HostAwayError, TransientError
from orchestrator.farm import Farm
from orchestrator.health.ladder import Budgets, Next, Past, Reachable, next_step
from orchestrator.inventory import Device
from orchestrator.recovering import Stepped
from sti_runtime.errors import StifarmError

_log = structlog.get_logger(__name__)

InReach = Callable[[str], bool]
"""Whether the host of a device is there."""


def _always(_device: str) -> bool:
    return True


@dataclass(frozen=True)
class Recovered:
    """How it ended. ``steps``: (step, what it came to), in order; ``cause``: why it does not answer, with
    what was tried; None when it does."""

    steps: Sequence[tuple[str, Stepped]]
    cause: str | None

    @property
    def back(self) -> bool:
        """Whether the device answers."""
        return self.cause is None


def recover(
    farm: Farm,
    worker: Worker,
    device: Device,
    cause: str,
    *,
    budgets: Budgets | None = None,
    quarantine: bool = True,
    in_reach: InReach = _always,
) -> Recovered:
    """Climb the ladder until the device answers or is in quarantine. ``cause``: what is wrong with it;
    ``quarantine`` False: the last rung is left out; ``in_reach``: asked before every step, the last too.

    Raises: DeviceReservedError (a person has it, who is not disturbed); HostAwayError; StoreError.
    """
    limits = budgets or Budgets()
    with farm.store.reader() as session:
        device_id = device_by_name(session, device.name).id
        refuse_reserved(session, device_id, database_wall_ns(session))
    taken: list[tuple[str, Stepped]] = []
    while True:
        if not in_reach(device.name):
            raise HostAwayError("its host went away before it was recovered.", device=device.name)
        step = _next(farm, device, device_id, limits)
        _log.info("recovery", device=device.name, step=step.step, why=step.why)
        if step.step == "quarantine":
            whole = _cause(cause, step, taken)
            if quarantine:
                with farm.store.session() as session:
                    begin_quarantine(session, device_id, whole)
            return Recovered(taken, whole)
        stepped = worker.recover(device.name, step.step)
        taken.append((step.step, stepped))
        with farm.store.session() as session:
            record_step(session, device_id, step.step, stepped.outcome, stepped.detail)
        if stepped.outcome == "recovered":
            return Recovered(taken, None)


def climb(
    farm: Farm,
    worker: Worker,
    device: Device,
    error: TransientError,
    *,
    quarantine: bool,
    in_reach: InReach = _always,
) -> StifarmError:
    """Climb the ladder for a device that did not answer while it was worked with.

    Returns the error that its work ends with: the same, a QuarantinedError, or a HostAwayError when it was
    the host that did not answer. What else hinders the ladder is logged.
    """
    if isinstance(error, HostAwayError):
        return error
    try:
        recovered = recover(farm, worker, device, error.what, quarantine=quarantine, in_reach=in_reach)
        if not recovered.back:
            with farm.store.reader() as session:
                refuse_quarantined(session, device_by_name(session, device.name).id)
    except (QuarantinedError, HostAwayError) as instead:
        return instead
    except StifarmError as hindered:
        _log.warning("its recovery is hindered", device=device.name, cause=hindered.what)
    return error


def _next(farm: Farm, device: Device, device_id: int, budgets: Budgets) -> Next:
    with farm.store.reader() as session:
        now = database_wall_ns(session)
        rows = steps_since(session, device_id, now - budgets.window_ns)
        past = [Past(row.step, row.outcome, row.wall_ns) for row in rows]
    return next_step(past, now, Reachable(device.transport, device.recovery.reboot), budgets)


def _cause(cause: str, step: Next, taken: Sequence[tuple[str, Stepped]]) -> str:
    tried = [f"{name} {stepped.outcome} ({stepped.detail})" for name, stepped in taken]
    passed = [f"no {name}: {why}" for name, why in step.passed_over if name not in dict(taken)]
    return "; ".join([cause, *tried, *passed])
