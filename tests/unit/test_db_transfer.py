"""Export of tables and views."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from sqlalchemy import insert

from db.documents import document, storable, untrusted_document
from db.events import record_event
from db.models import EventRow
from db.session import Store, open_store, sqlite_url
from db.transfer import export_table, tables
from sti_runtime.errors import InputError, ResourceError
from tests.contract import store_world as world


@pytest.fixture
def store(tmp_path: Path) -> Store:
    opened = open_store(sqlite_url(tmp_path / "store.sqlite"))
    with opened.session() as session:
        record_event(session, "info", "one", 'with "quotes", commas\nand lines')
        record_event(session, "error", "two", "ü")
    return opened


def test_export_csv_and_json_agree(store: Store, tmp_path: Path) -> None:
    with store.reader() as session:
        assert export_table(session, "events", tmp_path / "e.csv", "csv") == 2
        assert export_table(session, "events", tmp_path / "e.json", "json") == 2
        assert export_table(session, "plans", tmp_path / "p.json", "json") == 0
    objects = json.loads((tmp_path / "e.json").read_text())
    assert [o["what"] for o in objects] == ['with "quotes", commas\nand lines', "ü"]
    with (tmp_path / "e.csv").open(newline="") as stream:
        assert [row["what"] for row in csv.DictReader(stream)] == [o["what"] for o in objects]
    assert json.loads((tmp_path / "p.json").read_text()) == []
    assert not list(tmp_path.glob("*.part"))
    store.close()


def test_export_parquet_keeps_types_and_nulls(store: Store, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow: install stifarm[parquet]")
    with store.session() as session:
        world.populate(session)
    with store.reader() as session:
        assert export_table(session, "events", tmp_path / "e.parquet", "parquet") == 2
        assert export_table(session, "v_latest_plans", tmp_path / "v.parquet", "parquet") == 1
        assert export_table(session, "runs", tmp_path / "r.parquet", "parquet") == 0
    events = parquet.read_table(tmp_path / "e.parquet")
    assert events.column("what").to_pylist() == ['with "quotes", commas\nand lines', "ü"]
    assert events.column("device_id").to_pylist() == [None, None]
    (plan,) = parquet.read_table(tmp_path / "v.parquet").to_pylist()
    assert (plan["device"], plan["within_target"], plan["borrowed"]) == ("board", True, False)
    assert parquet.read_table(tmp_path / "r.parquet").num_rows == 0
    store.close()


def test_export_of_many_rows_keeps_them_all_in_order(store: Store, tmp_path: Path) -> None:
    count = 12_000  # more than two batches
    rows = [{"wall_ns": i, "level": "info", "kind": "k", "what": str(i)} for i in range(count)]
    with store.session() as session:
        session.execute(insert(EventRow), rows)
    with store.reader() as session:
        assert export_table(session, "events", tmp_path / "e.csv", "csv") == count + 2
    with (tmp_path / "e.csv").open(newline="") as stream:
        found = [int(row["wall_ns"]) for row in csv.DictReader(stream)]
    assert found[2:] == list(range(count))
    store.close()


def test_export_refuses_clearly(store: Store, tmp_path: Path) -> None:
    with store.reader() as session:
        with pytest.raises(InputError, match=r"It has: .*runs"):
            export_table(session, "cats", tmp_path / "x", "csv")
        with pytest.raises(InputError, match="csv, json, parquet"):
            export_table(session, "events", tmp_path / "x", "xlsx")
        with pytest.raises(ResourceError, match="No such file or directory"):
            export_table(session, "events", tmp_path / "absent" / "x", "csv")
        (tmp_path / "mine").write_text("mine")
        with pytest.raises(InputError, match="exists already"):
            export_table(session, "events", tmp_path / "mine", "csv")
        assert (tmp_path / "mine").read_text() == "mine"
        assert export_table(session, "events", tmp_path / "mine", "json", force=True) == 2
    assert "journal_records" in tables()
    assert "v_run_summary" in tables()
    store.close()


def test_documents_hold_what_columns_can() -> None:
    assert storable("a\x00b\ud800") == "a\ufffdb?"
    assert document({"b": 1, "a": [True, None]}) == '{"a":[true,null],"b":1}'
    request = world.request(0).model_copy(update={"logits": (float("nan"), float("-inf"))})
    assert json.loads(untrusted_document(request))["logits"] == ["nan", "-inf"]
