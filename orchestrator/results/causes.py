"""Why a claim is not reached, as far as the figures of a run tell: lines of the page, pure functions."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator

from db.statistics import median
from orchestrator.library import DEV_SPLIT
from orchestrator.results.gather import Cell, Results


def of_whole_model(results: Results, device: str, target: str) -> Iterator[str]:
    """By task: what the plan's submodel alone costs at 32 bits, and what is left for its fidelities."""
    for task in results.tasks:
        mine = results.largest_preload(device=device, task=task, target=target, policy="sti")
        whole = results.largest_preload(device=device, task=task, target=target, policy="preload-32")
        if mine is None or whole is None or mine.plan is None or whole.plan is None:
            continue
        points = [_submodel_points(results, cell) for cell in (mine, whole)]
        if points[0] is None or points[1] is None or mine.accuracy is None or whole.accuracy is None:
            continue
        submodel = points[0] - points[1]
        all_of_it = (mine.accuracy.correct.value_ppm - whole.accuracy.correct.value_ppm) / 1e4
        yield (
            f"{task}: its submodel {mine.plan.depth}×{mine.plan.width} alone {submodel:+.1f} points (32 bits,"
            f" the dev rows of [its training](#models-and-tasks));"
            f" its {mine.plan.mean_fidelity_milli / 1e3:.1f} bits the other"
            f" {all_of_it - submodel:+.1f}"
        )


def of_memory(mine: Cell, whole: Cell) -> Iterator[str]:
    """What the worst cell's memory is made of, and the part that no plan can shrink."""
    if mine.samples is None or whole.samples is None:
        return
    memory, limit = mine.samples.memory, whole.samples.memory.parts_bytes
    parts = {
        "resident tensors": memory.resident_bytes,
        "activations": memory.activations_bytes,
        "preload buffer": memory.preload_bytes,
        "working buffer": memory.working_bytes,
    }
    fixed = memory.resident_bytes + memory.activations_bytes
    yield (
        f"{mine.asked.device}, {mine.asked.task}: "
        + ", ".join(f"{name} {100 * size / memory.parts_bytes:.0f} %" for name, size in parts.items())
        + f"; resident tensors and activations, which no plan shrinks, are 1/{limit / max(1, fixed):.1f} of"
        " what `preload-32` holds"
    )


def of_lead(results: Results, best: Cell) -> Iterator[str]:
    """The most there is to gain over a baseline: what the whole model at 32 bits is right in beyond it."""
    whole = results.largest_preload(
        task=best.asked.task, target=results.targets[-1], policy="preload-32", device=best.asked.device
    )
    if whole is None or whole.accuracy is None or best.accuracy is None:
        return
    right = whole.accuracy.correct.value_ppm / 1e4
    most = right - best.accuracy.correct.value_ppm / 1e4
    shape = "" if best.plan is None else f" ({best.plan.depth}×{best.plan.width})"
    yield (
        f"{best.asked.task}: over `{best.asked.policy}`{shape} there are {most:+.1f} points to gain at most:"
        f" the whole model at 32 bits has {right:.1f} %"
    )


def of_late_requests(results: Results) -> Iterator[str]:
    """By device: how many requests are over T and by how much, beside how far predictions are off."""
    beyond: dict[str, list[float]] = defaultdict(list)
    totals: dict[str, int] = defaultdict(int)
    errors: dict[str, list[float]] = defaultdict(list)
    for cell in results.cells:
        if cell.asked.policy != "sti" or cell.samples is None or not cell.target_ns:
            continue
        device, latency_ns = cell.asked.device, cell.samples.latency_ns
        totals[device] += len(latency_ns)
        beyond[device] += [one / cell.target_ns - 1 for one in latency_ns if one > cell.target_ns]
        if cell.plan is not None:
            errors[device].append(median(latency_ns) / max(1, cell.plan.predicted_median_latency_ns) - 1)
    for device, over in sorted(beyond.items(), key=lambda each: -len(each[1])):
        if not over:
            continue
        ranked = sorted(over)
        said = (
            f"{device}: {len(over)} of {totals[device]}, half of them by more than"
            f" {100 * ranked[len(ranked) // 2]:.1f} % of T, at most {100 * ranked[-1]:.0f} %"
        )
        if each := sorted(errors[device]):
            said += f"; cells' medians are {100 * each[len(each) // 2]:+.1f} % off their predictions"
        yield said


def of_estimates(results: Results) -> Iterator[str]:
    """By task: what an estimate without any error could reach against a profile with that reliability."""
    for (_, task), profile in results.importance.items():
        if profile.method == "exhaustive":
            reliability = max(0, profile.reliability_ppm) / 1e6
            yield (
                f"{task}: an estimate without error can be expected to reach {math.sqrt(reliability):.2f},"
                " the root of that reliability (more where both share rows)"
            )


def _submodel_points(results: Results, cell: Cell) -> float | None:
    """Accuracy in percent of the plan's submodel at 32 bits, as its training scored it."""
    info, plan = results.models.get(cell.asked.bundle), cell.plan
    if info is None or plan is None:
        return None
    for score in info.scores:
        if score.split == DEV_SPLIT and (score.submodel.depth, score.submodel.width) == (
            plan.depth,
            plan.width,
        ):
            return 100 * score.correct / score.rows
    return None
