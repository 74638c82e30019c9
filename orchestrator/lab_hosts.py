"""All lab hosts as one worker: each call goes to the host that its device hangs on.

The controller's own devices are driven by its own worker, those of a host that joined by that host's. A host
that is gone makes its devices unreachable (HostAwayError), which whoever drives a job waits out; when it
joins again the calls go to it again. Knows nothing of Ray.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import structlog

from orchestrator.content_cache import Content
from orchestrator.deploy import DeployReport, Underway
from orchestrator.dispatch import Worker
from orchestrator.errors import DeviceError, HostAwayError, HostLostError, PoolError, StableError
from orchestrator.hosts import OWN, RENAME, FarmDevices, HostOffer, SeenHost, gather
from orchestrator.inventory import Device
from orchestrator.shipping import ShippedWorker, ship
from orchestrator.worker import HostWorker
from sti_runtime.errors import FormatError, ResourceError, StifarmError
from sti_runtime.messages import Lease

REFRESH_S = 1.0
"""So old may be what is known of the hosts when a call is sent."""

NOTE_S = 10.0
"""So often what is known of the hosts is written down; what changes what they offer, at once."""

_log = structlog.get_logger(__name__)


class Cluster(Protocol):
    """Where hosts join: ``ray.pool.RayPool``."""

    def hosts(self) -> tuple[SeenHost, ...]: ...
    def worker_of(self, offer: HostOffer) -> ShippedWorker: ...


Note = Callable[[Sequence[SeenHost]], None]
"""Writes down what is known of the hosts."""

Remembered = Callable[[], frozenset[str]]
"""The names of the hosts that the farm still counts on. Raises: StoreError."""

Changed = Callable[[FarmDevices], None]
"""Called when the devices of the farm are others than before."""


Ended = Callable[[HostWorker], None]
"""Ends a worker that nobody calls any more."""


@dataclass
class _Known:
    """What was last seen of the hosts. ``workers`` by host and node."""

    offers: dict[str, HostOffer]
    present: frozenset[str]
    farm: FarmDevices
    at: float


@dataclass
class _Own:
    """A worker of the controller's own devices. ``calls`` of it are under way; ``replaced``: what ends it
    with the last of them, once another is in its place."""

    worker: HostWorker
    calls: int = 0
    replaced: Ended | None = None


class LabHosts:
    """The devices of controller and hosts, and their worker.

    ``before``: what the hosts offered when they were last there; they are away until they are seen. A host
    that the cluster does not name stays away as long as it is ``remembered``; without that, always.
    """

    def __init__(
        self,
        own: Sequence[Device],
        own_worker: HostWorker,
        cluster: Cluster,
        *,
        before: Sequence[HostOffer] = (),
        note: Note | None = None,
        remembered: Remembered | None = None,
        changed: Changed | None = None,
    ) -> None:
        self._own, self._own_worker, self._cluster = tuple(own), _Own(own_worker), cluster
        self._note, self._remembered, self._changed = note, remembered, changed
        offers = {offer.name: offer for offer in before}
        self._known = _Known(offers, frozenset(), gather(own, before), 0.0)
        self._workers: dict[str, ShippedWorker] = {}
        self._lock, self._looking = threading.Lock(), threading.Lock()
        self._shipping: dict[str, threading.Lock] = {}
        self._noted = 0.0
        self.sent: dict[str, tuple[int, int]] = {}
        """(bytes sent, bytes to send) to the host of a device, while it is sent a deploy's content."""

    @property
    def worker(self) -> Worker:
        """Drives every device, wherever it hangs."""
        return cast(Worker, _Routed(self))

    def farm_devices(self) -> FarmDevices:
        """Every device of controller and hosts, those of hosts that are away too."""
        return self._fresh().farm

    def own_changed(self, own: Sequence[Device], own_worker: HostWorker, ended: Ended) -> None:
        """The controller's own devices are these from now on, driven by another worker; calls under way end
        with the one they began with, which is then handed to ``ended``, in a thread of its own."""
        with self._looking:
            with self._lock:
                before, self._own_worker = self._own_worker, _Own(own_worker)
                before.replaced = ended
                before.calls += 1
            self._own = tuple(own)
            self._known.at = 0.0
        self._fresh()
        self._left(before)

    def is_own(self, device: str) -> bool:
        """Whether a device hangs on the controller itself."""
        return self.farm_devices().hosts.get(device) == OWN

    def in_reach(self, device: str) -> bool:
        """Whether a device's host is there: the controller itself, or one that has joined it and lives."""
        known = self._fresh()
        host = known.farm.hosts.get(device)
        return host == OWN or host in known.present

    @contextlib.contextmanager
    def _worker_of(self, device: str) -> Iterator[tuple[HostWorker, bool]]:
        """(the worker of a device's host, whether that is the controller itself), for one call. Raises:
        HostAwayError while it is away; StableError when no host, or more than one, has such a device."""
        known = self._fresh()
        if device in known.farm.refused:
            raise StableError(known.farm.refused[device], RENAME, device=device)
        host = known.farm.hosts.get(device)
        if host is None:
            raise StableError("no host offers it.", "See stifarm host list.", device=device)
        if host == OWN:
            with self._lock:
                own = self._own_worker
                own.calls += 1
            try:
                yield own.worker, True
            finally:
                self._left(own)
            return
        if host not in known.present:
            raise _out_of_reach(host, device)
        offer = known.offers[host]
        try:
            with self._lock:
                if offer.node not in self._workers:
                    self._workers[offer.node] = self._cluster.worker_of(offer)
                worker = self._workers[offer.node]
            yield worker, False
        except HostLostError as error:
            self._known.at = 0.0
            raise _out_of_reach(host, device) from error

    def _left(self, own: _Own) -> None:
        """A call of a worker of the controller's own has ended: the last one of a replaced worker ends it."""
        with self._lock:
            own.calls -= 1
            ended = own.replaced if own.calls == 0 else None
        if ended is not None:
            threading.Thread(target=ended, args=(own.worker,), name="ending", daemon=True).start()

    def call(self, device: str, act: Callable[[HostWorker], Any]) -> Any:
        """Have a device's host do something. Raises: HostAwayError when it is gone, what ``act`` raises."""
        with self._worker_of(device) as (worker, _):
            return act(worker)

    def deploy(
        self,
        device: str,
        bundle: Path,
        tasks: Sequence[Path] = (),
        lease: Lease | None = None,
        identity: str | None = None,
    ) -> tuple[DeployReport, ...]:
        """As ``HostWorker.deploy``, of files of the controller, which the device's host is sent first."""
        with self._worker_of(device) as (worker, own):
            if own:
                return worker.deploy(device, bundle, tasks, lease, identity)
            contents = (Content.of_bundle(bundle), *(Content.of_task(path) for path in tasks))
            shipped = cast(ShippedWorker, worker)
            try:
                for content in contents:
                    self._ship(device, content, shipped)
                return shipped.deploy_shipped(device, contents, lease, identity)
            except (ResourceError, FormatError) as error:
                host = self._known.farm.hosts.get(device, "")
                raise StableError(f"its host {host}: {error.what}", error.remedy, device=device) from error

    def _ship(self, device: str, content: Content, host: ShippedWorker) -> None:
        """One sender at a time for each host and content; the next finds it there."""
        name = self._known.farm.hosts.get(device, "")
        with self._lock:
            turn = self._shipping.setdefault(f"{name}/{content.digest}", threading.Lock())

        def advance(done: int, total: int) -> None:
            self.sent[device] = (done, total)

        with turn:
            try:
                sent = ship(content, host, advance)
            finally:
                self.sent.pop(device, None)
        if sent:
            _log.info("content sent to a host", host=name, digest=content.digest, bytes=sent)

    def _fresh(self) -> _Known:
        """What is known of the hosts, asked anew when it is old. Nobody waits for another's question."""
        old = time.monotonic() - self._known.at > REFRESH_S
        if old and self._looking.acquire(blocking=self._known.at == 0):
            try:
                self._look()
            finally:
                self._looking.release()
        return self._known

    def _look(self) -> None:
        try:
            seen = self._cluster.hosts()
        except PoolError as error:
            _log.warning("the hosts cannot be asked for", cause=error.what)
            self._known = _Known(self._known.offers, frozenset(), self._known.farm, time.monotonic())
            return
        offers = dict(self._known.offers)
        for host in seen:
            if host.state in ("left", "refused"):
                offers.pop(host.name, None)
            elif host.offer is not None:
                offers[host.name] = host.offer
        for name in self._forgotten(offers.keys() - {host.name for host in seen}):
            _log.warning("a host is forgotten", host=name)
            del offers[name]
        present = frozenset(host.name for host in seen if host.state == "present")
        for name in sorted(self._known.present - present):
            _log.warning("a host is gone", host=name)
        farm, news = self._known.farm, offers != self._known.offers
        if news or self._known.at == 0:
            farm = gather(self._own, offers.values())
            if self._changed is not None:
                self._changed(farm)
        self._known = _Known(offers, present, farm, time.monotonic())
        if self._note is not None and (news or time.monotonic() - self._noted > NOTE_S):
            self._noted = time.monotonic()
            try:
                self._note(seen)
            except StifarmError as error:
                _log.warning("what is known of the hosts could not be written down", cause=error.what)

    def _forgotten(self, unnamed: Set[str]) -> list[str]:
        """Those of the hosts that the cluster does not name that nobody counts on any more."""
        if not unnamed or self._remembered is None:
            return []
        try:
            return sorted(unnamed - self._remembered())
        except StifarmError as error:
            _log.warning("what hosts the farm has could not be read", cause=error.what)
            return []


class _Routed:
    """Turns a worker's methods, whose first argument names a device, into calls of that device's host."""

    def __init__(self, hosts: LabHosts) -> None:
        self._hosts = hosts
        self.deploy = hosts.deploy

    def progress(self, name: str) -> Underway:
        """Of what goes to the host, then of what goes to the device."""
        sent = self._hosts.sent.get(name)
        if sent is not None:
            return Underway(*sent, waits="")
        try:
            found: Underway = self._hosts.call(name, lambda worker: worker.progress(name))
        except DeviceError as error:
            return Underway(0, 0, waits=error.what)
        return found

    def host(self, name: str) -> str:
        """The host that a device hangs on; a name that no host has is one of its own: its calls fail."""
        return self._hosts.farm_devices().hosts.get(name, name)

    def halt(self, name: str) -> None:
        """Where the host is away nothing is under way that could be halted."""
        with contextlib.suppress(DeviceError):
            self._hosts.call(name, lambda worker: worker.halt(name))

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_") or not hasattr(Worker, method):
            raise AttributeError(method)

        def call(name: str, *args: Any, **kwargs: Any) -> Any:
            return self._hosts.call(name, lambda worker: getattr(worker, method)(name, *args, **kwargs))

        return call


def _out_of_reach(host: str, device: str) -> HostAwayError:
    return HostAwayError(
        f"host {host} is out of reach.",
        f"See that it runs and is connected; stifarm host join on {host} brings its devices back.",
        device=device,
    )
