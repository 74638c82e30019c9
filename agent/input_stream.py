"""A verb's standard input: taken in blocks as it comes, and ended where a link is gone without a word."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable

INPUT_WAIT_S = 30.0
"""Input that is silent for longer has ended."""

BLOCK_BYTES = 1 << 20
_POLL_S = 1.0


class InputStream:
    """A stream that cannot be sought, read in blocks. ``stopped``: asked between waits; true ends it."""

    def __init__(self, fd: int, stopped: Callable[[], bool] = lambda: False) -> None:
        self._fd, self._stopped = fd, stopped
        self._block = bytearray(BLOCK_BYTES)
        self._start = self._end = 0

    def line(self, cap_bytes: int) -> bytes | None:
        """The next line with its newline; None if it has no end within the cap."""
        line = bytearray()
        while len(line) < cap_bytes and (piece := self.piece(cap_bytes - len(line))):
            end = bytes(piece).find(b"\n") + 1
            line += piece[:end] if end else piece
            if end:
                self._start -= len(piece) - end
                return bytes(line)
        return None

    def piece(self, limit: int) -> memoryview:
        """The next bytes there are, at most ``limit``, good until the next call; none at the end."""
        if self._start == self._end:
            self._start, self._end = 0, self._fill()
        start = self._start
        self._start = min(self._end, start + limit)
        return memoryview(self._block)[start : self._start]

    def _fill(self) -> int:
        deadline = time.monotonic() + INPUT_WAIT_S
        while not self._stopped() and time.monotonic() < deadline:
            try:
                if select.select([self._fd], [], [], _POLL_S)[0]:
                    return os.readv(self._fd, [self._block])
            except OSError:
                break  # where the link broke, the input has ended
        return 0
