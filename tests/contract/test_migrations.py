"""Stores of every earlier schema, with data in them, become stores of this one; nothing in them changes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, MetaData, inspect, select, text

from db import session as session_module
from db.audit import audit_attempt
from db.errors import StoreVersionError
from db.jobs import progress
from db.models import Base
from db.plan_answers import latest_plans
from db.profiles import profile_samples
from db.session import KNOWN_REVISIONS, open_store, parse_url, upgrade
from db.views import VIEWS, drop_views
from sti_runtime.messages import JournalRecord

DATA = Path(__file__).parents[1] / "data"
EARLIER = KNOWN_REVISIONS[:-1]


@contextmanager
def connected(url: str) -> Iterator[Connection]:
    """A transaction on the database, as the store itself opens it."""
    engine = session_module.make_engine(parse_url(url))
    with engine.begin() as connection:
        yield connection
    engine.dispose()


def stored(revision: str) -> dict[str, list[dict[str, Any]]]:
    """Rows that the program of that revision wrote, by table; of the revision before where it has none."""
    path = DATA / f"store-{revision}.json"
    if not path.exists():
        return stored(EARLIER[EARLIER.index(revision) - 1])
    found: dict[str, list[dict[str, Any]]] = json.loads(path.read_text())
    return found


def rows_of(
    connection: Connection, tables: dict[str, list[dict[str, Any]]]
) -> dict[str, list[dict[str, Any]]]:
    """The same tables and columns as they are in the database now."""
    now = MetaData()
    now.reflect(connection)
    found = {}
    for name, rows in tables.items():
        table = now.tables[name]
        query = select(table).order_by(*table.primary_key.columns)
        columns = list(rows[0]) if rows else []
        found[name] = [
            {column: row[column] for column in columns} for row in connection.execute(query).mappings()
        ]
    return found


def make_old(url: str, revision: str) -> dict[str, list[dict[str, Any]]]:
    """A store of an earlier revision with data; what was put in."""
    tables = stored(revision)
    with connected(url) as connection:
        session_module._migrate(connection, "here", revision)
        connection.execute(text("DELETE FROM store_meta"))
        old = MetaData()
        old.reflect(connection)
        for table in old.sorted_tables:
            if tables.get(table.name):
                connection.execute(table.insert(), tables[table.name])
        assert rows_of(connection, tables) == tables
    return tables


@pytest.mark.parametrize("revision", EARLIER)
def test_every_row_of_an_earlier_store_is_there_after_the_upgrade(fresh_url: str, revision: str) -> None:
    tables = make_old(fresh_url, revision)
    with pytest.raises(StoreVersionError, match="older stifarm"):
        open_store(fresh_url)
    assert upgrade(fresh_url) == KNOWN_REVISIONS[-1]
    with connected(fresh_url) as connection:
        assert rows_of(connection, tables) == tables
    assert schema_differences(fresh_url) == []


def test_a_store_of_the_first_schema_answers_as_before(fresh_url: str) -> None:
    tables = make_old(fresh_url, "0001")
    upgrade(fresh_url)
    with open_store(fresh_url) as store, store.reader() as session:
        assert store.store_id == tables["store_meta"][0]["store_id"]
        answers = latest_plans(session, include_emulated=True)
        assert [(a.device, a.plan.target_ns, a.borrowed) for a in answers] == [
            ("board", 5_000_000, False),
            ("board", 7_000_000, False),
            ("twin", 9_000_000, True),
        ]
        assert answers[0].measured is not None
        assert answers[0].measured.latency.count == 10
        jobs = {row["digest"]: row["job_id"] for row in session.execute(
            select(Base.metadata.tables["device_profiles"])).mappings()}  # fmt: skip
        by_job = [job for job in jobs.values() if job is not None]
        assert sorted(by_job) == ["job-1", "job-2"]  # those that were fitted from samples
        samples = profile_samples(
            session, device_id=1, bundle_digest=tables["bundles"][0]["digest"], engine="torch", job_id="job-1"
        )
        assert samples is not None
        records = [
            JournalRecord.from_json(row["record_json"].encode(), source="test")
            for row in tables["journal_records"]
            if row["job_id"] == "job-1"
        ]
        audit = audit_attempt(session, device_id=1, job_id="job-1", attempt=1, records=records)
        assert audit.discrepancies == ()


def test_an_upgrade_counts_what_the_store_holds_of_each_attempt(fresh_url: str) -> None:
    tables = make_old(fresh_url, "0005")
    with connected(fresh_url) as connection:  # of one journal the third record never came
        gone = "DELETE FROM journal_records WHERE job_id = 'job-2' AND attempt = 1 AND seq = 2"
        for samples in ("probes", "io_samples", "compute_samples", "fixed_samples", "runs", "evaluations"):
            of_job = "(SELECT id FROM journal_records WHERE job_id = 'job-2' AND seq = 2)"
            connection.execute(text(f"DELETE FROM {samples} WHERE journal_id IN {of_job}"))
        assert connection.execute(text(gone)).rowcount == 1
    upgrade(fresh_url)
    with open_store(fresh_url) as store, store.reader() as session:
        for attempt in tables["attempts"]:
            job_id, number = attempt["job_id"], attempt["number"]
            counted = progress(session, job_id, number)
            records = [
                row
                for row in tables["journal_records"]
                if (row["job_id"], row["attempt"]) == (job_id, number)
                and (job_id, number, row["seq"]) != ("job-2", 1, 2)
            ]
            believed = [row["type"] for row in records if row["rejected"] is None]
            assert counted.gaps == (job_id == "job-2" and number == 1)
            assert counted.next_seq == (2 if counted.gaps else len(records))
            assert counted.results == believed.count("result")
            assert counted.failures == believed.count("failure")
            assert counted.rejected == len(records) - len(believed)
            assert counted.ended == ("end" in believed)


def test_an_upgrade_that_fails_leaves_the_store_as_it_was(fresh_url: str) -> None:
    tables = make_old(fresh_url, "0001")
    with connected(fresh_url) as connection:
        connection.execute(text("CREATE TABLE sample_summaries (x INTEGER)"))
    with pytest.raises(Exception, match="sample_summaries"):
        upgrade(fresh_url)
    with connected(fresh_url) as connection:
        assert connection.execute(text("SELECT version_num FROM alembic_version")).scalar() == "0001"
        assert rows_of(connection, tables) == tables


# ------------------------------------------------------------------ the schema itself


def schema_differences(url: str) -> list[Any]:
    """Where the migrated schema is not that of the models, made afresh in the same kind of database."""
    with connected(url) as connection:
        return list(compare_metadata(MigrationContext.configure(connection), Base.metadata))


def described(connection: Connection) -> dict[str, Any]:
    """Tables with columns, keys, indexes and constraints, in an order of no meaning."""
    seen = inspect(connection)
    found: dict[str, Any] = {}
    for table in seen.get_table_names():
        if table == "alembic_version":
            continue
        columns = {c["name"]: (str(c["type"]), c["nullable"]) for c in seen.get_columns(table)}
        checks = {(c["name"], " ".join(c["sqltext"].split())) for c in seen.get_check_constraints(table)}
        unique = {(u["name"], tuple(u["column_names"])) for u in seen.get_unique_constraints(table)}
        indexes = {(i["name"], tuple(i["column_names"]), bool(i["unique"])) for i in seen.get_indexes(table)}
        # SQLite keeps no name of a reference that came with a column added later.
        keys = {
            (tuple(k["constrained_columns"]), k["referred_table"], tuple(k["referred_columns"]))
            for k in seen.get_foreign_keys(table)
        }
        found[table] = (columns, checks, unique, indexes, keys, seen.get_pk_constraint(table)["name"])
    return found


def test_the_migrated_schema_is_that_of_the_models(fresh_url: str) -> None:
    upgrade(fresh_url)
    assert schema_differences(fresh_url) == []
    with connected(fresh_url) as connection:
        migrated = described(connection)
        drop_views(connection)
        Base.metadata.drop_all(connection)
        Base.metadata.create_all(connection)
        wanted = described(connection)
    assert migrated.keys() == wanted.keys()
    for table, parts in wanted.items():
        assert migrated[table] == parts, table


def test_every_view_has_the_columns_that_it_states(url: str) -> None:
    upgrade(url)  # again: views that are there are made anew
    with connected(url) as connection:
        names = [name for name in inspect(connection).get_view_names() if name.startswith("v_")]
        assert sorted(names) == sorted(view.name for view in VIEWS)
        for view in VIEWS:
            result = connection.execute(text(f"SELECT * FROM {view.name}"))
            assert list(result.keys()) == list(view.types)
