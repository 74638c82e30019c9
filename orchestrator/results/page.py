"""The page of results in Markdown: a pure function of what was gathered and drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from db.statistics import Interval, Proportion, median, p95_interval, summarise, wilson
from orchestrator.results.figures import Figure, title_of
from orchestrator.results.gather import Cell, DeviceFound, Results
from orchestrator.results.headline import effects, headline
from orchestrator.submodel_report import submodel_table
from orchestrator.training_report import training_lines
from sti_runtime.messages import VerifiedEmulation
from sti_runtime.policies import POLICIES
from sti_runtime.shard import shard_bytes
from sti_runtime.units import NS_PER_S, format_bytes, format_ns, format_rate

NONE = "–"

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


def write_page(results: Results, figures: Sequence[Figure], out: Path, command: str) -> str:
    """The text of the page that will stand at ``out``; figures are linked relative to it."""
    claims = headline(results)
    parts = [
        f"# Results: {results.campaign.name}",
        f"Written by `{command}` from the store; no figure here was typed.",
        "\n".join(_provenance(results)),
        *_standing(results),
        "## Headline",
        _table(
            ("what must hold", "reach", "found [95 %]", ""),
            [(claim.what, claim.reach, claim.found, f"**{claim.verdict}**") for claim in claims],
        ),
        "\n".join(f"- {line}" for claim in claims for line in _detail(claim.what, claim.detail)),
        _elsewhere(out),
        *_notes(results),
        "## Devices",
        _devices(results),
        _speeds(results),
        *_spot_checks(results),
        "## Models and tasks",
        _models(results),
        *_submodels(results),
        *_figures(figures, out),
        "## Every policy against `sti`",
        "In the same place (device, T, |S|): accuracy less that of `sti`, paired over dev rows, mean"
        " over tasks. By task, in brackets in how many places.",
        _effects(results),
        "## All cells",
        _LEGEND,
        *_cells(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# ------------------------------------------------------------------ how it was made


def _provenance(results: Results) -> Iterator[str]:
    spec, run = results.spec, results.run
    began, ended = _time(run.started_wall_ns), _time(run.ended_wall_ns)
    digest = results.campaign.spec_digest[:12]
    yield f"- campaign `{spec.name}` ({digest}), run {run.number}: {began} to {ended}"
    yield (
        f"- {spec.requests} {spec.request_kind} requests × {spec.repeats} for each cell, W = {spec.working},"
        f" slack {'used' if spec.slack else 'not used'}, importance from up to {spec.importance_rows} rows,"
        f" seed {spec.seed}"
    )
    if spec.draw is not None:
        yield (
            f"- accuracy and requests are of at most {spec.draw.rows:,} dev rows of each task, drawn by seed"
            f" {spec.draw.seed}; where a task has more, intervals are wider than all rows would give"
        )
    yield f"- T: {', '.join(results.targets)}; |S|: {', '.join(size.text for size in spec.preload_sizes)}"
    yield f"- stifarm {version('stifarm')}; agents: {_listed(a for d in results.devices for a in d.agents)}"


def _time(wall_ns: int | None) -> str:
    return (
        "–" if wall_ns is None else f"{datetime.fromtimestamp(wall_ns // NS_PER_S, UTC):%Y-%m-%d %H:%M} UTC"
    )


def _listed(texts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(texts)) or NONE


def _standing(results: Results) -> Iterator[str]:
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
        f"- {device}, {task}: {len(cells)} without {_listed(' and '.join(cell.lacking) for cell in cells)},"
        f" policies {_listed(cell.asked.policy for cell in cells)}"
        for (device, task), cells in groups.items()
    ]
    yield "\n".join([*lines, *(f"- cause: {cause}" for cause in causes)])


def _detail(what: str, detail: Sequence[str]) -> Iterator[str]:
    if detail:
        yield f"{what.split(':')[0]}: {'; '.join(detail)}"


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


# ------------------------------------------------------------------ devices, models


def _devices(results: Results) -> str:
    return _table(
        (
            "device",
            "what it is",
            "limits: stated",
            "verified",
            "system",
            "engine",
            "threads",
            "gates of its runs",
        ),
        [
            (
                device.row.name,
                f"emulated ({_listed(device.mechanisms)})" if device.row.emulated else "as it is",
                *_limits(device),
                _listed(device.systems),
                _listed(device.engines),
                _listed(map(str, device.threads)),
                _listed(f"{count} {verdict}" for verdict, count in sorted(device.gates.items())),
            )
            for device in results.devices
        ],
    )


def _limits(device: DeviceFound) -> tuple[str, str]:
    found: VerifiedEmulation | None = device.verified
    if found is None:
        return NONE, NONE
    asked = found.emulation
    stated, verified = [], []
    if asked.io_bytes_per_s is not None:
        stated.append(f"reads {format_rate(asked.io_bytes_per_s)}")
        verified.append("?" if found.io_bytes_per_s is None else format_rate(found.io_bytes_per_s))
    if asked.cpu_share_milli is not None:
        stated.append(f"{asked.cpu_share_milli / 1000:g} of a CPU")
        verified.append("?" if found.cpu_share_milli is None else f"{found.cpu_share_milli / 1000:g}")
    return ", ".join(stated) or NONE, ", ".join(verified) or NONE


def _speeds(results: Results) -> str:
    order = {device: number for number, device in enumerate(results.by_starvation)}
    targets: dict[tuple[str, str, str], dict[str, int]] = {}
    for cell in results.cells:
        if cell.target_ns is not None:
            key = (cell.asked.device, cell.bundle, cell.asked.task)
            targets.setdefault(key, {})[cell.asked.target] = cell.target_ns
    return _table(
        (
            "device", "bundle", "all shards read at 32 bits", "whole model computed", "IO ÷ compute",
            "profile", *(f"T = {target}" for target in results.targets),
        ),
        [
            (
                title_of(results, speed.device),
                speed.bundle,
                format_ns(speed.read_ns),
                format_ns(speed.compute_ns),
                f"{speed.ratio:.2f}",
                speed.profile,
                *(
                    format_ns(known[target]) if target in known else NONE
                    for known in [targets.get((speed.device, speed.bundle, speed.task), {})]
                    for target in results.targets
                ),
            )
            for speed in sorted(results.speeds, key=lambda speed: (order[speed.device], speed.bundle))
        ],
    )  # fmt: skip


def _spot_checks(results: Results) -> Iterator[str]:
    if results.spot_checks:
        yield (
            "Spot check: accuracy is measured once for each plan content, on one device. The classes that"
            " timed requests gave on each device, beside those of that evaluation: "
            + "; ".join(
                f"{check.device}: {check.compared:,} compared, {check.different:,} different"
                for check in results.spot_checks
            )
            + "."
        )


def _models(results: Results) -> str:
    rows = []
    named = {(cell.asked.bundle, cell.bundle, cell.asked.task) for cell in results.cells}
    for digest, name, task in sorted(named, key=lambda each: each[1:]):
        manifest = results.manifests[digest]
        model = manifest.model
        dev = {
            cell.accuracy.correct.total
            for cell in results.pick(bundle=digest, task=task)
            if cell.accuracy is not None
        }
        of = results.dev_rows.get(task, (0, 0))[1]
        rows.append(
            (
                f"{name} ({digest[:12]})",
                f"{model.family}, {model.layers} × {model.heads} × {model.hidden}",
                format_bytes(shard_bytes(model)),
                f"{len(manifest.submodels)}{', untrained' if manifest.untrained else ', trained'}",
                manifest.quantizer.label,
                task,
                _listed(f"{count:,}" + (f" of {of:,}" if count < of else "") for count in sorted(dev)),
            )
        )
    return _table(
        ("bundle", "layers × heads × hidden", "32-bit shards", "submodels", "quantizer", "task", "dev rows"),
        rows,
    )


def _submodels(results: Results) -> Iterator[str]:
    """What each model's training brought: every submodel that plans may take, at 32 bits, on all dev rows."""
    named = {cell.asked.bundle: cell.bundle for cell in results.cells}
    for digest, name in sorted(named.items(), key=lambda each: each[1]):
        info = results.models.get(digest)
        if info is None or not info.scores:
            continue
        yield f"### Submodels of {name}"
        if lines := training_lines(info.provenance):
            yield "\n".join(f"- {line}" for line in lines)
        columns, rows, caption = submodel_table(info.scores)
        yield _table([column.lstrip(">") for column in columns], rows)
        yield " ".join(caption.split())


def _figures(figures: Sequence[Figure], out: Path) -> Iterator[str]:
    if figures:
        yield "## Figures"
    for figure in figures:
        yield f"![{figure.says}]({figure.path.relative_to(out.parent).as_posix()})"
        yield figure.says


# ------------------------------------------------------------------ cells


def _effects(results: Results) -> str:
    return _table(
        ("policy", "points of accuracy [95 %]", "by task", "infeasible where `sti` is not"),
        [
            (
                f"`{effect.policy}`",
                NONE if effect.mean is None else str(effect.mean),
                "; ".join(effect.by_task) or NONE,
                str(effect.infeasible),
            )
            for effect in effects(results)
        ],
    )


def _cells(results: Results) -> Iterator[str]:
    order = {target: number for number, target in enumerate(results.targets)}
    policies: list[str] = list(POLICIES)
    for task in results.tasks:
        for device in results.by_starvation:
            cells = results.pick(task=task, device=device)
            if not cells:
                continue
            yield f"### {task} on {title_of(results, device)}"
            cells.sort(
                key=lambda cell: (
                    order[cell.asked.target],
                    policies.index(cell.asked.policy),
                    cell.asked.preload_bytes,
                )
            )
            several = len({cell.asked.engine for cell in cells}) > 1 or len({c.bundle for c in cells}) > 1
            yield _table(_COLUMNS, [_cell(cell, several=several) for cell in cells])


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
