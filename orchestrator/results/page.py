"""The page of results in Markdown: a pure function of what was gathered and drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from db.statistics import Interval, Proportion, median, p95_interval, summarise, wilson
from orchestrator.results.claims import Claim
from orchestrator.results.effects import effects
from orchestrator.results.figures import Figure, title_of
from orchestrator.results.gather import Cell, Results
from orchestrator.results.grounds import devices, models, speeds, spot_checks, submodels
from orchestrator.results.headline import headline
from orchestrator.results.markdown import table
from orchestrator.results.predictions import predictions
from orchestrator.results.provenance import limits, provenance, standing
from sti_runtime.policies import POLICIES
from sti_runtime.units import NONE, format_bytes, format_ns

_COLUMNS = (
    "T", "|S|", "policy", "n×m", "bits", "accuracy, % [95 %]", "median [95 %]", "p95 [95 %]", "≤ T",
    "stall", "read", "resident", "preload", "working", "activations", "all parts", "process peak",
)  # fmt: skip

_LEGEND = (
    "T: target latency; beside it what it came to on that device. |S|: preload buffer; policies that "
    "have no use for one have none. n×m: layers × slices of the submodel; bits: mean fidelity of its "
    "shards. Accuracy: on the task's dev rows, measured once for each distinct plan content (Wilson "
    "interval). Median and p95 of the valid requests, with distribution-free intervals from order "
    "statistics (of p95 from 72 requests on). ≤ T: requests within T. Stall: share of the latency that "
    "compute waited for shards. Read: bytes that the kernel read from storage for a request, median. "
    "Memory: peaks by part from the engine's allocators, and the agent process's own peak (VmHWM). "
    "infeasible: by its own predictor no trained submodel meets T under that policy."
)


_REPLACED = {
    "sti-0mb": "no preload buffer",
    "exact": "submodel, preload buffer and fidelities chosen together by a solver",
    "exact-io": "the same for the submodel of `sti`",
    "random": "shards ranked at random, not by importance",
    "no-slack": "nothing is read in the time by which T exceeds compute",
    "uniform": "all streamed shards at one fidelity",
    "wide-first": "of submodels with as many shards the wider, not the deeper",
}

NO_CLAIMS = "Nothing is claimed: what must hold is about `sti`, which this campaign does not ask."


def write_page(results: Results, figures: Sequence[Figure], out: Path, command: str) -> str:
    """The text of the page that will stand at ``out``; figures are linked relative to it."""
    claims = headline(results)
    parts = [
        f"# Results: {results.campaign.name}",
        f"Written by `{command}` from the store; no figure here was typed.",
        "\n".join(provenance(results)),
        *standing(results),
        "## Headline",
        _headline(claims),
        "\n".join(f"- {line}" for claim in claims for line in _detail(claim.what, claim.detail)),
        *_causes(claims),
        limits(results),
        _elsewhere(out),
        *_notes(results),
        "## Devices",
        devices(results),
        speeds(results),
        *spot_checks(results),
        "## Models and tasks",
        models(results),
        *submodels(results),
        *_figures(results, figures, out),
        "## Every policy against `sti`",
        "In the same place (device, T, |S|): accuracy less that of `sti`, paired over dev rows, mean"
        " over tasks. By task, in brackets in how many places. Requests within T of both, and the policy's"
        " memory (all parts, geometric mean) as a multiple of that of `sti`, where both were timed.",
        *_meanings(results),
        _effects(results),
        limits(results),
        *predictions(results),
        "## All cells",
        _LEGEND,
        *_cells(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _headline(claims: Sequence[Claim]) -> str:
    if not claims:
        return NO_CLAIMS
    return table(
        ("what must hold", "reach", "found [95 %]", ""),
        [(claim.what, claim.reach, claim.found or NONE, f"**{claim.verdict}**") for claim in claims],
    )


def _detail(what: str, detail: Sequence[str]) -> Iterator[str]:
    if detail:
        yield f"{what.split(':')[0]}: {'; '.join(detail)}"


def _causes(claims: Sequence[Claim]) -> Iterator[str]:
    """Why claims are not reached, where the figures tell."""
    told = [line for claim in claims for line in _detail(claim.what, claim.cause)]
    if told:
        yield "Why what is not reached is not, as far as these figures tell:"
        yield "\n".join(f"- {line}" for line in told)


def _elsewhere(out: Path) -> str:
    """Where the claim is judged that no campaign measures; a link where the page is one of the docs."""
    page = "[importance](importance.md)" if out.parent.name == "docs" else "docs/importance.md"
    return (
        f"What importance by gradient costs beside the exhaustive one, and how it ranks: {page}, measured by"
        " `python -m bench.importance`."
    )


def _notes(results: Results) -> Iterator[str]:
    if results.spec.notes:
        yield "## Read with care"
        yield "\n".join(f"- {note}" for note in results.spec.notes)


# ------------------------------------------------------------------ figures


def _figures(results: Results, figures: Sequence[Figure], out: Path) -> Iterator[str]:
    if figures:
        yield "## Figures"
    for figure in figures:
        yield f"![{figure.says}]({figure.path.relative_to(out.parent).as_posix()})"
        yield " ".join(filter(None, (figure.says, limits(results, of_dev=figure.of_dev))))


# ------------------------------------------------------------------ cells


def _meanings(results: Results) -> Iterator[str]:
    """What the policies of this page replace, in words."""
    asked = {cell.asked.policy for cell in results.cells}
    told = [f"`{policy}`: {words}" for policy, words in _REPLACED.items() if policy in asked]
    if told:
        yield f"Where each departs from `sti`: {'; '.join(told)}."


def _effects(results: Results) -> str:
    return table(
        (
            "policy",
            "points of accuracy [95 %]",
            "by task",
            "infeasible where `sti` is not",
            "≤ T",
            "≤ T, `sti` there",
            "memory, `sti` = 1",
        ),
        [
            (
                f"`{effect.policy}`",
                NONE if effect.mean is None else str(effect.mean),
                "; ".join(effect.by_task) or NONE,
                str(effect.infeasible),
                _percent(effect.within),
                _percent(effect.within_sti),
                NONE if effect.memory is None else f"{effect.memory:.2f}",
            )
            for effect in effects(results)
        ],
    )


def _percent(share: Proportion | None) -> str:
    return NONE if share is None else f"{share.value_ppm / 1e4:.1f} %"


def _cells(results: Results) -> Iterator[str]:
    order = {target: number for number, target in enumerate(results.targets)}
    policies: list[str] = list(POLICIES)
    for task in results.tasks:
        for device in results.by_starvation:
            cells = results.pick(task=task, device=device)
            if not cells:
                continue
            yield f"### {task} on {title_of(results, device)}"
            if care := limits(results, task):
                yield care
            cells.sort(
                key=lambda cell: (
                    order[cell.asked.target],
                    policies.index(cell.asked.policy),
                    cell.asked.preload_bytes,
                )
            )
            several = len({cell.asked.engine for cell in cells}) > 1 or len({c.bundle for c in cells}) > 1
            yield table(_COLUMNS, [_cell(cell, several=several) for cell in cells])


def _cell(cell: Cell, *, several: bool) -> tuple[str, ...]:
    asked, plan, samples = cell.asked, cell.plan, cell.samples
    target = asked.target if cell.target_ns is None else f"{asked.target} ({format_ns(cell.target_ns)})"
    policy = f"{asked.policy} ({cell.bundle}, {asked.engine})" if several else asked.policy
    head = (target, asked.preload or NONE, policy)
    if cell.infeasible:
        return (*head, "infeasible", *[NONE] * (len(_COLUMNS) - 4))
    planned = (
        (NONE, NONE)
        if plan is None
        else (f"{plan.depth}×{plan.width}", f"{plan.mean_fidelity_milli / 1000:.1f}")
    )
    right = NONE if cell.accuracy is None else _share(cell.accuracy.correct)
    summary = summarise(samples.latency_ns) if samples else None
    if samples is None or summary is None:
        states = ", ".join(state for state in cell.found.states if state != "done") or "no valid request"
        return (*head, *planned, right, states, *[NONE] * (len(_COLUMNS) - 7))
    memory = samples.memory
    return (
        *head,
        *planned,
        right,
        format_ns(summary.median) + _between(summary.interval),
        format_ns(summary.p95) + _between(p95_interval(samples.latency_ns)),
        _within(cell.within, summary.count),
        f"{samples.stall_share_ppm / 1e4:.1f} %",
        format_bytes(median(samples.storage_bytes)),
        *(
            format_bytes(part)
            for part in (
                memory.resident_bytes,
                memory.preload_bytes,
                memory.working_bytes,
                memory.activations_bytes,
                memory.parts_bytes,
            )
        ),
        NONE if memory.process_bytes is None else format_bytes(memory.process_bytes),
    )


def _share(share: Proportion) -> str:
    return f"{share.value_ppm / 1e4:.1f} [{share.low_ppm / 1e4:.1f}–{share.high_ppm / 1e4:.1f}]"


def _between(interval: Interval | None) -> str:
    return "" if interval is None else f" [{format_ns(interval.low)}–{format_ns(interval.high)}]"


def _within(count: int, total: int) -> str:
    share = wilson(count, total)
    return f"{share.value_ppm / 1e4:.1f} % ({count}/{total})"
