"""The board: where controller and hosts leave their announcements, in the head node's key-value store.

It is asked over one short connection each time, by processes that need no worker of Ray: a host that waits,
``host list``. What is on it ends with the head node; everything that must last is in the farm's store.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import socket
import time
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import HostError, PoolError
from orchestrator.hosts import Announcement, HostOffer, SeenHost, read_announcement, read_offer

NAMESPACE = b"stifarm"

_CONTROLLER = b"controller"
_HOST = b"host/"
_TIMEOUT_S = 10
_CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Endpoint:
    """An address to listen at or to join. ``port`` 0: the kernel chooses."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Of "HOST:PORT"; the host's first IPv4 address counts. Raises: HostError."""
        host, _, port = text.rpartition(":")
        if not host or re.fullmatch("[0-9]{1,5}", port) is None or int(port) > 65535:
            raise HostError(f"{text!r} is no address.", "Write it as HOST:PORT, such as 192.0.2.7:6379.")
        return cls(address_of(host, "Give the controller's IPv4 address."), int(port))

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def address_of(host: str, remedy: str) -> str:
    """A host's first IPv4 address. Raises: HostError, with that remedy, when it has none."""
    why: object
    try:
        return str(socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        why = error.strerror or error
    except ValueError as error:  # no name at all: an empty or overlong part of it, a NUL
        why = error
    raise HostError(f"{host!r} has no address: {why}.", remedy)


class Unreachable(PoolError):  # noqa: N818 (a state, waited for)
    """Nobody answers at the controller's address now."""


class Board:
    """The board at an address. Raises, as every method: Unreachable, PoolError."""

    def __init__(self, endpoint: Endpoint) -> None:
        raylet: Any = importlib.import_module("ray._raylet")  # compiled, without annotations
        self.endpoint = endpoint
        self._require_listener()
        with self._errors():
            self._client = raylet.GcsClient(address=str(endpoint))

    def announce(self, controller: Announcement) -> None:
        """Say who the controller is."""
        self._put(_CONTROLLER, controller.to_json())

    def controller(self) -> Announcement:
        """Who the controller is. Raises: HostError when it is of another version; Unreachable when none has
        said so far that it is there."""
        with self._errors():
            data = self._client.internal_kv_get(_CONTROLLER, NAMESPACE, timeout=_TIMEOUT_S)
        if data is None:
            raise Unreachable(  # a head node announces itself a moment after it is up
                f"What answers at {self.endpoint} is no controller of a farm.",
                "Start one there: stifarm serve --listen ADDRESS, or stifarm host up --listen ADDRESS.",
            )
        return read_announcement(data, str(self.endpoint))

    def offer(self, host: HostOffer) -> None:
        """Put a host on the board, in place of one of its name."""
        self._put(_HOST + host.name.encode(), host.to_json())

    def leave(self, host: HostOffer) -> None:
        """Say on the board that a host has left."""
        self.offer(host.model_copy(update={"left_wall_ns": time.time_ns()}))

    def forget(self, name: str) -> None:
        """Take a host off the board."""
        with self._errors():
            self._client.internal_kv_del(_HOST + name.encode(), False, NAMESPACE, timeout=_TIMEOUT_S)

    def hosts(self) -> tuple[SeenHost, ...]:
        """Every host on the board, by name."""
        with self._errors():
            keys = self._client.internal_kv_keys(_HOST, NAMESPACE, timeout=_TIMEOUT_S)
            found = self._client.internal_kv_multi_get(list(keys), NAMESPACE, timeout=_TIMEOUT_S)
        alive = self.nodes()
        names = {key.removeprefix(_HOST).decode(): data for key, data in found.items()}
        return tuple(read_offer(name, names[name], alive) for name in sorted(names))

    def nodes(self) -> frozenset[str]:
        """The nodes that Ray holds for alive."""
        messages: Any = importlib.import_module("ray.core.generated.gcs_pb2")  # generated, likewise
        with self._errors():
            found = self._client.get_all_node_info(timeout=_TIMEOUT_S)
        alive = messages.GcsNodeInfo.GcsNodeState.ALIVE
        return frozenset(node.node_id.hex() for node in found.values() if node.state == alive)

    def _put(self, key: bytes, data: bytes) -> None:
        with self._errors():
            self._client.internal_kv_put(key, data, True, NAMESPACE, timeout=_TIMEOUT_S)

    def _require_listener(self) -> None:
        """Ray's own client waits for 40 s where nobody listens, and says little."""
        try:
            socket.create_connection((self.endpoint.host, self.endpoint.port), _CONNECT_TIMEOUT_S).close()
        except OSError as error:
            raise Unreachable(
                f"No controller answers at {self.endpoint}: {error.strerror or error}.",
                "See there that stifarm serve --listen (or host up --listen) runs, and that no firewall is "
                "between.",
            ) from error

    @contextlib.contextmanager
    def _errors(self) -> Any:
        import ray

        try:
            yield
        except ray.exceptions.AuthenticationError as error:
            raise HostError(
                f"The controller at {self.endpoint} refuses the token of this machine.",
                "Copy the file ray_token of the controller's state folder here again.",
            ) from error
        except ray.exceptions.RayError as error:
            raise Unreachable(
                f"The controller at {self.endpoint} does not answer: {error}", "Try again in a moment."
            ) from error
