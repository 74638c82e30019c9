"""What must hold of the planner ``exact`` and of importance that is estimated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from orchestrator.results import causes
from orchestrator.results.claims import Claim, told_mean, verdict
from orchestrator.results.effects import effect_of, same_places
from orchestrator.results.gather import Cell, Results
from sti_runtime.rank_statistics import rank_correlation

CORRELATION = 0.7


def exact_claims(results: Results) -> Iterator[Claim]:
    """``exact`` against ``sti``, the paper's planner."""
    cells = results.pick(policy="exact")
    missing = any(cell.missing for cell in cells)
    yield _expected(results, missing=missing)
    effect = effect_of(results, "exact")
    mean = effect.mean
    ranked = tuple(ranked_expectations(results))
    claim = Claim(
        "`exact` against `sti` (the planner `paper`) in the same places, mean over tasks: points of accuracy",
        "not below by more than noise",
        told_mean(mean, len(results.tasks)),
        verdict(None if mean is None else mean.high >= 0, missing=missing),
        effect.by_task,
    ).because(ranked)
    yield claim if claim.cause else replace(claim, detail=(*claim.detail, *ranked))


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
        verdict(below == 0 if places else None, missing=missing),
        tuple(details),
    )


def _gains(differences: Sequence[float]) -> str:
    mean = sum(differences) / len(differences)
    return f"mean {mean:+.3g}, least {min(differences):+.3g}, most {max(differences):+.3g} milli-nats"


def ranked_expectations(results: Results) -> Iterator[str]:
    """By task: how well the expected gains of all plans made by importance rank their measured accuracy."""
    for task in results.tasks:
        found = {
            cell.plan.content_digest: (float(cell.gain_nano), float(cell.accuracy.correct.value_ppm))
            for cell in results.pick(task=task)
            if cell.plan is not None and cell.gain_nano is not None and cell.accuracy is not None
        }
        if len(found) > 2:
            gains, right = zip(*found.values(), strict=True)
            yield (
                f"{task}: over {len(found)} distinct plans the expected gain ranks as accuracy does at"
                f" {rank_correlation(gains, right):.2f}"
            )


def estimate_claims(results: Results) -> Iterator[Claim]:
    """The gradient's estimate of importance beside each exhaustive profile; what the store lacks is said."""
    found, details = list[float](), list[str]()
    exhaustive = {key: one for key, one in results.importance.items() if one.method == "exhaustive"}
    for (bundle, task), whole in exhaustive.items():
        estimate = results.estimates.get((bundle, task))
        if estimate is None:
            details.append(
                f"{task}: the store has no estimate of it"
                f" (`stifarm importance --bundle {bundle} --task {task} --method gradient` makes it)"
            )
            continue
        found.append(rank_correlation(estimate.worth(), whole.worth()))
        details.append(
            f"{task}: {found[-1]:.2f} on {estimate.rows} rows (split-half reliability of the exhaustive one,"
            f" {whole.rows} rows: {whole.reliability_ppm / 1e6:.2f})"
        )
    if exhaustive:
        yield Claim(
            "Importance estimated by gradient: rank correlation with the exhaustive profile by loss, the"
            " lowest of the tasks",
            f"≥ {CORRELATION:g}",
            f"{min(found):.2f}" if found else None,
            verdict(
                min(found) >= CORRELATION if found else None, missing=len(found) < len(results.importance)
            ),
            (*details, "its cost is measured by `python -m bench.importance`"),
        ).because(causes.of_estimates(results))
