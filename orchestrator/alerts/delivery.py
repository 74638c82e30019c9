"""Delivering events to whom they are for. All state is rows: a process killed at any point loses none.

An event is settled in the store only after it was taken, so one whose deliverer is killed between the two is
told again (its ``id`` stays). One process at a time delivers an alert; a killed one's claim lapses.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy.orm import Session

from db import alerts
from db.clock import database_wall_ns
from db.models import AlertRow
from db.session import Store
from orchestrator.alerts.sending import LIMIT_S, NotTakenError, execute, post, webhook_url
from sti_runtime.errors import StifarmError

_MOST_ALERTS = 64
_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Patience:
    """``limit_s``: for an answer. ``pause_s``, doubled each time up to ``pause_most_s``: before another try.
    ``budget_s``: an event that is older and is refused is given up. ``look_s``: how often events are
    looked for."""

    limit_s: float = LIMIT_S
    pause_s: float = 2.0
    pause_most_s: float = 300.0
    budget_s: float = 86_400.0
    look_s: float = 2.0

    @property
    def claim_ns(self) -> int:
        """How long a killed deliverer's claim lasts: longer than one event can take."""
        return int((3 * self.limit_s + 5) * 1e9)

    def pause_ns(self, tries: int) -> int:
        """The pause after so many tries before."""
        return int(min(self.pause_s * 2 ** min(tries, 30), self.pause_most_s) * 1e9)


def deliver(store: Store, name: str, patience: Patience | None = None) -> int:
    """Tell of all events of an alert, in order, until one is not taken; how many were.

    Raises: StoreError.
    """
    limits = patience or Patience()
    with store.reader() as session:  # which, unlike a claim, disturbs no writer
        if not _due(session, alerts.get_alert(session, name)):
            return 0
    with store.session() as session:
        if not alerts.claim(session, name, limits.claim_ns):
            return 0
    taken = 0
    try:
        while _one(store, name, limits):
            taken += 1
    finally:
        with store.session() as session:
            alerts.give_back(session, name)
    return taken


def _due(session: Session, row: AlertRow) -> bool:
    waits = row.retry_wall_ns is not None and row.retry_wall_ns > database_wall_ns(session)
    return not waits and alerts.next_event(session, row) is not None


def _one(store: Store, name: str, limits: Patience) -> bool:
    """Tell of the next event; False when there is none, when it is not time, or when it was not taken."""
    with store.session() as session:
        alerts.extend(session, name, limits.claim_ns)
        row = alerts.get_alert(session, name)
        now = database_wall_ns(session)
        event = alerts.next_event(session, row)
        if event is None or (row.retry_wall_ns or 0) > now:
            return False
        document = alerts.event_document(session, store.store_id, event)
    try:
        send(row, document, os.environ, limits.limit_s)
    except NotTakenError as error:
        _log.warning("an alert was not taken", alert=name, event_id=event.id, cause=error.what)
        with store.session() as session:
            alerts.failed(session, name, error.what, limits.pause_ns(row.tries))
            if now - event.wall_ns > limits.budget_s * 1e9:
                alerts.given_up(session, name, event.id, error.what)
        return False
    with store.session() as session:
        alerts.delivered(session, name, event.id)
    return True


def send(
    row: AlertRow, document: Mapping[str, Any], environ: Mapping[str, str], limit_s: float = LIMIT_S
) -> None:
    """Tell whom an alert is for. Raises: NotTakenError."""
    target = alerts.target_of(row)
    if row.kind == "webhook":
        post(webhook_url(target, environ), document, limit_s=limit_s)
    else:
        execute(target, document, limit_s=limit_s)


def deliver_all(store: Store, patience: Patience | None = None) -> int:
    """Tell of all events of all alerts once, side by side; how many were taken. Raises: StoreError."""
    with store.reader() as session:
        names = [row.name for row in alerts.list_alerts(session)]
    if not names:
        return 0
    with ThreadPoolExecutor(min(len(names), _MOST_ALERTS)) as pool:
        return sum(pool.map(lambda name: deliver(store, name, patience), names))


def deliver_until(store: Store, stop: threading.Event, patience: Patience | None = None) -> None:
    """Tell of events as they come until ``stop`` is set: for a controller's thread.

    Whoever hangs holds up only themselves. A store that fails is tried again: events wait there.
    """
    limits = patience or Patience()
    running: dict[str, Future[int]] = {}
    with ThreadPoolExecutor(_MOST_ALERTS) as pool:
        while not stop.wait(limits.look_s):
            for name, done in list(running.items()):
                if done.done():
                    del running[name]
                    _tell(name, done)
            try:
                with store.reader() as session:
                    names = [row.name for row in alerts.list_alerts(session)]
            except StifarmError as error:
                _log.warning("alerts cannot be looked up", cause=error.what)
                continue
            for name in names:
                if name not in running:
                    running[name] = pool.submit(deliver, store, name, limits)


@contextmanager
def telling(store: Store, patience: Patience | None = None) -> Iterator[None]:
    """Within the block events are told as they come, beside whatever else is done."""
    stop = threading.Event()
    teller = threading.Thread(target=deliver_until, args=(store, stop, patience))
    teller.start()
    try:
        yield
    finally:
        stop.set()
        teller.join()


def _tell(name: str, done: Future[int]) -> None:
    try:
        done.result()
    except StifarmError as error:
        _log.warning("an alert cannot be delivered now", alert=name, cause=error.what)
