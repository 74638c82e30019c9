"""The farm's head node: started by one process of the controller, found by the others through its home."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from orchestrator.errors import HostError
from orchestrator.home_files import read_if_there, remove, write_whole
from orchestrator.hosts import Announcement, Versions
from orchestrator.processes import ProcessId, alive, identify
from orchestrator.ray.board import Board, Endpoint
from orchestrator.ray.nodes import Ports, RunningNode, head_node
from orchestrator.settings import Settings
from sti_runtime.records import Record


class Head(Record):
    """Where a farm's head node listens, and the process that runs it."""

    format: Literal["stifarm-head"]
    version: Literal[1]
    address: str
    process: ProcessId

    @property
    def endpoint(self) -> Endpoint:
        """The address to join."""
        return Endpoint.parse(self.address)


def running_head(settings: Settings) -> Head | None:
    """The head node of the farm, if one is up. Raises: HostError when its file does not tell."""
    path = _path(settings)
    head = read_if_there(
        path,
        Head,
        HostError,
        "So nobody knows whether the farm's head node is up. End stifarm serve --listen or host up if one "
        f"runs with this state folder (ps -ef); then: rm {path}",
    )
    return head if head is not None and alive(head.process) else None


@contextlib.contextmanager
def head_of(
    settings: Settings, listen: Endpoint, *, num_cpus: int | None = None, ports: Ports | None = None
) -> Iterator[RunningNode]:
    """Run the farm's head node for the length of the block. Raises: HostError when one is up; PoolError;
    ResourceError."""
    other = running_head(settings)
    if other is not None:
        raise HostError(
            f"The farm's head node is up already, at {other.address} (process {other.process.pid}).",
            "End that process first, or go on with it.",
        )
    with head_node(listen, num_cpus, ports) as node:
        process = identify(os.getpid())
        assert process is not None
        head = Head(format="stifarm-head", version=1, address=str(node.endpoint), process=process)
        path = _path(settings)
        write_whole(path, head.to_json())
        Board(node.endpoint).announce(
            Announcement(
                format="stifarm-controller",
                version=1,
                versions=Versions.own(),
                machine=socket.gethostname(),
                started_wall_ns=time.time_ns(),
            )
        )
        try:
            yield node
        finally:
            remove(path)


def _path(settings: Settings) -> Path:
    return settings.home / "head.json"
