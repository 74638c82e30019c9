"""Verbs about the store: upgrade, export, backup."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from db.session import upgrade as upgrade_store
from db.transfer import backup as backup_store
from db.transfer import export_table, tables
from orchestrator.cli.context import Options, farm_of
from orchestrator.cli.output import success

db_app = typer.Typer(no_args_is_help=True, help="The SQL store.")


@db_app.command("upgrade")
def upgrade(context: typer.Context) -> None:
    """Create the schema, or bring an older one to this version.

    Example: stifarm --db-url postgresql://farm@db/stifarm db upgrade
    """
    options = context.obj
    assert isinstance(options, Options)
    settings = options.settings()
    success(f"the store has schema {upgrade_store(settings.db_url)}")


@db_app.command("export")
def export(
    context: typer.Context,
    table: Annotated[str, typer.Argument(help=f"One of: {', '.join(tables())}.")],
    path: Annotated[Path, typer.Argument(help="File to write.")],
    format_: Annotated[str, typer.Option("--format", help="csv or json.")] = "csv",
) -> None:
    """Write one table to a file.

    Example: stifarm db export requests requests.csv
    """
    with farm_of(context) as farm, farm.store.reader() as session:
        count = export_table(session, table, path, format_)
    success(f"{count} rows of {table} in {path}")


@db_app.command("backup")
def backup(context: typer.Context, path: Annotated[Path, typer.Argument(help="New file to write.")]) -> None:
    """Copy a SQLite store while it is in use.

    Example: stifarm db backup store-backup.sqlite
    """
    options = context.obj
    assert isinstance(options, Options)
    backup_store(options.settings().db_url, path)
    success(f"the store is backed up in {path}")
