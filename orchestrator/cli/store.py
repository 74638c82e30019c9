"""Verbs about the store: upgrade, export, backup, restore, compact, audit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from db.backup import Contents
from db.backup import backup as backup_store
from db.backup import restore as restore_store
from db.compact import Retention
from db.compact import compact as compact_store
from db.compact import vacuum as vacuum_store
from db.devices import list_devices
from db.session import upgrade as upgrade_store
from db.transfer import export_table, formats
from orchestrator.audit import DeviceAudit, audit_device
from orchestrator.cli.context import DevicesOption, JsonOption, Options, driving, farm_of
from orchestrator.cli.output import emit_json, fail, note, steps, success, table, warn
from orchestrator.cli.over_devices import failed_json, finish
from orchestrator.inventory import Device
from orchestrator.side_by_side import side_by_side
from orchestrator.store_place import absent_store
from sti_runtime.errors import InputError, StifarmError
from sti_runtime.units import format_bytes

db_app = typer.Typer(no_args_is_help=True, help="The SQL store.")


@db_app.command("upgrade")
def upgrade(context: typer.Context) -> None:
    """Create the schema, or bring an older one to this version.

    Example: stifarm --db-url postgresql://farm@db/stifarm db upgrade
    """
    success(f"the store has schema {upgrade_store(_url(context, new=True))}")


@db_app.command("export")
def export(
    context: typer.Context,
    table: Annotated[str, typer.Argument(help="Table or view: see docs/schema.md.")],
    path: Annotated[Path, typer.Argument(help="File to write.")],
    format_: Annotated[str, typer.Option("--format", help=f"{', '.join(formats())}.")] = "csv",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write one table or view to a file.

    Example: stifarm db export v_run_summary runs.parquet --format parquet
    """
    with farm_of(context, existing=True) as farm, farm.store.reader() as session:
        count = export_table(session, table, path, format_, force=force)
    success(f"{count} rows of {table} in {path}")


@db_app.command("backup")
def backup(context: typer.Context, path: Annotated[Path, typer.Argument(help="New file to write.")]) -> None:
    """Copy the store, of either kind, while it is in use.

    Example: stifarm db backup store-backup.sqlite
    """
    contents = backup_store(_url(context), path)
    success(f"the store is backed up in {path}: {_in_words(contents)}")


@db_app.command("restore")
def restore(context: typer.Context, path: Annotated[Path, typer.Argument(help="A backup.")]) -> None:
    """Fill an empty store, of either kind, with a backup; the one backed up must not be used any more.

    Example: stifarm --db-url postgresql://farm@db/stifarm db restore store-backup.sqlite
    """
    contents = restore_store(_url(context, new=True), path)
    success(f"the store is restored from {path}: {_in_words(contents)}")


@db_app.command("compact")
def compact(
    context: typer.Context,
    days: Annotated[int, typer.Option(min=0, help="Keep samples younger than so many days.")] = 90,
    profiles: Annotated[int, typer.Option(min=0, help="Keep those of the newest fits of a device.")] = 3,
    runs: Annotated[int, typer.Option(min=0, help="Keep those of the newest runs of a plan.")] = 3,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    vacuum: Annotated[bool, typer.Option("--vacuum", help="Give the space back to the disk.")] = False,
    json: JsonOption = False,
) -> None:
    """Replace old raw samples by summaries; what plans rest on is kept (docs/schema.md, Retention).

    Example: stifarm db compact --days 30 --dry-run
    """
    with farm_of(context, existing=True) as farm:
        with steps(quiet=json) as bars, bars.step("compact samples") as bar:
            done = compact_store(
                farm.store, Retention(days, profiles, runs), dry_run=dry_run, advance=lambda n: bar(n, n)
            )
        if vacuum and not dry_run:
            vacuum_store(farm.store)
    if json:
        emit_json({**asdict(done), "dry_run": dry_run})
    else:
        verb = "would become" if dry_run else "are now"
        success(
            f"{done.samples} samples of {done.records} records {verb} {done.summaries} summaries;"
            f" their records take {format_bytes(done.bytes_saved)} less"
        )


def _url(context: typer.Context, *, new: bool = False) -> str:
    """The store's URL; ``new``: where the verb makes it, and that is said."""
    options = context.obj
    assert isinstance(options, Options)
    settings = options.settings()
    made = absent_store(settings, existing=not new)
    if made is not None:
        note(f"{made} is to be a new store")
    return settings.db_url


def _in_words(contents: Contents) -> str:
    rows = sum(content.rows for content in contents.values())
    return f"{rows} rows in {len(contents)} tables, all read again and found the same"


MOST_SHOWN = 20
"""Most discrepancies shown of one device; ``--json`` has all."""


@db_app.command("audit")
def audit(context: typer.Context, devices: DevicesOption = "all", json: JsonOption = False) -> None:
    """Compare the store with the journals on devices, record by record and sample by sample.

    What a device has measured must be in the store once, and unchanged; exit code 1 when it is not.
    Example: stifarm db audit --devices all
    """
    with farm_of(context, existing=True) as farm, driving(farm, devices, quarantined=True) as session:
        with farm.store.reader() as reader:
            known = {row.name: row.id for row in list_devices(reader)}

        def one(device: Device) -> DeviceAudit | StifarmError:
            if device.name not in known:
                return InputError(f"{device.name}: the store has nothing of it.", "Deploy to it first.")
            try:
                return audit_device(farm, session.worker, device.name, known[device.name])
            except StifarmError as error:
                return error

        answers = side_by_side([[device] for device in session.devices], one, farm.stop)
        found = {device.name: answer for device, answer in answers}
    audits = [found[device.name] for device in session.devices]
    done = [audit for audit in audits if isinstance(audit, DeviceAudit)]
    if json:
        emit_json(
            [
                *map(_audit_json, done),
                *(
                    failed_json(device.name, audit)
                    for device, audit in zip(session.devices, audits, strict=True)
                    if isinstance(audit, StifarmError)
                ),
            ]
        )
    else:
        show_audits(done)
    for error in audits:
        if isinstance(error, StifarmError):
            fail(error)
    wrong = [audit for audit in done if not audit.ok]
    if wrong:
        raise typer.Exit(1)
    finish([audit if isinstance(audit, StifarmError) else None for audit in audits])


def show_audits(audits: Sequence[DeviceAudit]) -> None:
    table(
        "Store against journals",
        ("device", ">journals", ">records", ">samples", ">forgotten", ">foreign", "result"),
        [
            (
                audit.device,
                str(audit.journals),
                str(audit.audit.records),
                str(audit.audit.samples),
                str(audit.forgotten),
                str(len(audit.foreign)),
                "agree" if audit.ok else f"{len(audit.audit.discrepancies)} discrepancies",
            )
            for audit in audits
        ],
        caption="forgotten: attempts whose journal is no longer on the device.\n"
        "foreign: journals of jobs of other stores.",
    )
    for audit in audits:
        for wrong in audit.audit.discrepancies[:MOST_SHOWN]:
            where = f"job {wrong.job_id}, attempt {wrong.attempt}, record {wrong.seq}"
            warn(f"{audit.device}: {where}: {wrong.what}")


def _audit_json(audit: DeviceAudit) -> dict[str, Any]:
    return {
        "device": audit.device,
        "journals": audit.journals,
        "records": audit.audit.records,
        "samples": audit.audit.samples,
        "forgotten": audit.forgotten,
        "foreign": list(audit.foreign),
        "discrepancies": [asdict(wrong) for wrong in audit.audit.discrepancies],
    }
