"""What a page of results says of how it came about: run, requests, what is missing, limits."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version

from orchestrator.results.gather import Cell, Results
from orchestrator.results.markdown import listed
from sti_runtime.units import NONE, NS_PER_S


def provenance(results: Results) -> Iterator[str]:
    """The run, what it asks and what it was planned by."""
    spec, run = results.spec, results.run
    began, ended = _time(run.started_wall_ns), _time(run.ended_wall_ns)
    digest = results.campaign.spec_digest[:12]
    yield f"- campaign `{spec.name}` ({digest}), run {run.number}: {began} to {ended}"
    yield (
        f"- {spec.requests} {spec.request_kind} requests × {spec.repeats} for each cell, W = {spec.working},"
        f" slack {'used' if spec.slack else 'not used'}, seed {spec.seed}"
    )
    ranked = (
        f"{bundle} on {task} {profile.digest[:12]} of {profile.rows:,} rows"
        for (bundle, task), profile in sorted(results.importance.items())
    )
    yield f"- importance profiles: {listed(ranked)}"
    if drawn := _drawn(results):
        yield (
            f"- accuracy and requests are of a draw of the dev rows, {', '.join(drawn)}: intervals are wider"
            " than all rows would give"
        )
    if (requests := _requests(results)) is not None:
        yield f"- {requests}"
    yield f"- T: {', '.join(results.targets)}; |S|: {', '.join(size.text for size in spec.preload_sizes)}"
    if any(" of " in target for target in results.targets):
        yield (
            "- whole-model compute: what a device's profile says that its fixed cost and all layers at full"
            " width take (p95, decompression included)"
        )
    yield f"- stifarm {version('stifarm')}; agents: {listed(a for d in results.devices for a in d.agents)}"


def _requests(results: Results) -> str | None:
    """How many requests the timed cells rest on, and how many were left out as invalid."""
    timed = [cell.samples for cell in results.cells if cell.samples is not None]
    if not timed:
        return None
    asked = results.spec.requests * results.spec.repeats
    counts = [len(samples.latency_ns) for samples in timed]
    fewer = sum(count < asked for count in counts)
    said = f"valid requests: {min(counts)} or more in each of {len(timed)} timed cells"
    if fewer:
        said += f", {fewer} of them with fewer than the {asked} asked"
    if invalid := sum(samples.invalid for samples in timed):
        said += f"; {invalid:,} invalid ones (throttled, or not read as asked) are left out"
    return said


def _time(wall_ns: int | None) -> str:
    return (
        NONE if wall_ns is None else f"{datetime.fromtimestamp(wall_ns // NS_PER_S, UTC):%Y-%m-%d %H:%M} UTC"
    )


def standing(results: Results) -> Iterator[str]:
    """What is missing, told first."""
    missing = [cell for cell in results.cells if cell.missing]
    if not missing:
        return
    states = ", ".join(f"{count} {state}" for state, count in sorted(results.cell_states.items()))
    yield f"## Not complete: {len(missing)} of {len(results.cells)} cells are missing"
    yield f"The run is {results.run.state}; its timed cells: {states}. What follows is of what is done."
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in missing:
        groups.setdefault((cell.asked.device, cell.asked.task), []).append(cell)
    causes = dict.fromkeys(cause for cell in missing for cause in cell.found.causes)
    lines = [
        f"- {device}, {task}: {len(cells)} without {listed(' and '.join(cell.lacking) for cell in cells)},"
        f" policies {listed(cell.asked.policy for cell in cells)}"
        for (device, task), cells in groups.items()
    ]
    yield "\n".join([*lines, *(f"- cause: {cause}" for cause in causes)])


def limits(results: Results, task: str | None = None, *, of_dev: bool = True) -> str:
    """What figures do not show of the data they are of (of a task, of the dev rows), to stand beside them."""
    drawn = _drawn(results, task) if of_dev else []
    parts = [f"Of a draw of the dev rows: {', '.join(drawn)}." if drawn else ""]
    parts.append(
        "Limits of data and devices: [read with care](#read-with-care)." if results.spec.notes else ""
    )
    return " ".join(filter(None, parts))


def _drawn(results: Results, task: str | None = None) -> list[str]:
    """Tasks of which not all dev rows were taken."""
    return [
        f"{name} {rows:,} of {whole:,}"
        for name, (rows, whole) in results.dev_rows.items()
        if rows < whole and task in (None, name)
    ]
