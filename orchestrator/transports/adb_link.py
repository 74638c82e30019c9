"""One device behind an adb server: opening services on it, finding it again, saying why it is not there."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

import structlog

from orchestrator.errors import DeviceError, LinkError, StableError, near
from orchestrator.transports.adb_server import AdbServer, Listed, split_endpoint
from orchestrator.transports.adb_socket import AdbSocket, ProtocolError, RefusalError, RequestError
from orchestrator.transports.adb_states import NO_PERMISSION, READY, Trouble, trouble_of

DEFAULT_DAEMON_PORT = 5555
ANSWER_S = 20.0
CONNECT_S = 10.0
"""How long the server may try to connect to a daemon over TCP: one in reach answers in far less time; where
nobody is, the server would try for longer."""

_SETTLE_S = 5.0
_PAUSE_S = 0.05
_STALE_S = 1.0
"""How long a daemon over TCP may be offline before it is connected anew: it is so while being connected."""

_TRIES = 4

Answer = TypeVar("Answer")

_log = structlog.get_logger()


class AdbLink:
    """The way to one device. ``serial``: as the server lists it; ``address``: of a daemon reached over TCP,
    which the server is told to connect to when it does not list it, for at most ``connect_s``. An address
    where nobody answered is taken out of the server's list again, if it was not in it before."""

    def __init__(
        self,
        device: str,
        server: AdbServer,
        *,
        serial: str | None,
        address: str | None,
        connect_s: float = CONNECT_S,
    ) -> None:
        self.device, self._server, self._connect_s = device, server, connect_s
        self._address = None if address is None else with_port(address)
        self.serial = serial or self._address or ""
        self._mending = threading.Lock()
        self._features: frozenset[str] | None = None
        self._was_there = False

    def features(self) -> frozenset[str]:
        """What the device's daemon can. Raises: LinkError, StableError."""
        known = self._features
        if known is None:
            said = self._trying(
                lambda: self._server.ask(f"host-serial:{self.serial}:features"), time.monotonic() + ANSWER_S
            )
            self._features = known = frozenset(said.strip().split(","))
        return known

    def open(self, service: bytes, timeout_s: float) -> AdbSocket:
        """A connection to a service of the device, accepted. Raises: LinkError, StableError."""
        deadline = time.monotonic() + timeout_s
        link = self._trying(
            lambda: self._server.open(f"host:transport:{self.serial}", deadline - time.monotonic()), deadline
        )
        try:
            link.limit(deadline - time.monotonic())
            link.request(service)
        except RefusalError as error:
            link.close()
            self._features = None
            name = service.partition(b":")[0].decode(errors="replace")
            raise LinkError(
                f"the device does not give the service {name} ({error.what}).",
                "Try again: it may be restarting. If it happens again, restart the device.",
                device=self.device,
            ) from error
        except BaseException as error:
            link.close()
            if isinstance(error, OSError | EOFError | ProtocolError | RequestError):
                raise self.lost(error) from error
            raise
        return link

    def reconnect(self) -> None:
        """Have the server drop its connection to the device; the next use makes it anew.

        Source: AOSP, adb/SERVICES.TXT: host:disconnect, <host-prefix>:reconnect. Raises: DeviceError.
        """
        self._features = None
        if self._address is not None:
            self._disconnect()
            return
        try:
            self._server.ask(f"host-serial:{self.serial}:reconnect")
        except RefusalError as error:
            _log.info("the adb server did not reconnect", device=self.device, cause=error.what)

    def replace_server(self) -> bool:
        """Start the server anew if it is one that we started; see ``AdbServer.replace_own``."""
        self._features = None
        return self._server.replace_own()

    def lost(self, error: Exception) -> DeviceError:
        """Our error for what went wrong on an open connection."""
        if isinstance(error, RequestError):
            return StableError(error.what, "Pass what is long in a file.", device=self.device)
        self._features = None
        if isinstance(error, ProtocolError):
            return StableError(
                f"the device does not keep to adb's protocol: {error.what}",
                "Restart the device; if it happens again, do not trust it.",
                device=self.device,
            )
        if isinstance(error, TimeoutError):
            return LinkError(
                "the device does not answer.",
                "Check the cable and that it is not frozen.",
                device=self.device,
            )
        return LinkError(
            f"the link to the device was lost: {getattr(error, 'strerror', None) or error}.",
            "Check the cable; then run the command again.",
            device=self.device,
        )

    def _trying(self, ask: Callable[[], Answer], deadline: float) -> Answer:
        """What the server answers; where it refuses the device, the device is looked for."""
        refusal = RefusalError("it is not there")
        for _ in range(_TRIES):
            try:
                answer = ask()
            except RefusalError as error:
                refusal = error
            else:
                self._was_there = True
                return answer
            self._features = None
            self._find(deadline)
        raise LinkError(
            f"the adb server does not let it be used: {refusal.what}.", "Try again.", device=self.device
        )

    def _find(self, deadline: float) -> None:
        """Return when the server lists the device as ready; connect to a daemon over TCP anew where needed.

        One thread does so at a time: a second one would cut the connection that the first has made.
        """
        if not self._mending.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise self.lost(TimeoutError("timed out"))
        try:
            began = time.monotonic()
            until = min(began + _SETTLE_S, deadline)
            connected = added = False
            while True:
                listed = self._server.devices()
                state = next((each.state for each in listed if each.serial == self.serial), "absent")
                now = time.monotonic()
                if state == READY:
                    return
                stale = state == "offline" and now - began > _STALE_S
                if self._address is not None and not connected and (state == "absent" or stale):
                    added = not stale
                    self._connect(stale=stale, timeout_s=min(self._connect_s, deadline - now))
                    connected = True
                    until = min(time.monotonic() + _SETTLE_S, deadline)
                elif now > until:
                    if added and state in ("absent", "offline"):
                        self._disconnect()
                    raise self._unreachable(state, listed)
                else:
                    time.sleep(_PAUSE_S)
        finally:
            self._mending.release()

    def _connect(self, *, stale: bool, timeout_s: float) -> None:
        """Have the server connect to the daemon. It answers in words and calls failures answers, too."""
        if stale:
            self._disconnect()
        _log.info("the adb server is told to connect", device=self.device, address=self._address)
        try:
            said = self._server.ask(f"host:connect:{self._address}", timeout_s).strip()
        except RefusalError as error:
            said = error.what
        except LinkError as error:
            if not isinstance(error.__cause__, TimeoutError):
                raise
            said = f"nobody answers within {timeout_s:.0f} s"
        _log.info("the adb server has tried to connect", device=self.device, answer=said[:200])
        if "authenticate" in said:
            raise self._unreachable("unauthorized", ())
        if not said.startswith(("connected to", "already connected")):
            if not stale:
                self._disconnect()
            raise LinkError(
                f"no adb daemon can be reached at {self._address}: {said[:200]}.",
                "Check that the device is on, in this network, and has adb over TCP enabled (adb tcpip).",
                device=self.device,
            )

    def _disconnect(self) -> None:
        """Have the server forget the address."""
        try:
            self._server.ask(f"host:disconnect:{self._address}")
        except (RefusalError, DeviceError) as error:
            _log.debug("nothing to disconnect", device=self.device, cause=error.what)

    def _unreachable(self, state: str, listed: tuple[Listed, ...]) -> DeviceError:
        """Why a device in that state cannot be used, and what to do."""
        trouble = None if state == "absent" else trouble_of(state)
        if trouble is not None:
            return self._error(trouble)
        if self._was_there:
            return LinkError(
                f"the device {self.serial} is gone.",
                "Check the cable; if it restarts, wait for it.",
                device=self.device,
            )
        if any(each.state.startswith("no permissions") for each in listed):
            return self._error(NO_PERMISSION)
        there = near(self.serial, [each.serial for each in listed])
        return StableError(
            f"the adb server sees no device {self.serial}. {there}",
            "Plug it in, enable USB debugging in its developer options, and check serial in the inventory"
            " (stifarm devices discover lists serials).",
            device=self.device,
        )

    def _error(self, trouble: Trouble) -> DeviceError:
        kind = LinkError if trouble.passing else StableError
        return kind(trouble.what, trouble.remedy, device=self.device)


def with_port(address: str) -> str:
    """The address of a daemon as the server lists it."""
    host, port = split_endpoint(address)
    return f"{host}:{port or DEFAULT_DAEMON_PORT}"
