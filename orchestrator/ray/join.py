"""What a lab host runs: join the controller, watch over the node, join again whenever that ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import structlog

from orchestrator.errors import HostError, PoolError
from orchestrator.home_files import lock_file, make_folder, read_if_there, remove, write_whole
from orchestrator.host_checks import exposed_at
from orchestrator.hosts import OWN, HostOffer, Versions
from orchestrator.inventory import load_inventory
from orchestrator.processes import ProcessId, alive, identify
from orchestrator.ray.access import authenticated
from orchestrator.ray.board import Board, Endpoint, Unreachable
from orchestrator.ray.nodes import Ports, RunningNode, host_node, own_address
from orchestrator.settings import Settings
from sti_runtime.records import Record
from sti_runtime.units import many

HOST_LOCK = "host.lock"
"""What the one process that joins with a home locks."""

WATCH_S = 2.0
"""So often a host sees whether its node runs and its controller still knows it."""

_AGAIN_S = 1.0
_AGAIN_MOST_S = 10.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Joining:
    """What a host joins with. ``ip`` None: this machine's address on the way to the controller."""

    controller: Endpoint
    name: str
    ip: str | None
    ports: Ports | None
    cache_bytes: int


class Joined(Record):
    """The process that keeps this host joined, in ``host.json`` of its home."""

    format: Literal["stifarm-joined"]
    version: Literal[1]
    name: str
    controller: str
    process: ProcessId


Tell = Callable[[str], None]
"""Called with a line for people."""


def keep_joined(settings: Settings, joining: Joining, token: Path, tell: Tell, stop: threading.Event) -> None:
    """Offer this machine's devices to the farm until ``stop`` is set; a lost controller is waited for.

    Raises: PoolError when the controller cannot be joined at first; HostError when it refuses this host, also
    later: waiting would not help. InventoryError, ResourceError.
    """
    with _one_per_home(settings, joining), authenticated(token, make=False):
        joined_before, pause_s = False, _AGAIN_S
        while not stop.is_set():
            try:
                with _joined(settings, joining) as (node, offer):
                    offered = many(len(offer.devices), "device")
                    tell(f"{joining.name} joined {joining.controller}: {offered}, node {node.id[:12]}")
                    for finding in [] if joined_before else exposed_at(offer.address):
                        tell(f"{finding.subject}: {finding.text}. {finding.remedy}")
                    joined_before, pause_s = True, _AGAIN_S
                    why = _watch(joining.controller, node, stop)
                    if stop.is_set():
                        Board(joining.controller).leave(offer)
            except PoolError as error:
                if not joined_before:
                    raise
                why = error.what
            if not stop.is_set():
                tell(f"not joined: {why} Trying again every {_AGAIN_MOST_S:g} s; jobs on devices go on.")
                stop.wait(pause_s)
                pause_s = min(2 * pause_s, _AGAIN_MOST_S)


def joined_here(settings: Settings) -> Joined | None:
    """The process that keeps this host joined, if there is one. Raises: HostError when its file does not
    tell."""
    path = _path(settings)
    joined = read_if_there(
        path,
        Joined,
        HostError,
        "So nobody knows which process keeps this machine joined. End stifarm host join if it runs with this "
        f"state folder (ps -ef); then: rm {path}",
    )
    return joined if joined is not None and alive(joined.process) else None


@contextlib.contextmanager
def _joined(settings: Settings, joining: Joining) -> Iterator[tuple[RunningNode, HostOffer]]:
    """Be on the controller's board with a node of this machine."""
    board = Board(joining.controller)
    board.controller()
    _require_own_name(board, settings.home, joining)
    inventory = load_inventory(settings.inventory)
    ip = joining.ip or own_address(joining.controller)
    with host_node(joining.controller, ip, joining.ports) as node:
        offer = HostOffer(
            format="stifarm-host",
            version=1,
            versions=Versions.own(),
            name=joining.name,
            machine=socket.gethostname(),
            address=ip,
            pid=os.getpid(),
            node=node.id,
            joined_wall_ns=time.time_ns(),
            home=str(settings.home),
            inventory=str(inventory.path),
            inventory_text=inventory.path.read_text(encoding="utf-8"),
            cache_bytes=joining.cache_bytes,
            left_wall_ns=0,
        )
        board.offer(offer)
        yield node, offer


def _require_own_name(board: Board, home: Path, joining: Joining) -> None:
    if joining.name == OWN:
        raise HostError(f"No host can be called {OWN}.", "Give it another name: --name NAME.")
    other = next((host for host in board.hosts() if host.name == joining.name), None)
    if other is None or other.offer is None or other.state != "present":
        return
    if (other.offer.machine, other.offer.home) == (socket.gethostname(), str(home)):
        return  # a process before this one, whose node is about to be missed
    raise HostError(
        f"A host called {joining.name} is there already: {other.offer.machine} ({other.offer.address}, "
        f"process {other.offer.pid}).",
        "Give this one another name: --name NAME.",
    )


def _watch(controller: Endpoint, node: RunningNode, stop: threading.Event) -> str:
    """Wait until this host is joined no more; why."""
    gone = False
    while not stop.wait(WATCH_S):
        if node.died:
            return f"its own {node.died} ended."
        try:
            known = node.id in Board(controller).nodes()
        except Unreachable as error:
            if not gone:
                _log.warning("the controller is gone; waiting", cause=error.what)
            gone = True
            continue
        gone = False
        if not known:
            return "the controller was started anew, or had given this host up."
    return ""


@contextlib.contextmanager
def _one_per_home(settings: Settings, joining: Joining) -> Iterator[None]:
    """Be the one process that joins with this home. Raises: HostError, ResourceError."""
    make_folder(settings.home)
    process = identify(os.getpid())
    assert process is not None
    mine = Joined(
        format="stifarm-joined",
        version=1,
        name=joining.name,
        controller=str(joining.controller),
        process=process,
    )
    path = _path(settings)
    lock = lock_file(settings.home / HOST_LOCK)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise HostError(
                f"Another process joins with {settings.home} already.",
                "See stifarm host leave; two hosts on one machine need a --home each.",
            ) from error
        write_whole(path, mine.to_json())
        try:
            yield
        finally:
            remove(path)
    finally:
        os.close(lock)


def _path(settings: Settings) -> Path:
    return settings.home / "host.json"
