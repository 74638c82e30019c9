"""Task data to a device: sent in pieces that the agent appends, so that an interrupted file goes on where it
broke off, and verified as a whole there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import structlog

from orchestrator.agent_verbs import call_agent, lease_arguments
from orchestrator.deploy import (
    COMMIT_TIMEOUT_S,
    PACK_FILE,
    SLOWEST_LINK_BYTES_PER_S,
    DeployReport,
    Held,
    ask_held,
    file_digest,
    host_unreadable,
)
from orchestrator.errors import AgentError, StableError, new_agent_remedy
from orchestrator.transports.base import Progress, Transport
from sti_runtime.errors import DigestError
from sti_runtime.messages import Lease

PIECE_BYTES = 1 << 20
"""Of a file whose device takes no streamed input: what an interruption loses at most."""

_BLOCK_BYTES = 1 << 18
_TRIES = 2

_log = structlog.get_logger(__name__)


def deploy_task_data(
    transport: Transport,
    spool: str,
    path: Path,
    progress: Progress | None = None,
    *,
    lease: Lease | None = None,
    held: Held | None = None,
) -> DeployReport:
    """Bring a file of task data to a device, named by the SHA-256 of its bytes; what the device has of it is
    not sent again. A file that arrives damaged is sent once more. Raises: as deploy_bundle."""
    began = time.monotonic()
    digest, size = file_digest(path), path.stat().st_size
    held = held or ask_held(transport, spool, [digest])
    if digest in held.tasks:
        return DeployReport(digest, 0, 1, 0, size, time.monotonic() - began, already=True)
    begin = held.partial.get(digest, 0)
    sender = _Sender(transport, spool, path, digest, size, progress, lease_arguments(lease))
    for attempt in range(_TRIES):
        try:
            sender.send(begin if begin <= size else 0)
            break
        except AgentError as error:
            if error.error != DigestError.__name__ or attempt + 1 == _TRIES:
                raise
            _log.warning("damaged task data is sent again", device=transport.device, cause=error.what)
            begin = 0
    return DeployReport(digest, 1, 1, sender.bytes, size, time.monotonic() - began, already=False)


class _Sender:
    """Feeds one file into ``accept-task``; counts what went over the wire."""

    def __init__(
        self,
        transport: Transport,
        spool: str,
        path: Path,
        digest: str,
        size: int,
        progress: Progress | None,
        fence: tuple[str, ...],
    ) -> None:
        self._transport, self._spool, self._path = transport, spool, path
        self._digest, self._size, self._progress, self._fence = digest, size, progress, fence
        self.bytes = 0

    def send(self, begin: int) -> None:
        """Send all from ``begin`` on, by one command where input is streamed. Raises: DeviceError."""
        most = self._size if self._transport.streams_input() else PIECE_BYTES
        while True:
            length = min(most, self._size - begin)
            state = self._send_piece(begin, length)
            begin += length
            if state != "incoming" or begin >= self._size:
                break
        if state not in ("accepted", "already"):
            raise StableError(
                f"the agent took all of the task data and calls it {state[:20]!r}.",
                new_agent_remedy(self._transport.device),
                device=self._transport.device,
            )

    def _send_piece(self, begin: int, length: int) -> str:
        done = begin

        def handed_over(count: int) -> None:
            nonlocal done
            done += count
            self.bytes += count
            if self._progress is not None:
                self._progress(done, self._size)

        answer = call_agent(
            self._transport,
            self._spool,
            "accept-task",
            self._digest,
            *self._fence,
            timeout_s=COMMIT_TIMEOUT_S + length / SLOWEST_LINK_BYTES_PER_S,
            stdin=piece_blocks(self._path, begin, length, self._size, handed_over),
            stdin_file=f"{self._spool}/{PACK_FILE}",
        )
        return str(answer.get("state"))


def piece_blocks(
    path: Path, begin: int, length: int, total: int, handed_over: Callable[[int], None]
) -> Iterator[bytes]:
    """The input of ``accept-task``: a line of where the piece belongs, and its bytes. Raises: FormatError."""
    yield b"[%d,%d,%d]\n" % (begin, length, total)
    left = length
    try:
        with path.open("rb") as stream:
            stream.seek(begin)
            while left and (block := stream.read(min(left, _BLOCK_BYTES))):
                yield block
                handed_over(len(block))
                left -= len(block)
    except OSError as error:
        raise host_unreadable(path, error) from error
