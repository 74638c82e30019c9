"""The schema page names every table, column and enumerated value, and its example queries run."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
from sqlalchemy import text

from db import staleness
from db.models import Base
from db.models.campaigns import (
    BATCH_STATES,
    CATCH_UPS,
    CELL_KINDS,
    CELL_STATES,
    OVERLAPS,
    RUN_STATES,
    SCHEDULE_STATES,
    TRIGGERS,
)
from db.models.health import (
    ALERT_KINDS,
    DELIVERY_OUTCOMES,
    RECOVERY_OUTCOMES,
    RECOVERY_STEPS,
    RESULT_VERDICTS,
)
from db.models.hosts import HOST_STATES
from db.models.runs import GATE_VERDICTS, REQUEST_KINDS
from db.models.samples import IO_MODES, PROVEN_MODES
from db.models.summaries import QUANTITIES, SAMPLE_KINDS
from db.models.work import ATTEMPT_STATES, EVENT_LEVELS, JOB_STATES, RECORD_TYPES
from db.session import open_store, sqlite_url
from db.views import VIEWS, View

PAGE = (Path(__file__).parents[2] / "docs" / "schema.md").read_text(encoding="utf-8")
ENUMERATIONS = (
    HOST_STATES, GATE_VERDICTS, PROVEN_MODES, REQUEST_KINDS, IO_MODES,
    ATTEMPT_STATES, EVENT_LEVELS, JOB_STATES, RECORD_TYPES, QUANTITIES, SAMPLE_KINDS,
    BATCH_STATES, CATCH_UPS, CELL_KINDS, CELL_STATES, OVERLAPS, RUN_STATES, SCHEDULE_STATES, TRIGGERS,
    ALERT_KINDS, DELIVERY_OUTCOMES, RECOVERY_OUTCOMES, RECOVERY_STEPS, RESULT_VERDICTS,
)  # fmt: skip


def _section(table: str) -> str:
    """What the page says of one table: from its name to the next table's or the next heading."""
    shared = {"io_samples", "compute_samples", "fixed_samples"}
    start = PAGE.index("**io_samples**" if table in shared else f"**{table}**")
    found = re.search(r"\n\n(\*\*|#)", PAGE[start:])
    assert found is not None
    return PAGE[start : start + found.start()]


@pytest.mark.parametrize("table", sorted(Base.metadata.tables))
def test_every_column_is_described(table: str) -> None:
    section = _section(table)
    missing = [c.name for c in Base.metadata.tables[table].columns if f"`{c.name}`" not in section]
    assert missing == []


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.name)
def test_every_column_of_a_view_is_described(view: View) -> None:
    section = _section(view.name)
    assert [name for name in view.types if f"`{name}`" not in section] == []


def test_every_enumerated_value_is_described() -> None:
    values = {value for enumeration in ENUMERATIONS for value in enumeration}
    assert [value for value in sorted(values) if f"`{value}`" not in PAGE] == []


def test_example_queries_run(tmp_path: Path) -> None:
    block = re.search(r"```sql\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    queries = [query for query in block[1].split(";") if query.strip()]
    assert len(queries) == 5
    with open_store(sqlite_url(tmp_path / "s.sqlite")) as store, store.reader() as session:
        for query in queries:
            assert session.execute(text(query)).all() == []


def test_queries_from_python_exist() -> None:
    named = re.findall(r"`(db\.\w+)\.(\w+)[`(]", PAGE.split("## Queries from Python")[1])
    assert len(named) > 15
    missing = [(module, name) for module, name in named if not callable(_attribute(module, name))]
    assert missing == []


def _attribute(module: str, name: str) -> object:
    return getattr(importlib.import_module(module), name, None)


def test_every_reason_of_staleness_is_described() -> None:
    assert [reason for reason in staleness.REASONS if f"`{reason}`" not in PAGE] == []
