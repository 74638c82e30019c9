"""Chunks of a bundle as a command's input: a pack, read ahead and checked while the link is busy.

A pack is one line, the JSON list of chunk numbers of ``Manifest.all_chunks()``, then their bytes in that
order.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from sti_runtime.errors import DigestError
from sti_runtime.manifest import Chunk
from sti_runtime.records import sha256_hex

_AHEAD = 4
"""Chunks read ahead: enough to bridge a slow read, a few MB of memory."""

_END_S = 0.5


def pack_blocks(
    bundle_path: Path,
    chunks: Sequence[tuple[str, Chunk]],
    wanted: Sequence[int],
    handed_over: Callable[[int], None],
) -> Iterator[bytes]:
    """The blocks of a pack of ``wanted``; ``handed_over`` gets the length of each chunk that was taken.

    Raises: DigestError when the bundle on the host is damaged.
    """
    yield json.dumps(list(wanted), separators=(",", ":")).encode() + b"\n"
    with closing(read_ahead(read_chunk(bundle_path, *chunks[index]) for index in wanted)) as blocks:
        for block in blocks:
            yield block
            handed_over(len(block))


def small_packs(wanted: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, ...]]:
    """``wanted`` in packs of few chunks, in their order, none longer than the longest chunk there is.

    Where a pack counts once it is whole, an interruption loses no more. At least one pack, which may
    be empty; ``lengths``: of all chunks.
    """
    packs: list[tuple[int, ...]] = []
    most, room = max(lengths), 0
    for index in wanted:
        if packs and lengths[index] <= room:
            packs[-1] += (index,)
        else:
            packs.append((index,))
            room = most
        room -= lengths[index]
    return packs or [()]


def read_chunk(bundle_path: Path, file: str, chunk: Chunk) -> bytes:
    """A chunk's bytes, checked. Raises: DigestError."""
    try:
        with (bundle_path / file).open("rb") as stream:
            stream.seek(chunk.offset)
            data = stream.read(chunk.length)
    except OSError as error:
        raise DigestError(
            f"{bundle_path / file} on the host cannot be read: {error.strerror}.",
            f"Remove {bundle_path} and build the bundle again.",
        ) from error
    if sha256_hex(data) != chunk.sha256:
        raise DigestError(
            f"{bundle_path / file} on the host is damaged at byte {chunk.offset}.",
            f"Remove {bundle_path} and build the bundle again.",
        )
    return data


def read_ahead(source: Iterator[bytes], depth: int = _AHEAD) -> Generator[bytes, None, None]:
    """The blocks of ``source``, taken from it by a thread, at most ``depth`` before they are asked for.

    What ``source`` raises is raised here, behind the blocks before it. Closing ends the thread.
    """
    blocks: queue.Queue[bytes | None] = queue.Queue(depth)
    closed = threading.Event()
    errors: list[Exception] = []

    def offer(block: bytes | None) -> bool:
        while not closed.is_set():
            try:
                blocks.put(block, timeout=_END_S)
            except queue.Full:
                continue
            return True
        return False

    def read() -> None:
        try:
            for block in source:
                if not offer(block):
                    return
        except Exception as error:  # noqa: BLE001 - the source's own; raised again where its blocks are taken
            errors.append(error)
        offer(None)

    reader = threading.Thread(target=read, name="read-ahead", daemon=True)
    reader.start()
    try:
        while (block := blocks.get()) is not None:
            yield block
        if errors:
            raise errors[0]
    finally:
        closed.set()
        reader.join()
