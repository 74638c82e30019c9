"""A stock adb client with a server of its own, on a port of its own: nobody else's server is touched."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIMIT_S = 120


def clients() -> dict[str, str]:
    """The adb clients there are: this machine's, and the one that adbutils brings."""
    import adbutils

    bundled = Path(adbutils.__file__).parent / "binaries/adb"
    found = {"system": shutil.which("adb"), "adbutils": str(bundled) if bundled.exists() else None}
    return {name: path for name, path in found.items() if path is not None}


class StockAdb:
    """One client; ``serial`` is given to the commands that need a device."""

    def __init__(self, client: str, home: Path, port: int) -> None:
        self.serial = ""
        self._client = client
        kept = {name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ}
        # The server takes no device of the user's, and waits for none.
        alone = {"ADB_USB": "0", "ADB_EMU": "0", "ADB_MDNS": "0"}
        own = {"HOME": str(home), "TMPDIR": str(home), "ANDROID_ADB_SERVER_PORT": str(port)}
        self._env = {**kept, **alone, **own}

    def __call__(self, *argv: str, stdin: bytes | None = b"") -> subprocess.CompletedProcess[bytes]:
        """Run the client to its end; the exit code is the caller's to judge."""
        chosen = ["-s", self.serial] if self.serial else []
        return subprocess.run(
            [self._client, *chosen, *argv],
            input=stdin,
            capture_output=True,
            env=self._env,
            timeout=LIMIT_S,
            check=False,
        )

    def out(self, *argv: str, stdin: bytes | None = b"") -> bytes:
        """Output of a command that must succeed."""
        done = self(*argv, stdin=stdin)
        assert done.returncode == 0, (argv, done.stdout, done.stderr)
        return done.stdout

    def connect(self, endpoint: str) -> None:
        """Have the server connect to a device, which is the chosen one from now on."""
        self.serial = ""
        self("connect", endpoint)
        self.serial = endpoint

    def state(self) -> str:
        """The device's state, as ``adb devices`` has it; empty when it is not listed."""
        chosen, self.serial = self.serial, ""
        try:
            lines = self.out("devices").decode().splitlines()
        finally:
            self.serial = chosen
        return next((line.split()[1] for line in lines if line.split()[:1] == [chosen]), "")

    def wait_for_state(self, state: str) -> None:
        """Until ``adb devices`` says so."""
        deadline = time.monotonic() + LIMIT_S
        while (seen := self.state()) != state:
            assert time.monotonic() < deadline, f"the device is {seen!r}, not {state!r}"
            time.sleep(0.1)


@contextmanager
def stock_adb(client: str, home: Path) -> Iterator[StockAdb]:
    """A client and its server, which ends with the block."""
    with socket.socket() as chooser:
        chooser.bind(("127.0.0.1", 0))
        port = chooser.getsockname()[1]
    home.mkdir(parents=True, exist_ok=True)
    adb = StockAdb(client, home, port)
    try:
        yield adb
    finally:
        adb.serial = ""
        adb("kill-server")
