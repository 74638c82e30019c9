"""What a page of results says beside its figures: of requests, of limits of the data, of what is compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from db.models import CampaignRow
from orchestrator.results.figures import Figure
from orchestrator.results.gather import Results
from orchestrator.results.page import write_page
from tests.unit.planning_data import make_manifest, proportional
from tests.unit.test_results import BASES, LARGE, MS, STI, TIGHT, cell, plan_of, results_of, scored


def page_of(results: Results, *figures: Figure) -> str:
    known = replace(
        results,
        campaign=CampaignRow(name="n", spec_digest="0" * 64),
        manifests={"b" * 64: make_manifest(1, 2, proportional(4096))},
    )
    return write_page(known, figures, Path("pages/n.md"), "stifarm campaign results n")


def test_a_page_says_how_many_requests_its_cells_rest_on() -> None:
    whole = results_of(*STI)
    asks = {"requests": 100, "notes": ("QQP is a sample.",)}
    whole = replace(whole, spec=whole.spec.model_copy(update=asks))
    assert "- valid requests: 100 or more in each of 3 timed cells\n" in page_of(whole)
    assert STI[0].samples is not None
    few = replace(STI[0].samples, latency_ns=(40 * MS,) * 93, invalid=7)
    page = page_of(replace(whole, cells=(replace(STI[0], samples=few), *STI[1:])))
    assert (
        "- valid requests: 93 or more in each of 3 timed cells, 1 of them with fewer than the 100 asked;"
        " 7 invalid ones (throttled, or not read as asked) are left out\n"
    ) in page


def test_a_page_says_how_well_plans_foretold_what_was_measured() -> None:
    one = cell("sti", TIGHT, 90, preload=LARGE, latency_ms=44)
    assert one.samples is not None
    plan = plan_of(4, 6, bits=3)
    plan.predicted_median_latency_ns, plan.predicted_latency_ns = 40 * MS, 45 * MS
    foretold = replace(one, plan=plan)
    late = replace(one.samples, latency_ns=(50 * MS,) * 30 + (30 * MS,) * 70)
    section = page_of(results_of(foretold, replace(foretold, samples=late)))
    section = section.split("## Predicted and measured\n")[1].split("\n## ")[0]
    assert "| board | `sti` | 2 | 0.93 [0.75–1.10] | 15.0 % |" in section
    untimed = replace(foretold, samples=None)
    assert "## Predicted and measured" not in page_of(results_of(untimed))


def test_limits_of_the_data_stand_beside_what_is_of_them() -> None:
    none = results_of(*STI)
    assert "read with care" not in page_of(none)
    noted = replace(
        none,
        spec=none.spec.model_copy(update={"notes": ("QQP is a sample.",)}),
        dev_rows={"demo": (100, 1000), "other": (50, 50)},
    )
    figure = Figure(Path("pages/n/timeline.png"), "A request.")
    heat = Figure(Path("pages/n/importance.png"), "Shards.", of_dev=False)
    page = page_of(replace(noted, models={"b" * 64: scored({(3, 6): 91})}), figure, heat)
    care = (
        "Of a draw of the dev rows: demo 100 of 1,000. Limits of data and devices:"
        " [read with care](#read-with-care)."
    )
    assert f"A request. {care}" in page
    assert "Shards. Limits of data and devices" in page
    assert "Wilson's interval. Limits of data and devices" in page
    for beginning in ("## Headline", "## Every policy against `sti`", "### demo on board"):
        section = page.split(f"{beginning}\n")[1].split("\n## ")[0]
        assert care in section


def test_a_page_says_where_policies_depart_from_sti_and_what_is_claimed_without_it() -> None:
    shuffled = cell("random", TIGHT, 70, preload=LARGE)
    page = page_of(results_of(*STI, shuffled))
    assert "Where each departs from `sti`: `random`: shards ranked at random, not by importance.\n" in page
    assert "Nothing is claimed" in page_of(results_of(*BASES))
