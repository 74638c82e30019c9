"""Commands: a process per stream, with pipes or a terminal, with or without packets around its output.

As on a phone: a stream ends when all holders of the output have closed it; a process whose client leaves
is sent a hang-up where packets or a terminal are between them, else only loses its pipes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import struct
import subprocess
import termios
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from orchestrator.lab.adbd import shell_format
from orchestrator.lab.adbd.shell_format import HEAD_BYTES, ShellRequest
from orchestrator.lab.adbd.stream import ExactReader, Stream, StreamClosedError

_PIPE_BYTES = 256 << 10
_WINDOW_CAP_BYTES = 64
_NOT_RUN = 127
# A session's leader that opens a terminal gets it as its own: the shell does, then becomes the command.
_ON_TERMINAL = 'exec "$@" <>"$0" >&0 2>&0'


@dataclass(frozen=True)
class ShellHost:
    """Where commands run: the shell, their environment and folder."""

    shell: str
    environment: Mapping[str, str]
    folder: Path


class _Command:
    """A running command. ``outputs``: file descriptor to the kind of packet its bytes travel in."""

    def __init__(self, process: subprocess.Popen[bytes], stdin: int, outputs: dict[int, int]) -> None:
        self.process = process
        self.stdin = stdin
        self.outputs = outputs
        self.pty = stdin in outputs
        self.takes_input = True

    def end_input(self) -> None:
        """Close the command's input; a terminal stays open for the output."""
        if self.takes_input and not self.pty:
            os.close(self.stdin)
        self.takes_input = False

    def close_outputs(self) -> None:
        """Take no more of the output; a terminal hangs up."""
        for fd in self.outputs:
            os.close(fd)


def serve_shell(stream: Stream, request: ShellRequest, host: ShellHost) -> None:
    """Run a request's command over a stream, to its end or until the client leaves."""
    try:
        command = _start(request, host)
    except OSError as error:
        _refuse(stream, request, f"cannot run {host.shell}: {error.strerror}\n".encode())
        return
    left = os.eventfd(0, os.EFD_CLOEXEC)
    ended = os.pidfd_open(command.process.pid)
    stream.when_closed(lambda: os.eventfd_write(left, 1))
    # Without packets all that the client wrote before it left is still the command's.
    stop = left if request.packets else ended
    feeder = threading.Thread(target=_feed, args=(stream, request, command, stop), daemon=True)
    feeder.start()
    present = False
    try:
        present = _pump(stream, request, command, left) and not _wait(ended, select.POLLIN, left)
        if present and request.packets:
            code = _exit_code(command.process.wait())
            stream.write(shell_format.pack_head(shell_format.EXIT, 1) + bytes([code]))
    except StreamClosedError:
        present = False
    finally:
        stream.close()
        os.eventfd_write(left, 1)
        if not present and (request.packets or request.pty) and command.process.poll() is None:
            command.process.send_signal(signal.SIGHUP)
        if not command.pty:
            command.close_outputs()
        feeder.join()
        command.end_input()
        if command.pty:
            command.close_outputs()
        os.close(left)
        os.close(ended)
    command.process.wait()


def _refuse(stream: Stream, request: ShellRequest, text: bytes) -> None:
    with contextlib.suppress(StreamClosedError):
        if request.packets:
            stream.write(shell_format.pack_head(shell_format.STDERR, len(text)) + text)
            stream.write(shell_format.pack_head(shell_format.EXIT, 1) + bytes([_NOT_RUN]))
        else:
            stream.write(text)


def _start(request: ShellRequest, host: ShellHost) -> _Command:
    argv = [host.shell, "-c", os.fsdecode(request.command)] if request.command else [host.shell, "-"]
    environment = {**host.environment, "TERM": request.terminal}
    return (_on_terminal if request.pty else _on_pipes)(argv, request, environment, host)


def _on_pipes(
    argv: list[str], request: ShellRequest, environment: Mapping[str, str], host: ShellHost
) -> _Command:
    pipes = [os.pipe() for _ in range(3 if request.packets else 2)]
    (given, stdin), *outputs = pipes
    for _, writer in outputs:
        with contextlib.suppress(OSError):  # beyond the user's limit: the usual size will do
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    os.set_blocking(stdin, False)
    try:
        process = subprocess.Popen(
            argv,
            stdin=given,
            stdout=outputs[0][1],
            stderr=outputs[-1][1],
            env=environment,
            cwd=host.folder,
            start_new_session=True,
        )
    except OSError:
        for fd in (stdin, *(reader for reader, _ in outputs)):
            os.close(fd)
        raise
    finally:
        for fd in (given, *(writer for _, writer in outputs)):
            os.close(fd)
    kinds = (shell_format.STDOUT, shell_format.STDERR)
    return _Command(process, stdin, {reader: kind for (reader, _), kind in zip(outputs, kinds, strict=False)})


def _on_terminal(
    argv: list[str], request: ShellRequest, environment: Mapping[str, str], host: ShellHost
) -> _Command:
    master, slave = os.openpty()
    os.set_blocking(master, False)
    try:
        process = subprocess.Popen(
            [host.shell, "-c", _ON_TERMINAL, os.ttyname(slave), *argv],
            stdin=subprocess.DEVNULL,
            stdout=slave,
            stderr=slave,
            env=environment,
            cwd=host.folder,
            start_new_session=True,
        )
    except OSError:
        os.close(master)
        raise
    finally:
        os.close(slave)
    return _Command(process, master, {master: shell_format.STDOUT})


def _pump(stream: Stream, request: ShellRequest, command: _Command, left: int) -> bool:
    """Send the command's output until it ends; False when the client left before."""
    head = HEAD_BYTES if request.packets else 0
    buffer = memoryview(bytearray(min(_PIPE_BYTES + head, stream.payload_bytes)))
    poll = select.poll()
    poll.register(left, select.POLLIN)
    for fd in command.outputs:
        poll.register(fd, select.POLLIN)
    open_outputs = len(command.outputs)
    while open_outputs:
        for fd, _ in poll.poll():
            if fd == left:
                return False
            try:
                count = os.readv(fd, [buffer[head:]])
            except BlockingIOError:
                continue
            except OSError:  # EIO: the terminal's last process has gone
                count = 0
            if not count:
                poll.unregister(fd)
                open_outputs -= 1
                continue
            if head:
                buffer[:head] = shell_format.pack_head(command.outputs[fd], count)
            stream.write(buffer[: head + count])
    return True


def _feed(stream: Stream, request: ShellRequest, command: _Command, stop: int) -> None:
    """Give the command what the client writes, until either is gone or ``stop`` is readable."""
    try:
        if not request.packets:
            while piece := stream.read():
                if not _write(command, piece, stop):
                    return
            return
        reader = ExactReader(stream)
        while head := shell_format.parse_head(reader.exactly(HEAD_BYTES)):
            kind, length = head
            if kind == shell_format.WINDOW_SIZE and length <= _WINDOW_CAP_BYTES:
                _resize(command, reader.exactly(length))
                continue
            for piece in reader.pieces(length):
                if kind == shell_format.STDIN and not _write(command, piece, stop):
                    return
            if kind == shell_format.CLOSE_STDIN:
                command.end_input()
    except StreamClosedError:
        return


def _write(command: _Command, data: memoryview, stop: int) -> bool:
    """Write all of ``data``, unless the command no longer reads. False: ``stop`` was readable meanwhile, and
    nothing must follow what was left out."""
    while data and command.takes_input:
        try:
            data = data[os.write(command.stdin, data) :]
        except BlockingIOError:
            if _wait(command.stdin, select.POLLOUT, stop):
                return False
        except OSError:  # EPIPE, EIO: it reads no more, which is its right
            command.end_input()
    return True


def _wait(fd: int, event: int, stop: int) -> bool:
    """Wait for an event of ``fd``; True when ``stop`` was readable first."""
    poll = select.poll()
    poll.register(stop, select.POLLIN)
    poll.register(fd, event)
    return any(ready == stop for ready, _ in poll.poll())


def _resize(command: _Command, data: bytes) -> None:
    window = shell_format.parse_window(data)
    if window is not None and command.pty:
        with contextlib.suppress(OSError):  # the terminal has just gone
            fcntl.ioctl(command.stdin, termios.TIOCSWINSZ, struct.pack("4H", *window))


def _exit_code(status: int) -> int:
    """What a shell would say of a status of ``subprocess``."""
    return status if status >= 0 else 128 - status
