"""adb's file service: stat, send and receive on one connection, compressed where the device can.

Source: AOSP packages/modules/adb, docs/dev/sync.md and file_sync_protocol.h. All numbers are little endian. A
request is four letters, the length of a path, the path. Data travels in blocks of at most 64 KiB, each with
its letters and length; an end or a failure has the same form.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

import zstandard

from orchestrator.transports.adb_socket import AdbSocket, ProtocolError

BLOCK_BYTES = 1 << 16
_ANSWER_S = 60.0
_DONE_S = 300.0
"""How long a device may take to write out what it was sent."""

_TEXT_CAP_BYTES = 4096
_WINDOW_CAP_BYTES = 8 << 20
_BLOCK_COST_BYTES = 1 << 10
"""What a block counts at least: empty ones must come to an end, too."""

_UNASKED_CAP_BYTES = 1 << 20
"""Of a file whose size nobody has asked for: it is looked at, not fetched."""

_ZSTD_FLAG = 4
_ZSTD_LEVEL = 1
"""The fastest: what is sent is mostly quantized weights, of which no level takes much away."""

_HEAD = struct.Struct("<4sI")
_SEND_2 = struct.Struct("<4sII")
_RECEIVE_2 = struct.Struct("<4sI")
_STAT_1 = struct.Struct("<4sIII")
_STAT_2 = struct.Struct("<4sIQQIIIIQqqq")

COMPRESSION_FEATURE = "sendrecv_v2_zstd"
STAT_FEATURE = "stat_v2"


class SyncError(Exception):
    """The device's daemon refused; ``code`` is the errno that its text stands for, 0 for another text."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.text, self.code = text, code


@dataclass(frozen=True)
class FileStat:
    """What a file is."""

    mode: int
    size_bytes: int

    @property
    def regular(self) -> bool:
        """Whether it is a plain file."""
        return stat.S_ISREG(self.mode)


class SyncSession:
    """One connection to the file service. After an error it is of no use."""

    def __init__(self, link: AdbSocket, features: frozenset[str]) -> None:
        self._link = link
        self._stat_2 = STAT_FEATURE in features
        self._zstd = COMPRESSION_FEATURE in features
        self._whole = True
        self._room = 0
        link.limit(_ANSWER_S)

    @property
    def usable(self) -> bool:
        """Whether another request may follow: the last one was answered to its end, and nobody hung up."""
        return self._whole and not self._link.readable(0)

    def close(self) -> None:
        """End the connection."""
        self._link.close()

    def stat(self, path: str) -> FileStat:
        """What is at a path; symbolic links are followed where the daemon can (else they are what is told).

        Raises: SyncError, ProtocolError, OSError, EOFError.
        """
        self._link.send(_request(b"STA2" if self._stat_2 else b"STAT", path))
        if self._stat_2:
            answer = _STAT_2.unpack(self._link.exactly(_STAT_2.size))
            self._expect(answer[0], b"STA2")
            if answer[1] != 0:
                raise SyncError(_words(answer[1]), answer[1])
            return FileStat(answer[4], answer[8])
        letters, mode, size, _ = _STAT_1.unpack(self._link.exactly(_STAT_1.size))
        self._expect(letters, b"STAT")
        if mode == 0:  # the old form does not say why; to receive it does
            for _ in self.receive(path, compressed=False):
                break
            raise SyncError("cannot be looked at", 0)
        return FileStat(mode, size)

    def send(self, path: str, blocks: Iterable[bytes], *, mode: int, mtime_s: int) -> None:
        """Write a file. Raises: SyncError, ProtocolError, OSError, EOFError; what ``blocks`` raises."""
        if self._zstd:
            head = _request(b"SND2", path) + _SEND_2.pack(b"SND2", stat.S_IFREG | mode, _ZSTD_FLAG)
            blocks = _compressed(blocks)
        else:
            head = _request(b"SEND", f"{path},{stat.S_IFREG | mode}")
        try:
            self._link.send(head)
            for block in blocks:
                for at in range(0, len(block), BLOCK_BYTES):
                    piece = block[at : at + BLOCK_BYTES]
                    self._link.send(_HEAD.pack(b"DATA", len(piece)) + piece)
                if self._link.readable(0):
                    break  # it speaks before the end: it refuses
            else:
                self._link.send(_HEAD.pack(b"DONE", mtime_s & 0xFFFFFFFF))
        except (BrokenPipeError, ConnectionResetError):
            if not self._link.readable(0):
                raise
        self._link.limit(_DONE_S)
        letters, length = _HEAD.unpack(self._link.exactly(_HEAD.size))
        self._refused(letters, length)
        self._expect(letters, b"OKAY")
        self._link.limit(_ANSWER_S)

    def receive(
        self, path: str, *, compressed: bool = True, limit_bytes: int = _UNASKED_CAP_BYTES
    ) -> Iterator[bytes]:
        """The blocks of a file, of at most ``limit_bytes`` on the wire: a device need not come to an end.

        Raises: SyncError, ProtocolError, OSError, EOFError.
        """
        self._whole = False
        self._room = limit_bytes
        if not (self._zstd and compressed):
            self._link.send(_request(b"RECV", path))
            yield from iter(self._data, b"")
            self._whole = True
            return
        self._link.send(_request(b"RCV2", path) + _RECEIVE_2.pack(b"RCV2", _ZSTD_FLAG))
        # Read in steps: a small block may stand for very much data.
        decompressor = zstandard.ZstdDecompressor(max_window_size=_WINDOW_CAP_BYTES)
        source = _Source(self._data)
        stream = cast(BinaryIO, source)
        try:
            with decompressor.stream_reader(stream, read_size=BLOCK_BYTES, read_across_frames=True) as reader:
                yield from iter(lambda: reader.read(BLOCK_BYTES), b"")
        except zstandard.ZstdError as error:
            raise ProtocolError(f"compressed data that is none ({error}).") from error
        source.finish()
        self._whole = True

    def _data(self) -> bytes:
        """The next block of a file; empty at its end."""
        while True:
            letters, length = _HEAD.unpack(self._link.exactly(_HEAD.size))
            self._refused(letters, length)
            if letters == b"DONE":
                return b""
            self._expect(letters, b"DATA")
            if length > BLOCK_BYTES:
                raise ProtocolError(f"a block of {length} bytes.")
            self._room -= max(length, _BLOCK_COST_BYTES)
            if self._room < 0:
                raise ProtocolError("a file that does not end.")
            if length:
                return self._link.exactly(length)

    def _refused(self, letters: bytes, length: int) -> None:
        if letters == b"FAIL":
            if length > _TEXT_CAP_BYTES:
                raise ProtocolError(f"an error text of {length} bytes.")
            text = self._link.exactly(length).decode(errors="replace").strip()
            raise SyncError(text, code_of(text))

    @staticmethod
    def _expect(letters: bytes, wanted: bytes) -> None:
        if letters != wanted:
            raise ProtocolError(f"{letters!r} instead of {wanted.decode()}.")


class _Source:
    """Compressed blocks as a file to read."""

    def __init__(self, data: Callable[[], bytes]) -> None:
        self._data, self._held, self._ended = data, b"", False

    def read(self, limit: int) -> bytes:
        if not self._held and not self._ended:
            self._held = self._data()
            self._ended = not self._held
        block, self._held = self._held[:limit], self._held[limit:]
        return block

    def finish(self) -> None:
        """Take what is left: at most the end."""
        if not self._ended and self.read(1):
            raise ProtocolError("data behind the compressed file.")


def _compressed(blocks: Iterable[bytes]) -> Iterator[bytes]:
    compressor = zstandard.ZstdCompressor(level=_ZSTD_LEVEL).compressobj()
    for block in blocks:
        yield compressor.compress(block)
    yield compressor.flush()


def _request(letters: bytes, path: str) -> bytes:
    name = path.encode("utf-8", errors="surrogateescape")
    return _HEAD.pack(letters, len(name)) + name


def _words(code: int) -> str:
    return os.strerror(code) if code in errno.errorcode else f"error {code}"


def code_of(text: str) -> int:
    """The errno whose words a text of the device ends with; 0: none."""
    for code in errno.errorcode:
        if text.endswith(os.strerror(code)):
            return code
    return 0
