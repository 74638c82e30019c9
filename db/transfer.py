"""Export of tables and views to files, streamed: a table may be larger than memory."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqlalchemy import BigInteger, Boolean, FromClause, Table, Text, column, select, table
from sqlalchemy.orm import Session
from sqlalchemy.types import TypeEngine

from db.models import Base
from db.views import VIEWS
from sti_runtime.errors import InputError, ResourceError

_ROWS_AT_ONCE = 5000

Types = Mapping[str, type]
"""Columns in order with what their values are: int, bool or str. Any may be NULL."""

Batches = Iterable[Sequence[Sequence[Any]]]


def tables() -> tuple[str, ...]:
    """Names of all tables and views that can be exported."""
    return (*sorted(Base.metadata.tables), *(view.name for view in VIEWS))


def formats() -> tuple[str, ...]:
    """Names of the formats."""
    return tuple(_WRITERS)


def export_table(session: Session, name: str, path: Path, format: str, *, force: bool = False) -> int:
    """Write a table or view to ``path`` as "csv", "json" (one array of objects) or "parquet"; the number of
    rows. NULL is an empty field, ``null`` and a null.

    The file appears when it is complete; one that is there is replaced only by ``force``.
    Raises: InputError; ResourceError when it cannot be written.
    """
    source = _source(name)
    if format not in _WRITERS:
        raise InputError(f"Cannot export to {format!r}.", f"Formats: {', '.join(_WRITERS)}.")
    if path.is_dir() or (path.exists() and not force):
        raise InputError(f"{path} exists already.", "Name another file, or replace that one with --force.")
    query = select(source).execution_options(yield_per=_ROWS_AT_ONCE)
    if isinstance(source, Table):
        query = query.order_by(*source.primary_key.columns)
    types = {c.name: c.type.python_type for c in source.columns}
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        count = _WRITERS[format](partial, types, session.execute(query).partitions())
        partial.replace(path)
    except OSError as error:
        raise ResourceError(
            f"{path}: the export cannot be written: {error.strerror or error}.",
            "Free some space or choose another folder.",
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()
    return count


def _source(name: str) -> FromClause:
    """The table or view, with typed columns. Raises: InputError."""
    found = Base.metadata.tables.get(name)
    if found is not None:
        return found
    kinds: dict[str, TypeEngine[Any]] = {"integer": BigInteger(), "boolean": Boolean(), "text": Text()}
    for view in VIEWS:
        if view.name == name:
            return table(name, *(column(each, kinds[kind]) for each, kind in view.types.items()))
    raise InputError(
        f"The store has no table {name!r}, and no view of that name.", f"It has: {', '.join(tables())}."
    )


def _write_csv(path: Path, types: Types, batches: Batches) -> int:
    count = 0
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(types)
        for rows in batches:
            writer.writerows(rows)
            count += len(rows)
    return count


def _write_json(path: Path, types: Types, batches: Batches) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as stream:
        stream.write("[")
        for rows in batches:
            for row in rows:
                stream.write(",\n" if count else "\n")
                stream.write(json.dumps(dict(zip(types, row, strict=True)), ensure_ascii=False))
                count += 1
        stream.write("\n]\n")
    return count


def _write_parquet(path: Path, types: Types, batches: Batches) -> int:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise InputError("Parquet needs the package pyarrow.", "Install stifarm[parquet].") from error
    kinds = {int: pyarrow.int64(), bool: pyarrow.bool_(), str: pyarrow.string()}
    schema = pyarrow.schema([(name, kinds[kind]) for name, kind in types.items()])
    count = 0
    with parquet.ParquetWriter(path, schema, compression="zstd") as writer:
        for rows in batches:
            arrays = [
                pyarrow.array(values, type=field.type)
                for values, field in zip(zip(*rows, strict=True), schema, strict=True)
            ]
            writer.write_batch(pyarrow.record_batch(arrays, schema=schema))
            count += len(rows)
    return count


_WRITERS: dict[str, Callable[[Path, Types, Batches], int]] = {
    "csv": _write_csv,
    "json": _write_json,
    "parquet": _write_parquet,
}
