"""The adb server: asking it, and starting one where none runs.

A good neighbour: the server may be the user's, Android Studio's or another program's. It is asked over its
socket, whatever its version; no adb client is ever run, for a client kills a server of another version. One
is started only where nothing listens, at the address that is adb's default here: a server that the inventory
names has an owner, and keys that ours would not have. Only one that we started is ever ended.
"""

from __future__ import annotations

import fcntl
import importlib.resources
import json
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from orchestrator.errors import DeviceError, LinkError, StableError, TransientError
from orchestrator.transports.adb_socket import AdbSocket, ProtocolError, RefusalError, ServerAddress
from orchestrator.transports.local import LocalTransport

DEFAULT_PORT = 5037
_ANSWER_S = 10.0
_START_S = 30.0
_PASSED_ON = re.compile(r"(ANDROID|ADB|XDG)_.*")
_KEY = re.compile(r"\s(?=(?:usb|product|model|device|features|transport_id):)")

_log = structlog.get_logger()


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
    and replace one of ours that hangs."""

    def __init__(self, address: ServerAddress, device: str, *, ours: bool = False) -> None:
        self.address, self._device = address, device
        self._ours = ours and address.local

    def open(self, service: str, timeout_s: float) -> AdbSocket:
        """A connection on which the server has accepted a service.

        Raises: RefusalError (the server's own), LinkError, StableError.
        """
        for last in (False, True):
            link: AdbSocket | None = None
            try:
                link = AdbSocket(self.address, min(timeout_s, _ANSWER_S))
                link.request(service.encode())
                return link
            except BaseException as error:
                if link is not None:
                    link.close()
                if not isinstance(error, OSError | EOFError | ProtocolError):
                    raise
                if last or not self._mend(error, started=link is not None):
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

    def _mend(self, error: Exception, *, started: bool) -> bool:
        """Whether another try may succeed: a missing server was started, a hung one of ours replaced."""
        try:
            return self._mended(error, started=started)
        except OSError as problem:
            raise StableError(
                f"no adb server can be started: {problem.filename or problem}: {problem.strerror}.",
                "Make the folder writable (XDG_STATE_HOME names another), or start one: adb start-server.",
                device=self._device,
            ) from problem

    def _mended(self, error: Exception, *, started: bool) -> bool:
        if isinstance(error, ConnectionRefusedError) and self._ours:
            with _own(self.address) as record:
                if not listens(self.address):
                    self._start(record)
            return True
        if isinstance(error, TimeoutError) and started and self._ours:
            with _own(self.address) as record:
                pid = _live_pid(record)
                if pid is None:
                    return False
                _log.warning("the adb server that we started hangs", address=str(self.address), pid=pid)
                os.kill(pid, signal.SIGKILL)
                self._await(lambda: not listens(self.address))
                self._start(record)
            return True
        # A server that has just been ended resets what was sent to it.
        return isinstance(error, EOFError | ConnectionError) and started

    def _start(self, record: Path) -> None:
        """Start a server of our own, in the foreground mode of adb: that mode ends no other."""
        program = find_adb()
        if program is None:
            raise StableError(
                f"no adb server runs at {self.address}, and there is no adb to start one with.",
                "Install adb (on Debian: apt install adb), or set ADBUTILS_ADB_PATH to it.",
                device=self._device,
            )
        log = record.with_suffix(".log")
        log.unlink(missing_ok=True)
        environment = {name: value for name, value in os.environ.items() if _PASSED_ON.fullmatch(name)}
        port = str(self.address.port)
        local = LocalTransport(self._device)
        pid = local.start_detached([program, "-P", port, "nodaemon", "server"], log=str(log), env=environment)
        record.write_text(json.dumps({"pid": pid, "start_ticks": _start_ticks(pid)}))
        self._await(lambda: listens(self.address) or _start_ticks(pid) is None)
        if not listens(self.address):
            record.unlink()
            said = log.read_text(errors="replace").strip()[-300:] if log.exists() else ""
            raise StableError(
                f"no adb server runs at {self.address}, and {program} starts none: {said or 'it is silent'}.",
                "Start one by hand to see why: adb start-server.",
                device=self._device,
            )
        _log.info("an adb server was started", address=str(self.address), program=program, pid=pid)

    def _await(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_S
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.02)

    def _error(self, error: Exception) -> DeviceError:
        where = f"the adb server at {self.address}"
        if isinstance(error, ProtocolError):
            return StableError(
                f"something that is no adb server has port {self.address.port} of {self.address.host}:"
                f" {error.what}",
                "End it, or give the adb server another port (adb_server in the inventory).",
                device=self._device,
            )
        if isinstance(error, ConnectionRefusedError):
            host = "" if self.address.local else f" on {self.address.host}"
            everywhere = "" if self.address.local else "-a "
            return LinkError(
                f"{where} cannot be reached: nothing listens there.",
                f"stifarm starts one only at adb's default address on this machine. Start it{host}:"
                f" adb {everywhere}-P {self.address.port} nodaemon server (a lab's: stifarm lab up).",
                device=self._device,
            )
        if isinstance(error, TimeoutError):
            return LinkError(
                f"{where} does not answer.",
                "It was not started by stifarm, so stifarm does not end it: restart it (adb kill-server).",
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


def find_adb() -> str | None:
    """The adb to start a server with: the one a variable names, adbutils' own, the system's."""
    bundled = str(importlib.resources.files("adbutils.binaries") / "adb")
    for path in (os.environ.get("ADBUTILS_ADB_PATH"), bundled, shutil.which("adb")):
        if path and os.access(path, os.X_OK):
            return path
    return None


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


def listens(address: ServerAddress) -> bool:
    """Whether something listens there."""
    try:
        AdbSocket(address, 1).close()
    except OSError:
        return False
    return True


@contextmanager
def _own(address: ServerAddress) -> Iterator[Path]:
    """The record of a server that we started, locked: several processes may find none at once."""
    home = os.environ.get("XDG_STATE_HOME")
    folder = (Path(home) if home else Path.home() / ".local/state") / "stifarm"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"adb-server-{address.port}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder / f"adb-server-{address.port}.json"


def _live_pid(record: Path) -> int | None:
    """The process of the server that we started, where it still runs."""
    try:
        said = json.loads(record.read_text())
        pid, ticks = int(said["pid"]), int(said["start_ticks"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return pid if _start_ticks(pid) == ticks else None  # another process may have its number by now


def _start_ticks(pid: int) -> int | None:
    """When a live process started. Source: proc_pid_stat(5), fields 3 and 22."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return int(fields[19]) if fields[0] not in "ZX" else None
