"""Starting and ending Ray nodes of our own: the controller's head and a lab host's.

Their processes end with the process, and the thread, that started them, however it ends: the kernel kills
them (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import re
import shutil
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import structlog

from orchestrator.errors import HostError, PoolError
from orchestrator.interrupts import held_interrupts
from orchestrator.processes import ProcessId, descendants, identify, kill
from orchestrator.ray.board import Endpoint, address_of
from orchestrator.ray.calls import not_started
from orchestrator.ray.folders import OBJECT_STORE_BYTES, objects_folder, session_folder

_SYSTEM_CONFIG = {
    "health_check_initial_delay_ms": 3000,
    "health_check_period_ms": 2000,
    "health_check_timeout_ms": 5000,
    "health_check_failure_threshold": 4,
}
"""A host whose processes die is told by its closed connections at once; one that loses power, by these."""

_SERVICES = (
    "node_manager_port",
    "object_manager_port",
    "metrics_agent_port",
    "runtime_env_agent_port",
    "dashboard_agent_listen_port",
    "metrics_export_port",
)
_LEAST_PORTS = 16

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Ports:
    """The ports of a node: one for each of its services, the rest for workers; see docs/hosts.md."""

    first: int
    last: int

    @classmethod
    def parse(cls, text: str) -> Ports:
        """Of "FIRST-LAST". Raises: HostError."""
        found = re.fullmatch(r"(\d{4,5})-(\d{4,5})", text)
        if found is None:
            raise HostError(f"{text!r} is no range of ports.", "Write it like 20000-20063.")
        first, last = int(found[1]), int(found[2])
        if first < 1024 or last > 65535 or last - first + 1 < _LEAST_PORTS:
            raise HostError(
                f"{text} is no range for a node.",
                f"It takes {_LEAST_PORTS} ports or more, between 1024 and 65535.",
            )
        return cls(first, last)

    def parameters(self) -> dict[str, int]:
        """As Ray takes them."""
        fixed = {name: self.first + place for place, name in enumerate(_SERVICES)}
        return {**fixed, "min_worker_port": self.first + len(_SERVICES), "max_worker_port": self.last}


class RunningNode:
    """A node of this process. ``id``: hexadecimal."""

    def __init__(self, node: Any, folder: Path) -> None:
        self._node, self.folder = node, folder
        self.id = str(node.node_id)
        self.endpoint = Endpoint.parse(str(node.gcs_address))

    @property
    def died(self) -> str:
        """Which of its processes ended by itself; empty while all run."""
        return ", ".join(sorted({str(kind) for kind, _ in self._node.dead_processes()}))

    def end(self) -> None:
        """End its processes and remove its folder."""
        with held_interrupts():
            ours = _processes(self.folder)
            self._node.kill_all_processes(check_alive=False, allow_graceful=False)
            for process in ours:  # its monitoring agents would notice within a minute
                kill(process, signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextlib.contextmanager
def head_node(listen: Endpoint, num_cpus: int | None, ports: Ports | None) -> Iterator[RunningNode]:
    """The node that others join, at the address ``listen``. Raises: PoolError."""
    _require_free(listen)
    node = _start(
        head=True,
        node_ip_address=listen.host,
        gcs_server_port=listen.port,
        num_cpus=num_cpus,
        ports=ports,
        include_dashboard=False,
        dashboard_host="127.0.0.1",
        dashboard_port=0,
        no_monitor=True,
        _system_config=_SYSTEM_CONFIG,
    )
    try:
        yield node
    finally:
        node.end()


@contextlib.contextmanager
def host_node(controller: Endpoint, ip: str, ports: Ports | None) -> Iterator[RunningNode]:
    """A node that has joined the controller's head, for a host's worker only. Raises: PoolError."""
    node = _start(
        head=False,
        gcs_address=str(controller),
        node_ip_address=ip,
        num_cpus=0,  # tasks need the controller's files
        ports=ports,
        dashboard_host="127.0.0.1",
    )
    try:
        yield node
    finally:
        node.end()


def own_address(controller: Endpoint) -> str:
    """This machine's address on the way to the controller. Raises: HostError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((controller.host, controller.port))  # sends nothing
        except OSError as error:
            raise HostError(
                f"There is no way to {controller}: {error.strerror}.", "Check the network of this machine."
            ) from error
        return str(probe.getsockname()[0])


def machine_address(text: str) -> str:
    """The IPv4 address of this machine that a name or an address means. Raises: HostError when it is none."""
    remedy = "Give an IPv4 address of this machine that the controller can reach: see ip address."
    host = address_of(text, remedy)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            means = "" if host == text else f", which {text} means"
            raise HostError(
                f"This machine has not the address {host}{means}: {error.strerror}.", remedy
            ) from error
    _require_one(host, remedy)
    return host


def _require_one(host: str, remedy: str) -> None:
    """Raises: HostError for 0.0.0.0, which a node cannot be reached at."""
    if ipaddress.ip_address(host).is_unspecified:
        raise HostError(f"{host} means every address of this machine, not one that others reach.", remedy)


def _start(*, head: bool, ports: Ports | None, **parameters: Any) -> RunningNode:
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    folder, objects = session_folder(), objects_folder()
    try:
        with held_interrupts():  # it forks with callbacks, which would drop a Ctrl-C
            parameters |= {} if ports is None else ports.parameters()
            given: Any = cast(Any, RayParams)(  # its annotations are wrong
                num_gpus=0,
                object_store_memory=OBJECT_STORE_BYTES,
                plasma_directory=None if objects is None else str(objects),
                temp_dir=str(folder),
                include_log_monitor=False,
                **parameters,
            )
            return RunningNode(Node(given, head=head, shutdown_at_exit=False, spawn_reaper=True), folder)
    except KeyboardInterrupt:  # held until it ran
        kill_left(folder)
        raise
    except Exception as error:  # what Ray raises here is of no class of its own
        kill_left(folder)
        raise not_started("A Ray node", error) from error


def kill_left(folder: Path) -> None:
    """End what a start of Ray that failed, or was interrupted, left; remove its folder."""
    for process in _processes(folder):
        kill(process, signal.SIGKILL)
        _log.info("ended what a start of Ray left", pid=process.pid)
    shutil.rmtree(folder, ignore_errors=True)


def _processes(folder: Path) -> list[ProcessId]:
    """The processes below this one that are of the node of a folder: those whose command names it, and what
    these started that Ray has named. Agents of devices are none of them."""
    own = [pid for pid in descendants(os.getpid()) if str(folder).encode() in _command(pid)]
    named = [pid for each in own for pid in descendants(each) if _command(pid).startswith(b"ray::")]
    found = map(identify, dict.fromkeys((*own, *named)))
    return [process for process in found if process is not None]


def _command(pid: int) -> bytes:
    """A process's command line; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _require_free(listen: Endpoint) -> None:
    _require_one(listen.host, "Give the address of this machine that lab hosts reach: see ip address.")
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((listen.host, listen.port))
        except OSError as error:
            other = error.errno == errno.EADDRNOTAVAIL
            remedy = "an address of this machine (see ip address)" if other else "a free port"
            raise PoolError(
                f"{listen} cannot be listened at: {error.strerror}.",
                f"Give {remedy}{'' if other else ', or end what listens there'}.",
            ) from error
