"""The file service: stat, list, send and receive files, in both of its versions."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from orchestrator.lab.adbd import sync_format
from orchestrator.lab.adbd.compression import CODECS, CodecError, Decompressor
from orchestrator.lab.adbd.stream import ExactReader, Stream, StreamClosedError
from orchestrator.lab.adbd.sync_format import DATA_CAP_BYTES, DRY_RUN, HEAD

_LISTING_BYTES = 64 << 10


class _RefusedError(Exception):
    """A transfer that failed; its text is for the client, and the service goes on."""


class _MalformedError(Exception):
    """A message that is none; its text is for the client, and the service ends."""


def _because(what: str, error: OSError) -> _RefusedError:
    return _RefusedError(f"{what}: {error.strerror}")


def serve_sync(stream: Stream, features: frozenset[str]) -> None:
    """Answer requests until the client says QUIT, leaves, or breaks the protocol."""
    with contextlib.suppress(StreamClosedError):
        try:
            _Session(stream, features).serve()
        except _MalformedError as error:
            stream.write(sync_format.failure(str(error)))


@dataclass
class _Sink:
    """Where sent data goes; ``fd`` None: nowhere."""

    fd: int | None
    decompressor: Decompressor | None

    def take(self, pieces: Iterator[memoryview]) -> None:
        """Write what was received. Raises: _RefusedError."""
        for piece in pieces:
            if self.decompressor is None:
                self._write(piece)
                continue
            try:
                for plain in self.decompressor.feed(piece):
                    self._write(memoryview(plain))
            except CodecError as error:
                raise _RefusedError(f"decompression failed: {error}") from error

    def finish(self) -> None:
        """Raises: _RefusedError when a compressed stream is not complete."""
        if self.decompressor is not None and not self.decompressor.complete:
            raise _RefusedError("decompression failed: the stream is incomplete")

    def _write(self, data: memoryview) -> None:
        while data and self.fd is not None:
            try:
                data = data[os.write(self.fd, data) :]
            except OSError as error:
                raise _because("write failed", error) from error


class _Session:
    def __init__(self, stream: Stream, features: frozenset[str]) -> None:
        self._stream = stream
        self._reader = ExactReader(stream)
        self._features = features
        self._rest = 0  # bytes of the current DATA message that have not come yet
        self._done = True
        self._time = 0
        self._requests: dict[bytes, Callable[[bytes], None]] = {
            b"STAT": self._stat_1,
            b"LIST": lambda path: self._list(path, second=False),
            b"SEND": self._send_1,
            b"RECV": lambda path: self._receive(path, ""),
        }
        if "stat_v2" in features:
            self._requests[b"STA2"] = lambda path: self._stat_2(b"STA2", path, os.stat)
            self._requests[b"LST2"] = lambda path: self._stat_2(b"LST2", path, os.lstat)
        if "ls_v2" in features:
            self._requests[b"LIS2"] = lambda path: self._list(path, second=True)
        if "sendrecv_v2" in features:
            self._requests[b"SND2"] = self._send_2
            self._requests[b"RCV2"] = self._receive_2

    def serve(self) -> None:
        """Answer one request after the other. Raises: _MalformedError, StreamClosedError."""
        while True:
            name, length = HEAD.unpack(self._reader.exactly(HEAD.size))
            if name == b"QUIT":
                return
            if length > sync_format.PATH_CAP_BYTES:
                raise _MalformedError("path too long")
            request = self._requests.get(name)
            if request is None:
                raise _MalformedError(f"unknown command {name.hex()}")
            path = self._reader.exactly(length)
            if b"\0" in path:
                raise _MalformedError("a path with a zero byte")
            try:
                request(path)
            except _RefusedError as error:
                self._stream.write(sync_format.failure(str(error)))

    # ------------------------------------------------------------- looking

    def _stat_1(self, path: bytes) -> None:
        try:
            status = os.lstat(path)
        except OSError:
            status = None
        self._stream.write(sync_format.stat_1(status))

    def _stat_2(self, name: bytes, path: bytes, look: Callable[[bytes], os.stat_result]) -> None:
        try:
            answer = sync_format.stat_2(name, look(path), 0)
        except OSError as error:
            answer = sync_format.stat_2(name, None, error.errno or 0)
        self._stream.write(answer)

    def _list(self, path: bytes, *, second: bool) -> None:
        answer = bytearray()
        for name in (b".", b"..", *self._names(path)):
            try:
                answer += sync_format.entry(name, os.lstat(os.path.join(path, name)), 0, second=second)  # noqa: PTH118
            except OSError as error:
                answer += sync_format.entry(name, None, error.errno or 0, second=second)
            if len(answer) >= _LISTING_BYTES:
                self._stream.write(bytes(answer))
                answer.clear()
        self._stream.write(bytes(answer + sync_format.listing_end(second=second)))

    @staticmethod
    def _names(path: bytes) -> list[bytes]:
        # The protocol cannot say why a folder is not listed: the listing is empty.
        try:
            return os.listdir(path)  # noqa: PTH208 - names in bytes, whatever their encoding
        except OSError:
            return []

    # ----------------------------------------------------- from the client

    def _send_1(self, argument: bytes) -> None:
        parsed = sync_format.parse_send_name(argument)
        if parsed is None:
            raise _MalformedError("a name to send without its mode")
        self._take(*parsed, flags=0)

    def _send_2(self, path: bytes) -> None:
        name, mode, flags = sync_format.SEND_2.unpack(self._reader.exactly(sync_format.SEND_2.size))
        if name != b"SND2":
            raise _MalformedError("a send without its setup")
        self._take(path, mode, flags)

    def _take(self, path: bytes, mode: int, flags: int) -> None:
        """Receive a file, a link's target, or (a dry run) nothing that stays."""
        codec = self._codec(flags)
        dry = bool(flags & DRY_RUN)
        if dry and "sendrecv_v2_dry_run_send" not in self._features:
            raise _MalformedError("an unknown flag")
        self._rest, self._done = 0, False
        try:
            if stat.S_ISLNK(mode):
                self._take_link(path)
            else:
                self._take_file(path, mode, CODECS[codec].decompressor() if codec else None, dry=dry)
        except _RefusedError as error:
            # Said at once, so that the client may stop; one that goes on is listened to, to the end.
            self._stream.write(sync_format.failure(str(error)))
            self._skip()
        else:
            self._stream.write(sync_format.message(b"OKAY", 0))

    def _pieces(self) -> Iterator[memoryview]:
        """What DATA messages bring; returns at DONE, with its time in ``self._time``."""
        while True:
            for piece in self._reader.pieces(self._rest):
                self._rest -= len(piece)
                yield piece
            name, number = HEAD.unpack(self._reader.exactly(HEAD.size))
            if name == b"DONE":
                self._done, self._time = True, number
                return
            if name != b"DATA":
                raise _MalformedError("invalid data message")
            if number > DATA_CAP_BYTES:
                raise _MalformedError("oversize data message")
            self._rest = number

    def _skip(self) -> None:
        if not self._done:
            for _ in self._pieces():
                pass

    def _take_file(self, path: bytes, mode: int, decompressor: Decompressor | None, *, dry: bool) -> None:
        sink = _Sink(None if dry else _create(path, mode), decompressor)
        try:
            sink.take(self._pieces())
            sink.finish()
            if sink.fd is not None:
                os.utime(sink.fd, (self._time, self._time))
        except BaseException:  # also when the client leaves: half a file is none
            if sink.fd is not None and stat.S_ISREG(os.fstat(sink.fd).st_mode):
                with contextlib.suppress(OSError):  # somebody was faster
                    os.unlink(path)  # noqa: PTH108 - a path in bytes
            raise
        finally:
            if sink.fd is not None:
                os.close(sink.fd)

    def _take_link(self, path: bytes) -> None:
        target = bytearray()
        for piece in self._pieces():
            target += piece[: max(sync_format.PATH_CAP_BYTES + 1 - len(target), 0)]
        try:
            _make_room(path)
            os.symlink(bytes(target).rstrip(b"\0"), path)  # noqa: PTH211
        except OSError as error:
            raise _because("symlink failed", error) from error
        except ValueError as error:
            raise _RefusedError("symlink failed: a target with a zero byte") from error

    # ------------------------------------------------------- to the client

    def _receive_2(self, path: bytes) -> None:
        name, flags = sync_format.RECEIVE_2.unpack(self._reader.exactly(sync_format.RECEIVE_2.size))
        if name != b"RCV2" or flags & DRY_RUN:
            raise _MalformedError("a receive without its setup")
        self._receive(path, self._codec(flags))

    def _receive(self, path: bytes, codec: str) -> None:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _because("open failed", error) from error
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            self._send_compressed(fd, codec) if codec else self._send_plain(fd)
        except OSError as error:
            raise _because("read failed", error) from error
        finally:
            os.close(fd)
        self._stream.write(sync_format.message(b"DONE", 0))

    def _send_plain(self, fd: int) -> None:
        """Messages of the longest size, as many in a packet as it takes, read straight into their place."""
        step = HEAD.size + DATA_CAP_BYTES
        room = max(self._stream.payload_bytes // step, 1) * step
        buffer = memoryview(bytearray(room))
        while True:
            filled = 0
            while filled + step <= room:
                count = os.readv(fd, [buffer[filled + HEAD.size : filled + step]])
                if not count:
                    break
                HEAD.pack_into(buffer, filled, b"DATA", count)
                filled += HEAD.size + count
            if not filled:
                return
            self._stream.write(buffer[:filled])

    def _send_compressed(self, fd: int, codec: str) -> None:
        compressor = CODECS[codec].compressor()
        buffer = memoryview(bytearray(DATA_CAP_BYTES * 4))
        while count := os.readv(fd, [buffer]):
            self._send_data(compressor.feed(buffer[:count]))
        self._send_data(compressor.finish())

    def _send_data(self, data: bytes) -> None:
        for start in range(0, len(data), DATA_CAP_BYTES):
            part = data[start : start + DATA_CAP_BYTES]
            self._stream.write(sync_format.message(b"DATA", len(part), part))

    def _codec(self, flags: int) -> str:
        codec = sync_format.compression_of(flags)
        if codec is None or (codec and f"sendrecv_v2_{codec}" not in self._features):
            raise _MalformedError("an unknown flag")
        return codec


def _make_room(path: bytes) -> None:
    """Remove the file or link at a path, or make its parent folders; devices and folders stay."""
    try:
        mode = os.lstat(path).st_mode
        if stat.S_ISREG(mode) or stat.S_ISLNK(mode):
            os.unlink(path)  # noqa: PTH108 - paths in bytes, whatever their encoding
    except FileNotFoundError:
        os.makedirs(os.path.dirname(path) or b".", exist_ok=True)  # noqa: PTH103, PTH120


def _create(path: bytes, mode: int) -> int:
    """A new file in the place of an old one; a device is opened as it is. Raises: _RefusedError."""
    permissions = mode & 0o777
    # As Android does: everybody gets what the owner's bits say.
    permissions |= (permissions >> 3) & 0o070
    permissions |= (permissions >> 3) & 0o007
    try:
        _make_room(path)
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, permissions)
        except FileExistsError:
            return os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        os.fchmod(fd, permissions)
    except OSError as error:
        raise _because("couldn't create file", error) from error
    return fd
