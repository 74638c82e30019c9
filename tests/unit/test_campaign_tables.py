"""Campaigns as tables for people: units, what is compared with what, and why something is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from db.campaign_samples import Found, Question
from db.ratios import LEAST_SAMPLES, PPM, Ratio, Verdict, median_ratio, verdict
from db.statistics import summarise, wilson
from orchestrator.campaigns.compare import UNITS, Asked, Compared, Metric
from orchestrator.campaigns.compare_tables import asked_by_all, compared_rows, lacking_rows
from orchestrator.campaigns.report import Row, causes_of, counted, in_common, report_tables
from orchestrator.campaigns.status import RunStatus

MS = 10**6
ASKED = Asked("", "sst-2", "native", "100ms", 1_000_000, "sti")
OF_PROFILE = Asked(engine="native")
BETTER = Ratio(953_000, 901_000, 990_000)


def compared(
    metric: Metric,
    before: int | None,
    after: int | None,
    ratio: Ratio | None = BETTER,
    asked: Asked = ASKED,
    *,
    samples: tuple[int, int] = (30, 30),
    lacking: tuple[str, str] = ("", ""),
    said: Verdict | None = None,
) -> Compared:
    judged = said or verdict(ratio, more_is_better=metric == "accuracy")
    return Compared("desk", metric, UNITS[metric], asked, before, after, samples, lacking, ratio, judged)


def names(metrics: Sequence[Compared]) -> list[str]:
    return [cells[0] for cells in compared_rows(metrics)["desk"]]


def test_metrics_have_units_that_people_read() -> None:
    metrics = [
        compared("latency", 41_234_567, 39_296_542),
        compared("accuracy", 979_000, 985_120, Ratio(1_006_000, 990_000, 1_020_000)),
        compared("read", 50_000, 47_650, asked=OF_PROFILE),
        compared("compute", 1_234_567, 1_234_567, Ratio(PPM, PPM, PPM), asked=OF_PROFILE),
    ]
    assert asked_by_all(metrics) == "sst-2, native, sti, T = 100ms, |S| = 1 MB"
    assert compared_rows(metrics)["desk"] == [
        ("latency", "41.2 ms", "39.3 ms", "−4.7 %", "0.953 [0.901–0.990]", "better"),
        ("accuracy", "97.9 %", "98.5 %", "+0.6 points", "1.006 [0.990–1.020]", "same"),
        ("reading 1 MB", "50 ms", "47.6 ms", "−4.7 %", "0.953 [0.901–0.990]", "better"),
        ("computing a widest layer", "1.23 ms", "1.23 ms", "0.0 %", "1.000 [1.000–1.000]", "same"),
    ]
    assert lacking_rows(metrics, (3, 4)) == {}


def test_a_metric_is_named_by_what_differs() -> None:
    others = {
        "T = 60ms": replace(ASKED, target="60ms"),
        "T = 100ms": ASKED,
        "|S| = 0 B": replace(ASKED, preload_bytes=0),
    }
    metrics = [compared("latency", 1, 1, asked=each) for each in (ASKED, others["T = 60ms"])]
    assert asked_by_all(metrics) == "sst-2, native, sti, |S| = 1 MB"
    assert names(metrics) == [
        "latency, T = 100ms",
        "latency, T = 60ms",
    ]
    sizes = [compared("latency", 1, 1, asked=each) for each in (ASKED, others["|S| = 0 B"])]
    assert names(sizes) == [
        "latency, |S| = 1 MB",
        "latency, |S| = 0 B",
    ]
    policies = [ASKED, replace(ASKED, policy="load-exec", preload_bytes=None)]
    found = [compared("latency", 1, 1, asked=each) for each in policies]
    assert names(found) == ["latency, sti", "latency, load-exec"]
    assert asked_by_all(found) == "sst-2, native, T = 100ms, |S| = 1 MB"
    of_tasks = [replace(ASKED, task=task, bundle=f"minilm-{task}") for task in ("rte", "qqp")]
    named = [compared("latency", 1, 1, asked=each) for each in of_tasks]
    assert names(named) == ["latency, rte", "latency, qqp"]
    of_bundles = [replace(ASKED, bundle=name) for name in ("old", "new")]
    bundles = [compared("latency", 1, 1, asked=each) for each in of_bundles]
    assert names(bundles) == ["latency, old", "latency, new"]


@pytest.mark.parametrize(
    ("metric", "why"),
    [
        (
            compared("latency", 41 * MS, 40 * MS, None, samples=(30, 4)),
            "run 3: 41 ms of 30 samples; run 4: 40 ms of 4 samples; it takes 7 of each",
        ),
        (
            compared("latency", 41 * MS, None, None, samples=(30, 0), lacking=("", "no link")),
            "run 3: 41 ms of 30 samples; run 4: no link",
        ),
        (
            compared(
                "latency",
                None,
                None,
                None,
                samples=(0, 0),
                lacking=("no plan meets its T; the smallest that works is 60.624182ms",) * 2,
            ),
            "runs 3 and 4: no plan meets its T; the smallest that works is 60.7 ms",
        ),
        (
            compared("accuracy", 0, 500_000, None, samples=(8, 8)),
            "run 3: 0.0 % of 8 rows; run 4: 50.0 % of 8 rows; what was before may be 0",
        ),
    ],
)
def test_what_is_not_compared_says_why_and_has_no_row_of_dashes(metric: Compared, why: str) -> None:
    assert compared_rows([metric]) == {}
    assert lacking_rows([metric], (3, 4)) == {"desk": [(metric.metric, why)]}


def test_metrics_of_one_question_lack_the_same_together() -> None:
    why = ("it was not asked", "no link")
    metrics = [
        compared(metric, None, None, None, asked=asked, samples=(0, 0), lacking=why)
        for metric in ("latency", "accuracy")
        for asked in (ASKED, replace(ASKED, target="60ms"))
    ]
    assert lacking_rows(metrics, (3, 4))["desk"] == [
        (f"latency, accuracy, T = {target}", "run 3: it was not asked; run 4: no link")
        for target in ("100ms", "60ms")
    ]


def test_so_many_samples_are_needed_for_a_ratio() -> None:
    enough = range(100, 100 + LEAST_SAMPLES)
    assert median_ratio(enough, enough) is not None
    assert median_ratio(enough, enough[1:]) is None


def status(**counts: int) -> RunStatus:
    return RunStatus("nightly", 1, "done", "manual", None, counts, None, None, {}, ())


def test_a_run_says_what_became_of_all_its_cells() -> None:
    assert counted(status(done=28)) == "28 of 28"
    assert counted(status(done=24, infeasible=4)) == "24 + 4 infeasible of 28"
    assert counted(status(queued=2, failed=1)) == "0 + 1 failed + 2 queued of 3"


def row(device: str, target: str, policy: str = "sti", samples: tuple[int, ...] = (), **changes: Any) -> Row:
    states = {"done": 1} if samples else {"infeasible": 1}
    size = 1_000_000 if policy == "sti" else 0
    question = Question(device, "b" * 64, "sst-2", "native", target, size, policy)
    found = Found(question, "execute", 5 * MS, (), (), samples, 0, {**states, **changes}, ())
    within = wilson(len(samples), len(samples)) if samples else None
    return Row(found, "tiny", summarise(samples), within, None)


def test_a_report_has_a_table_for_each_device_and_columns_of_what_differs() -> None:
    samples = tuple(MS * number for number in range(160, 170))
    rows = [row("desk", "200ms", samples=samples), row("desk", "5ms"), row("board", "200ms")]
    assert in_common(rows) == "bundle tiny, task sst-2, native, sti, |S| = 1 MB"
    desk, board = report_tables(rows)
    assert desk.columns == ("T", "median [95 %]", ">p95", ">≤ T", "accuracy [95 %]")
    assert desk.rows == (
        ("200ms", "164 ms [161–168]", "169 ms", "10/10", "–"),
        ("5ms", "infeasible", "–", "–", "–"),
    )
    assert (board.device, len(board.rows)) == ("board", 1)
    several = [*rows, row("desk", "200ms", "load-exec", (1, 2))]
    (desk, _) = report_tables(several)
    assert in_common(several) == "bundle tiny, task sst-2, native, |S| = 1 MB"
    assert (desk.columns[0], desk.rows[0][0], desk.rows[-1][0]) == ("policy", "sti", "load-exec")
    (mixed,) = report_tables([row("desk", "200ms", samples=samples, failed=2)])
    assert (mixed.columns[-1], mixed.rows[0][-1]) == ("state", "1 done, 2 failed")


def test_causes_are_told_once_with_rounded_durations() -> None:
    causes = [
        f"no plan meets its T; the smallest that works is 60.{digits}ms" for digits in ("624182", "600001")
    ]
    question = Question("desk", "b" * 64, "sst-2", "native", "5ms", 0, "sti")
    found = Found(question, "execute", 5 * MS, (), (), (), 0, {"infeasible": 2}, tuple(causes))
    assert causes_of([Row(found, "tiny", None, None, None)]) == [
        "desk, sti at T = 5ms: no plan meets its T; the smallest that works is 60.7 ms"
    ]
