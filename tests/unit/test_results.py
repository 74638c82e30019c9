"""What is claimed of which cells; paired differences, the interval of p95, figures' looks."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from db.campaign_results import Samples
from db.campaign_samples import Found, Question
from db.measured import PeakMemory
from db.models import CampaignRow, CampaignRunRow, PlanRow
from db.runs import Accuracy
from db.statistics import p95_interval, percentile, wilson
from orchestrator.campaigns.spec import CampaignSpec
from orchestrator.campaigns.spec_file import load_campaign
from orchestrator.figures.style import looks
from orchestrator.figures.timeline import io_rows
from orchestrator.results.effects import effects
from orchestrator.results.gather import Cell, Results, Speed
from orchestrator.results.headline import headline
from orchestrator.results.paired import difference, mean_difference, pooled_difference
from sti_runtime.importance_profile import ImportanceProfile, Method, Score, ShardScore
from sti_runtime.messages import LayerTrace
from sti_runtime.model import Submodel
from sti_runtime.model_store import ModelInfo, SubmodelScore
from sti_runtime.policies import POLICIES
from sti_runtime.units import NONE
from tests.farm_world import tiny_config

TIGHT, LOOSE = "0.5 of whole-model compute", "1 of whole-model compute"
LARGE = "2 % of 32-bit shards"
MS = 1_000_000


def cell(
    policy: str, target: str, right: int | None, *, preload: str = "", parts: int = 10, latency_ms: int = 40
) -> Cell:
    """A cell of one device and task with T of 50 or 100 ms; ``right`` of 100 rows, None: infeasible."""
    question = Question("board", "b" * 64, "demo", "native", target, len(preload), policy, preload)
    state = "infeasible" if right is None else "done"
    found = Found(
        question, "execute", (50 if target == TIGHT else 100) * MS, (), (), (), 0, {state: 1}, ()
    )  # fmt: skip
    if right is None:
        return Cell(found, "tiny", None, None, None, None)
    memory = PeakMemory(parts, 0, 0, 0, None)
    samples = Samples((latency_ms * MS,) * 100, (0,) * 100, (1,) * 100, 0, memory, (1,))
    rows = np.arange(100) < right
    return Cell(found, "tiny", None, samples, Accuracy(wilson(right, 100), 0, "d" * 64, "dev", 0), rows)


def results_of(*cells: Cell) -> Results:
    spec = CampaignSpec.model_validate(
        {
            "version": 1,
            "name": "n",
            "kinds": ("execute", "evaluate"),
            "targets": (LOOSE, TIGHT),
            "preload": ("0MB", LARGE),
            "policies": ("sti", "exact"),
        }
    )
    speed = Speed("board", "tiny", "demo", 90, 10, "fit")
    return Results(CampaignRow(), CampaignRunRow(), spec, cells, (), (speed,), {}, {}, (), {})


def claims(*cells: Cell) -> list[tuple[str, str]]:
    """(found, verdict) of the whole model, memory, ahead, over T, exact."""
    told = [claim for claim in headline(results_of(*cells)) if "expected gain" not in claim.what]
    return [(claim.found or NONE, claim.verdict) for claim in told]


STI = (
    cell("sti", TIGHT, 50, preload="0MB"),
    cell("sti", TIGHT, 80, preload=LARGE),
    cell("sti", LOOSE, 89, preload=LARGE),
)
BASES = (
    cell("load-exec", TIGHT, None),
    cell("std-pipeline-2", TIGHT, 70),
    cell("std-pipeline-6", TIGHT, None),
)
WHOLE = cell("preload-32", LOOSE, 90, parts=90)
EXACT = cell("exact", LOOSE, 90, preload=LARGE)


def test_claims_are_of_the_largest_preload_and_their_targets() -> None:
    whole, memory, ahead, over, exact = claims(*STI, *BASES, WHOLE, EXACT)
    assert whole == ("-1.0 [-3.0, +1.0]", "reached")
    assert memory == ("1/9.0", "reached")
    assert (ahead[0].split()[0], ahead[1]) == ("+10.0", "reached")
    assert (over[0].split()[0], over[1]) == ("0.00", "reached")
    assert (exact[0].split()[0], exact[1]) == ("+1.0", "reached")


def test_bundles_of_one_task_are_judged_apart() -> None:
    def of_codec(each: Cell, right: int) -> Cell:
        asked = replace(each.asked, bundle="c" * 64)
        return replace(
            each, found=replace(each.found, question=asked), bundle="fisher", right=np.arange(100) < right
        )

    others = [of_codec(STI[2], 70), of_codec(WHOLE, 90)]
    told = [one for one in headline(results_of(*STI, WHOLE, *others)) if "whole model in memory" in one.what]
    assert [(claim.what.split()[0], (claim.found or "").split()[0], claim.verdict) for claim in told] == [
        ("(tiny)", "-1.0", "reached"),
        ("(fisher)", "-20.0", "not reached"),
    ]


def test_engines_that_devices_have_of_their_own_are_judged_together() -> None:
    elsewhere = [
        replace(each, found=replace(each.found, question=replace(each.asked, device="gpu", engine="torch")))
        for each in STI
    ]
    (over,) = headline(results_of(*STI, *elsewhere))
    assert over.what == "Requests over T, all `sti` cells together"
    assert (over.found or "").endswith("0 of 600")


def test_how_expected_gains_rank_is_told_of_every_plan_by_importance() -> None:
    cells = [
        replace(
            cell(policy, TIGHT, right, preload=LARGE),
            plan=PlanRow(content_digest=str(number), importance_digest="i", device_profile_digest="p"),
            gain_nano=gain,
        )
        for number, (policy, right, gain) in enumerate(
            [("sti", 80, 3), ("exact", 90, 4), ("random", 70, 2), ("uniform", 60, 1)]
        )
    ]
    (told,) = [claim for claim in headline(results_of(*cells)) if "points of accuracy" in claim.what]
    assert told.verdict == "reached"
    line = "demo: over 4 distinct plans the expected gain ranks as accuracy does at 1.00"
    assert told.detail[1:] == (line,)
    worse = [replace(one, right=np.arange(100) < 20) if one.asked.policy == "exact" else one for one in cells]
    (told,) = [claim for claim in headline(results_of(*worse)) if "points of accuracy" in claim.what]
    assert (told.verdict, told.cause) == ("not reached", (line,))


def test_a_claim_that_fails_says_so() -> None:
    late = cell("sti", TIGHT, 72, preload=LARGE, latency_ms=51)
    whole, memory, ahead, over, _ = claims(
        STI[2], late, *BASES, cell("preload-32", LOOSE, 92, parts=70), EXACT
    )
    assert [verdict for _, verdict in (whole, memory, ahead, over)] == ["not reached"] * 4
    assert over[0].endswith("100 of 200")


def test_what_is_not_reached_has_its_cause() -> None:
    late = cell("sti", TIGHT, 72, preload=LARGE, latency_ms=51)
    small = replace(STI[2], plan=plan_of(3, 6, bits=4))
    full = replace(cell("preload-32", LOOSE, 92, parts=70), plan=plan_of(6, 12, bits=32))
    results = replace(
        results_of(small, late, *BASES, full, EXACT), models={"b" * 64: scored({(3, 6): 91, (6, 12): 93})}
    )
    causes = [claim.cause for claim in headline(results) if "expected gain" not in claim.what]
    assert causes[0] == (
        "demo: its submodel 3×6 alone -2.0 points (32 bits, the dev rows of"
        " [its training](#models-and-tasks)); its 4.0 bits the other -1.0",
    )
    assert causes[1] == (
        "board, demo: resident tensors 100 %, activations 0 %, preload buffer 0 %, working buffer 0 %;"
        " resident tensors and activations, which no plan shrinks, are 1/7.0 of what `preload-32` holds",
    )
    assert causes[2] == (
        "demo: over `std-pipeline-2` there are +22.0 points to gain at most: the whole model"
        " at 32 bits has 92.0 %",
    )
    assert causes[3] == (
        "board: 100 of 200, half of them by more than 2.0 % of T, at most 2 %; cells' medians are"
        " +100.0 % off their predictions",
    )
    assert all(claim.verdict == "not reached" for claim in headline(results) if claim.cause)


def plan_of(depth: int, width: int, *, bits: int) -> PlanRow:
    return PlanRow(
        depth=depth, width=width, mean_fidelity_milli=1000 * bits, predicted_median_latency_ns=20 * MS
    )


def scored(right: dict[tuple[int, int], int]) -> ModelInfo:
    """A model whose submodels had so many of 100 dev rows right."""
    scores = tuple(
        SubmodelScore(
            submodel=Submodel(kept=tuple(range(depth)), width=width), split="dev", correct=correct, rows=100
        )
        for (depth, width), correct in right.items()
    )
    return ModelInfo(
        format="stifarm-model",
        version=1,
        config=tiny_config(),
        untrained=False,
        submodels=tuple(score.submodel for score in scores),
        tensors_digest="0" * 64,
        tokenizer_digest=None,
        source="a test",
        provenance={},
        scores=scores,
    )


def test_a_baseline_that_is_over_its_target_does_not_count() -> None:
    late = cell("std-pipeline-2", TIGHT, 70, latency_ms=51)
    assert claims(*STI, BASES[0], late, WHOLE)[2] == ("–", "nothing to compare")


def test_what_is_missing_leaves_a_claim_undecided() -> None:
    waiting = replace(BASES[1], samples=None, accuracy=None)
    assert claims(*STI, BASES[0], waiting, WHOLE)[2][1] == "not known"
    unmeasured = replace(WHOLE, samples=None, accuracy=None, right=None)
    assert claims(*STI, *BASES, unmeasured)[0] == ("–", "not known")


def test_what_a_campaign_does_not_ask_is_not_claimed() -> None:
    told = [claim.what for claim in headline(results_of(*STI, EXACT))]
    assert len(told) == 3
    assert told[0].startswith("Requests over T")
    assert all(what.startswith("`exact` against `sti`") for what in told[1:])
    assert headline(results_of(*BASES, WHOLE)) == []


def test_a_task_for_which_only_the_others_have_a_plan_is_not_reached() -> None:
    elsewhere = (
        cell("sti", TIGHT, None, preload=LARGE),
        cell("sti", LOOSE, None, preload=LARGE),
        WHOLE,
        BASES[1],
    )
    other = [
        replace(each, found=replace(each.found, question=replace(each.asked, task="other")))
        for each in elsewhere
    ]
    told = headline(results_of(*STI, *BASES, WHOLE, *other))
    for claim in (told[0], told[2]):
        assert (claim.found or "").endswith("(1 of 2 tasks)")
        assert claim.verdict == "not reached"
        assert claim.detail[1].startswith("other: `sti` infeasible, the other measured")


def test_effects_are_of_the_same_places() -> None:
    found = {effect.policy: effect for effect in effects(results_of(*STI, *BASES, WHOLE, EXACT))}
    assert found["std-pipeline-2"].mean is not None
    assert (found["std-pipeline-2"].mean.points, found["std-pipeline-2"].infeasible) == (5.0, 0)  # +20, -10
    assert found["std-pipeline-2"].within == wilson(100, 100)  # one cell, which stands for both |S|
    assert found["std-pipeline-2"].within_sti == wilson(200, 200)
    assert found["std-pipeline-2"].memory == pytest.approx(1)
    assert found["preload-32"].memory == pytest.approx(9)
    assert found["load-exec"].mean is None
    assert found["load-exec"].infeasible == 2
    assert found["exact"].mean is not None
    assert found["exact"].mean.points == pytest.approx(1.0)


def test_the_interval_of_p95_covers_it_and_needs_seventy_two_samples() -> None:
    assert p95_interval(range(71)) is None
    few = p95_interval(range(72))
    assert few is not None
    assert few.high == 71
    rng, inside, trials = random.Random(1), 0, 400
    for _ in range(trials):
        interval = p95_interval([rng.randrange(10**6) for _ in range(100)])
        assert interval is not None
        inside += interval.low <= 950_000 <= interval.high
    assert inside >= 0.93 * trials
    many = p95_interval(range(1000))
    assert many is not None
    assert many.low < percentile(range(1000), 95) < many.high


def test_differences_are_paired_over_rows() -> None:
    one = np.array([True] * 90 + [False] * 10)
    other = one.copy()
    other[:4] = False
    same = difference(one, one)
    assert (same.points, same.error) == (0.0, 0.0)
    found = difference(one, other)
    assert found.points == pytest.approx(4.0)
    assert found.error == pytest.approx(100 * math.sqrt(0.04 * 0.96 / 99))
    assert found.low < 4 < found.high
    with pytest.raises(ValueError, match="cannot be paired"):
        difference(one, other[:5])


def test_means_take_tasks_as_independent_and_places_as_not() -> None:
    one = np.array([True] * 9 + [False])
    other = np.array([True] * 5 + [False] * 5)
    each = difference(one, other)
    both = mean_difference([each, each])
    assert both is not None
    assert (both.points, both.of) == (each.points, 2)
    assert both.error == pytest.approx(each.error / math.sqrt(2))
    places = pooled_difference([(one, other)] * 3)
    assert places is not None
    assert places.points == pytest.approx(each.points)
    assert places.error == pytest.approx(each.error)
    assert mean_difference([]) is pooled_difference([]) is None


def test_every_policy_has_a_look_of_its_own() -> None:
    names = [f"policy-{number}" for number in range(14)]
    found = looks(names)
    assert len({(look.colour, look.marker) for look in found.values()}) == len(names)
    assert found == looks(names)


def test_names_that_differ_in_a_number_share_a_colour() -> None:
    found = looks(list(POLICIES))
    assert len({(look.colour, look.marker) for look in found.values()}) == len(POLICIES)
    for family in ("std-pipeline", "preload"):
        assert len({look.colour for name, look in found.items() if name.startswith(family)}) == 1


@pytest.mark.parametrize("name", ["paper", "ablations"])
def test_no_other_policy_of_a_campaign_has_the_colour_of_sti(name: str) -> None:
    spec = load_campaign(Path(__file__).parents[2] / "campaigns" / f"{name}.yaml")
    found = looks(spec.planning_policies)
    assert found["sti"].colour not in {look.colour for other, look in found.items() if other != "sti"}


def test_layers_read_at_once_have_rows_of_their_own() -> None:
    def layer(start_ns: int, end_ns: int) -> LayerTrace:
        return LayerTrace(
            io_start_ns=start_ns, io_end_ns=end_ns, bytes=end_ns, compute_start_ns=0, compute_end_ns=0,
            decompress_ns=0, stall_ns=0,
        )  # fmt: skip

    assert io_rows([layer(0, 0), layer(1, 5), layer(2, 9), layer(5, 7), layer(6, 8)]) == {
        1: 0,
        2: 1,
        3: 0,
        4: 2,
    }


def profile_of(method: Method) -> ImportanceProfile:
    return ImportanceProfile(
        format="stifarm-importance", version=1, method=method, task="demo", model_digest="a" * 64,
        split_digest="d" * 64, layers=1, slices=3, base_fidelity=2, rows=100, reliability_ppm=900_000,
        base=Score(loss_nano=900, correct=50),
        scores=tuple(
            ShardScore(layer=0, slice=i, score=Score(loss_nano=800 - 100 * i, correct=50)) for i in range(3)
        ),
    )  # fmt: skip


def test_an_estimate_of_importance_that_the_store_lacks_is_asked_for() -> None:
    key = ("tiny", "demo")
    results = replace(results_of(*STI), importance={key: profile_of("exhaustive")})
    for estimates, found, verdict in (
        ({}, None, "not known"),
        ({key: profile_of("gradient")}, "1.00", "reached"),
    ):
        (claim,) = [c for c in headline(replace(results, estimates=estimates)) if "gradient" in c.what]
        assert (claim.found, claim.verdict) == (found, verdict)
        asked = "stifarm importance --bundle tiny --task demo --method gradient" in claim.detail[0]
        assert asked == (found is None)


def test_expected_gains_are_compared_in_the_same_places() -> None:
    mine = replace(cell("sti", TIGHT, 80, preload=LARGE), gain_nano=2_000_000)
    better = replace(cell("exact", TIGHT, 80, preload=LARGE), gain_nano=3_000_000)
    worse = replace(better, gain_nano=1_000_000)
    none = cell("exact", TIGHT, None, preload=LARGE)
    for exact, told, verdict in (
        (better, "below in 0 of 1 places; mean +1, least +1, most +1 milli-nats", "reached"),
        (worse, "below in 1 of 1 places; mean -1, least -1, most -1 milli-nats", "not reached"),
        (none, "below in 1 of 1 places", "not reached"),
    ):
        (claim,) = [one for one in headline(results_of(mine, exact)) if "expected gain" in one.what]
        assert (claim.found, claim.verdict) == (told, verdict)
