"""The controller of campaigns: gives free lanes their next batch and keeps how each one ended.

All it knows is in the store. Killed at any point, its successor takes up the claims it held (of the same
owner at once, else when they run out) and finds the same jobs; two controllers on one store work side by
side. A database that cannot be reached is waited for: what ends meanwhile is kept until it can be written.
"""

from __future__ import annotations

import queue
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Event

import structlog
from sqlalchemy.orm import Session

from db import campaign_work as work
from db.campaigns import open_runs, start_queued
from db.errors import StoreError
from db.leases import database_wall_ns
from orchestrator.campaigns import claims
from orchestrator.campaigns.choose import next_batch
from orchestrator.campaigns.conclude import conclude_run
from orchestrator.campaigns.estimate import Typical, amounts, left_by_lane
from orchestrator.campaigns.lanes import lanes_of
from orchestrator.campaigns.steps import Batch, Ends, Means, perform
from orchestrator.errors import CommandTimeoutError, LinkError, TransientError
from orchestrator.health.recovery import climb
from orchestrator.pump.loop import Pump
from sti_runtime.errors import StifarmError

MOST_AT_ONCE = 1024
"""Batches under way at once; each waits for its device in a thread of its own."""

_TICK_S = 1.0
_STORE_PAUSE_S = 5.0
_RENEW_S = work.CLAIM_TTL_NS / 4e9
_STRANGE_AFTER_NS = 600 * 10**9
_STRANGE_MOST_NS = 24 * 3600 * 10**9
"""So long nothing has happened on a device that is out of reach (not in the inventory, its host away) when a
run gives it up; the longer time while another controller works, which may have it in reach."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class _Active:
    """A batch under way in this process."""

    batch: Batch
    lane: str
    stop: Event


@dataclass(frozen=True)
class _Ended:
    """What a batch came to: its cells' ends, or the error or interruption that ended it."""

    batch: Batch
    ends: Ends
    error: BaseException | None


class Controller:
    """Runs the open runs of the store's campaigns with the devices of one farm."""

    def __init__(self, means: Means) -> None:
        self._means = means
        self._farm = means.farm
        self._inventory = self._farm.inventory
        self._lanes = lanes_of(self._inventory.devices, self._farm.settings.machine_lock)
        self._active: dict[int, _Active] = {}
        self._ended: queue.SimpleQueue[_Ended] = queue.SimpleQueue()
        self._unsaved: list[_Ended] = []
        self._renewed = time.monotonic()
        self._sizes: Mapping[int, Mapping[tuple[str | None, str], tuple[int, int]]] = {}
        """What the open runs are of, which does not change; see ``db.campaign_work.sizes``."""
        self._missed: set[str | None] = set()
        """Devices out of reach that batches wait for."""

    def run(self, over: Callable[[bool], bool], *, tick: Callable[[], None] = lambda: None) -> None:
        """Work until ``over``, which is told whether nothing is under way or ready. ``tick`` is called before
        each look.

        On KeyboardInterrupt, or when the farm's ``stop`` is set (which raises it), agents are asked to stop
        behind their present units and what is under way goes back to the queue.
        """
        pool = ThreadPoolExecutor(MOST_AT_ONCE, thread_name_prefix="batch")
        with Pump(self._farm.store, self._means.worker, self._farm.owner) as pump:
            self._means = replace(self._means, runner=pump.run_job)
            try:
                self._until(over, tick, pool)
            finally:
                self._leave(pool)

    def _until(
        self, over: Callable[[bool], bool], tick: Callable[[], None], pool: ThreadPoolExecutor
    ) -> None:
        while True:
            if self._farm.stop.is_set():
                raise KeyboardInterrupt
            try:
                tick()
                idle = self._look(pool)
                if over(idle):
                    break
            except StoreError as error:
                _log.warning("the store cannot be used; waiting", cause=error.what)
                self._farm.stop.wait(_STORE_PAUSE_S)
            self._take(_TICK_S)

    # -------------------------------------------------------------- one look

    def _look(self, pool: ThreadPoolExecutor) -> bool:
        """Save what has ended, begin what can begin; whether nothing is under way or ready."""
        while self._unsaved:
            self._save(self._unsaved[0])
            self._unsaved.pop(0)
        self._keep_claims()
        if self._farm.inventory is not self._inventory:  # hosts have joined
            self._inventory = self._farm.inventory
            self._lanes = lanes_of(self._inventory.devices, self._farm.settings.machine_lock)
        ready = self._begin_ready(pool)
        with self._farm.store.session() as session:
            for run in open_runs(session):
                others = open_runs(session, campaign_id=run.campaign_id)
                if run.state == "queued" and all(other.state == "queued" for other in others):
                    ready |= start_queued(session, run.id)
                elif run.state == "running":
                    conclude_run(session, run)
        return not (self._active or self._unsaved or ready)

    def _keep_claims(self) -> None:
        """Renew claims, tell batches whose runs were cancelled, and end those that their controller left."""
        store, owner = self._farm.store, self._farm.owner
        if self._active and time.monotonic() - self._renewed > _RENEW_S:
            with store.session() as session:
                kept = work.renew(session, list(self._active), owner)
            for batch_id in self._active.keys() - kept:
                self._active[batch_id].stop.set()
            self._renewed = time.monotonic()
        with store.reader() as session:
            left = [row.id for row in work.under_way(session)]
            cancelled = work.cancelled_under_way(session, left)
        for batch_id in cancelled:
            if batch_id in self._active:
                self._active[batch_id].stop.set()
            else:
                claims.end_abandoned(self._means, batch_id)

    def _begin_ready(self, pool: ThreadPoolExecutor) -> bool:
        """Begin a batch on every free lane that has one; whether one is ready that had to wait."""
        store, owner = self._farm.store, self._farm.owner
        with store.reader() as session:
            now = database_wall_ns(session)
            waiting = work.waiting(session, now)
            under_way = work.under_way(session)
            had = work.had(session, now)
            left_of = self._left_of(session) if any(each.deadline_wall_ns for each in waiting) else {}
            moved = work.last_moves(session) if waiting or under_way else {}
        mine = [row for row in under_way if row.owner == owner and row.id not in self._active]
        lapsed = [row for row in under_way if row.owner != owner and (row.claimed_until_wall_ns or 0) < now]
        others = [row for row in under_way if row.owner != owner and row not in lapsed]
        elsewhere = {row.device for row in others}
        strange_before = now - (_STRANGE_MOST_NS if others else _STRANGE_AFTER_NS)
        for row in (*mine, *lapsed):
            lane = self._lane(row.device)
            if lane is None and moved.get(row.device, now) < strange_before:
                self._give_up(row.id, row.device)
            elif lane is not None and lane not in self._busy:
                self._begin(pool, row.id, lane)
        had_of: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        for (run_id, device), spent_ns in had.items():
            had_of[self._lane(device) or ""][run_id] += spent_ns
        by_lane: dict[str, list[work.Waiting]] = defaultdict(list)
        self._tell_missed({each.device for each in waiting if self._lane(each.device) is None} - elsewhere)
        for each in waiting:
            lane_or_none = self._lane(each.device)
            if lane_or_none is None:
                begun = each.started_wall_ns or each.due_wall_ns
                if each.device not in elsewhere and max(begun, moved.get(each.device, 0)) < strange_before:
                    self._give_up(each.batch_id, each.device)
            elif each.ready and (each.device is None or each.device not in elsewhere):
                by_lane[lane_or_none].append(each)
        for lane, ready in by_lane.items():
            chosen = (
                None if lane in self._busy else next_batch(ready, had_of[lane], left_of.get(lane, {}), now)
            )
            if chosen is not None:
                self._begin(pool, chosen.batch_id, lane)
        return any(by_lane.values())

    def _left_of(self, session: Session) -> Mapping[str, Mapping[int, int]]:
        """By lane and run: about how many ns of work are left, which says whose deadline is in danger."""
        left, typical = work.left(session), Typical.of(work.durations(session))
        self._sizes = {run_id: self._sizes.get(run_id) or work.sizes(session, run_id) for run_id in left}
        found: dict[str, dict[int, int]] = defaultdict(dict)
        for run_id, counts in left.items():
            lanes = left_by_lane(
                amounts(counts, self._sizes[run_id]), typical, lambda device: self._lane(device) or ""
            )
            for lane, ns in lanes.items():
                found[lane][run_id] = ns
        return found

    @property
    def _busy(self) -> set[str]:
        return {active.lane for active in self._active.values()}

    def _lane(self, device: str | None) -> str | None:
        """The lane of a device that can be asked now; None for another."""
        lane = self._lanes.get(device)
        return lane if device is None or (lane is not None and self._means.in_reach(device)) else None

    def _tell_missed(self, devices: set[str | None]) -> None:
        """Say of which devices batches wait that are out of reach, each once."""
        for device in devices - self._missed:
            _log.warning("is out of reach; campaigns wait for it", device=device)
        self._missed = devices

    def _give_up(self, batch_id: int, device: str | None) -> None:
        """Give up a run on a device that nobody has in reach."""
        known = any(device == each.name for each in self._inventory.devices)
        why = "its host has been away" if known else f"it is not in the inventory of {self._farm.owner}"
        claims.give_up_device(self._farm, batch_id, f"{device} is out of reach: {why}")

    def _begin(self, pool: ThreadPoolExecutor, batch_id: int, lane: str) -> None:
        batch = claims.claimed(self._farm, batch_id)
        if batch is None:
            return
        active = _Active(batch, lane, Event())
        self._active[batch_id] = active
        pool.submit(self._work, active)

    # -------------------------------------------------------------- threads

    def _work(self, active: _Active) -> None:
        """In a thread: do the batch and hand over what came of it."""
        batch, ends = active.batch, Ends()
        error: BaseException | None = None
        means = replace(self._means, farm=self._farm.stopped_by(active.stop))
        try:
            ends = perform(means, batch, lambda known: claims.note(self._farm, batch, known))
        except (LinkError, CommandTimeoutError) as lost:
            error = lost if active.stop.is_set() else self._recovered(batch, lost)
        except BaseException as raised:  # noqa: BLE001 - handed to the loop, which keeps it with the cells
            error = raised
        self._ended.put(_Ended(batch, ends, error))

    def _recovered(self, batch: Batch, error: TransientError) -> StifarmError:
        """Climb for a batch's device, to its quarantine when this was the last try; the batch's error."""
        device = next((each for each in self._inventory.devices if each.name == error.device), None)
        if device is None:
            return error
        last = batch.row.tries + 1 >= claims.TRIES
        return climb(
            self._farm, self._means.worker, device, error, quarantine=last, in_reach=self._means.in_reach
        )

    def _take(self, limit_s: float) -> None:
        """Wait up to ``limit_s`` for a batch to end."""
        try:
            ended = self._ended.get(timeout=limit_s)
            while True:
                self._unsaved.append(ended)
                ended = self._ended.get_nowait()
        except queue.Empty:
            return

    def _save(self, ended: _Ended) -> None:
        claims.settle(self._means, ended.batch, ended.ends, ended.error)
        self._active.pop(ended.batch.row.id, None)

    def _leave(self, pool: ThreadPoolExecutor) -> None:
        """Stop what is under way, wait for it, and give back what was claimed."""
        for active in self._active.values():
            active.stop.set()
        pool.shutdown(wait=True)
        while not self._ended.empty():
            self._unsaved.append(self._ended.get())
        for ended in self._unsaved:
            try:
                self._save(ended)
            except StoreError as error:
                _log.warning("the store did not take what ended; its claim runs out", cause=error.what)
