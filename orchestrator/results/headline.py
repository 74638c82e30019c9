"""What must hold, and whether it does: computed from the cells, each with its number."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from db.statistics import median, wilson
from orchestrator.results import causes
from orchestrator.results.effects import effect_of, same_places
from orchestrator.results.gather import Cell, Results
from orchestrator.results.paired import Difference, difference, mean_difference
from sti_runtime.rank_statistics import rank_correlation
from sti_runtime.units import format_bytes

Verdict = Literal["reached", "not reached", "not known", "nothing to compare"]
"""not known: cells are missing. nothing to compare: none is, and there is no pair of plans that meet T."""

STREAMING = ("load-exec", "std-pipeline-2", "std-pipeline-6", "std-pipeline-32")
WITHIN_POINTS = 1.0
MEMORY_SHARE = 1 / 8
AHEAD_POINTS = 5.0
OVER_PPM = 10_000
CORRELATION = 0.7


@dataclass(frozen=True)
class Claim:
    """One line of the headline. ``found``: None where nothing is known. ``detail``: the figures it is made
    of, and what it leaves out; ``cause``: of what is not reached, why, as far as the run's figures tell."""

    what: str
    reach: str
    found: str | None
    verdict: Verdict
    detail: tuple[str, ...] = ()
    cause: tuple[str, ...] = ()

    def because(self, lines: Iterable[str]) -> Claim:
        """With its cause, where it is not reached; ``lines`` are made only then."""
        return replace(self, cause=tuple(lines)) if self.verdict == "not reached" else self


def headline(results: Results) -> list[Claim]:
    """Every claim, in the order in which they are told."""
    return [
        *(_whole_model(results, device) for device in results.by_starvation),
        _memory(results),
        *(_ahead(results, device) for device in results.by_starvation[:1]),
        _over_target(results),
        *_exact(results),
        *_estimated(results),
    ]


def _whole_model(results: Results, device: str) -> Claim:
    """``sti`` against the whole model in memory."""
    target = results.targets[-1]
    details: list[str] = []
    each: list[Difference] = []
    missing = False
    for task in results.tasks:
        mine = results.largest_preload(device=device, task=task, target=target, policy="sti")
        whole = results.largest_preload(device=device, task=task, target=target, policy="preload-32")
        told = _against(mine, whole)
        missing = missing or _lacks(mine) or _lacks(whole)
        details.append(f"{task}: {told}")
        if isinstance(told, Difference):
            each.append(told)
    mean = mean_difference(each)
    return Claim(
        f"`sti` at the largest |S| against the whole model in memory (`preload-32`), T = {target},"
        f" {device}, mean over tasks: points of accuracy",
        f"≥ −{WITHIN_POINTS:g}",
        _told(mean, len(results.tasks)),
        _verdict(None if mean is None else mean.points >= -WITHIN_POINTS, missing=missing),
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
        _verdict(max(ratios) <= MEMORY_SHARE if ratios else None, missing=missing),
        tuple(details),
    ).because(worst)


def _ahead(results: Results, device: str) -> Claim:
    """``sti`` against the best that streams and meets T, at the tightest T on the starved device."""
    target = results.targets[0]
    details: list[str] = []
    bounds: list[str] = []
    each: list[Difference] = []
    missing = False
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
        details.append(f"{task}: {told} over `{best.asked.policy}`")
        bounds += causes.of_lead(results, best)
        if isinstance(told, Difference):
            each.append(told)
    mean = mean_difference(each)
    return Claim(
        f"`sti` at the largest |S| against the best of `load-exec` and `std-pipeline-*` that meets T,"
        f" T = {target}, {device} (the slowest to read), mean over tasks: points of accuracy",
        f"≥ {AHEAD_POINTS:g}",
        _told(mean, len(results.tasks)),
        _verdict(None if mean is None else mean.points >= AHEAD_POINTS, missing=missing),
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
        _verdict(
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


def _exact(results: Results) -> Iterator[Claim]:
    """``exact`` against ``sti``, the paper's planner, where both were asked."""
    if "exact" not in results.spec.policies or "sti" not in results.spec.policies:
        return
    cells = results.pick(policy="exact")
    missing = any(cell.missing for cell in cells)
    yield _expected(results, missing=missing)
    effect = effect_of(results, "exact")
    mean = effect.mean
    yield Claim(
        "`exact` against `sti` (the planner `paper`) in the same places, mean over tasks: points of accuracy",
        "not below by more than noise",
        _told(mean, len(results.tasks)),
        _verdict(None if mean is None else mean.high >= 0, missing=missing),
        effect.by_task,
    ).because(causes.of_expectations(results))


def _grounds(cell: Cell) -> tuple[str | None, str] | None:
    """The profiles that a cell's plan rests on."""
    return None if cell.plan is None else (cell.plan.importance_digest, cell.plan.device_profile_digest)


def _expected(results: Results, *, missing: bool) -> Claim:
    """The gain that its own model expects; a place where only the other has a plan counts as below."""
    below = places = apart = 0
    details: list[str] = []
    ahead: list[float] = []
    for task in results.tasks:
        of_task: list[float] = []
        for mine, exact in same_places(results, task, "exact"):
            if mine.gain_nano is None or (exact.gain_nano is None and not exact.infeasible):
                continue
            if exact.plan is not None and _grounds(mine) != _grounds(exact):
                apart += 1
                continue
            places += 1
            if exact.gain_nano is None or exact.gain_nano < mine.gain_nano:
                below += 1
            if exact.gain_nano is not None:
                of_task.append((exact.gain_nano - mine.gain_nano) / 1e6)
        ahead += of_task
        if of_task:
            details.append(f"{task}: {_gains(of_task)} in {len(of_task)} places")
    if apart:
        details.append(f"left out: {apart} places whose plans rest on other profiles")
    return Claim(
        "`exact` against `sti` in the same places: expected gain (the loss that the additive model expects to"
        " save)",
        "never below",
        f"below in {below} of {places} places" + (f"; {_gains(ahead)}" if ahead else "") if places else None,
        _verdict(below == 0 if places else None, missing=missing),
        tuple(details),
    )


def _gains(differences: Sequence[float]) -> str:
    mean = sum(differences) / len(differences)
    return f"mean {mean:+.3g}, least {min(differences):+.3g}, most {max(differences):+.3g} milli-nats"


def _estimated(results: Results) -> Iterator[Claim]:
    """The gradient's estimate of importance, where the store holds one beside each exhaustive profile."""
    found, details = list[float](), list[str]()
    for (bundle, task), estimate in results.estimates.items():
        whole = results.importance[bundle, task]
        if whole.method != "exhaustive":
            continue
        found.append(rank_correlation(estimate.worth(), whole.worth()))
        details.append(
            f"{task}: {found[-1]:.2f} on {estimate.rows} rows (split-half reliability of the exhaustive one,"
            f" {whole.rows} rows: {whole.reliability_ppm / 1e6:.2f})"
        )
    if found:
        yield Claim(
            "Importance estimated by gradient: rank correlation with the exhaustive profile by loss, the"
            " lowest of the tasks",
            f"≥ {CORRELATION:g}",
            f"{min(found):.2f}",
            _verdict(min(found) >= CORRELATION, missing=len(found) < len(results.importance)),
            (*details, "its cost is measured by `python -m bench.importance`"),
        ).because(causes.of_estimates(results))


# ------------------------------------------------------------------ parts


def _verdict(holds: bool | None, *, missing: bool) -> Verdict:
    """A claim over cells that are not all there is not decided; None: nothing was compared."""
    if missing:
        return "not known"
    if holds is None:
        return "nothing to compare"
    return "reached" if holds else "not reached"


def _told(mean: Difference | None, tasks: int) -> str | None:
    """A mean over tasks; how many where some are left out."""
    if mean is None:
        return None
    return f"{mean}" if mean.of == tasks else f"{mean} ({mean.of} of {tasks} tasks)"


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
