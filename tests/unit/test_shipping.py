"""Content on its way to a host: what is lacking, damaged, interrupted, too much, in use."""

from __future__ import annotations

import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from orchestrator.content_cache import Cache, Content, Lack
from orchestrator.shipping import PIECE_BYTES, ship
from sti_runtime.errors import DigestError, FormatError, ResourceError
from tests.bundles import make_bundle, small_config

LIMIT = 100 * PIECE_BYTES


def task_data(folder: Path, size: int, fill: bytes = b"x") -> Content:
    """A file of task data at the controller, which then is not where a host could see it."""
    folder.mkdir(exist_ok=True)
    data = (fill * size)[:size]
    path = folder / f"{sha256(data).hexdigest()}.safetensors"
    path.write_bytes(data)
    return Content.of_task(path)


class Elsewhere(Cache):
    """The cache of a host that does not see the controller's files; ``pieces`` counts what it was sent."""

    def __init__(self, folder: Path, limit_bytes: int = LIMIT) -> None:
        super().__init__(folder, limit_bytes)
        self.pieces = 0
        self.spoil: Callable[[bytes], bytes] = bytes

    def lacking(self, content: Content) -> tuple[Lack, ...] | None:
        return super().lacking(moved(content))

    def receive(self, content: Content, file: str, offset: int, piece: bytes) -> None:
        self.pieces += 1
        super().receive(moved(content), file, offset, self.spoil(piece))

    def settle(self, content: Content) -> None:
        super().settle(moved(content))


def moved(content: Content) -> Content:
    """The content as a host elsewhere is told of it: its path is not there."""
    return Content(content.kind, content.digest, Path("/not/there") / content.digest, content.files)


def test_task_data_goes_in_pieces_once(tmp_path: Path) -> None:
    content, cache = task_data(tmp_path / "a", 2 * PIECE_BYTES + 5), Elsewhere(tmp_path / "cache")
    steps: list[tuple[int, int]] = []
    assert ship(content, cache, lambda done, total: steps.append((done, total))) == content.size_bytes
    assert (cache.pieces, steps[-1]) == (3, (content.size_bytes, content.size_bytes))
    with cache.using([moved(content)]) as (path,):
        assert path.read_bytes() == content.path.read_bytes()
    assert ship(content, cache) == 0
    assert cache.pieces == 3


def test_a_bundle_arrives_whole(tmp_path: Path) -> None:
    content, cache = (
        Content.of_bundle(make_bundle(small_config(), tmp_path)[0].path),
        Elsewhere(tmp_path / "cache"),
    )
    assert ship(content, cache) == content.size_bytes
    with cache.using([moved(content)]) as (path,):
        assert Content.of_bundle(path).files == content.files


def test_a_host_that_sees_the_path_is_sent_nothing(tmp_path: Path) -> None:
    content, cache = task_data(tmp_path / "a", 100), Cache(tmp_path / "cache", LIMIT)
    assert ship(content, cache) == 0
    with cache.using([content]) as (path,):
        assert path == content.path
    content.path.write_bytes(b"other")  # the path is there, what is in it is not
    assert cache.lacking(content) is not None


def test_an_interrupted_transfer_goes_on(tmp_path: Path) -> None:
    content, cache = task_data(tmp_path / "a", 3 * PIECE_BYTES), Elsewhere(tmp_path / "cache")
    first = content.path.read_bytes()[:PIECE_BYTES]
    cache.receive(content, content.digest, 0, first)
    cache.receive(content, content.digest, 0, first)  # a call that was repeated
    assert cache.lacking(content) == (Lack(content.digest, PIECE_BYTES),)
    assert ship(content, Elsewhere(tmp_path / "cache")) == 2 * PIECE_BYTES


def test_what_arrives_damaged_is_sent_once_more(tmp_path: Path) -> None:
    content, cache = task_data(tmp_path / "a", 50), Elsewhere(tmp_path / "cache")

    def once(piece: bytes) -> bytes:
        cache.spoil = bytes
        return b"!" + piece[1:]

    cache.spoil = once
    assert ship(content, cache) == 100
    other = task_data(tmp_path / "a", 60)
    cache.spoil = lambda piece: b"!" + piece[1:]
    with pytest.raises(DigestError, match="arrived damaged"):
        ship(other, cache)
    assert cache.lacking(other) == (Lack(other.digest, 0),)


def test_the_cache_forgets_what_was_used_longest_ago_but_nothing_in_use(tmp_path: Path) -> None:
    cache = Elsewhere(tmp_path / "cache", limit_bytes=250)
    old, used, fresh = (task_data(tmp_path / "a", 100, fill) for fill in (b"o", b"u", b"f"))
    for age, content in ((10, used), (5, old)):
        ship(content, cache)
        os.utime(tmp_path / "cache/tasks" / content.digest, (age, age))
    with cache.using([moved(used)]):
        ship(fresh, cache)
        assert not (tmp_path / "cache/tasks" / old.digest).exists()
        large, in_use = (
            task_data(tmp_path / "a", 200),
            r"no room for 200 bytes .* 200 of 250 bytes are in use",
        )
        with cache.using([moved(fresh)]), pytest.raises(ResourceError, match=in_use):
            cache.lacking(large)
    with pytest.raises(ResourceError, match="no longer in the host's cache"), cache.using([moved(old)]):
        pass


def test_only_files_of_the_content_are_written(tmp_path: Path) -> None:
    content, cache = task_data(tmp_path / "a", 10), Elsewhere(tmp_path / "cache")
    with pytest.raises(FormatError, match="is no file of"):
        cache.receive(content, "../escaped", 0, b"x")
    assert not (tmp_path / "cache").exists()
