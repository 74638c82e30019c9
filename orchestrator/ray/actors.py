"""The workers of lab hosts as actors: one for each host, pinned to its node, that drives all its devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from orchestrator.errors import HostLostError, PoolError
from orchestrator.hosts import HostOffer
from orchestrator.inventory import Device
from orchestrator.ray.calls import Outcome, asking, fetch, guarded
from orchestrator.settings import Settings
from orchestrator.shipping import ShippedWorker
from orchestrator.worker import HostWorker

_THREADS = 160
"""Calls of one host at once: two for each device that is worked on (``side_by_side.MOST_AT_ONCE``) and some
more."""

_WAIT_S = 5.0
"""So often is a host looked at while a call to it is under way."""

_OPTIONS: dict[str, Any] = {
    "num_cpus": 0,
    "max_concurrency": _THREADS,
    "max_restarts": -1,
    "max_task_retries": 2,
}


class HostActor:
    """A host's worker in a process of its own. Its calls may be repeated, so Ray restarts it when it dies."""

    def __init__(self, settings: Settings, devices: Sequence[Device], cache_bytes: int | None = None) -> None:
        if cache_bytes is None:
            self._worker: HostWorker = HostWorker(settings, devices)
        else:
            self._worker = ShippedWorker(settings, devices, cache_bytes)

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Outcome:
        """Run one method of the worker."""
        return guarded(lambda _: getattr(self._worker, method)(*args, **kwargs), None)


class ActorLink:
    """Turns method calls into calls of an actor. ``alive``: whether its node still is, None: not asked."""

    def __init__(self, actor: Any, alive: Callable[[], bool] | None = None) -> None:
        self.actor, self._alive = actor, alive

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_") or not hasattr(ShippedWorker, method):
            raise AttributeError(method)

        def call(*args: Any, **kwargs: Any) -> Any:
            with asking(f"call {method} of a host's worker"):
                reference = self.actor.call.remote(method, args, kwargs)
            return fetch(reference) if self._alive is None else self._fetch_while_alive(reference)

        return call

    def _fetch_while_alive(self, reference: Any) -> Any:
        """The value of a call to another machine. Raises: its StifarmError, HostLostError, PoolError."""
        import ray

        assert self._alive is not None
        while True:
            with asking("wait for a host's worker"):
                done, _ = ray.wait([reference], timeout=_WAIT_S)
            if done:
                break
            try:
                alive = self._alive()
            except PoolError as error:
                raise HostLostError(f"Nobody can say whether its node lives: {error.what}") from error
            if not alive:
                raise HostLostError("Its node is gone.")
        try:
            return fetch(reference)
        except PoolError as error:
            if isinstance(error.__cause__, ray.exceptions.RayTaskError):
                raise  # it is there, and failed
            raise HostLostError(f"Its worker is gone: {error.what}") from error


def own_actor(settings: Settings, devices: Sequence[Device]) -> HostWorker:
    """The worker of the controller's own devices: it ends with the controller. Raises: PoolError."""
    import ray

    with asking("start the worker of the controller's devices"):
        node = ray.get_runtime_context().get_node_id()
        return cast(HostWorker, ActorLink(_pinned(node).remote(settings, tuple(devices))))


def end_actor(worker: HostWorker) -> None:
    """End the process of a worker made here, once what it has in the background is done; its devices' agents
    go on. Raises: PoolError."""
    import ray

    worker.close()
    try:
        ray.kill(cast(ActorLink, worker).actor)
    except (ValueError, ray.exceptions.RayError) as error:  # RaySystemError, or Ray has been shut down
        raise PoolError(f"A replaced worker could not be ended: {error}") from error


def host_actor(offer: HostOffer, alive: Callable[[], bool]) -> ShippedWorker:
    """The worker of a host that joined: there is one for each time it joined, whichever controller asks.
    Raises: HostLostError when it cannot be asked for."""
    name = f"{offer.name}@{offer.node}"
    pinned = _pinned(offer.node, name=name, lifetime="detached", get_if_exists=True)
    try:
        with asking(f"start the worker of host {offer.name}"):
            actor = pinned.remote(offer.settings, offer.devices, offer.cache_bytes)
    except PoolError as error:
        raise HostLostError(error.what, error.remedy) from error
    return cast(ShippedWorker, ActorLink(actor, alive))


def _pinned(node: str, **options: Any) -> Any:
    """The actor's class, to run on one node only."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    remote: Any = ray.remote  # its annotations lack max_concurrency
    actor_class = remote(**_OPTIONS)(HostActor)
    strategy = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    return actor_class.options(scheduling_strategy=strategy, **options)
