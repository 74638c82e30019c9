"""Host side of the content-addressed deploy: a device gets the chunks it lacks, and nothing twice.

One question (``has``) tells what a device holds. The manifest of what it lacks is
announced (``missing``), the lacking chunks are streamed into ``accept``, which makes the bundle visible at
its end. Each step can be repeated, so an interrupted deploy goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from orchestrator.agent_verbs import call_agent, lease_arguments
from orchestrator.chunk_stream import pack_blocks, small_packs
from orchestrator.counterpart import other_protocol
from orchestrator.errors import AgentError, StableError, new_agent_remedy
from orchestrator.ownership import require_ours
from orchestrator.transports.base import Progress, Transport
from sti_runtime.errors import DigestError, FormatError
from sti_runtime.journal_format import PROTOCOL_VERSION
from sti_runtime.manifest import MANIFEST_CAP_BYTES, MANIFEST_NAME, Chunk, Manifest
from sti_runtime.messages import Lease
from sti_runtime.records import sha256_hex

COMMIT_TIMEOUT_S = 600.0
SLOWEST_LINK_BYTES_PER_S = 100_000
"""A link that is slower for a whole deploy counts as broken."""

PACK_FILE = "incoming/pack"
"""Below the spool: what a device gets that takes no streamed input. One fixed name, so that what an
interruption leaves is overwritten by the next; the agent's verbs remove it, too."""

_TRIES = 2

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class DeployReport:
    """What a deploy did. ``bytes_sent`` counts chunk bytes on the wire, ``bytes_total`` the content's.

    ``already``: the device had it committed and nothing was sent.
    """

    digest: str
    chunks_sent: int
    chunks_total: int
    bytes_sent: int
    bytes_total: int
    seconds: float
    already: bool


@dataclass(frozen=True)
class Underway:
    """How far the deploy to a device is (0 of 0 without one), and what the call under way waits for."""

    sent_bytes: int
    total_bytes: int
    waits: str


@dataclass(frozen=True)
class Held:
    """Digests of what a device holds: finished bundles, announced ones, task data; ``partial``: how many
    bytes of task data on its way; who it is. Its own statement."""

    identity: str
    bundles: frozenset[str]
    incoming: frozenset[str]
    tasks: frozenset[str]
    partial: Mapping[str, int]

    @classmethod
    def from_answer(cls, answer: dict[str, Any], device: str) -> Held:
        """Out of an agent's answer to ``has``: not trusted. Raises: StableError."""
        kinds = [answer.get(kind) for kind in ("bundles", "incoming", "tasks")]
        identity, protocol, partial = answer.get("identity"), answer.get("protocol"), answer.get("partial")
        if protocol != PROTOCOL_VERSION:
            raise other_protocol(device, str(protocol)[:20])
        good = all(isinstance(k, list) and all(isinstance(digest, str) for digest in k) for k in kinds)
        good = good and isinstance(partial, dict)
        good = good and all(type(count) is int and count >= 0 for count in (partial or {}).values())
        if not good or not isinstance(identity, str) or not 0 < len(identity) <= 100:
            raise StableError(
                f"the agent does not say what the device holds ({str(answer)[:80]}).",
                new_agent_remedy(device),
                device=device,
            )
        bundles, incoming, tasks = (frozenset(kind or ()) for kind in kinds)
        return cls(identity, bundles, incoming, tasks, partial or {})


def ask_held(transport: Transport, spool: str, digests: Sequence[str]) -> Held:
    """Which of these a device holds, by one command. Raises: DeviceError."""
    return Held.from_answer(call_agent(transport, spool, "has", *digests), transport.device)


def bundle_digest(bundle_path: Path) -> str:
    """The digest of a bundle of the host. Raises: FormatError when it cannot be read."""
    return sha256_hex(_host_manifest(bundle_path / MANIFEST_NAME))


def file_digest(path: Path) -> str:
    """SHA-256 of a file of the host. Raises: FormatError when it cannot be read."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise host_unreadable(path, error) from error


def host_unreadable(path: Path, error: OSError) -> FormatError:
    """For task data of the host that cannot be read."""
    return FormatError(f"{path}: cannot be read: {error.strerror}.", "Make the task data again.")


def deploy_bundle(
    transport: Transport,
    spool: str,
    bundle_path: Path,
    progress: Progress | None = None,
    *,
    lease: Lease | None = None,
    held: Held | None = None,
) -> DeployReport:
    """Bring a bundle to a device; ``progress`` gets (bytes sent, bytes to send), ``lease`` fences, ``held``
    is what the device just said that it holds (None: it is asked).

    Raises: DigestError or FormatError when the host's bundle is damaged, DeviceFullError, AgentError (for a
    lease that is refused nothing was sent), StableError for a chunk that arrives damaged twice,
    TransientError.
    """
    began = time.monotonic()
    fence = lease_arguments(lease)
    manifest_path = bundle_path / MANIFEST_NAME
    data = _host_manifest(manifest_path)
    digest = sha256_hex(data)
    held = held or ask_held(transport, spool, [digest])
    if digest in held.bundles:
        return DeployReport(digest, 0, 0, 0, 0, time.monotonic() - began, already=True)
    manifest = Manifest.from_json(data, source=str(manifest_path), cap_bytes=MANIFEST_CAP_BYTES)
    announced = f"{spool}/incoming/{digest}/{MANIFEST_NAME}"
    if digest not in held.incoming:
        announced = f"{spool}/incoming/{digest}.manifest"
        require_ours(transport, spool, lease)  # the agent is asked when the manifest is there
        transport.push(manifest_path, announced)
    sender = _Sender(transport, spool, bundle_path, digest, manifest.all_chunks(), progress, fence)
    for attempt in range(_TRIES):
        answer = call_agent(transport, spool, "missing", announced, *fence, timeout_s=COMMIT_TIMEOUT_S)
        try:
            if answer.get("complete") is not True:
                sender.send(_indices(answer, "missing", len(sender.table), transport.device))
            break
        except AgentError as error:
            if error.error != DigestError.__name__ or attempt + 1 == _TRIES:
                raise
            _log.warning(
                "chunks damaged on the device are sent again", device=transport.device, cause=error.what
            )
            announced = f"{spool}/incoming/{digest}/{MANIFEST_NAME}"
    return DeployReport(
        digest=digest,
        chunks_sent=sender.chunks,
        chunks_total=len(sender.table),
        bytes_sent=sender.bytes,
        bytes_total=sum(chunk.length for _, chunk in sender.table),
        seconds=time.monotonic() - began,
        already=False,
    )


class _Sender:
    """Streams chunks of one bundle into ``accept``; counts what went over the wire."""

    def __init__(
        self,
        transport: Transport,
        spool: str,
        bundle_path: Path,
        digest: str,
        chunks: tuple[tuple[str, Chunk], ...],
        progress: Progress | None,
        fence: tuple[str, ...],
    ) -> None:
        self._transport, self._spool, self._bundle_path = transport, spool, bundle_path
        self._digest, self._progress, self._fence = digest, progress, fence
        self._sent_bytes = self._total_bytes = 0
        self.table = chunks
        self.chunks = self.bytes = 0

    def send(self, wanted: Sequence[int]) -> None:
        """Send all of ``wanted`` and make the bundle visible; a chunk that arrives damaged is sent once more.

        Raises: DeviceError, DigestError when the host's bundle is damaged.
        """
        rejected = self._stream(wanted)
        if not rejected:
            return
        _log.warning("chunks arrived damaged", device=self._transport.device, chunks=len(rejected))
        again = self._stream(rejected)
        if again:
            file, chunk = self.table[again[0]]
            raise StableError(
                f"{len(again)} chunks arrived damaged twice, the first from byte {chunk.offset} of {file}.",
                "The link or the device's storage corrupts data: check cable and storage, then deploy again.",
                device=self._transport.device,
            )

    def _stream(self, wanted: Sequence[int]) -> list[int]:
        """Send chunks, by one command where input is streamed; returns those that the device rejected."""
        self._sent_bytes, self._total_bytes = 0, sum(self.table[index][1].length for index in wanted)
        packs = [tuple(wanted)]
        if not self._transport.streams_input():
            packs = small_packs(wanted, [chunk.length for _, chunk in self.table])
        rejected: list[int] = []
        for pack in packs:
            rejected += self._send_pack(pack, last=pack is packs[-1] and not rejected)
        return rejected

    def _send_pack(self, pack: Sequence[int], *, last: bool) -> list[int]:
        blocks = _Blocks(pack_blocks(self._bundle_path, self.table, pack, self._handed_over))
        try:
            answer = call_agent(
                self._transport,
                self._spool,
                "accept",
                self._digest,
                *(("--commit",) if last else ()),
                *self._fence,
                timeout_s=COMMIT_TIMEOUT_S + self._total_bytes / SLOWEST_LINK_BYTES_PER_S,
                stdin=blocks,
                stdin_file=f"{self._spool}/{PACK_FILE}",
            )
        except AgentError as error:
            if blocks.error is not None:
                raise blocks.error from error
            raise
        named = _indices(answer, "rejected", len(self.table), self._transport.device)
        rejected = [index for index in named if index in pack]
        if last and not rejected and answer.get("state") != "committed":
            raise StableError(
                f"the agent took every chunk and still lacks {str(answer.get('remaining'))[:20]}.",
                new_agent_remedy(self._transport.device),
                device=self._transport.device,
            )
        return rejected

    def _handed_over(self, length: int) -> None:
        self._sent_bytes += length
        self.chunks += 1
        self.bytes += length
        if self._progress is not None:
            self._progress(self._sent_bytes, self._total_bytes)


class _Blocks:
    """Input that ends where its source fails: what went before is kept there. ``error``: the failure."""

    def __init__(self, source: Iterator[bytes]) -> None:
        self._source = source
        self.error: DigestError | None = None

    def __iter__(self) -> Iterator[bytes]:
        try:
            yield from self._source
        except DigestError as error:
            self.error = error


def _indices(answer: dict[str, Any], key: str, count: int, device: str) -> list[int]:
    """A list of chunk indices out of an agent's answer: not trusted. Raises: StableError."""
    value = answer.get(key)
    good = isinstance(value, list) and all(type(index) is int and 0 <= index < count for index in value)
    if not good or value is None or len(set(value)) != len(value):
        raise StableError(
            f"the agent's answer names chunks that the bundle has not ({key}: {str(value)[:80]}).",
            new_agent_remedy(device),
            device=device,
        )
    return list(value)


def _host_manifest(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(MANIFEST_CAP_BYTES + 1)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}.", "Build the bundle again.") from error
