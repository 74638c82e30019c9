"""The Transport protocol: all that the farm asks of a way to reach a device.

A transport is bound to one device. Paths on the device are strings in the device's own notation; paths
on the host are ``pathlib.Path``. Commands are argument vectors and never pass through a shell of ours.

Rules every transport keeps (tests/contract/test_transport.py runs them over each):

* ``run`` ends within ``timeout_s`` and leaves no process behind, whatever the command started. ``stdin``
  is fed to the command as it reads; a command that ends without reading it all is no error.
* ``push`` and ``pull`` are atomic: the destination has its old content or all of the new one. They
  create missing parent folders of the destination.
* ``read_from`` answers with what is there: fewer bytes at the end of the file, none beyond it.
* ``start_detached`` returns when the command has been executed (or its failure is known); the process
  outlives the connection and the host's process, in a session of its own.
* Errors are ``TransientError`` when another try may help, else ``StableError``. Where the device cannot be
  reached at the time (a lost or refused connection, no answer to one, a device that was there and is gone)
  the transient one is a ``LinkError``: callers wait for the device, whose processes go on. A key that is not
  accepted is stable. A command's own exit status is not an error.
* All methods may be called from several threads at once.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from orchestrator.errors import StableError

OUTPUT_CAP_BYTES = 8 << 20
"""Bytes kept of each output stream of a command: a device is not trusted to stop talking."""

PROCESS_ID = re.compile(rb"[0-9]{1,9}")
"""A process id as a device says it: at most the digits that a Linux kernel gives one."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""


@dataclass(frozen=True)
class Completed:
    """A command that ended. ``exit_code`` is negative when a signal killed it, else what it exited with: a
    shell that catches a signal and exits by itself (mksh does, with 143 for SIGTERM) was not killed. A
    transport that hears of the end through the device's shell cannot tell every signal: over adb SIGINT and
    SIGPIPE are 130 and 141, which a command may exit with, too.

    ``truncated``: an output was longer than its cap and the rest was dropped.
    """

    argv: tuple[str, ...]
    exit_code: int
    stdout: bytes
    stderr: bytes
    truncated: bool

    @property
    def ok(self) -> bool:
        """Whether the command ended with 0."""
        return self.exit_code == 0

    def error_text(self, limit: int = 500) -> str:
        """The end of what the command said on stderr, else on stdout, for messages."""
        text = (self.stderr.strip() or self.stdout.strip()).decode(errors="replace")
        return text if len(text) <= limit else "…" + text[-limit:]


class Transport(Protocol):
    """One device, reached in one way. See the module's docstring for the rules."""

    @property
    def device(self) -> str:
        """The device's name, for messages."""

    agent_argv: tuple[str, ...]
    """How the agent is called on this device: the argv before its verb. At first that of the torch agent in
    the device's own Python; who brings an executable sets its path."""

    poll_pause_s: float
    """How long to wait between two looks at a job: looking must not disturb what is timed there."""

    answered: bool
    """Whether a command has come to its end on the device: one that is gone after that is waited for, as for
    a reboot."""

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
        """Run a command to its end; ``env`` is added to the device's environment, ``stdin`` is its input
        (None: empty), taken block by block as the link and the command keep up. Where input cannot be
        streamed it is a file of the device first: ``stdin_file``, else a temporary one. It is removed.

        Raises: CommandTimeoutError, TransientError, StableError (no such command); what ``stdin`` raises,
        after the command was killed.
        """

    def streams_input(self) -> bool:
        """Whether a command gets its input while the link brings it. Where it gets all of it afterwards, an
        interruption loses all of it: what is long is better given in pieces.

        Raises: TransientError, StableError.
        """

    def push(self, source: Path, destination: str, *, progress: Progress | None = None) -> None:
        """Copy a file of the host to the device.

        Raises: DeviceFullError, TransientError, StableError.
        """

    def pull(self, source: str, destination: Path, *, progress: Progress | None = None) -> None:
        """Copy a file of the device to the host. Raises: MissingFileError, TransientError, StableError."""

    def read_from(self, path: str, offset: int, limit: int) -> bytes:
        """At most ``limit`` bytes of a file from ``offset``.

        Raises: MissingFileError, TransientError, StableError.
        """

    def start_detached(self, argv: Sequence[str], *, log: str, env: Mapping[str, str] | None = None) -> int:
        """Start a command that goes on by itself, its output appended to ``log``; returns its process id.

        Raises: TransientError, StableError (no such command).
        """

    def default_workdir(self) -> str:
        """The absolute folder for ours on the device when the inventory names none; this user may write to
        it and execute from it. Raises: TransientError, StableError.
        """

    def close(self) -> None:
        """Give the connection back; processes started detached go on."""

    # What follows has a meaning for some transports only; ``Plain`` has it for the others.

    def not_yet(self) -> str:
        """Why a job must not be started on the device although it answers (it is booting, say); empty: it
        may. Raises: TransientError, StableError.
        """

    def reconnect(self) -> None:
        """Give every connection back; what stands between host and device (a server) connects anew, too.
        Raises: DeviceError.
        """

    def replace_server(self) -> bool:
        """Start what stands between host and device anew; False where nothing does, or where it is not ours
        to touch. Other devices behind it are out of reach for a moment. Raises: DeviceError.
        """

    def reboot(self) -> None:
        """Have the device restart; returns when it is asked. Raises: StableError where it cannot be asked or
        does not permit it; TransientError when it is gone before it answers.
        """


class Plain(ABC):
    """A device that takes jobs as soon as it answers, with nothing between it and the host, that nobody
    restarts from here."""

    answered = False
    """Set by ``run``; see ``Transport.answered``."""

    @property
    @abstractmethod
    def device(self) -> str:
        """The device's name, for messages."""

    def not_yet(self) -> str:
        """Nothing."""
        return ""

    def close(self) -> None:  # noqa: B027 - whoever has a connection gives it back
        """Nothing to give back."""

    def reconnect(self) -> None:
        """Give the connection back: the next call makes a new one."""
        self.close()

    def replace_server(self) -> bool:
        """There is none."""
        return False

    def reboot(self: Transport) -> None:
        """Raises: StableError."""
        raise StableError(
            "it is not rebooted from here.",
            "Restart it by hand, or name a reboot_command in the inventory.",
            device=self.device,
        )
