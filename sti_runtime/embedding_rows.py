"""Embedding rows on demand: which pages of ``embeddings.bin`` a request needs, and its rows out of them.

A request reads the rows of its distinct tokens, the first L position rows and its token-type rows, as
whole 4 KiB pages, each page once. The pages lie in one buffer in file order, so a row that crosses a
page border is contiguous there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sti_runtime.errors import InputError
from sti_runtime.manifest import ALIGNMENT, EmbeddingTable, Manifest
from sti_runtime.plan import MERGE_LIMIT_BYTES
from sti_runtime.shard import F32
from sti_runtime.storage import U8

I64 = npt.NDArray[np.int64]
_MERGE_PAGES = MERGE_LIMIT_BYTES // ALIGNMENT


@dataclass(frozen=True, slots=True)
class Request:
    """One row of task data. Shapes: ids and types [L]; tokens behind ``length`` are padding."""

    input_ids: npt.NDArray[np.int32]
    token_types: npt.NDArray[np.int32]
    length: int

    @property
    def tokens(self) -> int:
        """L."""
        return int(self.input_ids.shape[0])


@dataclass(frozen=True, slots=True)
class PageRun:
    """Neighbouring pages read as one: file range, and where it lies in the buffer.

    ``required_bytes`` is what the file has of it; the last page of the file may be short."""

    offset: int
    length: int
    required_bytes: int
    start: int


@dataclass(frozen=True, slots=True)
class RowReads:
    """The page reads of one request and where its rows lie. Starts are in floats from the buffer's start.

    Shapes: words, types [L]; positions: the first of L neighbouring rows."""

    runs: tuple[PageRun, ...]
    buffer_bytes: int
    required_bytes: int
    words: I64
    position: int
    types: I64 | None


def check_request(manifest: Manifest, request: Request) -> None:
    """Raises: InputError if a token is outside the vocabulary or the sequence longer than the positions."""
    config = manifest.model
    highest, lowest = int(request.input_ids.max()), int(request.input_ids.min())
    if lowest < 0 or highest >= config.vocab:
        raise InputError(
            f"Token id {highest if lowest >= 0 else lowest} is outside the model's vocabulary of "
            f"{config.vocab}.",
            "Tokenize the task with this model's tokenizer.",
        )
    if request.tokens > config.max_tokens or not 1 <= request.length <= request.tokens:
        raise InputError(
            f"{request.length} of {request.tokens} tokens do not fit a model of {config.max_tokens}.",
            "Tokenize the task with fewer tokens.",
        )
    if config.token_types and not 0 <= int(request.token_types.min()) <= int(request.token_types.max()) < (
        config.token_types
    ):
        raise InputError("A token type is outside the model's.", "Tokenize the task for this model.")


def plan_row_reads(manifest: Manifest, file_bytes: int, request: Request) -> RowReads:
    """The reads of one checked request; ``file_bytes`` is the size of the embeddings file."""
    tables = {table.name: table for table in manifest.embeddings}
    word_starts = _row_starts(tables["word"], request.input_ids)
    position = tables["position"]
    first = position.offset + manifest.model.position_offset * position.row_bytes
    last = first + request.tokens * position.row_bytes - 1
    parts = [
        _pages(word_starts, tables["word"].row_bytes),
        np.arange(first // ALIGNMENT, last // ALIGNMENT + 1),
    ]
    type_starts = None
    if manifest.model.token_types:
        type_starts = _row_starts(tables["token_type"], request.token_types)
        parts.append(_pages(type_starts, tables["token_type"].row_bytes))
    pages = np.unique(np.concatenate(parts))
    runs = tuple(_runs(pages, file_bytes))
    return RowReads(
        runs=runs,
        buffer_bytes=int(pages.size) * ALIGNMENT,
        required_bytes=sum(run.required_bytes for run in runs),
        words=_in_buffer(word_starts, pages),
        position=int(_in_buffer(np.array([first]), pages)[0]),
        types=None if type_starts is None else _in_buffer(type_starts, pages),
    )


def gather_rows(buffer: U8, reads: RowReads, hidden: int) -> tuple[F32, F32, F32 | None]:
    """Copy the rows out of the pages: words [L, H], positions [L, H], token types [L, H] or None."""
    floats = buffer[: reads.buffer_bytes].view(np.float32)
    windows = np.lib.stride_tricks.as_strided(
        floats, (floats.size - hidden + 1, hidden), (4, 4), writeable=False
    )
    tokens = reads.words.size
    positions = floats[reads.position : reads.position + tokens * hidden].reshape(tokens, hidden)
    types = None if reads.types is None else windows[reads.types]
    return windows[reads.words], positions.copy(), types


def buffer_bound_bytes(manifest: Manifest, tokens: int) -> int:
    """Bytes that the pages of any request of ``tokens`` tokens fit in."""
    row_bytes = 4 * manifest.model.hidden
    per_row = (row_bytes + ALIGNMENT - 2) // ALIGNMENT + 1
    rows = tokens + (min(manifest.model.token_types, tokens) if manifest.model.token_types else 0)
    positions = (tokens * row_bytes + ALIGNMENT - 2) // ALIGNMENT + 1
    file_pages = -(-max(t.offset + t.rows * t.row_bytes for t in manifest.embeddings) // ALIGNMENT)
    return min(rows * per_row + positions, file_pages) * ALIGNMENT


def _row_starts(table: EmbeddingTable, rows: npt.NDArray[Any]) -> I64:
    starts: I64 = table.offset + rows.astype(np.int64) * table.row_bytes
    return starts


def _pages(starts: I64, row_bytes: int) -> I64:
    """Pages that the rows touch (with repeats)."""
    first, last = starts // ALIGNMENT, (starts + row_bytes - 1) // ALIGNMENT
    steps = np.arange(int((last - first).max()) + 1)
    touched: I64 = np.minimum(first[:, None] + steps, last[:, None]).reshape(-1)
    return touched


def _runs(pages: I64, file_bytes: int) -> list[PageRun]:
    breaks = np.flatnonzero(np.diff(pages) != 1) + 1
    runs, start = [], 0
    for end in [*breaks.tolist(), int(pages.size)]:
        for part in range(start, end, _MERGE_PAGES):
            offset = int(pages[part]) * ALIGNMENT
            length = (min(part + _MERGE_PAGES, end) - part) * ALIGNMENT
            runs.append(PageRun(offset, length, min(length, file_bytes - offset), part * ALIGNMENT))
        start = end
    return runs


def _in_buffer(starts: I64, pages: I64) -> I64:
    """File offsets → index of the float in the buffer."""
    byte = np.searchsorted(pages, starts // ALIGNMENT) * ALIGNMENT + starts % ALIGNMENT
    return np.asarray(byte // 4, np.int64)
