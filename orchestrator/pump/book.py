"""What the fleet's loop asks of the store: for many jobs in one transaction.

Where that fails, each is done in one of its own, so that no device's trouble is another's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import structlog
from sqlalchemy.orm import Session

from db import arrivals, fleet_work
from db.arrivals import TakenIn
from db.errors import StoreUnreachableError
from db.fleet_work import Opening
from db.leases import LeaseGrant
from db.session import Store
from orchestrator.dispatch import LEASE_TTL_NS, Outcome
from orchestrator.health.kinds import HEALTH
from orchestrator.patience import patiently
from orchestrator.pump.run import Run
from orchestrator.pump.watch import Stretch

MOST_TOGETHER = 250
"""So many jobs share a transaction."""

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")
_R = TypeVar("_R")


class Book:
    """The store of a fleet. ``runs``: the jobs under way, by device; while the store is away it is waited
    for, until nobody wants any of them or ``closed`` is set. Raises, as every method: KeyboardInterrupt then;
    StoreUnreachableError when that took too long."""

    def __init__(self, store: Store, owner: str, runs: dict[str, Run], closed: threading.Event) -> None:
        self._store, self._owner = store, owner
        self._stop = _AllStopped(runs, closed)

    def open(self, runs: Sequence[Run]) -> list[LeaseGrant | None]:
        """Open jobs' first attempts; the lease of each, None where it is not plain or was not possible."""

        def work(session: Session, part: Sequence[Run]) -> list[LeaseGrant | None]:
            openings = [
                Opening(run.request.device_id, run.request.key, run.request.kind, run.first) for run in part
            ]
            grants = fleet_work.open_plain(
                session, self._owner, openings, LEASE_TTL_NS, even_quarantined=HEALTH
            )
            return [grants.get(run.first.id) for run in part]

        return [None if isinstance(found, Exception) else found for found in self._together(runs, work)]

    def take_in(self, come: Sequence[tuple[Run, Stretch]]) -> list[TakenIn | Exception]:
        """Take in records; of each stretch what became of it, or why it could not be taken in."""

        def work(session: Session, part: Sequence[tuple[Run, Stretch]]) -> list[TakenIn | Exception]:
            return [*arrivals.take_in(session, [run.arrived(stretch) for run, stretch in part])]

        return self._together(come, work)

    def renew(self, runs: Sequence[Run]) -> list[LeaseGrant | Exception]:
        """Renew leases; of each the new one, or why not."""

        def work(session: Session, part: Sequence[Run]) -> list[LeaseGrant | Exception]:
            return [*fleet_work.renew(session, [run.lease for run in part], LEASE_TTL_NS)]

        return self._together(runs, work)

    def complete(self, runs: Sequence[Run]) -> list[Outcome | Exception]:
        """Give back the devices of jobs that ended; what each came to."""

        def work(session: Session, part: Sequence[Run]) -> list[Outcome | Exception]:
            fleet_work.give_back(session, [run.lease for run in part])
            found = fleet_work.found_of(session, [run.attempt.id for run in part])
            return [_outcome(run, found[run.attempt.id]) for run in part]

        return self._together(runs, work)

    def _together(
        self, items: Sequence[_T], work: Callable[[Session, Sequence[_T]], Sequence[_R]]
    ) -> list[_R | Exception]:
        answers: list[_R | Exception] = []
        for at in range(0, len(items), MOST_TOGETHER):
            answers.extend(self._part(items[at : at + MOST_TOGETHER], work))
        return answers

    def _part(
        self, items: Sequence[_T], work: Callable[[Session, Sequence[_T]], Sequence[_R]]
    ) -> list[_R | Exception]:
        def once() -> Sequence[_R]:
            with self._store.session() as session:
                return work(session, items)

        try:
            return [*patiently(once, stop=self._stop)]
        except StoreUnreachableError:
            raise
        except Exception as error:  # noqa: BLE001 - told to the job that it belongs to
            if len(items) == 1:
                return [error]
            _log.warning("jobs' steps are taken one by one", cause=str(error))
            return [answer for item in items for answer in self._part([item], work)]


@dataclass(frozen=True)
class _AllStopped:
    """Whether nobody wants any of the jobs any more."""

    runs: dict[str, Run]
    closed: threading.Event

    def wait(self, timeout: float) -> bool:
        """As ``threading.Event.wait``."""
        if self.closed.wait(timeout):
            return True
        return bool(self.runs) and all(run.stopped for run in list(self.runs.values()))


def _outcome(run: Run, found: fleet_work.Found) -> Outcome:
    return Outcome(
        request=run.request,
        job_id=run.attempt.id,
        ran=True,
        results=found.results,
        failures=found.failures,
        rejected=found.rejected,
        refused=found.refused,
    )
