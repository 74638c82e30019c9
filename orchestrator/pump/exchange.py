"""The controller's side of one host's pump: orders out, stretches in, one call at a time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import structlog

from orchestrator.dispatch import Worker
from orchestrator.errors import LinkError, StableError
from orchestrator.pump.watch import Order, Stretch

PACE_S = 0.2
"""So long is between two calls of one host unless there are new orders: what comes goes together."""

_AGAIN_S = 1.0
_AGAIN_MOST_S = 5.0

_log = structlog.get_logger(__name__)


class HostExchange:
    """Has one host watch devices. ``stretches`` is called with what comes, ``lost`` with why a call failed;
    both from the thread of this object, which makes the calls."""

    def __init__(
        self,
        host: str,
        worker: Worker,
        stretches: Callable[[tuple[Stretch, ...]], None],
        lost: Callable[[str, BaseException], None],
    ) -> None:
        self.host, self._worker = host, worker
        self._stretches, self._lost = stretches, lost
        self._orders: dict[str, Order] = {}
        self._unsent: set[str] = set()
        self._leave: set[str] = set()
        self._changed = threading.Condition()
        self._epoch: str | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name=f"exchange-{host}", daemon=True)
        self._thread.start()

    def order(self, *orders: Order) -> None:
        """From now on these are the orders of their devices."""
        with self._changed:
            for order in orders:
                self._orders[order.device] = order
                self._unsent.add(order.device)
                self._leave.discard(order.device)
            self._changed.notify_all()

    def leave(self, device: str) -> None:
        """Watch a device no more."""
        with self._changed:
            self._orders.pop(device, None)
            self._unsent.discard(device)
            self._leave.add(device)
            self._changed.notify_all()

    def close(self) -> None:
        """End when the call under way has."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _work(self) -> None:
        pause_s = _AGAIN_S
        while True:
            with self._changed:
                while not self._closed and not self._orders and not self._leave:
                    self._changed.wait()
                if self._closed:
                    return
                sent = [self._orders[device] for device in sorted(self._unsent)]
                leave, any_device = sorted(self._leave), next(iter(self._orders or self._leave))
                self._unsent.clear()
                self._leave.clear()
            began = time.monotonic()
            try:
                drained = self._worker.exchange(any_device, sent, leave, PACE_S)
            except BaseException as error:  # noqa: BLE001 - whoever gave the orders judges it
                with self._changed:
                    if self._closed:  # the worker ended with its pool, while nobody waits for an answer
                        return
                self._failed(any_device, error)
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _AGAIN_MOST_S)
                continue
            pause_s = _AGAIN_S
            with self._changed:
                if self._epoch not in (None, drained.epoch):
                    _log.info("a host's worker was begun anew", host=self.host)
                    self._unsent |= self._orders.keys() - {order.device for order in sent}
                self._epoch = drained.epoch
                # What a controller before this one had ordered.
                self._leave |= {each.device for each in drained.stretches} - self._orders.keys()
            if drained.stretches:
                self._stretches(drained.stretches)
            with self._changed:  # new orders do not wait
                left = PACE_S - (time.monotonic() - began)
                self._changed.wait_for(lambda: self._unsent or self._closed, max(0.0, left))

    def _failed(self, device: str, error: BaseException) -> None:
        with self._changed:
            self._unsent |= self._orders.keys()
            order = self._orders.get(device)
        if isinstance(error, StableError):  # of this device: no host has it any more
            if order is not None:
                self._stretches((Stretch(device, order.number, None, error),))
            return
        if not isinstance(error, LinkError):
            _log.warning("a host's worker failed", host=self.host, cause=str(error))
        self._lost(self.host, error)
