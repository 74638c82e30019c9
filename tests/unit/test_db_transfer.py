"""Export and backup."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from sqlalchemy import text

from db.documents import document, storable, untrusted_document
from db.events import latest_events, record_event
from db.session import Store, open_store, sqlite_url
from db.transfer import backup, export_table, tables
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


def test_export_refuses_clearly(store: Store, tmp_path: Path) -> None:
    with store.reader() as session:
        with pytest.raises(InputError, match=r"It has: .*runs"):
            export_table(session, "cats", tmp_path / "x", "csv")
        with pytest.raises(InputError, match="csv, json"):
            export_table(session, "events", tmp_path / "x", "xlsx")
        with pytest.raises(ResourceError, match="No such file or directory"):
            export_table(session, "events", tmp_path / "absent" / "x", "csv")
    assert "journal_records" in tables()
    store.close()


def test_backup_of_a_store_in_use(store: Store, tmp_path: Path) -> None:
    copy = tmp_path / "copy.sqlite"
    backup(sqlite_url(tmp_path / "store.sqlite"), copy)
    with store.session() as session:
        record_event(session, "info", "later", "")
    with open_store(sqlite_url(copy)) as opened, opened.reader() as session:
        assert [event.kind for event in latest_events(session)] == ["two", "one"]
        assert opened.store_id == store.store_id
        assert session.execute(text("PRAGMA integrity_check")).scalar() == "ok"
    with pytest.raises(InputError, match="exists already"):
        backup(sqlite_url(tmp_path / "store.sqlite"), copy)
    store.close()


def test_backup_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="pg_dump") as caught:
        backup("postgresql://me:secret@host/farm", tmp_path / "x")
    assert "secret" not in str(caught.value)
    with pytest.raises(InputError, match="no store to back up"):
        backup(sqlite_url(tmp_path / "absent.sqlite"), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_documents_hold_what_columns_can() -> None:
    assert storable("a\x00b\ud800") == "a\ufffdb?"
    assert document({"b": 1, "a": [True, None]}) == '{"a":[true,null],"b":1}'
    request = world.request(0).model_copy(update={"logits": (float("nan"), float("-inf"))})
    assert json.loads(untrusted_document(request))["logits"] == ["nan", "-inf"]
