"""Commands on a device over adb: run to the end, with both outputs, input, a limit and no process left.

Over shell protocol 2 (Android 7 and later) the streams come in packets: a byte of kind, four of length.
Older daemons (Android 6, API 23, is the oldest that is supported) have the service ``exec:``, one raw stream;
there the outputs come one after the other, and input is sent to a file first.

Source: AOSP packages/modules/adb, shell_protocol.h, docs/dev/services.md.
"""

from __future__ import annotations

import contextlib
import struct
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

import structlog

from orchestrator.errors import CommandTimeoutError, DeviceError, StableError, TransientError
from orchestrator.transports.adb_link import AdbLink
from orchestrator.transports.adb_script import StatusFilter, command_script, kill_script, new_mark
from orchestrator.transports.adb_socket import AdbSocket, ProtocolError
from orchestrator.transports.base import Completed

_STDIN, _STDOUT, _STDERR, _EXIT, _CLOSE_STDIN = 0, 1, 2, 3, 4
_HEADER = struct.Struct("<BI")
_BLOCK_BYTES = 1 << 16
_PACKET_CAP_BYTES = 16 << 20
"""No daemon sends packets near it: what claims to be longer is no packet."""

_COMMAND_CAP_BYTES = {True: 32_000, False: 4_000}
"""Longest text of a command, for daemons with shell protocol 2 and without: one message to them holds it."""

_MARKS = 16
"""So many commands are ended by one: what names them has to fit into the length above."""

_DRAIN_S = 1.0
_KILL_S = 10.0

_log = structlog.get_logger()


class AdbShell:
    """Commands on one device."""

    def __init__(self, link: AdbLink) -> None:
        self._link = link
        self._orphans: list[str] = []
        """Marks of commands that may still run: the link was lost before they could be ended."""

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout_s: float,
        env: Mapping[str, str],
        cap_bytes: int,
        stdin: Iterable[bytes] | None,
        stdin_file: str | None = None,
    ) -> Completed:
        """See ``Transport.run``. ``stdin`` needs shell protocol 2; ``stdin_file``: a file on the device."""
        deadline = time.monotonic() + timeout_s
        mark = new_mark()
        packets = self.has_packets()
        source = "" if stdin is not None else stdin_file
        try:
            script = command_script(argv, env, mark, stdin=source, merged=not packets)
        except ValueError as error:
            raise StableError(
                f"{argv[0] if argv else 'nothing'} cannot be run: {error}.",
                "Correct it.",
                device=self._link.device,
            ) from error
        if len(script) > _COMMAND_CAP_BYTES[packets]:
            raise StableError(
                f"{argv[0]} cannot be run: its arguments are {len(script)} bytes long, and adb takes"
                f" {_COMMAND_CAP_BYTES[packets]} at most.",
                "Pass what is long in a file.",
                device=self._link.device,
            )
        self._end_orphans()
        service = (b"shell,v2,raw:" if packets else b"exec:") + script
        outputs = _Outputs(mark, cap_bytes)
        try:
            link = self._link.open(service, deadline - time.monotonic())
        except TransientError as error:
            self._orphans.append(mark)  # a device that hangs may still start it
            if isinstance(error.__cause__, TimeoutError) and time.monotonic() >= deadline:
                raise self._failed(TimeoutError(), argv, timeout_s) from error
            raise
        feed = None if stdin is None else _Feed(link, stdin)
        try:
            _receive(link, outputs, deadline, packets=packets)
        except (EOFError, ConnectionError, ProtocolError, ValueError) as error:
            self._orphans.append(mark)
            if feed is None or feed.error is None:
                raise self._failed(error, argv, timeout_s) from error
        except BaseException as error:
            link.hang_up()
            self.end(mark)
            if isinstance(error, OSError):
                raise self._failed(error, argv, timeout_s) from error
            raise
        finally:
            link.hang_up()
            if feed is not None:
                feed.join(_DRAIN_S)
            link.close()
        if feed is not None and feed.error is not None:
            self.end(mark)
            raise feed.error
        return self._completed(tuple(argv), outputs)

    def has_packets(self) -> bool:
        """Whether the daemon has shell protocol 2. Raises: TransientError, StableError."""
        return "shell_v2" in self._link.features()

    def _completed(self, argv: tuple[str, ...], outputs: _Outputs) -> Completed:
        status = outputs.filter.status
        if status is not None and status.refusal:
            raise StableError(
                f"{argv[0]} cannot be run: {status.refusal}.",
                "Check the path, its permissions and the installation.",
                device=self._link.device,
            )
        code = outputs.shell_code
        if status is not None:
            code = status.exit_code
        elif code is not None and code > 128:
            code = 128 - code  # the whole group was ended, its shell with it
        else:
            said = outputs.stderr.text() or f"it ended with {code}"
            raise StableError(
                f"the device's shell did not run {argv[0]}: {said}.",
                "Look whether sh works on the device.",
                device=self._link.device,
            )
        stdout, stderr = outputs.stdout, outputs.stderr
        return Completed(
            argv, code, bytes(stdout.kept), bytes(stderr.kept), stdout.truncated or stderr.truncated
        )

    def _failed(self, error: Exception, argv: Sequence[str], timeout_s: float) -> DeviceError:
        if isinstance(error, TimeoutError):
            return CommandTimeoutError(
                f"{' '.join(argv)[:200]} did not end within {timeout_s:g} s and was killed.",
                "Try again; if it happens again, look at the load of the device.",
                device=self._link.device,
            )
        if isinstance(error, ValueError):
            error = ProtocolError(f"{error}.")
        return self._link.lost(error)

    def end(self, mark: str) -> None:
        """End what a command started, and remove the temporary file of that name: now, or before the next
        command where the device cannot be reached."""
        if mark not in self._orphans:
            self._orphans.append(mark)
        try:
            self._end_orphans()
        except DeviceError as error:
            _log.info("a command may still run", device=self._link.device, mark=mark, cause=error.what)

    def _end_orphans(self) -> None:
        while marks := self._orphans[:_MARKS]:
            self._end_some(marks)

    def _end_some(self, marks: Sequence[str]) -> None:
        service = b"shell,v2,raw:" if self.has_packets() else b"exec:"
        with self._link.open(service + kill_script(marks), _KILL_S) as link:
            until = time.monotonic() + _KILL_S
            try:
                while link.some(_BLOCK_BYTES):
                    if time.monotonic() > until:
                        raise TimeoutError("timed out")
            except OSError as error:
                raise self._link.lost(error) from error
        for mark in marks:
            with contextlib.suppress(ValueError):  # another thread was faster
                self._orphans.remove(mark)


class _Kept:
    """The first bytes of an output."""

    def __init__(self, cap_bytes: int) -> None:
        self._cap_bytes = cap_bytes
        self.kept = bytearray()
        self.truncated = False

    def add(self, data: bytes) -> None:
        room = self._cap_bytes - len(self.kept)
        self.kept += data[:room]
        self.truncated = self.truncated or len(data) > room

    def text(self) -> str:
        """The end of it, for messages."""
        return bytes(self.kept[-300:]).decode(errors="replace").strip()


class _Outputs:
    """What a command has said so far, and how its shell ended: ``shell_code``, None as long as unknown."""

    def __init__(self, mark: str, cap_bytes: int) -> None:
        self.stdout, self.stderr = _Kept(cap_bytes), _Kept(cap_bytes)
        self.filter = StatusFilter(mark)
        self.shell_code: int | None = None

    def take_stdout(self, data: bytes) -> bytes:
        """Returns what came behind the status line."""
        before, after = self.filter.feed(data)
        self.stdout.add(before)
        return after


def _receive(link: AdbSocket, outputs: _Outputs, deadline: float, *, packets: bool) -> None:
    """Read until the command has ended. Raises: OSError, EOFError, ProtocolError, ValueError."""
    unpack = _Packets()
    drained = deadline
    while True:
        now = time.monotonic()
        ended = outputs.filter.status is not None
        if ended:
            # A process that left the group may hold the streams open for ever.
            drained = min(drained, now + _DRAIN_S)
        if now >= drained:
            if ended:
                return
            raise TimeoutError("timed out")
        if not link.readable(drained - now):
            continue
        try:
            data = link.some(_BLOCK_BYTES)
        except OSError:
            if ended:
                return
            raise
        if not data:
            break
        if not packets:
            outputs.stderr.add(outputs.take_stdout(data))
            continue
        for kind, block in unpack.feed(data):
            if kind == _STDOUT:
                outputs.take_stdout(block)
            elif kind == _STDERR:
                outputs.stderr.add(block)
            elif kind == _EXIT:
                outputs.shell_code = block[0]
                outputs.stdout.add(outputs.filter.rest())
                return
    if outputs.filter.status is None:
        raise EOFError("the connection was closed")


class _Packets:
    """Takes a stream of shell packets apart. A long packet comes in pieces: none is kept as a whole."""

    def __init__(self) -> None:
        self._held = b""
        self._kind, self._left = 0, 0

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """(kind, piece) of what has come. Raises: ProtocolError."""
        data = self._held + data
        at = 0
        while at < len(data):
            if self._left == 0:
                if len(data) - at < _HEADER.size:
                    break
                self._kind, self._left = _HEADER.unpack_from(data, at)
                at += _HEADER.size
                if self._left > _PACKET_CAP_BYTES:
                    raise ProtocolError(f"a packet of {self._left} bytes.")
                continue
            piece = data[at : at + self._left]
            at += len(piece)
            self._left -= len(piece)
            yield self._kind, piece
        self._held = data[at:]


class _Feed:
    """Sends a command's input from a thread; ``error`` is what the source of the input raised.

    The connection is ended then: half of an input must not pass for all of it.
    """

    def __init__(self, link: AdbSocket, source: Iterable[bytes]) -> None:
        self._link, self._source = link, source
        self.error: Exception | None = None
        link.socket.settimeout(None)  # a command may take its time to read
        self._thread = threading.Thread(target=self._feed, daemon=True)
        self._thread.start()

    def _feed(self) -> None:
        blocks = iter(self._source)
        while True:
            try:
                block = next(blocks, None)
            except Exception as error:  # noqa: BLE001 - of the caller's own making; raised again in run()
                self.error = error
                self._link.hang_up()
                return
            try:
                if block is None:
                    self._link.send(_HEADER.pack(_CLOSE_STDIN, 0))
                    return
                for at in range(0, len(block), _BLOCK_BYTES):
                    piece = block[at : at + _BLOCK_BYTES]
                    self._link.send(_HEADER.pack(_STDIN, len(piece)) + piece)
            except OSError:
                return  # the command ended; its input is not wanted any more

    def join(self, timeout_s: float) -> None:
        """Wait until the input was sent or the command has gone."""
        self._thread.join(timeout_s)
