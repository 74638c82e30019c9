"""A device at the end of a link whose speed is known: a network namespace behind a shaped pair of interfaces.

The kernel counts what passes. Needs root and iproute2; a server inside is started with ``inside``.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

SUBNET = "10.213.77"
HOST, DEVICE = f"{SUBNET}.1", f"{SUBNET}.2"
_BURST_BYTES = 256 << 10
_START_S = 30.0


@dataclass(frozen=True)
class Link:
    """``rate_bytes_per_s`` in both directions; 0: as fast as the kernel copies. A context manager."""

    rate_bytes_per_s: int

    @property
    def name(self) -> str:
        """Of the namespace and of the host's end of the link."""
        return f"stf{os.getpid()}"

    def __enter__(self) -> Self:
        peer = f"{self.name}p"
        _ip("netns", "add", self.name)
        _ip("link", "add", self.name, "type", "veth", "peer", "name", peer, "netns", self.name)
        _ip("addr", "add", f"{HOST}/30", "dev", self.name)
        _ip("-n", self.name, "addr", "add", f"{DEVICE}/30", "dev", peer)
        _ip("link", "set", self.name, "up")
        for device in (peer, "lo"):
            _ip("-n", self.name, "link", "set", device, "up")
        if self.rate_bytes_per_s:
            self._shape((), self.name)
            self._shape(("-n", self.name), peer)
        return self

    def _shape(self, where: tuple[str, ...], device: str) -> None:
        limits = ("rate", f"{8 * self.rate_bytes_per_s}bit", "burst", str(_BURST_BYTES), "latency", "50ms")
        subprocess.run(["tc", *where, "qdisc", "add", "dev", device, "root", "tbf", *limits], check=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _ip("link", "del", self.name)
        _ip("netns", "del", self.name)

    def inside(self, *argv: str) -> list[str]:
        """argv of a command that runs at the device's end."""
        return ["ip", "netns", "exec", self.name, *argv]

    def passed_bytes(self) -> tuple[int, int]:
        """(to the device, from it) so far, headers of all layers included."""
        folder = Path("/sys/class/net") / self.name / "statistics"
        return int((folder / "tx_bytes").read_text()), int((folder / "rx_bytes").read_text())


@dataclass
class Sshd:
    """A private sshd at the device's end, and what reaches it: keys, known hosts, the stock client."""

    link: Link
    folder: Path
    port: int = 2200
    process: subprocess.Popen[bytes] | None = None
    plain_name = "sftp put"

    def __enter__(self) -> Self:
        for name in ("host_key", "user_key"):
            argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name)]
            subprocess.run(argv, check=True)
        shutil.copy(self.folder / "user_key.pub", self.folder / "authorized_keys")
        public = (self.folder / "host_key.pub").read_text()
        (self.folder / "known_hosts").write_text(f"[{DEVICE}]:{self.port} {public}")
        (self.folder / "config").write_text(
            f"Port {self.port}\nListenAddress {DEVICE}\nPidFile none\nUsePAM no\nStrictModes no\n"
            f"HostKey {self.folder}/host_key\nAuthorizedKeysFile {self.folder}/authorized_keys\n"
            "PermitRootLogin prohibit-password\nMaxStartups 100\nSubsystem sftp internal-sftp\n"
            f"SetEnv HOME={self.folder}\n"  # a board's login: not what the user's own shell does at one
            "LogLevel ERROR\n"
        )
        program = shutil.which("sshd") or "/usr/sbin/sshd"
        self.process = subprocess.Popen(
            self.link.inside(program, "-D", "-e", "-f", str(self.folder / "config")),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self._await_answer()
        except BaseException:
            self._end()
            raise
        return self

    def _await_answer(self) -> None:
        deadline = time.monotonic() + _START_S
        while subprocess.run(["ssh", *self.options(), DEVICE, "true"], check=False).returncode:
            if time.monotonic() > deadline:
                raise TimeoutError("sshd does not answer")
            time.sleep(0.1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def cut(self) -> None:
        """End every connection as a pulled cable does for those at its ends; what they started goes on."""
        assert self.process is not None
        waiting = _children(self.process.pid)
        while waiting:
            pid = waiting.pop()
            if (Path("/proc") / str(pid) / "comm").read_text().startswith("sshd"):
                waiting += _children(pid)
                os.kill(pid, signal.SIGKILL)

    def options(self) -> tuple[str, ...]:
        """Of the stock ssh client; sftp takes all but the port's name."""
        chosen = {
            "Port": self.port,
            "IdentityFile": self.folder / "user_key",
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": self.folder / "known_hosts",
            "BatchMode": "yes",
            "LogLevel": "ERROR",
        }
        return tuple(part for name, value in chosen.items() for part in ("-o", f"{name}={value}"))

    def put(self, source: Path, target: Path) -> None:
        """Copy a file with the stock sftp client."""
        argv = ["sftp", *self.options(), "-b", "-", DEVICE]
        text = f"put {source} {target}\n".encode()
        subprocess.run(argv, input=text, stdout=subprocess.DEVNULL, check=True)

    def inventory_fields(self) -> str:
        """What the inventory says of a device here, in YAML's flow style."""
        return (
            f'transport: ssh, address: "root@{DEVICE}:{self.port}", key_file: {self.folder}/user_key, '
            f"known_hosts: {self.folder}/known_hosts"
        )


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
