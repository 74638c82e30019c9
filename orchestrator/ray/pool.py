"""The controller's cluster: a local one for one command, or that of the lab hosts.

A farm whose head node is up (this process starts it with ``listen``, or another one runs it: ``head.json``)
is joined, and then has the hosts that joined it too; else a local cluster starts, for this process alone.
"""

from __future__ import annotations

import contextlib
import importlib
import ipaddress
import logging
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import structlog

from orchestrator.errors import PoolError
from orchestrator.hosts import HostOffer, SeenHost
from orchestrator.interrupts import held_interrupts
from orchestrator.inventory import Device
from orchestrator.ray.access import authenticated
from orchestrator.ray.actors import end_actor, host_actor, own_actor
from orchestrator.ray.board import Board, Endpoint
from orchestrator.ray.calls import asking, fetch, guarded, not_started
from orchestrator.ray.folders import OBJECT_STORE_BYTES, objects_folder, session_folder
from orchestrator.ray.head import head_of, running_head
from orchestrator.ray.nodes import Ports, kill_left
from orchestrator.settings import Settings
from orchestrator.shipping import ShippedWorker
from orchestrator.worker import HostWorker
from sti_runtime.errors import StifarmError

_NODES_AGE_S = 1.0
_LOOPBACK = "127.0.0.1"

_log = structlog.get_logger(__name__)
_In = TypeVar("_In")
_Out = TypeVar("_Out")


class RayPool:
    """A Ray cluster for the length of a ``with`` block.

    ``listen``: run the farm's head node there, for lab hosts to join; None: join that of another process, or
    start a cluster for this process alone. ``start_seconds``: what starting it took. Raises: PoolError when
    Ray cannot be started.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        num_cpus: int | None = None,
        listen: Endpoint | None = None,
        ports: Ports | None = None,
    ) -> None:
        self._settings = settings
        self._num_cpus, self._listen, self._ports = num_cpus, listen, ports
        self._environment = contextlib.ExitStack()
        self._owns_cluster = False
        self._folders: list[Path] = []
        self._workers: list[HostWorker] = []
        self._board: Board | None = None
        self._nodes: tuple[float, frozenset[str]] = (0.0, frozenset())
        self.start_seconds = 0.0

    def __enter__(self) -> RayPool:
        began = time.monotonic()
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        self.start_seconds = time.monotonic() - began
        _log.info("ray started", seconds=round(self.start_seconds, 2), address=self.address)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                for worker in tuple(self._workers):
                    worker.close()
        finally:
            self._stop()

    @property
    def address(self) -> str:
        """Where this pool's cluster listens (host:port)."""
        import ray

        return str(ray.get_runtime_context().gcs_address)

    @property
    def cpus(self) -> int:
        """CPUs of the cluster: how many tasks of one CPU run at once."""
        import ray

        with asking("say how many CPUs it has"):
            resources: dict[str, float] = cast(Any, ray).cluster_resources()
        return max(1, int(resources.get("CPU", 1)))

    def host_worker(self, devices: Sequence[Device]) -> HostWorker:
        """The worker of one lab host, as an actor of its own that restarts when it dies.

        The result is used like a ``HostWorker``, from any thread; each call runs in the actor. The pool
        closes it at the end of its block.
        """
        worker = own_actor(self._settings, devices)
        self._workers.append(worker)
        return worker

    def end_worker(self, worker: HostWorker) -> None:
        """End a worker that ``host_worker`` gave and that is called no more: its process goes. What fails is
        logged: the end of the pool ends it."""
        try:
            end_actor(worker)
        except StifarmError as error:
            _log.warning("a replaced worker stays until the end", cause=error.what)
            return
        self._workers.remove(worker)

    def hosts(self) -> tuple[SeenHost, ...]:
        """The hosts that joined, or did; none in a cluster of this process alone. Raises: PoolError."""
        return () if self._board is None else self._board.hosts()

    def worker_of(self, offer: HostOffer) -> ShippedWorker:
        """The worker of a host that joined. Its methods raise HostLostError once the host is gone, as this
        does."""
        return host_actor(offer, lambda: offer.node in self._alive())

    def _alive(self) -> frozenset[str]:
        """The nodes that are, as of a moment ago. Raises: PoolError."""
        assert self._board is not None
        asked, nodes = self._nodes
        if time.monotonic() - asked > _NODES_AGE_S:
            nodes = self._board.nodes()
            self._nodes = (time.monotonic(), nodes)
        return nodes

    def map_tasks(
        self, function: Callable[[_In], _Out], items: Iterable[_In], *, num_cpus: float = 1
    ) -> Iterator[tuple[_In, _Out]]:
        """``(item, function(item))`` as they complete, ``num_cpus`` CPUs each.

        The first failure cancels the rest and is raised: StifarmError of the task, or PoolError.
        ``function`` and items are pickled; items wait on this side until a CPU is near.
        """
        import ray

        task = ray.remote(num_cpus=num_cpus, max_retries=2)(guarded)
        window = 2 * max(1, int(self.cpus / num_cpus))
        waiting = iter(items)
        running: dict[Any, _In] = {}
        try:
            while True:
                while len(running) < window:
                    try:
                        item = next(waiting)
                    except StopIteration:
                        break
                    with asking("take a task"):
                        running[task.remote(function, item)] = item
                if not running:
                    return
                with asking("wait for a task"):
                    done, _ = ray.wait(list(running), num_returns=1)
                item = running.pop(done[0])
                yield item, cast(_Out, fetch(done[0]))
        finally:
            for reference in running:
                ray.cancel(reference, force=True)

    def _start(self) -> None:
        self._environment.enter_context(authenticated(self._settings.ray_token))
        import ray

        if ray.is_initialized():
            raise PoolError("A Ray cluster is in use in this process already.", "Use one pool at a time.")
        _keep_off_stdout()
        where = self._joined() or self._own_cluster()
        self._owns_cluster = True
        try:
            with held_interrupts(), _own_signals():  # it forks with callbacks, which would drop a Ctrl-C
                ray.init(
                    namespace="stifarm",
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    configure_logging=False,
                    **where,
                )
        except Exception as error:  # what Ray raises here is of any class
            for folder in self._folders:
                kill_left(folder)
            raise not_started("Ray", error) from error

    def _joined(self) -> dict[str, Any]:
        """How to join the farm's head node, which ``listen`` starts; nothing when there is none."""
        if self._listen is not None:
            running = head_of(self._settings, self._listen, num_cpus=self._num_cpus, ports=self._ports)
            endpoint = self._environment.enter_context(running).endpoint
        else:
            head = running_head(self._settings)
            if head is None:
                return {}
            endpoint = head.endpoint
        if ipaddress.ip_address(endpoint.host).is_loopback:
            self._environment.enter_context(_loopback())
        self._board = Board(endpoint)
        self._board.controller()
        return {"address": str(endpoint), "_node_ip_address": endpoint.host}

    def _own_cluster(self) -> dict[str, Any]:
        """How to start a cluster of this process alone, which nothing outside this machine can reach."""
        self._environment.enter_context(_loopback())
        folder, objects = session_folder(), objects_folder()
        self._folders.append(folder)
        self._environment.callback(shutil.rmtree, folder, ignore_errors=True)
        return {
            "address": "local",
            "_node_ip_address": _LOOPBACK,
            "num_cpus": self._num_cpus,
            "object_store_memory": OBJECT_STORE_BYTES,
            "include_dashboard": False,
            "_temp_dir": str(folder),
            "_plasma_directory": None if objects is None else str(objects),
        }

    def _stop(self) -> None:
        if self._owns_cluster:
            import ray

            cast(Any, ray).shutdown()
            self._owns_cluster = False
        self._environment.close()


@contextlib.contextmanager
def _loopback() -> Iterator[None]:
    """Within the block, Ray keeps to the loopback address: it joins a head node there, not at the machine's
    own one, and its servers listen there only, not at every address."""
    constants: Any = importlib.import_module("ray._private.ray_constants")
    before, constants.ENABLE_RAY_CLUSTER = constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Within the block, Ray takes SIGTERM for itself no more than Ctrl-C: what came while it starts would end
    in one of its callbacks."""
    utils: Any = importlib.import_module("ray._private.utils")
    before, utils.set_sigterm_handler = utils.set_sigterm_handler, lambda _handler: None
    try:
        yield
    finally:
        utils.set_sigterm_handler = before


def _keep_off_stdout() -> None:
    """Send the cluster's own messages to the log: Ray prints them on stdout, which belongs to ``--json``."""
    worker: Any = importlib.import_module("ray._private.worker")
    worker.print_to_stdstream = _log_message


def _log_message(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    _log.warning("ray says", message="".join(str(line) for line in data["lines"])[:300])
