"""Runs of ``bench.engines`` as plain data and as a page: their tables, alone or joined. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.engine_ours import ENGINES
from bench.engine_rows import (
    CLOSE_LABEL,
    FIDELITIES,
    ROWS,
    Measured,
    OurInfo,
    PeerInfo,
    PlanSample,
    claims_of,
    cold_case,
    held_case,
    measured_rows,
)
from bench.figures import figure, markdown

FORMAT, VERSION = "stifarm-engines", 1


@dataclass(frozen=True)
class Run:
    """One run: what was asked for, where, and all that was measured. ``heading``: a line of text each."""

    heading: tuple[str, ...]
    rows: frozenset[int]
    found: Measured


# ------------------------------------------------------------------ plain data


def as_json(run: Run) -> str:
    """Every sample: enough to make the page and to ask later questions; its claims only to be read."""
    found = run.found
    return json.dumps(
        {
            "format": FORMAT,
            "version": VERSION,
            "heading": list(run.heading),
            "rows": sorted(run.rows),
            "samples": {case: dict(metrics) for case, metrics in found.samples.of.items()},
            "peers": [asdict(peer) for peer in found.peers],
            "ours": [asdict(entry) for entry in found.ours],
            "plans": [asdict(plan) for plan in found.plans],
            "isa": found.isa,
            "absent": {str(row): why for row, why in found.absent.items()},
            "claims": [entry.as_json() for entry in claims_of(found, run.rows)],
        },
        indent=1,
    )


def run_from_json(text: str) -> Run:
    """What ``as_json`` wrote. Raises: ValueError for anything else."""
    data = json.loads(text)
    if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"not a run of bench.engines ({FORMAT} {VERSION}); run it again with --json")
    found = Measured(
        peers=[PeerInfo(**peer) for peer in data["peers"]],
        ours=[OurInfo(**entry) for entry in data["ours"]],
        plans=[_plan(plan) for plan in data["plans"]],
        isa=data["isa"],
        absent={int(row): why for row, why in data["absent"].items()},
    )
    for case, metrics in data["samples"].items():
        found.samples.of[case].update(metrics)
    return Run(tuple(data["heading"]), frozenset(data["rows"]), found)


def _plan(data: Mapping[str, Any]) -> PlanSample:
    first, second = data["passes_ns"]
    return PlanSample(**{**data, "passes_ns": (first, second)})


# ------------------------------------------------------------------ the page


def unmeasured(runs: Sequence[Run]) -> list[int]:
    """Rows that no run measured."""
    measured = frozenset[int]().union(*(run.rows & measured_rows(run.found) for run in runs))
    return sorted(ROWS.keys() - measured)


def page(runs: Sequence[Run]) -> str:
    """All runs, each with its heading and its tables; of several, what none of them measured is said."""
    parts = [_report(run, titled=len(runs) > 1) for run in runs]
    if len(runs) > 1 and (missing := unmeasured(runs)):
        parts.insert(0, f"No run measured {_named(missing)}.")
    return "\n\n".join(parts)


def _named(rows: Sequence[int]) -> str:
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows))}"


def _report(run: Run, *, titled: bool) -> str:
    parts = [f"**{_named(sorted(run.rows)).capitalize()}**"] if titled else []
    parts.append("\n".join(f"* {line}" for line in run.heading))
    if any("spawn_ns" in metrics for metrics in run.found.samples.of.values()):
        parts.append(engines_table(run.found))
    parts.append(markdown(claims_of(run.found, run.rows)))
    return "\n\n".join(parts)


def engines_table(found: Measured) -> str:
    """All cold cases: peers, then ours."""
    head = "| | from its spawn, ms | creation + first, ms | steady, ms | peak, MB | cosine |"
    lines = [head, "|---|---|---|---|---|---|"]
    cosines = {peer.name: peer.cosine for peer in found.peers} | {o.case: o.cosine for o in found.ours}
    lacks = {peer.name: peer.lacks for peer in found.peers}
    held = {cold_case(e, k): held_case(e, k) for e in ENGINES for k in (*FIDELITIES, 32, CLOSE_LABEL)}
    for case, metrics in sorted(found.samples.of.items(), key=lambda item: item[0]):
        if "spawn_ns" not in metrics:
            continue
        steady = metrics.get("steady_ns") or found.samples.get(held.get(case, ""), "latency_ns")
        cells = [
            case + (f" ({lacks[case]})" if lacks.get(case) else ""),
            figure(metrics["spawn_ns"]).text(1e6),
            figure(metrics["create_ns"]).text(1e6) if "create_ns" in metrics else "",
            figure(steady).text(1e6) if steady else "",
            figure(metrics["peak_bytes"]).text(1e6, 0),
            f"{cosines[case]:.4f}" if case in cosines else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
