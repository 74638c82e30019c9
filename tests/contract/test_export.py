"""Exports of every table and view, from every kind of store."""

from __future__ import annotations

import csv
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from sqlalchemy import text

from db.ingest import ingest
from db.session import Store
from db.transfer import export_table, tables
from tests.contract import store_world as world


def test_every_table_and_view_can_be_had_in_every_format(store: Store, tmp_path: Path) -> None:
    with store.session() as session:
        made = world.populate(session)
        records = world.journal(made.job, made.plan)
        ingest(session, device_id=made.device_id, job_id=made.job.id, attempt=1, records=records)
    formats = ["csv", "json"] + ["parquet"] * (find_spec("pyarrow") is not None)
    filled = set[str]()
    with store.reader() as session:
        for name in tables():
            count = session.execute(text(f"SELECT count(*) FROM {name}")).scalar_one()
            filled |= {name} if count else set()
            for kind in formats:
                assert export_table(session, name, tmp_path / f"{name}.{kind}", kind) == count, (name, kind)
            objects = json.loads((tmp_path / f"{name}.json").read_text())
            with (tmp_path / f"{name}.csv").open(newline="") as stream:
                rows = list(csv.DictReader(stream))
            assert len(objects) == len(rows) == count
            for one, row in zip(objects, rows, strict=True):
                assert {key: "" if value is None else str(value) for key, value in one.items()} == row
    assert {"requests", "plans", "journal_records", "v_latest_plans", "v_run_summary"} <= filled


def test_parquet_has_what_json_has(store: Store, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow: install stifarm[parquet]")
    with store.session() as session:
        made = world.populate(session)
        records = world.journal(made.job, made.plan)
        ingest(session, device_id=made.device_id, job_id=made.job.id, attempt=1, records=records)
    with store.reader() as session:
        for name in ("requests", "v_run_summary"):
            export_table(session, name, tmp_path / "x.json", "json", force=True)
            export_table(session, name, tmp_path / "x.parquet", "parquet", force=True)
            found = parquet.read_table(tmp_path / "x.parquet").to_pylist()
            assert found == json.loads((tmp_path / "x.json").read_text())
            assert found
