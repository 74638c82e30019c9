"""The sessions of an ssh connection: how many there may be, and the warden that ends what commands leave."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Iterator

import paramiko
from paramiko.channel import Channel

from orchestrator.errors import LinkError, StableError
from orchestrator.transports.ssh_channels import UnansweredError, request, send
from orchestrator.transports.ssh_connect import Connection
from orchestrator.transports.ssh_script import LAUNCH, WARDEN, WARDEN_READY, quoted

COMMANDS_AT_ONCE = 6
"""OpenSSH allows ten sessions on a connection (MaxSessions); the warden and two for files are the others."""

_ONE_AT_A_TIME = re.compile(r"SSH-2\.0-dropbear")
"""Dropbear ends a session that was just opened, or even the connection, when the process of another session
ends before a command was begun on it. Seen with 2022.83."""

_OPEN_S = 60.0
_PATIENCE = 2.0
"""A board may need so many times as long for a process as for a sign of life."""

_STEP_S = 0.2
_READ_BYTES = 1 << 16
_NOISE_BYTES = 1 << 16


class Sessions:
    """Opens session channels, at most so many at once as the server allows."""

    def __init__(self, connection: Connection, device: str) -> None:
        self._connection, self._device = connection, device
        self.answer_s = _PATIENCE * connection.link.silence_s
        self._changed = threading.Condition()
        self._opening = threading.Lock()
        self._limit, self._open = COMMANDS_AT_ONCE, 0
        self.one_at_a_time = _ONE_AT_A_TIME.match(connection.transport.remote_version) is not None

    @property
    def alive(self) -> bool:
        """Whether the connection is."""
        return self._connection.alive

    @contextlib.contextmanager
    def command(self) -> Iterator[Channel]:
        """A channel for a command, closed at the end; waits while too many are open."""
        while True:
            with self._changed:
                while self._open >= self._limit:
                    self._changed.wait(_STEP_S)
                    if not self._connection.alive:
                        raise self.lost()
                self._open += 1
            try:
                channel = self.open()
            except SessionRefusedError as error:
                with self._changed:
                    self._open -= 1
                    if self._open == 0:
                        raise self._too_few(error) from error
                    self._limit = self._open
                continue
            except BaseException:
                self._release()
                raise
            try:
                yield channel
            finally:
                channel.close()
                self._release()
            return

    def open_kept(self) -> Channel:
        """A channel that stays open, and is not counted. Raises: LinkError, StableError."""
        while True:
            try:
                return self.open()
            except SessionRefusedError as error:
                with self._changed:
                    if self._open == 0:
                        raise self._too_few(error) from error
                    self._limit = max(1, min(self._limit, self._open - 1))
                    self._changed.wait(_STEP_S)

    def open(self) -> Channel:
        """A channel. Raises: LinkError, SessionRefusedError."""
        try:
            with self._opening:  # the library tells but one of two threads why it was refused
                return self._connection.transport.open_session(timeout=_OPEN_S)
        except paramiko.ChannelException as error:
            raise SessionRefusedError(error.text) from error
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise self.lost() from error

    def lost(self, cause: str | None = None) -> LinkError:
        """The error for a link that has ended, or does not answer and is ended now."""
        cause = cause or self._connection.cause()
        self._connection.close()
        return LinkError(f"the ssh link was lost: {cause}.", "Try again.", device=self._device)

    def _too_few(self, error: SessionRefusedError) -> StableError:
        return StableError(
            f"the ssh server refuses a session: {error}.",
            "Set MaxSessions to 4 or more in its sshd_config.",
            device=self._device,
        )

    def _release(self) -> None:
        with self._changed:
            self._open -= 1
            self._changed.notify()


class SessionRefusedError(Exception):
    """The server opens no further session."""


class Warden:
    """Ends process groups on the board, at once and without starting a process; see ``WARDEN``.

    Raises: LinkError (it was not there in ``Sessions.answer_s``, too), StableError.
    """

    def __init__(self, sessions: Sessions, device: str) -> None:
        self._lock = threading.Lock()
        self._channel = sessions.open_kept()
        self._answer_s = sessions.answer_s
        self._channel.settimeout(self._answer_s)
        self._said = b""
        try:
            request(self._channel, "exec", LAUNCH, self._answer_s)
            # Its text goes as an argument of a second sh, which finds the input as the first one leaves it.
            text = b"nl=$(printf '\\nx'); nl=${nl%x}; exec sh -c " + quoted(WARDEN) + b"\n"
            send(self._channel, text, self._answer_s)
            self._await(WARDEN_READY)
        except UnansweredError as error:
            raise sessions.lost(str(error)) from error
        except (paramiko.SSHException, OSError, EOFError) as error:
            self._channel.status_event.wait(self._answer_s)
            exited = self._channel.exit_status >= 0  # else the board goes down, or the link
            if exited and isinstance(error, EOFError):
                raise no_shell(self._said.decode(errors="replace"), device) from error
            raise sessions.lost() from error

    def watch(self, group: int, token: str) -> None:
        """From now on the group ends with the connection, if not before. Raises: OSError."""
        with self._lock:
            self._channel.sendall(f"watch {group} {token}\n".encode())

    def end(self, group: int, token: str) -> None:
        """Kill what is left of a group, and wait until it was done. Raises: OSError, EOFError."""
        with self._lock:
            self._channel.sendall(f"end {group} {token}\n".encode())
            self._await(token.encode())

    def _await(self, line: bytes) -> None:
        until = time.monotonic() + self._answer_s
        while time.monotonic() < until:
            before, found, after = self._said.partition(b"\n" + line + b"\n")
            if found:
                self._said = b"\n" + after
                return
            data = self._channel.recv(_READ_BYTES)
            if not data:
                raise EOFError("the warden ended")
            self._said = (before + data)[-_NOISE_BYTES:]
        raise TimeoutError("timed out")


def no_shell(said: str, device: str) -> StableError:
    """The error for an account that has no use for commands; ``said``: what it answered."""
    return StableError(
        f"its login shell executes no commands: {said.strip()[-200:] or 'it ended'}.",
        "Give the user a login shell, with sh in its PATH.",
        device=device,
    )
