"""What must hold, and whether it does: computed from the cells, each with its number."""

from __future__ import annotations

from dataclasses import replace

from db.statistics import median, wilson
from orchestrator.results import causes
from orchestrator.results.claims import Claim, told_mean, verdict
from orchestrator.results.gather import Cell, Results
from orchestrator.results.paired import Difference, difference, mean_difference
from orchestrator.results.planner_claims import estimate_claims, exact_claims
from orchestrator.results.variants import variants
from sti_runtime.units import format_bytes

STREAMING = ("load-exec", "std-pipeline-2", "std-pipeline-6", "std-pipeline-32")
WITHIN_POINTS = 1.0
MEMORY_SHARE = 1 / 8
AHEAD_POINTS = 5.0
OVER_PPM = 10_000


def headline(results: Results) -> list[Claim]:
    """Every claim about policies that the campaign asks, in the order in which they are told.

    A campaign that compares bundles of a task, or engines, has the claims of each.
    """
    claims: list[Claim] = []
    if not _asks(results, "sti"):
        return claims
    for said, one in variants(results):
        claims += [replace(claim, what=said + claim.what) for claim in _measured(one)]
    return [*claims, *estimate_claims(results)]


def _measured(results: Results) -> list[Claim]:
    claims: list[Claim] = []
    if _asks(results, "preload-32"):
        claims += [_whole_model(results, device) for device in results.by_starvation]
        claims.append(_memory(results))
    if _asks(results, *STREAMING):
        claims += [_ahead(results, device) for device in results.by_starvation[:1]]
    claims.append(_over_target(results))
    if _asks(results, "exact"):
        claims += exact_claims(results)
    return claims


def _asks(results: Results, *policies: str) -> bool:
    """Whether the run has cells of one of the policies."""
    return any(cell.asked.policy in policies for cell in results.cells)


def _whole_model(results: Results, device: str) -> Claim:
    """``sti`` against the whole model in memory."""
    target = results.targets[-1]
    details: list[str] = []
    each: list[Difference] = []
    missing = unplanned = False
    for task in results.tasks:
        mine = results.largest_preload(device=device, task=task, target=target, policy="sti")
        whole = results.largest_preload(device=device, task=task, target=target, policy="preload-32")
        told = _against(mine, whole)
        missing = missing or _lacks(mine) or _lacks(whole)
        unplanned = unplanned or (_infeasible(mine) and not _infeasible(whole))
        details.append(f"{task}: {told}")
        if isinstance(told, Difference):
            each.append(told)
    mean = mean_difference(each)
    return Claim(
        f"`sti` at the largest |S| against the whole model in memory (`preload-32`), T = {target},"
        f" {device}, mean over tasks: points of accuracy",
        f"≥ −{WITHIN_POINTS:g}",
        told_mean(mean, len(results.tasks)),
        verdict(_reaches(mean, -WITHIN_POINTS, unplanned=unplanned), missing=missing),
        tuple(details),
    ).because(causes.of_whole_model(results, device, target))


def _memory(results: Results) -> Claim:
    target, ratios, missing = results.targets[-1], list[float](), False
    worst: list[str] = []
    details: list[str] = []
    for device in results.by_starvation:
        for task in results.tasks:
            mine = results.largest_preload(device=device, task=task, target=target, policy="sti")
            whole = results.largest_preload(device=device, task=task, target=target, policy="preload-32")
            missing = missing or _lacks(mine) or _lacks(whole)
            if mine is None or whole is None or mine.samples is None or whole.samples is None:
                details.append(f"{device}, {task}: {_why(mine)} / {_why(whole)}")
                continue
            parts = mine.samples.memory.parts_bytes, whole.samples.memory.parts_bytes
            if parts[0] / parts[1] > max(ratios, default=0.0):
                worst = list(causes.of_memory(mine, whole))
            ratios.append(parts[0] / parts[1])
            details.append(
                f"{device}, {task}: {format_bytes(parts[0])} of {format_bytes(parts[1])}"
                f" (1/{parts[1] / parts[0]:.1f})"
            )
    return Claim(
        f"Memory of `sti`, all parts, at the largest |S| against `preload-32`, T = {target}: the worst ratio",
        "≤ 1/8",
        f"1/{1 / max(ratios):.1f}" if ratios else None,
        verdict(max(ratios) <= MEMORY_SHARE if ratios else None, missing=missing),
        tuple(details),
    ).because(worst)


def _ahead(results: Results, device: str) -> Claim:
    """``sti`` against the best that streams and meets T, at the tightest T on the starved device."""
    target = results.targets[0]
    details: list[str] = []
    bounds: list[str] = []
    each: list[Difference] = []
    missing = unplanned = False
    for task in results.tasks:
        mine = results.largest_preload(device=device, task=task, target=target, policy="sti")
        others = [
            cell
            for policy in STREAMING
            for cell in results.pick(device=device, task=task, target=target, policy=policy)
        ]
        if _lacks(mine) or not others or any(cell.missing for cell in others):
            missing = True
            details.append(f"{task}: not measured yet")
            continue
        meeting = [cell for cell in others if _meets(cell)]
        if not meeting:
            right = mine.accuracy if mine is not None else None
            does = f"`sti` does, at {right.correct.value_ppm / 1e4:.1f} %" if right else "nor does `sti`"
            details.append(f"{task}: none of them meets T; {does}")
            continue
        best = max(meeting, key=lambda cell: cell.accuracy.correct.value_ppm if cell.accuracy else 0)
        told = _against(mine, best)
        unplanned = unplanned or _infeasible(mine)
        over = "over" if isinstance(told, Difference) else "best:"
        details.append(f"{task}: {told} {over} `{best.asked.policy}`")
        bounds += causes.of_lead(results, best)
        if isinstance(told, Difference):
            each.append(told)
    mean = mean_difference(each)
    return Claim(
        f"`sti` at the largest |S| against the best of `load-exec` and `std-pipeline-*` that meets T,"
        f" T = {target}, {device} (the slowest to read), mean over tasks: points of accuracy",
        f"≥ {AHEAD_POINTS:g}",
        told_mean(mean, len(results.tasks)),
        verdict(_reaches(mean, AHEAD_POINTS, unplanned=unplanned), missing=missing),
        tuple(details),
    ).because(bounds)


def _over_target(results: Results) -> Claim:
    cells = [cell for cell in results.cells if cell.asked.policy == "sti" and not cell.infeasible]
    measured = [cell for cell in cells if cell.samples is not None]
    total = sum(len(cell.samples.latency_ns) for cell in measured if cell.samples)
    over = total - sum(cell.within for cell in measured)
    share = wilson(over, total) if total else None
    worst = sorted(
        (cell for cell in measured if cell.samples and cell.within < len(cell.samples.latency_ns)),
        key=lambda cell: cell.within / len(cell.samples.latency_ns) if cell.samples else 1.0,
    )
    return Claim(
        "Requests over T, all `sti` cells together",
        "≤ 1 %",
        f"{share.value_ppm / 1e4:.2f} % [{share.low_ppm / 1e4:.2f}, {share.high_ppm / 1e4:.2f}],"
        f" {over} of {total}"
        if share
        else None,
        verdict(
            None if share is None else share.value_ppm <= OVER_PPM,
            missing=any(cell.missing for cell in cells),
        ),
        tuple(
            f"{cell.asked.device}, {cell.asked.task}, T = {cell.asked.target}, |S| = {cell.asked.preload}:"
            f" {len(cell.samples.latency_ns) - cell.within} of {len(cell.samples.latency_ns)}"
            for cell in worst[:5]
            if cell.samples
        ),
    ).because(causes.of_late_requests(results))


# ------------------------------------------------------------------ parts


def _reaches(mean: Difference | None, points: float, *, unplanned: bool) -> bool | None:
    """Whether a mean is at least that; not where ``sti`` has no plan and the other has. None: no figure."""
    if unplanned:
        return False
    return None if mean is None else mean.points >= points


def _infeasible(cell: Cell | None) -> bool:
    return cell is not None and cell.infeasible


def _lacks(cell: Cell | None) -> bool:
    """Whether a cell was not asked, or is missing."""
    return cell is None or cell.missing


def _meets(cell: Cell) -> bool:
    """Whether a baseline's plan was found and half of its requests are within T."""
    return (
        not cell.infeasible
        and cell.samples is not None
        and median(cell.samples.latency_ns) <= (cell.target_ns or 0)
    )


def _against(one: Cell | None, other: Cell | None) -> Difference | str:
    """The paired difference, or why there is none."""
    if one is None or other is None or one.accuracy is None or other.accuracy is None:
        return f"`sti` {_why(one)}, the other {_why(other)}"
    if one.right is None or other.right is None or one.right.shape != other.right.shape:
        return "its rows cannot be paired: their labels are not in this home"
    return difference(one.right, other.right)


def _why(cell: Cell | None) -> str:
    if cell is None:
        return "not asked"
    if cell.infeasible:
        return "infeasible"
    return "not measured yet" if cell.missing else "measured"
