"""The verb ``accept``: chunks come on standard input, are checked as they come and listed once on storage.

Input that ends early leaves what came whole: it is flushed and listed before the verb fails, and only the
rest has to come again. Format: docs/job-and-journal.md, 6.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from agent.chunk_writer import BATCH_BYTES, ChunkWriter
from agent.chunks import LOCK_WAIT_S
from agent.fence import refused, still_admitted
from agent.incoming import RESEND, Layout, commit_incoming, incoming_layout, read_done
from agent.input_stream import BLOCK_BYTES, InputStream
from agent.locks import hold
from agent.spool import Spool
from sti_runtime.errors import FormatError
from sti_runtime.messages import Lease

HEADER_CAP_BYTES = 1 << 20


def accept(
    spool: Spool,
    digest: str,
    fd: int,
    *,
    commit: bool = False,
    lease: Lease | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Take chunks in from ``fd``; what follows the last one is not read. ``commit``: if then nothing lacks,
    make the bundle visible, as the verb ``commit`` does; what was read back here is not read again.

    A chunk whose bytes are wrong is in ``rejected``, the others are kept. Raises: InputError if the bundle
    was not announced; FormatError if the input is malformed or ends early and RefusedError if the lease
    became stale: what came before is kept; DigestError as ``commit``; StorageFullError.
    """
    with hold(spool.deploy_lock, wait_s=LOCK_WAIT_S, what="Deploying to this device"):
        layout = incoming_layout(spool, digest)
        source = InputStream(fd, stopped)
        indices = _read_header(source, layout)
        with ChunkWriter(spool, layout, read_back=commit) as writer:
            rejected = _Intake(spool, layout, source, writer, lease).take(indices)
        remaining = len(layout.chunks) - len(read_done(spool, layout))
        if commit and not remaining:
            commit_incoming(spool, layout, writer.stored)
    return {
        "digest": digest,
        "accepted": len(indices) - len(rejected),
        "rejected": rejected,
        "remaining": remaining,
        "state": "committed" if commit and not remaining else "incoming",
    }


def _read_header(source: InputStream, layout: Layout) -> list[int]:
    header = source.line(HEADER_CAP_BYTES)
    cause = ""
    try:
        indices = None if header is None else json.loads(header)
    except (ValueError, RecursionError):
        indices = None
    if header is None:
        cause = f"its first line has no end within {HEADER_CAP_BYTES} bytes"
    elif not isinstance(indices, list) or not all(type(index) is int for index in indices):
        cause = "its first line is not a JSON list of integers"
    elif len(set(indices)) != len(indices) or not all(0 <= i < len(layout.chunks) for i in indices):
        cause = f"its chunk numbers are not distinct numbers below {len(layout.chunks)}"
    if cause:
        raise FormatError(f"The input is not a pack: {cause}.", RESEND)
    assert isinstance(indices, list)
    return indices


class _Intake:
    """Takes the chunks of one pack."""

    def __init__(
        self, spool: Spool, layout: Layout, source: InputStream, writer: ChunkWriter, lease: Lease | None
    ) -> None:
        self._spool, self._layout, self._source = spool, layout, source
        self._writer, self._lease = writer, lease
        self._unchecked_bytes = 0

    def take(self, indices: Sequence[int]) -> list[int]:
        """Take them in their order; returns those that were rejected. Raises: FormatError when the input ends
        before them, RefusedError, StifarmError."""
        done = read_done(self._spool, self._layout)
        rejected = []
        for count, index in enumerate(indices):
            same = self._layout.same[self._layout.chunks[index][1].sha256]
            places = [place for place in same if place not in done]
            right = self._take_chunk(index, places)
            if right is None:
                raise FormatError(
                    f"The input ended after {count} of {len(indices)} chunks, which are kept.", RESEND
                )
            if right:
                self._writer.add(places)
                done.update(places)
            else:
                rejected.append(index)
            self._check_lease(index)
        return rejected

    def _take_chunk(self, index: int, places: Sequence[int]) -> bool | None:
        """Take a chunk to ``places``, none if it is done already; whether its bytes are right, None if the
        input ended before them. They are written as they come and count once they are listed."""
        chunk = self._layout.chunks[index][1]
        found = hashlib.sha256()
        done = 0
        while done < chunk.length:
            piece = self._source.piece(chunk.length - done)
            if not piece:
                return None
            found.update(piece)
            for place in places[:1]:
                self._writer.write(place, piece, done)
            done += len(piece)
        if found.hexdigest() != chunk.sha256:
            return False
        for place in places[1:]:
            for done in range(0, chunk.length, BLOCK_BYTES):
                data = self._writer.read(places[0], done, min(BLOCK_BYTES, chunk.length - done))
                self._writer.write(place, data, done)
        return True

    def _check_lease(self, index: int) -> None:
        """Look at the fence again now and then. Raises: RefusedError."""
        self._unchecked_bytes += self._layout.chunks[index][1].length
        if self._lease is not None and self._unchecked_bytes >= BATCH_BYTES:
            self._unchecked_bytes = 0
            reason = still_admitted(self._spool, self._lease)
            if reason is not None:
                raise refused(reason)
