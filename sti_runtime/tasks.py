"""Tasks: which columns of a TSV are text and label, reading it, holding out a profile split.

A TSV is UTF-8 with one header line, tab-separated and unquoted (``csv.QUOTE_NONE``: quote characters
are text). Empty lines are skipped, as the csv module does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, ValidationError

from sti_runtime.errors import DatasetError
from sti_runtime.metrics import (
    UNKNOWN_LABEL,
    Accuracy,
    accuracy,
    count_correct,
    mean_cross_entropy,
    row_losses,
    wilson_interval,
)
from sti_runtime.model import ModelConfig
from sti_runtime.records import Positive, Record, canonical_json, sha256_hex
from sti_runtime.task_data import (
    TaskData,
    TaskDataInfo,
    load_task_data,
    save_task_data,
    store_task_data,
    task_data_bytes,
    task_data_digest,
)
from sti_runtime.tokenization import encode

__all__ = [
    "PRESETS",
    "UNKNOWN_LABEL",
    "Accuracy",
    "Example",
    "TaskData",
    "TaskDataInfo",
    "TaskSpec",
    "accuracy",
    "build_task_data",
    "count_correct",
    "discover_labels",
    "load_task_data",
    "mean_cross_entropy",
    "read_tsv",
    "row_losses",
    "save_task_data",
    "split_digest",
    "split_profile",
    "store_task_data",
    "task_data_bytes",
    "task_data_digest",
    "user_task",
    "wilson_interval",
]

_REMEDY_FORMAT = "A task file is UTF-8, tab-separated, unquoted, with one header line."


class TaskSpec(Record):
    """How to read one task: one or two text columns, a label column, the labels in index order."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    text_columns: Annotated[tuple[str, ...], Field(min_length=1, max_length=2)]
    label_column: str
    labels: Annotated[tuple[str, ...], Field(min_length=2, max_length=4096)]
    max_tokens: Positive
    metric: Literal["accuracy"]


@dataclass(frozen=True, slots=True)
class Example:
    """One row: a text or a pair, and the index of its label (-1: unknown)."""

    text: str
    pair: str | None
    label: int


def _preset(
    name: str,
    text_columns: tuple[str, ...],
    labels: tuple[str, ...],
    label_column: str = "label",
    max_tokens: int = 128,
) -> TaskSpec:
    return TaskSpec(
        name=name,
        text_columns=text_columns,
        label_column=label_column,
        labels=labels,
        max_tokens=max_tokens,
        metric="accuracy",
    )


PRESETS: Mapping[str, TaskSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            _preset("sst-2", ("sentence",), ("0", "1"), max_tokens=64),
            _preset("rte", ("sentence1", "sentence2"), ("entailment", "not_entailment")),
            _preset("qnli", ("question", "sentence"), ("entailment", "not_entailment")),
            _preset("qqp", ("question1", "question2"), ("0", "1"), label_column="is_duplicate"),
        )
    }
)
"""GLUE tasks in the benchmark's own TSV form. Source: Wang et al., GLUE (2019)."""


def user_task(
    path: Path,
    *,
    name: str,
    text_columns: Sequence[str],
    label_column: str,
    labels: Sequence[str] | None = None,
    max_tokens: int = 128,
) -> TaskSpec:
    """The spec of a user's TSV; labels not given are those of the file, sorted.

    Raises: DatasetError.
    """
    if labels is None:
        labels = discover_labels(path, label_column)
    try:
        return TaskSpec(
            name=name,
            text_columns=tuple(text_columns),
            label_column=label_column,
            labels=tuple(labels),
            max_tokens=max_tokens,
            metric="accuracy",
        )
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DatasetError(
            f"{path}: no task can be made of it: {where}: {first['msg']}.",
            "Name the task in lower case, one or two text columns and at least two labels.",
        ) from error


def discover_labels(path: Path, label_column: str) -> tuple[str, ...]:
    """All labels of a TSV, sorted. Raises: DatasetError, also when there are fewer than two."""
    labels = sorted({cells[0] for _, cells in _rows(path, (label_column,))})
    if len(labels) < 2:
        raise DatasetError(
            f"{path}: column {label_column!r} holds one label only, {labels[0]!r}.",
            "Give data with at least two labels, or name the labels.",
        )
    return tuple(labels)


def read_tsv(path: Path, spec: TaskSpec, *, labelled: bool = True) -> list[Example]:
    """Read all rows of ``path``. Without ``labelled`` no label column is needed and labels are -1.

    Raises: DatasetError naming file, line, cause and remedy.
    """
    index = {label: number for number, label in enumerate(spec.labels)}
    columns = (*spec.text_columns, spec.label_column) if labelled else spec.text_columns
    examples = []
    for line, cells in _rows(path, columns):
        label = UNKNOWN_LABEL
        if labelled:
            if cells[-1] not in index:
                raise DatasetError(
                    f"{path}, line {line}: unknown label {cells[-1]!r} in column {spec.label_column!r}; "
                    f"task {spec.name} knows {', '.join(map(repr, spec.labels))}.",
                    "Correct the row or choose the task whose labels these are.",
                )
            label = index[cells[-1]]
        pair = cells[1] if len(spec.text_columns) == 2 else None
        examples.append(Example(text=cells[0], pair=pair, label=label))
    return examples


def split_profile(examples: Sequence[Example], rows: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Hold ``rows`` examples out of ``examples``: (train, profile), each in file order.

    The choice depends on texts and seed only, and rows with the same text stay on one side.
    Raises: DatasetError when that leaves no train rows or cannot be met.
    """
    keys = [sha256_hex(canonical_json([seed, example.text, example.pair])) for example in examples]
    held: set[int] = set()
    for _, group in groupby(sorted(range(len(examples)), key=lambda i: (keys[i], i)), key=keys.__getitem__):
        same = list(group)
        if len(held) + len(same) <= rows:
            held.update(same)
        if len(held) == rows:
            break
    if rows < 1 or len(held) != rows or len(held) == len(examples):
        raise DatasetError(
            f"A profile split of {rows} rows cannot be held out of {len(examples)} examples.",
            "Ask for at least one row and leave rows to train on: --profile-rows.",
        )
    train = [example for i, example in enumerate(examples) if i not in held]
    return train, [example for i, example in enumerate(examples) if i in held]


def split_digest(examples: Sequence[Example]) -> str:
    """SHA-256 of a split's texts and labels, in order."""
    return sha256_hex(canonical_json([[e.text, e.pair, e.label] for e in examples]))


def build_task_data(
    examples: Sequence[Example], spec: TaskSpec, split: str, *, config: ModelConfig, tokenizer_json: bytes
) -> TaskData:
    """Tokenize a split for a model; a model without a second token type gets zeros.

    Raises: DatasetError when there are no examples or the task's rows are longer than the model allows.
    """
    if not examples:
        raise DatasetError(f"Split {split!r} of task {spec.name} has no rows.", "Give data that has rows.")
    if spec.max_tokens > config.max_tokens:
        raise DatasetError(
            f"Task {spec.name} asks for {spec.max_tokens} tokens, the model allows {config.max_tokens}.",
            f"Set max_tokens to {config.max_tokens} or less: --max-tokens.",
        )
    tokenized = encode(tokenizer_json, [(e.text, e.pair) for e in examples], spec.max_tokens)
    types = tokenized.token_types if config.token_types > 1 else np.zeros_like(tokenized.token_types)
    return TaskData(
        info=TaskDataInfo(
            format="stifarm-task-data",
            version=1,
            task=spec.name,
            split=split,
            labels=spec.labels,
            tokenizer=sha256_hex(tokenizer_json),
        ),
        input_ids=tokenized.input_ids,
        token_types=types,
        lengths=tokenized.lengths,
        labels=np.array([e.label for e in examples], dtype=np.int32),
    )


# ------------------------------------------------------------------ TSV


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """(line number, the cells of ``columns``) of every row; at least one. Raises: DatasetError."""
    lines = _lines(path)
    _, header = next(lines, (0, []))
    if not header:
        raise DatasetError(f"{path}: is empty.", _REMEDY_FORMAT)
    positions = []
    for column in columns:
        if header.count(column) != 1:
            problem = "has no" if column not in header else "has more than one"
            raise DatasetError(
                f"{path}, line 1: {problem} column {column!r}; columns are {', '.join(map(repr, header))}.",
                "Name the text and label columns as the header does.",
            )
        positions.append(header.index(column))
    number = 0
    for number, cells in lines:
        if len(cells) != len(header):
            raise DatasetError(
                f"{path}, line {number}: {len(cells)} columns where the header has {len(header)}.",
                _REMEDY_FORMAT,
            )
        yield number, [cells[position] for position in positions]
    if number == 0:
        raise DatasetError(f"{path}: has a header and no rows.", "Give data that has rows.")


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of every line that is not empty. Lines end in LF or CRLF only."""
    try:
        with path.open("rb") as stream:
            for number, raw in enumerate(stream, start=1):
                line = raw.removesuffix(b"\n").removesuffix(b"\r")
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line:
                    yield number, _decode(line, path, number).split("\t")
    except OSError as error:
        raise DatasetError(
            f"{path}: cannot be read: {error.strerror}.", "Check the path and its permissions."
        ) from error


def _decode(line: bytes, path: Path, number: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{path}, line {number}: byte {error.start + 1} is not UTF-8.", "Convert the file to UTF-8."
        ) from error
