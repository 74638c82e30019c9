"""Device sides and servers of adb for tests: AOSP's daemon and a real server, on ports of their own.

The daemon is named by STIFARM_ADBD (``.ci/run`` builds it). No server of the user's is touched: ours have a
port, a home and keys of their own.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from orchestrator.transports.adb_own import find_adb
from orchestrator.transports.adb_server import AdbServer
from orchestrator.transports.adb_socket import ServerAddress

_START_S = 60.0


def free_port() -> int:
    """A port that nobody has at the moment, on loopback, away from where a server looks for emulators."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def adb_environment(home: Path, port: int) -> dict[str, str]:
    """The environment of an adb server or client with a home and keys of its own."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "ANDROID_ADB_SERVER_PORT": str(port),
        "ADB_LOCAL_TRANSPORT_MAX_PORT": "5554",  # looks for no emulators
        "ADB_USB": "0",  # takes no device of the user's, and waits for none
        "ADB_EMU": "0",
        "ADB_MDNS": "0",
        "ADB_MDNS_AUTO_CONNECT": "0",
        "ADB_MDNS_OPENSCREEN": "0",
        "XDG_STATE_HOME": str(home / "state"),
    }


def require_adb() -> str:
    """The adb program; the test is skipped where there is none."""
    program = find_adb()
    if program is None:
        pytest.skip("needs adb: adbutils brings none for this machine, and none is installed")
    return program


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex(("127.0.0.1", port)) == 0


class _Process:
    """A program with a port that is there when it runs."""

    def __init__(self, argv: list[str], port: int, environment: dict[str, str], log: Path) -> None:
        self._argv, self.port, self._environment, self._log = argv, port, environment, log
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Start it and wait for its port."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._argv,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_S
        while not _listens(self.port):
            assert self._process.poll() is None, self._log.read_text(errors="replace")
            assert time.monotonic() < deadline, f"{self._argv[0]} does not listen"
            time.sleep(0.02)

    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process is not None and self._process.poll() is None

    def freeze(self) -> None:
        """Stop it where it stands."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class Daemon(_Process):
    """AOSP's device-side daemon; its commands run on this machine, as this user."""

    def __init__(self, folder: Path, *, secure: bool = False) -> None:
        program = os.environ.get("STIFARM_ADBD")
        if not program or not os.access(program, os.X_OK):
            pytest.skip("needs AOSP's adbd: STIFARM_ADBD names none (.ci/run builds it)")
        folder.mkdir(parents=True, exist_ok=True)
        properties = folder / "properties"
        properties.write_text(f"ro.adb.secure={int(secure)}\n")
        port = free_port()
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "ADBD_PORT": str(port),
            "ADBD_PROPS": str(properties),
        }
        super().__init__([program], port, environment, folder / "log")

    @property
    def address(self) -> str:
        """As an inventory names it."""
        return f"127.0.0.1:{self.port}"


class Server(_Process):
    """An adb server of the test's own."""

    def __init__(self, folder: Path, *, program: str | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        port = free_port()
        self.environment = adb_environment(folder, port)
        self.program = program or require_adb()
        argv = [self.program, "-P", str(port), "nodaemon", "server"]
        super().__init__(argv, port, self.environment, folder / "log")

    @property
    def address(self) -> str:
        """As an inventory names it."""
        return f"127.0.0.1:{self.port}"

    def asked(self) -> AdbServer:
        """The server as our code sees it."""
        return AdbServer(ServerAddress("127.0.0.1", self.port), "under-test")


class OlderDevices:
    """A door to a server that hides features of its devices: what is behind it looks like an older phone."""

    def __init__(self, server: Server, hidden: Iterable[str]) -> None:
        self._server, self._hidden = server, frozenset(hidden)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        """As an inventory names it."""
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", self._server.port)) as server:
            try:
                head = _exactly(client, 4)
                asked = _exactly(client, int(head, 16))
                server.sendall(head + asked)
                if asked.endswith(b":features"):
                    status = _exactly(server, 4)
                    names = _exactly(server, int(_exactly(server, 4), 16)).decode().split(",")
                    shown = ",".join(name for name in names if name not in self._hidden).encode()
                    client.sendall(status + b"%04x" % len(shown) + shown)
                    return
                back = threading.Thread(target=_pump, args=(server, client), daemon=True)
                back.start()
                _pump(client, server)
                back.join()
            except (OSError, EOFError):
                return  # one of the sides has gone


def _exactly(source: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        block = source.recv(count - len(data))
        if not block:
            raise EOFError
        data += block
    return data


def _pump(source: socket.socket, sink: socket.socket) -> None:
    """Pass on what comes; at the end, or when the sink has gone, end both."""
    try:
        while block := source.recv(1 << 16):
            sink.sendall(block)
    except OSError:
        pass
    for each in (source, sink):
        try:
            each.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue
