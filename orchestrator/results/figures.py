"""Which figures a page of results has, and what of the results goes into them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.orm import Session

from db.campaign_results import usual_request
from orchestrator.figures.accuracy import Point, draw_accuracy
from orchestrator.figures.importance import draw_importance
from orchestrator.figures.timeline import Request, draw_timelines
from orchestrator.results.gather import Cell, Results
from orchestrator.results.headline import STREAMING
from sti_runtime.policies import POLICIES


@dataclass(frozen=True)
class Figure:
    """A figure that was drawn; ``says``: what a reader sees in it. ``of_dev``: it is of the dev rows."""

    path: Path
    says: str
    of_dev: bool = True


def draw_figures(session: Session, results: Results, folder: Path) -> list[Figure]:
    """Draw what there are figures of to ``folder``. Raises: InputError without Matplotlib, ResourceError."""
    return [
        figure
        for figure in (
            _by_target(results, folder / "accuracy-target.png"),
            _by_memory(results, folder / "accuracy-memory.png"),
            _timeline(session, results, folder / "timeline.png"),
            *(
                _heat(results, bundle, task, folder / f"importance-{task}-{bundle}.png")
                for bundle, task in sorted(results.importance)
            ),
        )
        if figure is not None
    ]


def title_of(results: Results, device: str) -> str:
    """A device's name, with what a reader must not miss."""
    emulated = {found.row.name for found in results.devices if found.row.emulated}
    return f"{device} (emulated)" if device in emulated else device


def _by_target(results: Results, path: Path) -> Figure | None:
    return _accuracy(
        results,
        [cell for cell in results.cells if _largest(results, cell)],
        path,
        says="Accuracy against T, by policy. Of policies that use a preload buffer the largest |S|; a policy"
        " that has no point at a T is infeasible there or not measured. Bars: 95 %.",
        title="Accuracy against target latency (largest |S|; bars: 95 %)",
        by_memory=False,
    )


def _by_memory(results: Results, path: Path) -> Figure | None:
    return _accuracy(
        results,
        [cell for cell in results.cells if cell.asked.target == results.targets[-1]],
        path,
        says=f"Accuracy against memory (all parts) at T = {results.targets[-1]}, every |S|. Up and left is"
        " better. Bars: 95 %.",
        title=f"Accuracy against memory, T = {results.targets[-1]} (bars: 95 %)",
        by_memory=True,
    )


def _accuracy(
    results: Results, cells: list[Cell], path: Path, *, says: str, title: str, by_memory: bool
) -> Figure | None:
    points = [
        Point(
            cell.asked.task,
            title_of(results, cell.asked.device),
            cell.asked.policy,
            cell.samples.memory.parts_bytes / 1e6 if by_memory else (cell.target_ns or 0) / 1e6,
            cell.accuracy.correct.value_ppm / 1e4,
            cell.accuracy.correct.low_ppm / 1e4,
            cell.accuracy.correct.high_ppm / 1e4,
        )
        for cell in cells
        if cell.samples is not None and cell.accuracy is not None
    ]
    if not points:
        return None
    there = {point.policy for point in points}
    draw_accuracy(
        points,
        policies=[policy for policy in POLICIES if policy in there],
        tasks=results.tasks,
        devices=[title_of(results, device) for device in results.by_starvation],
        title=title,
        x_label="memory, all parts, MB" if by_memory else "T, ms",
        joined=not by_memory,
        logarithmic=by_memory,
        path=path,
    )
    return Figure(path, says)


def _largest(results: Results, cell: Cell) -> bool:
    asked = cell.asked
    most = results.largest_preload(
        device=asked.device, task=asked.task, target=asked.target, policy=asked.policy, engine=asked.engine
    )
    return most is not None and most.asked == asked


def _timeline(session: Session, results: Results, path: Path) -> Figure | None:
    """The starved device: ``sti`` at its tightest T, then one that streams and one that loads first."""
    for device in results.by_starvation:
        for task in results.tasks:
            chosen = [
                cell
                for policies in (("sti",), STREAMING[1:], STREAMING[:1])
                if (cell := _tightest(results, device, task, policies)) is not None
            ]
            requests = []
            for cell in chosen:
                trace = usual_request(session, cell.samples.runs) if cell.samples else None
                if trace is None or cell.plan is None:
                    continue
                size = f", |S| = {cell.asked.preload}" if cell.asked.preload else ""
                bits = cell.plan.mean_fidelity_milli / 1000
                requests.append(
                    Request(
                        f"{cell.asked.policy}: {cell.plan.depth}×{cell.plan.width} at {bits:.1f} bits,"
                        f" T = {cell.asked.target}{size}: {trace.latency_ns / 1e6:.3g} ms,"
                        f" {100 * trace.stall_ns / max(1, trace.latency_ns):.0f} % stalled",
                        trace.layers,
                        trace.latency_ns,
                        cell.target_ns or 0,
                    )
                )
            if requests and chosen[0].asked.policy == "sti":
                where = f"{title_of(results, device)}, {task}"
                draw_timelines(requests, f"One request of median latency on {where}", path)
                return Figure(
                    path,
                    f"One request of median latency on {where}, as its agent traced it. Numbers are layers;"
                    " layers read at once have a row each.",
                )
    return None


def _tightest(results: Results, device: str, task: str, policies: tuple[str, ...]) -> Cell | None:
    for target in results.targets:
        cells = [
            cell
            for policy in reversed(policies)
            for cell in results.pick(device=device, task=task, target=target, policy=policy)
            if cell.samples is not None and cell.samples.latency_ns
        ]
        if cells:
            return max(cells, key=lambda cell: cell.asked.preload_bytes)
    return None


def _heat(results: Results, bundle: str, task: str, path: Path) -> Figure:
    profile = results.importance[bundle, task]
    draw_importance(profile, f"{bundle} on {task}", path)
    return Figure(
        path,
        f"Importance of the shards of {bundle} on {task}: loss saved by each alone at 32 bits, the others at"
        f" {profile.base_fidelity} bits, {profile.rows} rows of the profile split (split-half reliability"
        f" {profile.reliability_ppm / 1e6:.2f}).",
        of_dev=False,
    )
