"""The ssh transport: boards that run an ssh server. They need a POSIX sh and basic tools, no Python.

Neighbours, one job each: ssh_address and ssh_config (where, and as whom), ssh_known_hosts, ssh_channels and
ssh_connect (a checked, watched connection), ssh_keys and ssh_agent (logging in), ssh_script (what the board's
shell is told), ssh_sessions and ssh_exec (commands), ssh_files, ssh_sftp and ssh_sftp_wire (files) and,
without an sftp server, ssh_cat.
"""

from __future__ import annotations

import contextlib
import posixpath
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from orchestrator.errors import DeviceError, StableError
from orchestrator.transports.base import OUTPUT_CAP_BYTES, PROCESS_ID, Completed, Plain, Progress
from orchestrator.transports.ssh_address import Endpoint, endpoint_of
from orchestrator.transports.ssh_cat import CatFiles
from orchestrator.transports.ssh_connect import SILENCE_S, Connection, open_connection
from orchestrator.transports.ssh_exec import Sink, execute
from orchestrator.transports.ssh_files import failure
from orchestrator.transports.ssh_script import DETACH, REBOOT, not_started
from orchestrator.transports.ssh_sessions import Sessions, Warden
from orchestrator.transports.ssh_sftp import SftpFiles

if TYPE_CHECKING:
    from orchestrator.inventory import Device

START_TIMEOUT_S = 60.0
_HOME_TIMEOUT_S = 60.0
_REBOOT_ANSWER_S = 20.0
_PATH_CAP = 1024

# A work folder must take files and let them be executed; it is not left behind.
_WORKDIR = """umask 077; folder=$HOME/.stifarm-device; probe=$folder/.probe-$$
mkdir -p -- "$folder" && printf '#!/bin/sh\\nexit 0\\n' >"$probe" && chmod 700 "$probe" && "$probe"
code=$?; rm -f -- "$probe"; rmdir "$folder" 2>/dev/null; printf %s "$folder"; exit $code"""

_log = structlog.get_logger(__name__)


def connect(device: Device) -> SshTransport:
    """The transport of a device of the inventory."""
    return SshTransport(device.name, lambda: endpoint_of(device))


class _Board:
    """What exists as long as one connection: its sessions, the warden, the ways to files.

    ``quick`` is for small reads, which a transfer on ``bulk`` must not hold up. Where the server bears one
    command at a time only, further ones have connections of their own, made by ``reach`` and kept.
    """

    def __init__(self, connection: Connection, device: str, reach: Callable[[], Connection]) -> None:
        self.connection, self.device, self._reach = connection, device, reach
        self.sessions = Sessions(connection, device)
        self._lock = threading.Lock()
        self._warden: Warden | None = None
        self._files: tuple[SftpFiles | CatFiles, SftpFiles | CatFiles] | None = None
        self._busy, self._reaching = threading.Lock(), threading.Lock()
        self._further: list[_Board] = []

    def execute(
        self,
        argv: Sequence[str],
        *,
        timeout_s: float,
        env: Mapping[str, str] | None = None,
        output_cap_bytes: int = OUTPUT_CAP_BYTES,
        stdin: Iterable[bytes] | None = None,
        sink: Sink | None = None,
        keep: bool = False,
    ) -> Completed:
        """See ``ssh_exec.execute``."""
        with self._free() as board:
            return execute(
                board.sessions,
                board.warden(),
                argv,
                device=self.device,
                timeout_s=timeout_s,
                env=env or {},
                cap_bytes=output_cap_bytes,
                stdin=stdin,
                sink=sink,
                keep=keep,
            )

    def warden(self) -> Warden:
        """The connection's."""
        with self._lock:
            if self._warden is None:
                self._warden = Warden(self.sessions, self.device)
            return self._warden

    @contextlib.contextmanager
    def _free(self) -> Iterator[_Board]:
        """One that can take a command now. Raises: DeviceError."""
        if not self.sessions.one_at_a_time:
            yield self
            return
        board = self._claimed()
        try:
            yield board
        finally:
            board._busy.release()

    def _claimed(self) -> _Board:
        """One that is made busy. Dropbear takes few connections that have not logged in: one at a time."""
        free = self._idle()
        if free is not None:
            return free
        with self._reaching:
            free = self._idle()
            if free is None:
                free = _Board(self._reach(), self.device, self._reach)
                free._busy.acquire()
                with self._lock:
                    self._further.append(free)
            return free

    def _idle(self) -> _Board | None:
        with self._lock:
            self._further = [board for board in self._further if board.connection.alive]
            idle = (board for board in (self, *self._further) if board._busy.acquire(blocking=False))
            return next(idle, None)

    def close(self) -> None:
        """End the connection, and those made for further commands."""
        with self._lock:
            further, self._further = self._further, []
        for board in (self, *further):
            board.connection.close()

    def files(self) -> tuple[SftpFiles | CatFiles, SftpFiles | CatFiles]:
        """(quick, bulk), chosen at their first use."""
        with self._lock:
            if self._files is None:
                quick = SftpFiles(self.sessions, self.execute, self.device)
                if quick.check():
                    self._files = quick, SftpFiles(self.sessions, self.execute, self.device)
                else:
                    _log.warning("no sftp server: files go through cat", device=self.device)
                    slow = CatFiles(self.execute, self.execute, self.device)
                    self._files = slow, slow
            return self._files


class SshTransport(Plain):
    """Commands and files of a board; connects at the first use, and again after the link was lost."""

    def __init__(
        self, device: str, endpoint: Callable[[], Endpoint], *, silence_s: float = SILENCE_S
    ) -> None:
        self._device, self._endpoint, self._silence_s = device, endpoint, silence_s
        self._lock = threading.Lock()
        self._board: _Board | None = None
        self._attempts = 0
        self._failure: DeviceError | None = None
        self.agent_argv: tuple[str, ...] = ("python3", "-P", "-m", "agent")
        self.poll_pause_s = 0.5

    @property
    def device(self) -> str:
        """The device's name, for messages."""
        return self._device

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout_s: float,
        env: Mapping[str, str] | None = None,
        output_cap_bytes: int = OUTPUT_CAP_BYTES,
        stdin: Iterable[bytes] | None = None,
        stdin_file: str | None = None,
    ) -> Completed:
        """Run a command; see ``Transport.run``. The time counts from when there is a connection."""
        done = self._connected().execute(
            argv, timeout_s=timeout_s, env=env, output_cap_bytes=output_cap_bytes, stdin=stdin
        )
        self.answered = True
        return done

    def streams_input(self) -> bool:
        """Always."""
        return True

    def push(self, source: Path, destination: str, *, progress: Progress | None = None) -> None:
        """Copy a file; see ``Transport.push``. After a lost link it goes on where it was."""
        self._connected().files()[1].push(source, destination, progress)

    def pull(self, source: str, destination: Path, *, progress: Progress | None = None) -> None:
        """Copy a file; see ``Transport.pull``."""
        self._connected().files()[1].pull(source, destination, progress)

    def read_from(self, path: str, offset: int, limit: int) -> bytes:
        """Read a part of a file; see ``Transport.read_from``."""
        return self._connected().files()[0].read_from(path, offset, limit)

    def start_detached(self, argv: Sequence[str], *, log: str, env: Mapping[str, str] | None = None) -> int:
        """Start a process that no connection holds; see ``Transport.start_detached``."""
        name = argv[0]
        script = ["sh", "-c", DETACH, "sh", log, posixpath.dirname(log), *argv]
        done = self._connected().execute(script, timeout_s=START_TIMEOUT_S, env=env, keep=True)
        if done.ok and PROCESS_ID.fullmatch(done.stdout.strip()):
            return int(done.stdout)
        cause = not_started(done.exit_code)
        if cause is None:
            raise failure(done.error_text(), f"{name} cannot be started", self._device)
        raise StableError(
            f"{name} cannot be started: {cause}.",
            f"Check that it is installed and that {log} can be written.",
            device=self._device,
        )

    def default_workdir(self) -> str:
        """A folder of the user's home."""
        done = self.run(["sh", "-c", _WORKDIR], timeout_s=_HOME_TIMEOUT_S, env={"LC_ALL": "C"})
        folder = done.stdout.decode(errors="replace")
        if done.ok and folder.startswith("/") and folder.isprintable() and len(folder) <= _PATH_CAP:
            return folder
        why = failure(done.error_text(), f"its home cannot hold a work folder ({folder[:200]})", self._device)
        raise StableError(
            why.what.partition(": ")[2],
            "Give the device a workdir in the inventory, where its user may write and execute.",
            device=self._device,
        )

    def reboot(self) -> None:
        """Ask the board as its user, then by sudo without a password; see ``Transport.reboot``."""
        said = self.run(["sh", "-c", REBOOT], timeout_s=_REBOOT_ANSWER_S)
        if not said.ok:
            raise StableError(
                f"its user may not reboot it: {said.error_text(200) or said.exit_code}.",
                "Permit systemctl reboot to it (polkit or sudo), or name a reboot_command in the inventory.",
                device=self._device,
            )

    def close(self) -> None:
        """End the connection; commands end with it, what was started detached goes on."""
        with self._lock:
            if self._board is not None:
                self._board.close()
                self._board = None

    def _connected(self) -> _Board:
        """The board, reached anew after a lost link; whoever waits for that shares its outcome."""
        begun = self._attempts
        with self._lock:
            if self._board is not None and self._board.connection.alive:
                return self._board
            if self._attempts > begun and self._failure is not None:
                raise self._failure
            if self._board is not None:
                _log.warning("ssh link lost", device=self._device, cause=self._board.connection.cause())
                self._board.close()
                self._board = None
            self._failure = None
            try:
                connection = self._reach()
            except DeviceError as error:
                self._failure = error
                raise
            finally:
                self._attempts += 1
            self._board = _Board(connection, self._device, self._reach)
            return self._board

    def _reach(self) -> Connection:
        return open_connection(self._endpoint(), self._device, self._silence_s)
