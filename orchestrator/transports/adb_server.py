"""The adb server: asking it, and starting one where none runs.

A good neighbour: the server may be the user's, Android Studio's or another program's. It is asked over its
socket, whatever its version; no adb client is ever run, for a client kills a server of another version. One
is started only where nothing listens, at the address that is adb's default here: a server that the inventory
names has an owner, and keys that ours would not have. Only one that we started is ever ended (``adb_own``).
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.errors import DeviceError, LinkError, StableError, TransientError
from orchestrator.transports.adb_own import HANGS_S, OwnServer, adb_word
from orchestrator.transports.adb_socket import (
    AdbSocket,
    ProtocolError,
    RefusalError,
    RequestError,
    ServerAddress,
)

DEFAULT_PORT = 5037
_ANSWER_S = 10.0
_KEY = re.compile(r"\s(?=(?:usb|product|model|device|features|transport_id):)")


@dataclass(frozen=True)
class Listed:
    """A device as the server lists it. ``state``: "device", "offline", "unauthorized", "no permissions (…)"…;
    ``details``: what else it says, like ``product`` and ``model``."""

    serial: str
    state: str
    details: Mapping[str, str]


def server_address(text: str | None, environment: Mapping[str, str] | None = None) -> ServerAddress:
    """The server that ``host:port`` names, by default the one that adb's own variables name."""
    env = os.environ if environment is None else environment
    socket = env.get("ADB_SERVER_SOCKET", "")
    if text is None and socket.startswith("tcp:"):
        text = socket.removeprefix("tcp:")
        text = f"127.0.0.1:{text}" if re.fullmatch(r"[0-9]{1,5}", text) else text
    if text is None:
        port = env.get("ANDROID_ADB_SERVER_PORT", "")
        host = env.get("ANDROID_ADB_SERVER_ADDRESS") or "127.0.0.1"
        return ServerAddress(host, int(port) if re.fullmatch(r"[0-9]{1,5}", port) else DEFAULT_PORT)
    host, port = split_endpoint(text)
    return ServerAddress(host.strip("[]"), int(port or DEFAULT_PORT))


def split_endpoint(text: str) -> tuple[str, str]:
    """Host and port of ``host[:port]``; an IPv6 host stays in its brackets, a missing port is empty."""
    host, colon, port = text.rpartition(":")
    return (text, "") if not colon or "]" in port else (host, port)


class AdbServer:
    """An adb server on behalf of one device, whose name its errors carry. ``ours``: we may start one there,
    and replace one of ours that hangs: that answers nothing for ``hangs_s``."""

    def __init__(
        self, address: ServerAddress, device: str, *, ours: bool = False, hangs_s: float = HANGS_S
    ) -> None:
        self.address, self._device = address, device
        self._own = OwnServer(address, device, hangs_s) if ours and address.local else None

    def open(self, service: str, timeout_s: float) -> AdbSocket:
        """A connection on which the server has accepted a service. Where our own server does not answer in
        time, it takes longer to see why, and to mend it.

        Raises: RefusalError (the server's own), LinkError, StableError.
        """
        for last in (False, True):
            before = self._own.pid() if self._own else None
            link: AdbSocket | None = None
            try:
                link = AdbSocket(self.address, min(timeout_s, _ANSWER_S))
                link.request(service.encode())
                return link
            except BaseException as error:
                if link is not None:
                    link.close()
                if not isinstance(error, OSError | EOFError | ProtocolError | RequestError):
                    raise
                if last or not self._mended(error, before):
                    raise self._error(error) from error
        raise AssertionError("unreachable")

    def ask(self, service: str, timeout_s: float = _ANSWER_S) -> str:
        """A service's answer in words. Raises: RefusalError, LinkError, StableError."""
        with self.open(service, timeout_s) as link:
            try:
                link.limit(timeout_s)
                return link.block().decode(errors="replace")
            except (OSError, EOFError, ProtocolError) as error:
                raise self._error(error) from error

    def devices(self) -> tuple[Listed, ...]:
        """What the server sees. Raises: TransientError, StableError."""
        try:
            return parse_devices(self.ask("host:devices-l"))
        except RefusalError as error:
            raise TransientError(
                f"the adb server at {self.address} does not list devices: {error.what}.",
                "Try again; if it happens again, restart that server.",
                device=self._device,
            ) from error

    def replace_own(self) -> bool:
        """End the server and start it anew, if it is one that we started; False when it is not.

        Raises: StableError when none can be started.
        """
        return self._own is not None and self._own.replace()

    def _mended(self, error: Exception, before: int | None) -> bool:
        """Whether another try may succeed. ``before``: the process of our server when this one began."""
        if self._own:
            return self._own.mend(error, before)
        # A server that has just been ended resets what was sent to it.
        gone = isinstance(error, EOFError | ConnectionError)
        return gone and not isinstance(error, ConnectionRefusedError)

    def _error(self, error: Exception) -> DeviceError:
        where = f"the adb server at {self.address}"
        if isinstance(error, RequestError):
            return StableError(
                error.what, "Correct the device's serial or address in the inventory.", device=self._device
            )
        if isinstance(error, ProtocolError):
            return StableError(
                f"something that is no adb server has port {self.address.port} of {self.address.host}:"
                f" {error.what}",
                "End it, or give the adb server another port (adb_server in the inventory).",
                device=self._device,
            )
        if isinstance(error, ConnectionRefusedError):
            host = "" if self.address.local else f" on {self.address.host}"
            adb, everywhere = (adb_word(), "") if self.address.local else ("adb", "-a ")
            return LinkError(
                f"{where} cannot be reached: nothing listens there.",
                f"stifarm starts one only at adb's default address on this machine. Start it{host}:"
                f" {adb} {everywhere}-P {self.address.port} nodaemon server (a lab's: stifarm lab up).",
                device=self._device,
            )
        if isinstance(error, TimeoutError):
            return LinkError(
                f"{where} does not answer in time.",
                "Try again; if it happens again, look at the load of this machine."
                if self._own and self._own.pid() is not None
                else "Try again; if it happens again, restart it: stifarm replaces only one of its own at"
                " adb's default address (a lab's: stifarm lab down, then up).",
                device=self._device,
            )
        if isinstance(error, EOFError | ConnectionError):
            return LinkError(
                f"{where} closed the connection.",
                "Try again; if it happens again, look whether it is an adb server.",
                device=self._device,
            )
        unknown = isinstance(error, socket.gaierror) and error.errno != socket.EAI_AGAIN
        return (StableError if unknown else LinkError)(
            f"{where} cannot be reached: {getattr(error, 'strerror', None) or error}.",
            "Check adb_server in the inventory, and the network.",
            device=self._device,
        )


def parse_devices(text: str) -> tuple[Listed, ...]:
    """What ``host:devices-l`` answers. A serial hidden by missing permissions is question marks."""
    listed = []
    for line in text.splitlines():
        serial, _, rest = line.strip().partition(" ")
        state, *details = _KEY.split(" " + rest.strip())
        if serial and state.strip():
            pairs = (detail.strip().partition(":") for detail in details)
            listed.append(Listed(serial, state.strip(), {key: value for key, _, value in pairs}))
    return tuple(listed)
