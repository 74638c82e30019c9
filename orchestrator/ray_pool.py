"""Ray: the only module that imports it. A pool starts a local cluster, with token authentication on.

Ray is imported when a pool starts, not before: verbs that need none do not wait for it. Errors of our
tree pass from workers to the caller as they are; everything else becomes a PoolError.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar, cast

import structlog

from orchestrator.errors import PoolError
from orchestrator.interrupts import held_interrupts
from orchestrator.inventory import Device
from orchestrator.settings import Settings
from orchestrator.worker import HostWorker
from sti_runtime.errors import StifarmError

OBJECT_STORE_BYTES = 200_000_000
"""Enough for what passes through Ray here (records, never tensors of a whole model at once)."""

_OBJECT_STORE_MIN_BYTES = 80 << 20
_SOCKET_PATH_LIMIT = 107
_SESSION_PATH_BYTES = 70
"""Longest path Ray adds to its folder: ``/session_<date>_<pid>/sockets/<name>``."""

_FOLDER_PREFIX = "stifarm-ray-"
_WORKER_THREADS = 32
_TOKEN_VARIABLES = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_MODE_VARIABLE = "RAY_AUTH_MODE"

_log = structlog.get_logger(__name__)
_In = TypeVar("_In")
_Out = TypeVar("_Out")


class RayPool:
    """A local Ray cluster for the length of a ``with`` block.

    ``start_seconds``: what starting it took. Raises: PoolError when Ray cannot be started.
    """

    def __init__(self, settings: Settings, *, num_cpus: int | None = None) -> None:
        self._settings = settings
        self._num_cpus = num_cpus
        self._environment = contextlib.ExitStack()
        self._owns_cluster = False
        self._workers: list[HostWorker] = []
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
                for worker in self._workers:
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

        resources: dict[str, float] = cast(Any, ray).cluster_resources()
        return max(1, int(resources.get("CPU", 1)))

    def host_worker(self, devices: Sequence[Device]) -> HostWorker:
        """The worker of one lab host, as an actor of its own that restarts when it dies.

        The result is used like a ``HostWorker``, from any thread; each call runs in the actor. The pool
        closes it at the end of its block.
        """
        import ray

        remote: Any = ray.remote  # its annotations lack max_concurrency
        options = {"max_concurrency": _WORKER_THREADS, "max_restarts": -1, "max_task_retries": 2}
        actor_class = remote(num_cpus=0, **options)(_HostActor)
        worker = cast(HostWorker, _Remote(actor_class.remote(self._settings, tuple(devices))))
        self._workers.append(worker)
        return worker

    def map_tasks(
        self, function: Callable[[_In], _Out], items: Iterable[_In], *, num_cpus: float = 1
    ) -> Iterator[tuple[_In, _Out]]:
        """``(item, function(item))`` as they complete, ``num_cpus`` CPUs each.

        The first failure cancels the rest and is raised: StifarmError of the task, or PoolError.
        ``function`` and items are pickled; items wait on this side until a CPU is near.
        """
        import ray

        task = ray.remote(num_cpus=num_cpus, max_retries=2)(_guarded)
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
                    running[task.remote(function, item)] = item
                if not running:
                    return
                done, _ = ray.wait(list(running), num_returns=1)
                item = running.pop(done[0])
                yield item, cast(_Out, _fetch(done[0]))
        finally:
            for reference in running:
                ray.cancel(reference, force=True)

    def _start(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        self._environment.enter_context(_environment(_authentication(self._settings.ray_token)))
        import ray

        if ray.is_initialized():
            raise PoolError("A Ray cluster is in use in this process already.", "Use one pool at a time.")
        _enforce_token_authentication()
        _keep_off_stdout()
        self._owns_cluster = True
        folder = _session_folder()
        self._environment.callback(shutil.rmtree, folder, ignore_errors=True)
        try:
            with held_interrupts():  # it forks with callbacks, which would drop a Ctrl-C
                ray.init(
                    address="local",
                    num_cpus=self._num_cpus,
                    object_store_memory=OBJECT_STORE_BYTES,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    configure_logging=False,
                    _temp_dir=str(folder),
                    **_shared_memory(),
                )
        except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise PoolError(
                f"Ray could not be started: {error}",
                "Check free memory and space below the temporary folder.",
            ) from error

    def _stop(self) -> None:
        if self._owns_cluster:
            import ray

            cast(Any, ray).shutdown()
            self._owns_cluster = False
        self._environment.close()


# ------------------------------------------------------------------ what runs in workers


class _Outcome:
    """What a task or call came to: a value, or an error of our tree."""

    def __init__(self, value: Any, error: StifarmError | None) -> None:
        self.value, self.error = value, error


def _guarded(function: Callable[[Any], Any], item: Any) -> _Outcome:
    try:
        return _Outcome(function(item), None)
    except StifarmError as error:
        return _Outcome(None, error)


class _HostActor:
    """A HostWorker in a process of its own."""

    def __init__(self, settings: Settings, devices: Sequence[Device]) -> None:
        self._worker = HostWorker(settings, devices)

    def call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Outcome:
        """Run one method of the worker."""
        return _guarded(lambda _: getattr(self._worker, method)(*args, **kwargs), None)


class _Remote:
    """Turns method calls into calls of the actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method.startswith("_") or not hasattr(HostWorker, method):
            raise AttributeError(method)

        def call(*args: Any, **kwargs: Any) -> Any:
            return _fetch(self._actor.call.remote(method, args, kwargs))

        return call


def _fetch(reference: Any) -> Any:
    """The value behind a reference. Raises: the task's StifarmError, or PoolError."""
    import ray

    try:
        outcome = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise PoolError(f"A task failed unexpectedly: {error}", "Report it with this text.") from error
    except ray.exceptions.RayError as error:
        raise PoolError(
            f"A Ray worker died or was lost: {type(error).__name__}: {error}",
            "Check free memory (the kernel may have killed it), then run the command again: it resumes.",
        ) from error
    if outcome.error is not None:
        raise outcome.error
    return outcome.value


# ------------------------------------------------------------------ authentication and folders


def _authentication(token_path: Path) -> dict[str, str]:
    """Variables that switch token authentication on, whatever they were; a token given there is kept."""
    given = {name: os.environ[name] for name in _TOKEN_VARIABLES if os.environ.get(name)}
    if not given:
        _ensure_token(token_path)
        given = {"RAY_AUTH_TOKEN_PATH": str(token_path)}
    return {_MODE_VARIABLE: "token", **given}


def _ensure_token(path: Path) -> None:
    """A token made by Ray's own generator, readable by its owner only, unless there is one."""
    from ray._private.authentication.authentication_token_generator import generate_new_authentication_token

    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as stream:
        stream.write(generate_new_authentication_token())
    try:
        os.link(partial, path)  # fails if another process was first: its token counts
    except FileExistsError:
        _log.debug("another process made the token first", path=str(path))
    finally:
        partial.unlink()


def _enforce_token_authentication() -> None:
    """Make Ray read the environment anew, and refuse to go on without authentication."""
    raylet: Any = importlib.import_module("ray._raylet")  # compiled, without annotations
    raylet.Config.initialize("")
    raylet.AuthenticationTokenLoader.instance().reset_cache()
    if raylet.get_authentication_mode() != raylet.AuthenticationMode.TOKEN:
        raise PoolError(
            "Ray's token authentication cannot be switched on.",
            "Install the version of Ray in this project's lock file.",
        )


def _keep_off_stdout() -> None:
    """Send the cluster's own messages to the log: Ray prints them on stdout, which belongs to ``--json``."""
    worker: Any = importlib.import_module("ray._private.worker")
    worker.print_to_stdstream = _log_message


def _log_message(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    _log.warning("ray says", message="".join(str(line) for line in data["lines"])[:300])


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Change environment variables for a while."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _session_folder() -> Path:
    """A new folder for Ray, with a name short enough for its sockets; removes those of dead processes."""
    base = Path(tempfile.gettempdir())
    if len(str(base)) + len(_FOLDER_PREFIX) + 20 + _SESSION_PATH_BYTES > _SOCKET_PATH_LIMIT:
        base = Path("/tmp")
    for left in base.glob(f"{_FOLDER_PREFIX}*-*"):
        owner = left.name.removeprefix(_FOLDER_PREFIX).split("-")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists() and left.stat().st_uid == os.getuid():
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{_FOLDER_PREFIX}{os.getpid()}-", dir=base))


def _shared_memory() -> dict[str, Any]:
    """Where /dev/shm is too small (containers), the object store goes to the temporary folder."""
    shm = Path("/dev/shm")
    if shm.is_dir() and shutil.disk_usage(shm).free > OBJECT_STORE_BYTES + _OBJECT_STORE_MIN_BYTES:
        return {}
    return {"_plasma_directory": tempfile.gettempdir()}
