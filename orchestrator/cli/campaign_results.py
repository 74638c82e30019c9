"""The verb that writes a page of results, with its figures, from the store."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from sqlalchemy.orm import Session

from orchestrator.campaigns.report import report_json, rows_of
from orchestrator.cli.campaign_view import NameArgument, find_run, known_campaigns
from orchestrator.cli.context import JsonOption, farm_of
from orchestrator.cli.output import emit_json, note, success, table, warn
from orchestrator.results.figures import Figure, draw_figures
from orchestrator.results.gather import Results, gather
from orchestrator.results.headline import headline
from orchestrator.results.page import NO_CLAIMS, write_page
from sti_runtime.errors import ResourceError
from sti_runtime.units import NONE


def results(
    context: typer.Context,
    name: NameArgument,
    number: Annotated[
        str, typer.Option("--run", help="Run: its number, last, last-1, or a date of its schedule.")
    ] = "last",
    out: Annotated[
        Path | None, typer.Option("--out", help="Write the page there, figures into a folder of its name.")
    ] = None,
    figures: Annotated[
        bool, typer.Option("--figures/--no-figures", help="Draw figures (they need stifarm[figures]).")
    ] = True,
    json: JsonOption = False,
) -> None:
    """Judge a run, finished or not: what must hold, every cell; --out writes it as a page with figures.

    Example: stifarm campaign results paper --out docs/results.md
    """
    with farm_of(context, existing=True) as farm:
        (campaign,) = known_campaigns(farm, name)
        run = find_run(farm, campaign, number)
        with farm.store.reader() as session:
            found = gather(farm, session, campaign, run)
            claims = headline(found)
            rows = rows_of(session, run.id) if json else []
            if out is not None:
                _write(session, found, out, figures=figures, run=number)
    if json:
        emit_json(
            {
                "campaign": name,
                "run": run.number,
                "claims": [asdict(claim) for claim in claims],
                "missing": sum(cell.missing for cell in found.cells),
                "spot_checks": [asdict(check) for check in found.spot_checks],
                "cells": [report_json(row) for row in rows],
            }
        )
        return
    if claims:
        table(
            f"Run {run.number} of {name}: {run.state}",
            ("what must hold", "reach", "found", "verdict"),
            [
                (claim.what.replace("`", ""), claim.reach, claim.found or NONE, claim.verdict)
                for claim in claims
            ],
        )
    else:
        note(f"Run {run.number} of {name}: {run.state}. {NO_CLAIMS.replace('`', '')}")
    missing = sum(cell.missing for cell in found.cells)
    if missing:
        warn(f"{missing} of {len(found.cells)} cells are missing; stifarm campaign run {name} goes on")
    if out is None:
        note(f"every cell, as a page: stifarm campaign results {name} --out results.md")


def _write(session: Session, found: Results, out: Path, *, figures: bool, run: str) -> None:
    """The page and its figures. Raises: ResourceError, InputError without Matplotlib."""
    folder = out.with_suffix("") if out.suffix else out.with_name(f"{out.name}-figures")
    drawn: list[Figure] = draw_figures(session, found, folder) if figures else []
    words = ["stifarm", "campaign", "results", found.campaign.name, "--out", str(out)]
    words += [] if run == "last" else ["--run", run]
    words += [] if figures else ["--no-figures"]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(write_page(found, drawn, out, shlex.join(words)), encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"{out} cannot be written: {error.strerror}.", "Choose another file.") from error
    success(f"{out} written, with {len(drawn)} figures")
