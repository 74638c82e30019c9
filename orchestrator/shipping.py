"""Bundles and task data on their way to a lab host that has not the controller's folders.

The controller describes what a deploy needs (``Content``); the host says which bytes it lacks, gets them in
pieces, checks every digest and keeps them in a cache of bounded size below its home. A host that sees the
same content at the same path (the controller's own machine, a shared folder) is sent nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import structlog

from orchestrator.content_cache import Cache, Content, Lack
from orchestrator.deploy import DeployReport
from orchestrator.inventory import Device
from orchestrator.settings import Settings
from orchestrator.worker import HostWorker
from sti_runtime.errors import DigestError, FormatError
from sti_runtime.messages import Lease

PIECE_BYTES = 4 << 20
"""So much of a file goes over Ray at once: it is in memory on both sides."""

_TRIES = 2

_log = structlog.get_logger(__name__)


class ShippedWorker(HostWorker):
    """The worker of a lab host: as a HostWorker, with content that the controller sends."""

    def __init__(self, settings: Settings, devices: Sequence[Device], cache_bytes: int) -> None:
        super().__init__(settings, devices)
        self._cache = Cache(settings.shipped, cache_bytes)

    def lacking(self, content: Content) -> tuple[Lack, ...] | None:
        """As ``Cache.lacking``."""
        return self._cache.lacking(content)

    def receive(self, content: Content, file: str, offset: int, piece: bytes) -> None:
        """As ``Cache.receive``."""
        self._cache.receive(content, file, offset, piece)

    def settle(self, content: Content) -> None:
        """As ``Cache.settle``."""
        self._cache.settle(content)

    def deploy_shipped(
        self, name: str, contents: Sequence[Content], lease: Lease | None, identity: str | None
    ) -> tuple[DeployReport, ...]:
        """As ``deploy``, of a bundle and task data that are here. Raises: ResourceError if one is not."""
        with self._cache.using(contents) as (bundle, *tasks):
            return self.deploy(name, bundle, tasks, lease, identity)


class Receiver(Protocol):
    """What content is sent to: ``ShippedWorker``, or the same behind Ray."""

    def lacking(self, content: Content) -> tuple[Lack, ...] | None: ...
    def receive(self, content: Content, file: str, offset: int, piece: bytes) -> None: ...
    def settle(self, content: Content) -> None: ...


def ship(content: Content, host: Receiver, advance: Callable[[int, int], None] | None = None) -> int:
    """Send a host what it lacks of a content; bytes sent. ``advance`` gets (bytes sent, bytes to send).

    What arrives damaged is sent once more. Raises: ResourceError, DigestError, FormatError; OSError's cases
    as FormatError.
    """
    sent = 0
    for attempt in range(_TRIES):
        lacking = host.lacking(content)
        if lacking is None:
            break
        sizes = dict(content.files)
        total = sent + sum(sizes[lack.file] - lack.have for lack in lacking)
        for lack in lacking:
            for offset, piece in _pieces(content.source(lack.file), lack.have, sizes[lack.file]):
                host.receive(content, lack.file, offset, piece)
                sent += len(piece)
                if advance is not None:
                    advance(sent, total)
        try:
            host.settle(content)
            break
        except (DigestError, FormatError) as error:
            if attempt + 1 == _TRIES:
                raise
            _log.warning("content arrived damaged, it is sent again", cause=error.what)
    return sent


def _pieces(path: Path, start: int, size: int) -> Iterator[tuple[int, bytes]]:
    """Pieces of a file from a byte on; of an empty one its one empty piece."""
    try:
        with path.open("rb") as stream:
            stream.seek(start)
            offset = start
            while True:
                piece = stream.read(min(PIECE_BYTES, size - offset))
                if not piece and (offset or size):
                    break
                yield offset, piece
                offset += len(piece)
                if offset >= size:
                    return
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}.", "Build the bundle again.") from error
    raise FormatError(f"{path}: is shorter than {size} bytes.", "Build the bundle again.")
