"""A bundle or task data as a host is told of it, and the host's cache of what it was sent."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import structlog

from orchestrator.deploy import bundle_digest, file_digest
from sti_runtime.bundle import Bundle
from sti_runtime.errors import DigestError, FormatError, ResourceError
from sti_runtime.manifest import MANIFEST_NAME

CACHE_BYTES = 20_000_000_000
"""How much a host keeps of what it was sent, unless told otherwise."""

_SPARE_BYTES = 200_000_000
"""So much of the host's disk stays free."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Content:
    """A bundle's folder or a file of task data at the controller. ``files``: name and size of each file of a
    bundle; of task data its one file, whose name is the digest."""

    kind: Literal["bundle", "task"]
    digest: str
    path: Path
    files: tuple[tuple[str, int], ...]

    @classmethod
    def of_bundle(cls, path: Path) -> Content:
        """A bundle. Raises: FormatError, DigestError when it cannot be read or is not what it says."""
        bundle = Bundle.open(path)
        sizes = {MANIFEST_NAME: (path / MANIFEST_NAME).stat().st_size, **bundle.file_sizes()}
        return cls("bundle", bundle.digest, path, tuple(sizes.items()))

    @classmethod
    def of_task(cls, path: Path) -> Content:
        """A file of task data. Raises: FormatError when it cannot be read."""
        digest = file_digest(path)
        return cls("task", digest, path, ((digest, path.stat().st_size),))

    @property
    def size_bytes(self) -> int:
        """Bytes of all its files."""
        return sum(size for _, size in self.files)

    def source(self, file: str) -> Path:
        """Where one of its files is at the controller."""
        return self.path / file if self.kind == "bundle" else self.path


@dataclass(frozen=True)
class Lack:
    """A file of a content of which a host has the first ``have`` bytes."""

    file: str
    have: int


class Cache:
    """What a host was sent, below ``folder``; the content used last stays longest.

    ``limit_bytes`` bounds all of it; what a deploy uses now is never removed.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self._folder, self._limit_bytes = folder, limit_bytes
        self._used: dict[str, int] = {}
        self._lock = threading.RLock()

    @contextlib.contextmanager
    def using(self, contents: Sequence[Content]) -> Iterator[tuple[Path, ...]]:
        """Where contents are on this host; they stay for the length of the block.

        Raises: ResourceError when one is not (or no longer) here: it must be sent first.
        """
        with self._lock:
            paths = tuple(self._place(content) for content in contents)
            for content in contents:
                self._used[content.digest] = self._used.get(content.digest, 0) + 1
        try:
            yield paths
        finally:
            with self._lock:
                for content in contents:
                    self._used[content.digest] -= 1

    def lacking(self, content: Content) -> tuple[Lack, ...] | None:
        """Files to be sent, and how much of each is here; None when the content is. Makes room for them.

        Raises: ResourceError.
        """
        with self._lock:
            if self._found(content) is not None:
                return None
            incoming = self._incoming(content)
            have = {name: _size(incoming / name) for name, _ in content.files}
            self._make_room(content.size_bytes - sum(have.values()), keep=content.digest)
            # One that is larger than it may be is not a part of this content.
            return tuple(
                Lack(name, have[name] if have[name] <= size else 0)
                for name, size in content.files
                if have[name] != size
            )

    def receive(self, content: Content, file: str, offset: int, piece: bytes) -> None:
        """Write a piece of one file. Raises: ResourceError when the disk takes it not."""
        if file not in dict(content.files):
            raise FormatError(f"{file!r} is no file of {content.digest[:12]}.", "Report it with this text.")
        path = self._incoming(content) / file
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("r+b" if path.exists() else "wb") as stream:
                stream.truncate(offset)  # what a repeated call or another sender wrote behind it
                stream.seek(offset)
                stream.write(piece)
        except OSError as error:
            raise ResourceError(f"{path} cannot be written: {error.strerror}.", _FREE_SPACE) from error

    def settle(self, content: Content) -> None:
        """Check what was sent and put it in its place. Raises: DigestError, FormatError."""
        with self._lock:
            if self._found(content) is not None:
                return
            incoming = self._incoming(content)
            try:
                if content.kind == "bundle":
                    Bundle.open(incoming, verify=True)
                elif file_digest(incoming / content.digest) != content.digest:
                    raise DigestError(f"task data {content.digest[:12]} arrived damaged.", "Deploy again.")
            except (DigestError, FormatError):
                shutil.rmtree(incoming, ignore_errors=True)
                raise
            place = self._kept(content)
            place.parent.mkdir(parents=True, exist_ok=True)
            if content.kind == "bundle":
                incoming.rename(place)
            else:
                (incoming / content.digest).rename(place)
                incoming.rmdir()
            _log.info("content is here", digest=content.digest, bytes=content.size_bytes)

    # -------------------------------------------------------------- inner

    def _place(self, content: Content) -> Path:
        found = self._found(content)
        if found is None:
            raise ResourceError(
                f"{content.kind} {content.digest[:12]} is no longer in the host's cache.", "Deploy again."
            )
        return found

    def _found(self, content: Content) -> Path | None:
        kept = self._kept(content)
        if kept.exists():
            os.utime(kept)
            return kept
        return content.path if _is_there(content) else None

    def _kept(self, content: Content) -> Path:
        return self._folder / f"{content.kind}s" / content.digest

    def _incoming(self, content: Content) -> Path:
        return self._folder / "incoming" / content.digest

    def _make_room(self, needed: int, keep: str) -> None:
        held = [
            (entry.stat().st_mtime_ns, _size(entry), entry)
            for part in ("bundles", "tasks", "incoming")
            for entry in (self._folder / part).glob("*")
        ]
        total = sum(size for _, size, _ in held)
        free = shutil.disk_usage(_nearest(self._folder)).free - _SPARE_BYTES
        for _, size, entry in sorted(held):
            if total + needed <= self._limit_bytes and needed <= free:
                return
            if entry.name == keep or self._used.get(entry.name, 0) > 0:
                continue
            _log.info("removed from the cache", path=str(entry), bytes=size)
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            total, free = total - size, free + size
        if total + needed > self._limit_bytes or needed > free:
            raise ResourceError(
                f"there is no room for {needed} bytes in its cache {self._folder}: {total} of "
                f"{self._limit_bytes} bytes are in use, {max(0, free)} are free on its disk.",
                _FREE_SPACE,
            )


_FREE_SPACE = "Free space on the host, or give its cache more: stifarm host join --cache SIZE."


def _is_there(content: Content) -> bool:
    """Whether this machine sees the very content at the controller's path."""
    try:
        if content.kind == "task":
            return file_digest(content.path) == content.digest
        if bundle_digest(content.path) != content.digest:
            return False
        return all(_size(content.path / name) == size for name, size in content.files)
    except FormatError:
        return False


def _size(path: Path) -> int:
    """Bytes of a file, or of a folder's files; 0 when there is none."""
    if path.is_dir():
        return sum(each.stat().st_size for each in path.iterdir() if each.is_file())
    return path.stat().st_size if path.exists() else 0


def _nearest(path: Path) -> Path:
    """The path itself or its first parent that exists."""
    return next(part for part in (path, *path.parents) if part.exists())
