"""A command over an ssh connection: its outputs apart, its input block by block, its end in time."""

from __future__ import annotations

import re
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import paramiko
from paramiko.channel import Channel

from orchestrator.errors import CommandTimeoutError, LinkError, StableError
from orchestrator.transports.base import Completed
from orchestrator.transports.ssh_channels import UnansweredError, request, send
from orchestrator.transports.ssh_script import LAUNCH, command_line, not_run
from orchestrator.transports.ssh_sessions import Sessions, Warden, no_shell

UNNAMED_SIGNAL = 65
"""For a signal that the server has no name for: beyond those of Linux."""

_QUIET_S = 2.0
_STEP_S = 0.2
_READ_BYTES = 1 << 16
_NOISE_BYTES = 1 << 16
_PIECE_BYTES = (32 << 10) - 64
"""What a packet to OpenSSH holds. The library copies all that is left of a block for every packet of it."""

Sink = Callable[[bytes], None]


def execute(
    sessions: Sessions,
    warden: Warden,
    argv: Sequence[str],
    *,
    device: str,
    timeout_s: float,
    env: Mapping[str, str],
    cap_bytes: int,
    stdin: Iterable[bytes] | None = None,
    sink: Sink | None = None,
    keep: bool = False,
) -> Completed:
    """Run a command to its end; see ``Transport.run``. ``sink`` gets its output, block by block, instead of
    the result; ``keep``: leave what it started alone. Raises: as Transport.run, and what ``sink`` raises."""
    token = secrets.token_hex(12)
    try:
        line = command_line(argv, env, token, has_input=stdin is not None)
    except ValueError as error:
        name = argv[0] if argv else "nothing"
        raise StableError(f"{name} cannot be run: {error}.", "Correct the command.", device=device) from error
    with sessions.command() as channel:
        run = _Run(channel, token, cap_bytes, sink, time.monotonic() + timeout_s)
        try:
            run.start(line)
            group = run.group()
            if group is None:
                ended = run.wait()
            elif keep:
                ended = run.go(stdin)
            else:
                ended = _guarded(run, warden, group, token, stdin)
            if ended:
                run.drain()
        except UnansweredError as error:
            raise _late(argv, timeout_s, device) from error
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise sessions.lost() from error
        if run.error is not None:
            raise run.error
        if not ended:
            raise _late(argv, timeout_s, device)
        if group is None:
            code = run.exit_code()
            if code is None or code < 0:  # the board goes down: a shell without use for commands exits
                raise sessions.lost()
            raise no_shell(run.stderr.before() or run.stdout.before(), device)
        return _completed(run, argv, token, device)


def _late(argv: Sequence[str], timeout_s: float, device: str) -> CommandTimeoutError:
    return CommandTimeoutError(
        f"{' '.join(argv)[:200]} did not end within {timeout_s:g} s and was killed.",
        "Try again; if it happens again, look at the load of the device.",
        device=device,
    )


def _guarded(run: _Run, warden: Warden, group: int, token: str, stdin: Iterable[bytes] | None) -> bool:
    """Let the command go and wait for its end, whether it came in time; nothing of its group is left then."""
    warden.watch(group, token)
    try:
        return run.go(stdin)
    finally:
        warden.end(group, token)
        run.settle()


def _completed(run: _Run, argv: Sequence[str], token: str, device: str) -> Completed:
    stdout, stderr = bytes(run.stdout.kept), bytes(run.stderr.kept)
    code = run.exit_code()
    if code is None:
        raise LinkError(f"the ssh server did not say how {argv[0]} ended.", "Try again.", device=device)
    why = not_run(bytes(run.stderr.tail), code, token)
    if why is not None:
        raise StableError(
            f"{argv[0]} cannot be run: {why}.",
            "Check the path, its permissions and the installation.",
            device=device,
        )
    return Completed(tuple(argv), code, stdout, stderr, run.stdout.truncated or run.stderr.truncated)


class _Output:
    """One output of a command: what follows the line with its token, up to a cap."""

    def __init__(self, marker: re.Pattern[bytes], cap_bytes: int, sink: Sink | None) -> None:
        self._marker, self._cap_bytes, self._sink = marker, cap_bytes, sink
        self._before = b""
        self.found: re.Match[bytes] | None = None
        self.kept, self.tail = bytearray(), bytearray()
        self.truncated = False

    def before(self) -> str:
        """What was said by others than the command, which never came."""
        return self._before.decode(errors="replace").strip()

    def feed(self, data: bytes) -> None:
        """More of the output. What login scripts say before the command is dropped."""
        if self.found is None:
            self._before += data
            self.found = self._marker.search(self._before)
            if self.found is None:
                self._before = self._before[-_NOISE_BYTES:]
                return
            data, self._before = self._before[self.found.end() :], b""
        if self._sink is not None:
            if data:
                self._sink(data)
            return
        room = self._cap_bytes - len(self.kept)
        self.kept += data[:room]
        self.truncated = self.truncated or len(data) > room
        self.tail = (self.tail + data)[-512:]


class _Run:
    """A command on a channel: its outputs are read, and its input written, by threads."""

    def __init__(
        self, channel: Channel, token: str, cap_bytes: int, sink: Sink | None, deadline: float
    ) -> None:
        self._channel, self._deadline = channel, deadline
        word = token.encode()
        self.stdout = _Output(re.compile(b"\n" + word + b" ([0-9]{1,9})\n"), cap_bytes, sink)
        self.stderr = _Output(re.compile(word + b"\n"), cap_bytes, None)
        self.error: Exception | None = None
        self._heard = threading.Event()  # the group is known, or the output has ended
        self._done = threading.Event()  # the command has ended, or its input or output failed here
        self._moved = time.monotonic()
        self._threads: list[threading.Thread] = []

    def start(self, line: bytes) -> None:
        """Send the command off; it waits for ``go``. Raises: UnansweredError, OSError,
        paramiko.SSHException."""
        channel = self._channel
        channel.settimeout(None)
        request(channel, "exec", LAUNCH, self._left_s())
        send(channel, line, self._left_s())
        jobs: list[Callable[[], None]] = [
            lambda: self._read(channel.recv, self.stdout),
            lambda: self._read(channel.recv_stderr, self.stderr),
            self._await_end,
        ]
        for job in jobs:
            self._begin(job)

    def go(self, stdin: Iterable[bytes] | None) -> bool:
        """Let the command begin, with its input; see ``wait``. Raises: UnansweredError, OSError."""
        send(self._channel, b"\n", self._left_s())
        if stdin is None:
            self._channel.shutdown_write()
        else:
            self._begin(lambda: self._feed(stdin))
        return self.wait()

    def _begin(self, job: Callable[[], None]) -> None:
        thread = threading.Thread(target=job, daemon=True)
        thread.start()
        self._threads.append(thread)

    def group(self) -> int | None:
        """The command's process group as it was announced; None when the command ended before."""
        self._heard.wait(self._left_s())
        found = self.stdout.found
        return None if found is None else int(found[1])

    def wait(self) -> bool:
        """Wait for the command's end; whether it came in time."""
        return self._done.wait(self._left_s())

    def _left_s(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def settle(self) -> None:
        """Let the server say how a command ended that was killed: the next one begins after that."""
        self._channel.status_event.wait(_QUIET_S)

    def drain(self) -> None:
        """Wait for the rest of the outputs; what left the group may hold them open, or talk on, for ever."""
        self._moved = now = time.monotonic()
        until = max(self._deadline, now + _QUIET_S)
        for thread in self._threads[:2]:
            while thread.is_alive() and now - self._moved < _QUIET_S and now < until:
                thread.join(_STEP_S)
                now = time.monotonic()
        self._channel.close()
        for thread in self._threads:
            thread.join(_QUIET_S)

    def exit_code(self) -> int | None:
        """0 to 255, negative for a signal, None when the server did not say."""
        name = getattr(self._channel, "exit_signal", None)
        if name is not None:
            return -int(getattr(signal, f"SIG{name}", UNNAMED_SIGNAL))
        code = self._channel.exit_status
        return code if 0 <= code < 256 else None

    def _read(self, receive: Callable[[int], bytes], output: _Output) -> None:
        try:
            while data := receive(_READ_BYTES):
                self._moved = time.monotonic()
                output.feed(data)
                if self.stdout.found is not None:
                    self._heard.set()
        except Exception as error:  # noqa: BLE001 - of the sink's making; raised again in execute()
            self._fail(error)
        finally:
            if output is self.stdout:
                self._heard.set()

    def _await_end(self) -> None:
        self._channel.status_event.wait()
        self._done.set()

    def _feed(self, source: Iterable[bytes]) -> None:
        try:
            for block in source:
                for at in range(0, len(block), _PIECE_BYTES):
                    self._channel.sendall(block[at : at + _PIECE_BYTES])
            self._channel.shutdown_write()
        except OSError as error:
            if not self._channel.closed:
                self._fail(error)
        except Exception as error:  # noqa: BLE001 - of the caller's own making; raised again in execute()
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self.error = error
        self._done.set()
