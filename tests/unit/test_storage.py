"""Storage, buffers, embedding pages and the preload buffer, on real files."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sti_runtime.embedding_rows import (
    buffer_bound_bytes,
    check_request,
    gather_rows,
    plan_row_reads,
)
from sti_runtime.errors import InputError, StorageReadError
from sti_runtime.manifest import ALIGNMENT, EMBEDDINGS_FILE
from sti_runtime.messages import IoMode
from sti_runtime.preload import PreloadBuffer
from sti_runtime.storage import (
    U8,
    BufferPool,
    Storage,
    StorageCounter,
    anonymous_pages,
    direct_io_works,
)
from tests.bundles import make_bundle, make_request, small_config

PAGE = ALIGNMENT


@pytest.fixture
def data(tmp_path: Path) -> bytes:
    """Content of ``file.bin`` in tmp_path: 40 pages and a bit."""
    content = np.random.default_rng(0).integers(0, 256, 40 * PAGE + 100, np.uint8).tobytes()
    (tmp_path / "file.bin").write_bytes(content)
    return content


def open_storage(folder: Path, size: int, mode: IoMode) -> Storage:
    return Storage(folder, {"file.bin": size}, mode)


@pytest.mark.parametrize("mode", ["direct", "buffered"])
def test_scattered_read_gives_the_bytes_of_the_file(tmp_path: Path, data: bytes, mode: IoMode) -> None:
    buffers = [anonymous_pages(n * PAGE) for n in (1, 3, 2)]
    with open_storage(tmp_path, len(data), mode) as storage:
        assert storage.read("file.bin", 5 * PAGE, buffers) == 6 * PAGE
        assert storage.asked_bytes == 6 * PAGE
    assert b"".join(b.tobytes() for b in buffers) == data[5 * PAGE : 11 * PAGE]


@pytest.mark.parametrize("mode", ["direct", "buffered"])
def test_last_page_may_be_short_when_the_rest_is_not_required(
    tmp_path: Path, data: bytes, mode: IoMode
) -> None:
    buffer = anonymous_pages(2 * PAGE)
    with open_storage(tmp_path, len(data), mode) as storage:
        storage.read("file.bin", 39 * PAGE, [buffer], PAGE + 100)
        assert buffer[: PAGE + 100].tobytes() == data[39 * PAGE :]
        with pytest.raises(StorageReadError, match=r"file\.bin: ends at"):
            storage.read("file.bin", 39 * PAGE, [buffer], PAGE + 101)


@pytest.mark.parametrize("mode", ["direct", "buffered"])
def test_truncation_after_opening_is_an_error_that_names_file_and_offset(
    tmp_path: Path, data: bytes, mode: IoMode
) -> None:
    with open_storage(tmp_path, len(data), mode) as storage:
        with (tmp_path / "file.bin").open("r+b") as stream:
            stream.truncate(10 * PAGE + 7)
        with pytest.raises(StorageReadError, match=rf"file\.bin: ends at {10 * PAGE + 7}"):
            storage.read("file.bin", 8 * PAGE, [anonymous_pages(4 * PAGE)])


def test_a_file_shorter_than_its_manifest_is_refused_at_opening(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(StorageReadError, match="truncated"):
        open_storage(tmp_path, len(data) + 1, "buffered")
    with pytest.raises(StorageReadError, match=r"other\.bin: cannot be opened"):
        Storage(tmp_path, {"other.bin": 1}, "buffered")


def test_read_error_of_the_kernel_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with (
        Storage(tmp_path, {"folder": 0}, "buffered") as storage,
        pytest.raises(StorageReadError, match="folder: reading 4096 bytes at 0 failed: Is a directory"),
    ):
        storage.read("folder", 0, [anonymous_pages(PAGE)])


def test_direct_reads_are_counted_even_when_the_page_cache_is_warm(tmp_path: Path, data: bytes) -> None:
    if not direct_io_works(tmp_path / "file.bin"):
        pytest.skip(f"{tmp_path}: this filesystem has no direct IO")
    (tmp_path / "file.bin").read_bytes()
    counter = StorageCounter()
    counter.join()
    with open_storage(tmp_path, len(data), "direct") as storage:
        assert (storage.io_mode, storage.fallback) == ("direct", None)
        before = counter.read()
        storage.read("file.bin", 0, [anonymous_pages(8 * PAGE)])
        after = counter.read()
    counter.close()
    assert before is not None
    assert after is not None
    assert after - before == 8 * PAGE


def test_o_direct_that_is_served_from_memory_is_not_believed() -> None:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        pytest.skip("needs a tmpfs at /dev/shm")
    path = shm / f"stifarm-test-{np.random.default_rng().integers(1 << 60)}.bin"
    path.write_bytes(bytes(4 * PAGE))
    try:
        with Storage(shm, {path.name: 4 * PAGE}, "direct") as storage:
            assert storage.io_mode == "buffered"
            assert storage.fallback is not None
            storage.read(path.name, 0, [anonymous_pages(PAGE)])
    finally:
        path.unlink()


def test_eviction_empties_the_page_cache_except_for_mapped_pages(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "file.bin"
    if not direct_io_works(path):
        pytest.skip(f"{tmp_path}: no storage behind this filesystem whose reads could be counted")
    counter = StorageCounter()
    counter.join()

    def from_storage(storage: Storage) -> int:
        storage.evict()
        before = counter.read()
        storage.read("file.bin", 0, [anonymous_pages(16 * PAGE)])
        after = counter.read()
        assert before is not None
        assert after is not None
        return after - before

    with open_storage(tmp_path, len(data), "buffered") as storage, path.open("rb") as stream:
        assert from_storage(storage) >= 16 * PAGE
        mapped = mmap.mmap(stream.fileno(), 0, mmap.MAP_SHARED, mmap.PROT_READ)
        assert len({mapped[i * PAGE] for i in range(16)}) > 1
        assert from_storage(storage) < 16 * PAGE
        mapped.close()
    counter.close()


# ------------------------------------------------------------------ buffer pool


def test_pool_reuses_exact_sizes_and_drops_others_for_room() -> None:
    pool = BufferPool(4 * PAGE)
    first = pool.acquire([PAGE, 2 * PAGE])
    assert first is not None
    address = first[1].ctypes.data
    pool.release(first)
    again = pool.acquire([2 * PAGE])
    assert again is not None
    assert again[0].ctypes.data == address
    pool.release(again)
    assert pool.acquire([4 * PAGE]) is not None
    assert (pool.in_use_bytes, pool.held_bytes, pool.peak_bytes) == (4 * PAGE, 4 * PAGE, 4 * PAGE)
    assert pool.acquire([PAGE]) is None


@settings(max_examples=60, deadline=None)
@given(
    capacity=st.integers(1, 12),
    steps=st.lists(st.one_of(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.none()), max_size=30),
)
def test_pool_never_holds_more_than_its_capacity(capacity: int, steps: list[list[int] | None]) -> None:
    pool = BufferPool(capacity * PAGE)
    taken: list[list[U8]] = []
    for step in steps:
        if step is None:
            if taken:
                pool.release(taken.pop(0))
        else:
            fits = pool.in_use_bytes + sum(step) * PAGE <= capacity * PAGE
            buffers = pool.acquire([n * PAGE for n in step])
            assert (buffers is not None) == fits
            if buffers is not None:
                assert [b.nbytes for b in buffers] == [n * PAGE for n in step]
                assert all(b.ctypes.data % PAGE == 0 for b in buffers)
                taken.append(buffers)
        assert pool.in_use_bytes == sum(b.nbytes for group in taken for b in group)
        assert pool.in_use_bytes <= pool.held_bytes <= pool.peak_bytes <= capacity * PAGE
    addresses = {b.ctypes.data for group in taken for b in group}
    assert len(addresses) == sum(len(group) for group in taken)


# ------------------------------------------------------------------ preload buffer


def filled(capacity_pages: int, keys: list[tuple[int, int, int]]) -> PreloadBuffer:
    buffer = PreloadBuffer()
    buffer.resize(capacity_pages * PAGE)
    for key in keys:
        pages = buffer.pool.acquire([PAGE])
        assert pages is not None
        buffer.put(key, pages[0])
    return buffer


def test_a_smaller_buffer_keeps_the_bottom_layers() -> None:
    keys = [(0, 0, 2), (0, 1, 2), (1, 0, 2), (1, 1, 2), (3, 0, 4)]
    buffer = filled(5, keys)
    buffer.resize(3 * PAGE)
    assert buffer.keys() == {(0, 0, 2), (0, 1, 2), (1, 0, 2)}
    assert buffer.bytes == buffer.pool.held_bytes == 3 * PAGE
    buffer.resize(PAGE - 1)
    assert buffer.keys() == set()
    assert buffer.pool.held_bytes == 0


def test_a_larger_buffer_keeps_everything_and_keep_evicts_the_rest() -> None:
    buffer = filled(2, [(0, 0, 2), (1, 0, 3)])
    buffer.resize(9 * PAGE)
    assert buffer.bytes == 2 * PAGE
    buffer.keep([(1, 0, 3), (7, 7, 2)])
    assert buffer.keys() == {(1, 0, 3)}
    assert buffer.get((0, 0, 2)) is None


# ------------------------------------------------------------------ embedding rows


@pytest.mark.parametrize("hidden", [64, 96])
@pytest.mark.parametrize("mode", ["direct", "buffered"])
def test_rows_read_by_page_are_the_rows_of_the_tables(tmp_path: Path, hidden: int, mode: IoMode) -> None:
    config = small_config(hidden=hidden).model_copy(update={"position_offset": 2})
    bundle, tensors = make_bundle(config, tmp_path)
    for seed in range(4):
        request = make_request(config, seed=seed)
        with Storage.of_bundle(bundle.path, bundle.manifest, mode) as storage:
            reads = plan_row_reads(bundle.manifest, storage.size_bytes(EMBEDDINGS_FILE), request)
            buffer = anonymous_pages(reads.buffer_bytes)
            for run in reads.runs:
                into = buffer[run.start : run.start + run.length]
                storage.read(EMBEDDINGS_FILE, run.offset, [into], run.required_bytes)
            assert storage.asked_bytes == reads.required_bytes
        words, positions, types = gather_rows(buffer, reads, hidden)
        np.testing.assert_array_equal(words, tensors["embeddings.word.weight"][request.input_ids])
        np.testing.assert_array_equal(
            positions, tensors["embeddings.position.weight"][2 : 2 + request.tokens]
        )
        assert types is not None
        np.testing.assert_array_equal(types, tensors["embeddings.token_type.weight"][request.token_types])
        assert reads.buffer_bytes <= buffer_bound_bytes(bundle.manifest, request.tokens)
        pages = [p for run in reads.runs for p in range(run.offset, run.offset + run.length, PAGE)]
        assert len(pages) == len(set(pages)), "a page is read once"


def test_pages_without_a_needed_row_are_not_read(tmp_path: Path) -> None:
    config = small_config().model_copy(update={"vocab": 5000})
    bundle, _ = make_bundle(config, tmp_path)
    request = make_request(config)
    request.input_ids[:] = [7] * 12 + [4000] * 12
    reads = plan_row_reads(bundle.manifest, bundle.file_sizes()[EMBEDDINGS_FILE], request)
    rows = 2 + 2 + 1 + 1  # two word pages, 24 position rows of 256 bytes in two pages, one page of types
    assert reads.buffer_bytes <= rows * PAGE


def test_tokens_outside_the_model_are_refused(tmp_path: Path) -> None:
    config = small_config()
    bundle, _ = make_bundle(config, tmp_path)
    for change in (200, -1):
        request = make_request(config)
        request.input_ids[3] = change
        with pytest.raises(InputError, match=f"Token id {change} "):
            check_request(bundle.manifest, request)
    with pytest.raises(InputError, match="49 tokens do not fit"):
        check_request(bundle.manifest, make_request(config, tokens=49))
    request = make_request(config)
    request.token_types[0] = 2
    with pytest.raises(InputError, match="token type"):
        check_request(bundle.manifest, request)
