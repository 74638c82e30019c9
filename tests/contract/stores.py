"""Fixtures: every kind of store, SQLite and PostgreSQL, made afresh for each test."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.engine import make_url

from db.session import Store, open_store, parse_url, sqlite_url, upgrade
from tests.contract.postgres_server import (
    UNAVAILABLE,
    private_server,
    server_binaries,
    unprivileged_user,
)


@pytest.fixture(scope="session")
def postgres_template() -> Iterator[str]:
    """URL of a server with "{database}" where the database's name goes."""
    given = os.environ.get("STIFARM_TEST_POSTGRES_URL")
    if given:
        parsed = make_url(given)
        yield (
            parsed.set(database="XXdatabaseXX")
            .render_as_string(hide_password=False)
            .replace("XXdatabaseXX", "{database}")
        )
        return
    binaries, user = server_binaries(), unprivileged_user()
    if binaries is None or user is None:
        pytest.skip(UNAVAILABLE)
    with private_server(binaries, user) as template:
        yield template


@contextmanager
def _administrator(template: str) -> Iterator[Connection]:
    url = parse_url(template.format(database="postgres"))
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        yield connection
    engine.dispose()


@contextmanager
def database(template: str, copy_of: str = "template0") -> Iterator[str]:
    name = f"stifarm_{uuid.uuid4().hex[:12]}"
    with _administrator(template) as connection:
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {copy_of}"))
    yield name
    with _administrator(template) as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


@pytest.fixture(scope="session")
def migrated_postgres(postgres_template: str) -> Iterator[str]:
    """Name of a database with the current schema, to be copied (migrating one per test takes long)."""
    with database(postgres_template) as name:
        upgrade(postgres_template.format(database=name))
        yield name


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the current schema, to be copied."""
    path = tmp_path_factory.mktemp("store") / "migrated.sqlite"
    upgrade(sqlite_url(path))
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def fresh_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of a database that holds nothing yet."""
    if request.param == "sqlite":
        yield sqlite_url(tmp_path / "store.sqlite")
        return
    template: str = request.getfixturevalue("postgres_template")
    with database(template) as name:
        yield template.format(database=name)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of a store with the current schema."""
    if request.param == "sqlite":
        path = tmp_path / "store.sqlite"
        shutil.copyfile(request.getfixturevalue("migrated_sqlite"), path)
        yield sqlite_url(path)
        return
    template: str = request.getfixturevalue("postgres_template")
    with database(template, request.getfixturevalue("migrated_postgres")) as name:
        yield template.format(database=name)


@pytest.fixture
def store(url: str) -> Iterator[Store]:
    """An open store."""
    with open_store(url) as opened:
        yield opened
