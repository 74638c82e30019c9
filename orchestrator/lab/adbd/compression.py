"""The compressions of file transfer, as far as their packages are installed: brotli, lz4, zstd.

A codec gives streams: a compressor with ``feed`` and ``finish``, a decompressor whose ``feed`` yields its
output in pieces of bounded size, for a peer's 64 KiB may stand for gigabytes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

PIECE_BYTES = 1 << 20


class CodecError(Exception):
    """What was received is no stream of its compression."""


class Compressor(Protocol):
    """Turns bytes into a compressed stream."""

    def feed(self, data: memoryview) -> bytes:
        """Take bytes; what is ready of the stream."""

    def finish(self) -> bytes:
        """The rest of the stream."""


class Decompressor(Protocol):
    """Turns a compressed stream into bytes."""

    def feed(self, data: memoryview) -> Iterator[bytes]:
        """Take a part of the stream; yields bounded pieces. Raises: CodecError."""

    @property
    def complete(self) -> bool:
        """Whether the stream has come to its end."""


@dataclass(frozen=True)
class Codec:
    """One compression; ``flag``: its bit in the messages of transfer."""

    flag: int
    compressor: Callable[[], Compressor]
    decompressor: Callable[[], Decompressor]


def _module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _zstd(zstandard: Any) -> Codec:
    class Compress:
        def __init__(self) -> None:
            self._stream = zstandard.ZstdCompressor(level=1).compressobj()

        def feed(self, data: memoryview) -> bytes:
            return self._stream.compress(data)  # type: ignore[no-any-return]

        def finish(self) -> bytes:
            return self._stream.flush()  # type: ignore[no-any-return]

    class Decompress:
        # A slice of the input at a time: 4 bytes may stand for a block of 128 KiB.
        _SLICE_BYTES = 1024

        def __init__(self) -> None:
            self._stream = zstandard.ZstdDecompressor(max_window_size=8 << 20).decompressobj()

        @property
        def complete(self) -> bool:
            return bool(self._stream.eof)

        def feed(self, data: memoryview) -> Iterator[bytes]:
            for start in range(0, len(data), self._SLICE_BYTES):
                try:
                    piece = self._stream.decompress(data[start : start + self._SLICE_BYTES])
                except (zstandard.ZstdError, EOFError) as error:
                    raise CodecError(str(error)) from error
                if piece:
                    yield piece

    return Codec(4, Compress, Decompress)


def _lz4(frame: Any) -> Codec:
    class Compress:
        def __init__(self) -> None:
            self._stream = frame.LZ4FrameCompressor(auto_flush=True)
            self._head: bytes = self._stream.begin()

        def feed(self, data: memoryview) -> bytes:
            head, self._head = self._head, b""
            return head + self._stream.compress(data)  # type: ignore[no-any-return]

        def finish(self) -> bytes:
            head, self._head = self._head, b""
            return head + self._stream.flush()  # type: ignore[no-any-return]

    class Decompress:
        def __init__(self) -> None:
            self._stream = frame.LZ4FrameDecompressor()

        @property
        def complete(self) -> bool:
            return bool(self._stream.eof)

        def feed(self, data: memoryview) -> Iterator[bytes]:
            try:
                piece = self._stream.decompress(data, max_length=PIECE_BYTES)
                while piece or not (self._stream.needs_input or self._stream.eof):
                    yield piece
                    if self._stream.eof or self._stream.needs_input:
                        return
                    piece = self._stream.decompress(b"", max_length=PIECE_BYTES)
            except (RuntimeError, EOFError) as error:
                raise CodecError(str(error)) from error

    return Codec(2, Compress, Decompress)


def _brotli(brotli: Any) -> Codec:
    class Compress:
        def __init__(self) -> None:
            self._stream = brotli.Compressor(quality=1)

        def feed(self, data: memoryview) -> bytes:
            return self._stream.process(bytes(data))  # type: ignore[no-any-return]

        def finish(self) -> bytes:
            return self._stream.finish()  # type: ignore[no-any-return]

    class Decompress:
        def __init__(self) -> None:
            self._stream = brotli.Decompressor()

        @property
        def complete(self) -> bool:
            return bool(self._stream.is_finished())

        def feed(self, data: memoryview) -> Iterator[bytes]:
            taken: bytes = bytes(data)
            try:
                while True:
                    piece = self._stream.process(taken, output_buffer_limit=PIECE_BYTES)
                    if piece:
                        yield piece
                    if self.complete or self._stream.can_accept_more_data():
                        return
                    taken = b""
            except brotli.error as error:
                raise CodecError(str(error)) from error

    return Codec(1, Compress, Decompress)


def _installed() -> dict[str, Codec]:
    found = {}
    for name, package, make in (
        ("brotli", "brotli", _brotli),
        ("lz4", "lz4.frame", _lz4),
        ("zstd", "zstandard", _zstd),
    ):
        module = _module(package)
        # The bounded output of brotli is newer than the package.
        if module is not None and (name != "brotli" or hasattr(module.Decompressor, "can_accept_more_data")):
            found[name] = make(module)
    return found


CODECS: Mapping[str, Codec] = _installed()
"""The compressions that work here, by name."""
