"""AOSP's adb daemon at the device's end of a link, and a server of our own that asks it.

STIFARM_ADBD names the daemon, which listens on loopback only: a door leads to it.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from bench.deploy_link import DEVICE, Link

_PORT = 5601
_START_S = 30.0


@dataclass
class Adbd:
    """Daemon, door and server; a context manager."""

    link: Link
    folder: Path
    door_port: int = 5602
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    plain_name = "adb push"

    def __enter__(self) -> Self:
        program = os.environ.get("STIFARM_ADBD")
        adb = shutil.which("adb")
        if program is None or adb is None:
            raise SystemExit("needs adb, and STIFARM_ADBD must name AOSP's adbd")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.server_port = int(probe.getsockname()[1])
        try:
            self._begin(program, adb)
        except BaseException:
            self._end()
            raise
        return self

    def _begin(self, program: str, adb: str) -> None:
        properties = self.folder / "properties"
        properties.write_text("ro.adb.secure=0\n")
        home = {"PATH": os.environ["PATH"], "HOME": str(self.folder)}
        self._start(
            self.link.inside(program), home | {"ADBD_PORT": str(_PORT), "ADBD_PROPS": str(properties)}
        )
        self._open_door()
        self.environment = home | {
            "ANDROID_ADB_SERVER_PORT": str(self.server_port),
            "ADB_LOCAL_TRANSPORT_MAX_PORT": "5554",
            "ADB_MDNS_AUTO_CONNECT": "0",
        }
        self._start([adb, "-P", str(self.server_port), "nodaemon", "server"], self.environment)
        deadline = time.monotonic() + _START_S
        while b"connected" not in self._adb("connect", self.serial):
            if time.monotonic() > deadline:
                raise TimeoutError("adbd does not answer")
            time.sleep(0.1)
        self._adb("-s", self.serial, "wait-for-device")

    def _start(self, argv: list[str], environment: dict[str, str]) -> None:
        started = subprocess.Popen(
            argv,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.processes.append(started)
        time.sleep(0.5)

    def _open_door(self) -> None:
        words = (sys.executable, "-m", "bench.forward", DEVICE, str(self.door_port), str(_PORT))
        self._start(self.link.inside(*words), dict(os.environ))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    @property
    def serial(self) -> str:
        """As the server lists it."""
        return f"{DEVICE}:{self.door_port}"

    def cut(self) -> None:
        """End the connection: the door falls shut, and another is there at once."""
        door = self.processes.pop(1)
        door.kill()
        door.wait()
        self._open_door()
        self.processes.insert(1, self.processes.pop())

    def put(self, source: Path, target: Path) -> None:
        """Copy a file with the stock client."""
        self._adb("-s", self.serial, "push", str(source), str(target))

    def _adb(self, *words: str) -> bytes:
        argv = ["adb", "-P", str(self.server_port), *words]
        return subprocess.run(argv, env=self.environment, capture_output=True, check=False).stdout

    def inventory_fields(self) -> str:
        """What the inventory says of a device here, in YAML's flow style."""
        return f'transport: adb, address: "{self.serial}", adb_server: "127.0.0.1:{self.server_port}"'
