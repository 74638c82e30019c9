"""A real sshd for tests: private keys and configuration, on a port of its own, on this machine's loopback."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

_START_S = 60.0
_TRIES = 20


def sshd_program() -> str:
    """The path of sshd; skips the test where there is none."""
    found = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found is None or shutil.which("ssh-keygen") is None:
        pytest.skip("needs sshd and ssh-keygen (openssh-server)")
    return found


def make_key(path: Path, kind: str = "ed25519", passphrase: str = "") -> Path:
    """A key pair: ``path`` and ``path.pub``."""
    subprocess.run(
        ["ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", path.name, "-f", str(path)], check=True
    )
    return path


def public_part(key: Path) -> str:
    """Kind and public key, as a line of authorized_keys begins."""
    return " ".join(key.with_name(key.name + ".pub").read_text().split()[:2])


@dataclass
class SshServer:
    """sshd over ``folder``. ``options`` replace lines of its configuration; "" removes one."""

    folder: Path
    options: Mapping[str, str] = field(default_factory=dict)
    host_key_kinds: tuple[str, ...] = ("ed25519",)
    port: int = 0
    process: subprocess.Popen[bytes] | None = None
    title: ClassVar[str] = "sshd"
    """How the names of its processes begin."""

    def __post_init__(self) -> None:
        self.program = sshd_program()
        if os.geteuid() == 0:  # sshd wants it then, and only its service would make it
            Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
        self.home = self.folder / "home"
        self.home.mkdir(parents=True)
        self.host_keys = [make_key(self.folder / f"host_{kind}", kind) for kind in self.host_key_kinds]
        self.key = make_key(self.folder / "user_key")
        self.authorized = self.folder / "authorized_keys"
        self.authorized.write_text(public_part(self.key) + "\n")
        self.known_hosts = self.folder / "known_hosts"

    def start(self) -> None:
        """Start it on ``port`` (0: a free one) and wait until it answers."""
        wanted = self.port
        for _ in range(_TRIES):
            self.port = wanted or _free_port()
            if self._start():
                self.know()
                return
        raise AssertionError((self.folder / "log").read_text(errors="replace")[-2000:])

    def _argv(self) -> list[str]:
        """The server as a command that stays in the foreground; its files are written."""
        settings = {
            "Port": str(self.port),
            "ListenAddress": "127.0.0.1",
            "PidFile": "none",
            "AuthorizedKeysFile": str(self.authorized),
            "UsePAM": "no",
            "StrictModes": "no",
            "PermitRootLogin": "prohibit-password",
            "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
            "MaxStartups": "100",
            "Subsystem": "sftp internal-sftp",
            "SetEnv": f"HOME={self.home}",  # not what the user's own shell does at a login
            "LogLevel": "ERROR",
            **self.options,
        }
        lines = [f"{name} {value}" for name, value in settings.items() if value]
        lines += [f"HostKey {key}" for key in self.host_keys]
        config = self.folder / "sshd_config"
        config.write_text("\n".join(lines) + "\n")
        return [self.program, "-D", "-e", "-f", str(config)]

    def _start(self) -> bool:
        argv = self._argv()
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_S
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                with socket.create_connection(("127.0.0.1", self.port), timeout=5) as probe:
                    if probe.recv(4) == b"SSH-":
                        return True
            except OSError:
                time.sleep(0.02)
        self.stop()
        return False

    def know(self, port: int | None = None, name: str = "127.0.0.1") -> None:
        """Record its host keys as those of a port of this machine, beside those recorded before."""
        with self.known_hosts.open("a") as stream:
            for key in self.host_keys:
                stream.write(f"[{name}]:{port or self.port} {public_part(key)}\n")

    def children(self) -> list[int]:
        """The processes that serve connections, and what they started."""
        assert self.process is not None
        found, parents = [], [self.process.pid]
        while parents:
            parent = parents.pop()
            listed = subprocess.run(["pgrep", "-P", str(parent)], capture_output=True, text=True, check=False)
            below = [int(word) for word in listed.stdout.split()]
            found += below
            parents += below
        return found

    def stop(self) -> None:
        """End the server and its connections; what was started detached goes on."""
        if self.process is None:
            return
        serving = [pid for pid in self.children() if _name(pid).startswith(self.title)]
        self.process.kill()
        self.process.wait()
        for pid in serving:
            with_suppressed_kill(pid)
        self.process = None

    def fields(self, **others: str) -> str:
        """What the inventory says of it, in YAML's flow style."""
        values = {
            "transport": "ssh",
            "address": f'"{getpass.getuser()}@127.0.0.1:{self.port}"',
            "key_file": str(self.key),
            "known_hosts": str(self.known_hosts),
            **others,
        }
        return ", ".join(f"{name}: {value}" for name, value in values.items() if value)


def with_suppressed_kill(pid: int) -> None:
    """End a process that may have gone by itself."""
    try:
        os.kill(pid, 9)
    except ProcessLookupError:
        return


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
