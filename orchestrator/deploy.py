"""Host side of the content-addressed deploy: a device gets the chunks it lacks, and nothing twice.

Each step can be repeated, so an interrupted deploy goes on where it stopped: the manifest is announced
(``missing``), the lacking chunks travel in packs (``accept``), the bundle appears at once (``commit``).
A pack is one line, the JSON list of chunk indices into ``Manifest.all_chunks()``, then their bytes.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from orchestrator.agent_verbs import call_agent, lease_arguments
from orchestrator.errors import AgentError, DeviceFullError, MissingFileError, StableError
from orchestrator.transports.base import Progress, Transport
from sti_runtime.errors import DigestError, FormatError
from sti_runtime.manifest import MANIFEST_CAP_BYTES, MANIFEST_NAME, Chunk, Manifest
from sti_runtime.messages import Lease
from sti_runtime.records import sha256_hex
from sti_runtime.units import format_bytes

PACK_BYTES = 8 << 20
"""Most payload of one pack; one longer chunk travels alone."""

COMMIT_TIMEOUT_S = 600.0
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


def deploy_bundle(
    transport: Transport,
    spool: str,
    bundle_path: Path,
    progress: Progress | None = None,
    *,
    lease: Lease | None = None,
) -> DeployReport:
    """Bring a bundle to a device; ``progress`` gets (bytes sent, bytes to send), ``lease`` fences.

    Raises: DigestError or FormatError when the host's bundle is damaged, DeviceFullError, AgentError,
    StableError for a chunk that arrives damaged twice, TransientError.
    """
    began = time.monotonic()
    fence = lease_arguments(lease)
    manifest_path = bundle_path / MANIFEST_NAME
    data = _host_manifest(manifest_path)
    digest = sha256_hex(data)
    if _remote_digest(transport, f"{spool}/bundles/{digest}/{MANIFEST_NAME}") == digest:
        return DeployReport(digest, 0, 0, 0, 0, time.monotonic() - began, already=True)
    manifest = Manifest.from_json(data, source=str(manifest_path), cap_bytes=MANIFEST_CAP_BYTES)
    chunks = manifest.all_chunks()
    announced = f"{spool}/incoming/{digest}.manifest"
    transport.push(manifest_path, announced)
    sent_chunks = sent_bytes = 0
    for attempt in range(_TRIES):
        answer = call_agent(transport, spool, "missing", announced, *fence)
        wanted = _indices(answer, "missing", len(chunks), transport.device)
        sender = _Sender(transport, spool, bundle_path, digest, chunks, progress, fence)
        sender.send(wanted)
        sent_chunks, sent_bytes = sent_chunks + sender.chunks, sent_bytes + sender.bytes
        try:
            call_agent(transport, spool, "commit", digest, *fence, timeout_s=COMMIT_TIMEOUT_S)
            break
        except AgentError as error:
            if error.error != DigestError.__name__ or attempt + 1 == _TRIES:
                raise
            _log.warning(
                "chunks damaged on the device are sent again", device=transport.device, cause=error.what
            )
    transport.run(["rm", "-f", announced], timeout_s=30)
    return DeployReport(
        digest=digest,
        chunks_sent=sent_chunks,
        chunks_total=len(chunks),
        bytes_sent=sent_bytes,
        bytes_total=sum(chunk.length for _, chunk in chunks),
        seconds=time.monotonic() - began,
        already=False,
    )


def deploy_task_data(
    transport: Transport,
    spool: str,
    path: Path,
    progress: Progress | None = None,
    *,
    lease: Lease | None = None,
) -> DeployReport:
    """Bring a file of task data to a device, named by the SHA-256 of its bytes. Raises: as deploy_bundle."""
    began = time.monotonic()
    try:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            size = stream.tell()
    except OSError as error:
        raise FormatError(
            f"{path}: cannot be read: {error.strerror}.", "Make the task data again."
        ) from error
    if _remote_exists(transport, f"{spool}/tasks/{digest}.safetensors"):
        return DeployReport(digest, 0, 1, 0, size, time.monotonic() - began, already=True)
    transport.push(path, f"{spool}/tasks/{digest}.partial", progress=progress)
    call_agent(transport, spool, "accept-task", digest, *lease_arguments(lease))
    return DeployReport(digest, 1, 1, size, size, time.monotonic() - began, already=False)


def packs(
    chunks: Sequence[tuple[str, Chunk]], wanted: Sequence[int], limit_bytes: int = PACK_BYTES
) -> Iterator[tuple[int, ...]]:
    """Split chunk indices, in order, into packs of at most ``limit_bytes`` payload (or one chunk)."""
    group: list[int] = []
    size = 0
    for index in wanted:
        length = chunks[index][1].length
        if group and size + length > limit_bytes:
            yield tuple(group)
            group, size = [], 0
        group.append(index)
        size += length
    if group:
        yield tuple(group)


def write_pack(
    path: Path, bundle_path: Path, chunks: Sequence[tuple[str, Chunk]], indices: Sequence[int]
) -> int:
    """Write a pack, every chunk checked against its digest; returns the payload bytes.

    Raises: DigestError when the bundle on the host is damaged.
    """
    payload_bytes = 0
    with path.open("wb") as output:
        output.write(json.dumps(list(indices), separators=(",", ":")).encode() + b"\n")
        for index in indices:
            file, chunk = chunks[index]
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
            output.write(data)
            payload_bytes += len(data)
    return payload_bytes


class _Sender:
    """Sends chunks of one bundle; counts what went over the wire."""

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
        self._digest, self._table, self._progress = digest, chunks, progress
        self._fence = fence
        self.chunks = self.bytes = 0

    def send(self, wanted: Sequence[int]) -> None:
        """Send all of ``wanted``; a chunk that arrives damaged is sent once more. Raises: DeviceError."""
        total = sum(self._table[index][1].length for index in wanted)
        with tempfile.TemporaryDirectory(prefix="stifarm-pack-") as scratch:
            pack = Path(scratch) / "pack"
            rejected = [
                i for group in packs(self._table, wanted) for i in self._send_pack(pack, group, total)
            ]
            if rejected:
                _log.warning("chunks arrived damaged", device=self._transport.device, chunks=len(rejected))
            again = [i for group in packs(self._table, rejected) for i in self._send_pack(pack, group, total)]
        if again:
            file, chunk = self._table[again[0]]
            raise StableError(
                f"{len(again)} chunks arrived damaged twice, the first from byte {chunk.offset} of {file}.",
                "The link or the device's storage corrupts data: check cable and storage, then deploy again.",
                device=self._transport.device,
            )

    def _send_pack(self, pack: Path, group: tuple[int, ...], total: int) -> list[int]:
        """Send one pack; returns the chunks that the device rejected."""
        payload_bytes = write_pack(pack, self._bundle_path, self._table, group)
        base = self.bytes
        header_bytes = pack.stat().st_size - payload_bytes

        def forward(done: int, _: int) -> None:
            if self._progress is not None:
                self._progress(min(base + max(0, done - header_bytes), total), total)

        remote = f"{self._spool}/incoming/{self._digest}.pack"
        try:
            self._transport.push(pack, remote, progress=forward)
        except DeviceFullError as error:
            raise DeviceFullError(
                f"no space for a pack of {format_bytes(payload_bytes)} ({error.what}).",
                "Free space there (stifarm devices clean), then deploy again: it goes on from here.",
                device=self._transport.device,
            ) from error
        answer = call_agent(self._transport, self._spool, "accept", self._digest, remote, *self._fence)
        rejected = _indices(answer, "rejected", len(self._table), self._transport.device)
        self.chunks += len(group)
        self.bytes += payload_bytes
        return [index for index in rejected if index in group]


def _indices(answer: dict[str, Any], key: str, count: int, device: str) -> list[int]:
    """A list of chunk indices out of an agent's answer: not trusted. Raises: StableError."""
    value = answer.get(key)
    good = isinstance(value, list) and all(type(index) is int and 0 <= index < count for index in value)
    if not good or value is None or len(set(value)) != len(value):
        raise StableError(
            f"the agent's answer names chunks that the bundle has not ({key}: {str(value)[:80]}).",
            "Update stifarm on the device: agent and host must be of one version.",
            device=device,
        )
    return list(value)


def _host_manifest(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            return stream.read(MANIFEST_CAP_BYTES + 1)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror}.", "Build the bundle again.") from error


def _remote_digest(transport: Transport, path: str) -> str | None:
    try:
        return sha256_hex(transport.read_from(path, 0, MANIFEST_CAP_BYTES + 1))
    except MissingFileError:
        return None


def _remote_exists(transport: Transport, path: str) -> bool:
    try:
        transport.read_from(path, 0, 1)
    except MissingFileError:
        return False
    return True
