"""What is shown of store answers: figures with units, what limits them, nothing where nothing is known."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from db.grounds import ProfileRef, SampleCounts
from db.measured import Measured, PeakMemory
from db.plan_answers import PlanAnswer
from db.runs import Accuracy
from db.statistics import Interval, Summary, wilson
from orchestrator import report
from orchestrator.errors import StableError
from orchestrator.measure import Answer, Question
from sti_runtime.errors import InfeasiblePlanError
from sti_runtime.manifest import Manifest
from sti_runtime.model import Submodel
from sti_runtime.plan import Plan
from sti_runtime.units import NONE
from tests.agent_data import manifest_of, tiny_bundle
from tests.bundles import hand_plan

MS = 10**6
MEASURED = Measured(
    latency=Summary(count=30, median=41_500_000, p95=52 * MS, interval=Interval(40 * MS, 43_200_000)),
    within_target=wilson(29, 30),
    stall_share_ppm=123_400,
    storage_bytes=2_500_000,
    planned_bytes=2_400_000,
    memory=PeakMemory(1_000_000, 200_000, 300_000, 500_000, None),
    invalid=0,
    runs=2,
    older_runs=0,
    request_kind="warm",
    io_modes=("direct",),
    modes=(("direct", "direct", 30),),
    gate_verdict="pass",
    mechanisms=(),
)
ACCURACY = Accuracy(wilson(870, 1000), 400_000_000, "d" * 64, "dev", 1)


@pytest.mark.parametrize(
    ("kind", "modes", "found"),
    [
        ("warm", (("direct", "direct", 50),), [("direct 50/50", True)]),
        ("warm", (("direct", "direct", 48), ("direct", "mixed", 2)), [("direct 48/50", False)]),
        ("cold", (("direct", "buffered-cold", 50),), [("direct 0/50", False)]),
        (
            "cold",
            (("buffered", "buffered-cold", 4), ("buffered", "mixed", 1)),
            [("buffered-cold 4/5", False)],
        ),
        ("cached", (("buffered", "cached", 50),), [("cached 50/50", True)]),
    ],
)  # fmt: skip
def test_requests_that_read_as_asked_are_counted(
    answer: PlanAnswer, kind: str, modes: tuple[tuple[str, str, int], ...], found: list[tuple[str, bool]]
) -> None:
    measured = replace(MEASURED, request_kind=kind, modes=modes)
    assert report.mode_counts(measured) == found
    shown = replace(answer, measured=measured)
    assert [text for text, whole in found if not whole] == [n for n in report.notes(shown) if "/" in n]
    assert report.plan_json(shown)["measured"]["modes_as_asked"] == [text for text, _ in found]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    manifest: Manifest = manifest_of(tiny_bundle(tmp_path_factory.mktemp("bundles")))
    made = hand_plan(manifest, Submodel(kept=(0, 1), width=2), lambda _layer, slice_: 2 if slice_ else 32)
    return made.model_copy(update={"target_ns": 50 * MS})


@pytest.fixture
def answer(plan: Plan) -> PlanAnswer:
    return PlanAnswer(
        plan=plan,
        plan_id=1,
        plan_digest=plan.digest,
        device="desk",
        identity="0123456789abcdef",
        task="demo",
        predicted_latency_ns=48 * MS,
        predicted_median_latency_ns=40 * MS,
        predicted_interval=Interval(39 * MS, 50 * MS),
        measured=MEASURED,
        accuracy=ACCURACY,
        profiles=(ProfileRef("device", "e" * 64, 5, unfit=False),),
        stale=(),
        borrowed=False,
        emulated=False,
        mechanisms=(),
        planned_wall_ns=7,
    )


def cells(table: report.PlanTable, row: int = 0) -> dict[str, str]:
    """A row by column; of two columns of one name the latter is called with an apostrophe."""
    named: dict[str, str] = {}
    for column, cell in zip(table.columns, table.rows[row], strict=True):
        name = column.lstrip(">")
        named[f"{name}'" if name in named else name] = cell
    return named


def infeasible(device: str, target_ns: int, smallest_ns: int, policy: str = "sti") -> Answer:
    error = InfeasiblePlanError("No.", "Later.", smallest_target_ns=smallest_ns)
    return Answer(device, Question(target_ns, 0, 1, policy=policy), None, error)  # type: ignore[arg-type]


def test_a_measured_plan_shows_every_figure(answer: PlanAnswer) -> None:
    (table,) = report.plan_tables([answer])
    assert table.title == "desk"
    assert cells(table) == {
        "T": "50 ms",
        "n×m": "2×2",
        "bits": "17.0",
        "preload": "0 B",
        "read": "2.5 MB",
        "predicted": "48 ms",
        "median [95 %]": "41.5 ms [40–43.2]",
        "p95": "52 ms",
        "≤ T": "29/30",
        "stall": "12.3",
        "accuracy [95 %]": "87.0 "
        f"[{ACCURACY.correct.low_ppm / 1e4:.1f}–{ACCURACY.correct.high_ppm / 1e4:.1f}]",
        "memory": "2 MB",
    }


def test_what_was_not_measured_is_not_shown_as_a_figure(answer: PlanAnswer) -> None:
    (table,) = report.plan_tables([replace(answer, measured=None, accuracy=None)])
    shown = cells(table)
    unknown = ("median [95 %]", "p95", "≤ T", "stall", "accuracy [95 %]", "memory")
    assert {shown[name] for name in unknown} == {NONE}
    assert shown["predicted"] == "48 ms"
    few = replace(MEASURED, latency=replace(MEASURED.latency, interval=None))
    assert cells(report.plan_tables([replace(answer, measured=few)])[0])["median [95 %]"] == "41.5 ms"


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"emulated": True, "mechanisms": ("io: agent",)}, "emulated (io: agent)"),
        ({"emulated": True}, "emulated"),
        ({"stale": ("os-build",)}, "stale: os-build"),
        ({"measured": replace(MEASURED, invalid=3)}, "3 invalid left out"),
        ({"measured": replace(MEASURED, gate_verdict="ungated")}, "ungated"),
    ],
)
def test_what_limits_a_figure_stands_beside_it(
    answer: PlanAnswer, changes: dict[str, object], note: str
) -> None:
    assert report.notes(answer) == []
    limited = replace(answer, **changes)  # type: ignore[arg-type]
    assert note in report.notes(limited)
    (table,) = report.plan_tables([limited])
    assert note in " ".join((table.title, *table.rows[0]))


def test_plans_over_their_target_and_flags_are_noted(answer: PlanAnswer) -> None:
    late = answer.plan.model_copy(update={"within_target": False, "flags": ("untrained-submodels",)})
    assert report.notes(replace(answer, plan=late)) == ["untrained-submodels", "predicted over T"]


def test_each_device_has_a_table_with_what_its_rows_have_in_common_in_the_title(answer: PlanAnswer) -> None:
    board = replace(answer, device="board", emulated=True, mechanisms=("cpu: agent",), stale=("agent",))
    slower = board.plan.model_copy(update={"target_ns": 90 * MS})
    second = replace(board, plan=slower, stale=("agent", "kernel"))
    tables = report.plan_tables([answer, second, board])
    assert [table.title for table in tables] == ["desk", "board — emulated (cpu: agent) — stale: agent"]
    assert [row[0] for row in tables[1].rows] == ["50 ms", "90 ms"]
    assert cells(tables[1], 0)["n×m"] == "2×2"
    assert cells(tables[1], 1)["n×m"] == "2×2¹"
    assert tables[1].footnotes == ("¹ stale: kernel",)
    assert tables[0].footnotes == ()


def test_policies_are_named_when_there_are_several(answer: PlanAnswer) -> None:
    other = replace(answer, plan=answer.plan.model_copy(update={"policy": "load-exec"}))
    (table,) = report.plan_tables([answer, other])
    assert sorted(cells(table, row)["policy"] for row in range(2)) == ["load-exec", "sti"]
    assert "policy" not in cells(report.plan_tables([answer])[0])


def test_questions_without_a_plan_name_the_smallest_target(answer: PlanAnswer) -> None:
    stale = replace(answer, stale=("agent",))
    (table,) = report.plan_tables([stale], [infeasible("desk", 5 * MS, 12 * MS)])
    assert table.title == "desk — stale: agent"
    shown = cells(table)
    assert (shown["T"], shown["n×m"]) == ("5 ms", f"{NONE}¹")
    assert table.footnotes == ("¹ infeasible; the smallest T that works is 12 ms",)
    assert cells(table, 1)["T"] == "50 ms"


def test_only_questions_without_a_plan_keep_their_own_reasons() -> None:
    two = [infeasible("desk", 5 * MS, 12 * MS), infeasible("desk", 6 * MS, 30 * MS, "preload-32")]
    (table,) = report.plan_tables([], two)
    assert table.title == "desk"
    assert [note.rsplit(" is ", 1)[1] for note in table.footnotes] == ["12 ms", "30 ms"]


def test_no_answers_are_no_tables() -> None:
    assert report.plan_tables([]) == []


def test_the_document_for_machines_has_the_raw_figures(answer: PlanAnswer) -> None:
    document = json.loads(json.dumps(report.plan_json(answer)))
    assert Plan.from_json(json.dumps(document["plan"]).encode(), source="document") == answer.plan
    assert document["measured"]["median_ns"] == 41_500_000
    assert document["measured"]["median_interval_ns"] == [40 * MS, 43_200_000]
    assert document["measured"]["memory_bytes"]["process_peak"] is None
    assert document["accuracy"] == {
        "correct": 870,
        "rows": 1000,
        "interval_ppm": [ACCURACY.correct.low_ppm, ACCURACY.correct.high_ppm],
        "split": "dev",
    }
    assert document["emulated"] is False
    bare = report.plan_json(replace(answer, measured=None, accuracy=None))
    assert (bare["measured"], bare["accuracy"]) == (None, None)


def test_shares_are_shown_in_per_cent() -> None:
    assert report.percent(123_456) == "12.3 %"
    assert report.percent(0, 2) == "0.00 %"


def test_grounds_say_what_a_plan_rests_on(answer: PlanAnswer) -> None:
    hour_ns = 3600 * 10**9
    found = replace(
        answer,
        borrowed=True,
        stale=("OS changed since", "clocks changed since"),
        profiles=(
            ProfileRef("device", "e" * 64, 3 * hour_ns, False, "twin", "job-1", SampleCounts(90, 30, 60, 20)),
            ProfileRef("importance", "f" * 64, 72 * hour_ns, False, rows=500),
        ),
    )
    row = report.grounds_row(found)
    assert row[3:6] == ["48 ms [39–50]", f"{'e' * 12} borrowed from twin, 3 h", "90+30+60+20"]
    assert row[-3:] == [f"{'f' * 12}, 3 d", "500", "OS changed since, clocks changed since"]
    unknown = replace(
        answer, predicted_interval=None, profiles=(ProfileRef("device", "e" * 64, None, False),)
    )
    assert report.grounds_row(unknown)[3:] == ["48 ms", f"{'e' * 12}, –", "–", "–", "–", "no"]
    assert report.plan_json(found)["profiles"][0]["samples"]["io"] == 90
    assert report.plan_json(found)["borrowed"] is True


# ------------------------------------------------------------------ telling plans apart


def of(
    answer: PlanAnswer, task: str = "demo", importance: tuple[str, str | None] | None = None, **changes: Any
) -> PlanAnswer:
    """The answer with another plan, of another task or by another ranking: (digest, method)."""
    ranked = (
        ()
        if importance is None
        else (ProfileRef("importance", importance[0] * 64, 5, False, method=importance[1]),)
    )
    return replace(
        answer,
        task=task,
        plan=answer.plan.model_copy(update=changes),
        profiles=(ProfileRef("device", "e" * 64, 5, unfit=False), *ranked),
    )


GRADIENT, EXHAUSTIVE = ("a", "gradient"), ("b", "exhaustive")


@pytest.mark.parametrize(
    ("others", "shown"),
    [
        ((), {}),
        (({"target_ns": 60 * MS},), {}),
        (({"working_bytes": 3 * 10**6},), {"W": ["2 MB", "3 MB"]}),
        (({"working_bytes": 2_000_001},), {"W": ["2,000,000 B", "2,000,001 B"]}),
        (({"preload_bytes": 10**6, "target_ns": 60 * MS},), {"|S|": ["0 B", "1 MB"]}),
        (({"importance": EXHAUSTIVE},), {"importance": ["gradient", "exhaustive"]}),
        (({"importance": ("c", "gradient")},), {"importance": [f"gradient {d * 12}" for d in "ac"]}),
        (({"importance": ("c", None)},), {"importance": ["gradient", "c" * 12]}),
        (({"task": "rte", "importance": EXHAUSTIVE},), {"task": ["demo", "rte"]}),
        # A baseline takes the buffers it needs, and ranks nothing: its name says so.
        (
            ({"policy": "load-exec", "working_bytes": 7, "importance": None},),
            {"policy": ["sti", "load-exec"]},
        ),
        (
            (
                {"policy": "load-exec", "working_bytes": 7, "importance": None},
                {"policy": "load-exec", "working_bytes": 8, "importance": None, "target_ns": 60 * MS},
            ),
            {"policy": ["sti", "load-exec", "load-exec"]},
        ),
        (
            (
                {"policy": "load-exec", "working_bytes": 7, "importance": None},
                {"policy": "load-exec", "working_bytes": 8, "importance": None},
            ),
            {"policy": ["sti", "load-exec", "load-exec"], "W": ["2 MB", "7 B", "8 B"]},
        ),
    ],
)  # fmt: skip
def test_plans_are_told_apart_by_what_differs_and_by_nothing_else(
    answer: PlanAnswer, others: tuple[dict[str, Any], ...], shown: dict[str, list[str]]
) -> None:
    base: dict[str, Any] = {"working_bytes": 2 * 10**6, "importance": GRADIENT}
    found = [of(answer, **base), *(of(answer, **{**base, **each}) for each in others)]
    (table,) = report.plan_tables(found)
    noted = [f"importance: {name}" for name in shown.get("importance", ())]
    assert [note.split(" ", 1)[1] for note in table.footnotes] == noted
    extra = [column.lstrip(">") for column in table.columns if column not in report.PLAN_COLUMNS]
    assert extra == [name for name in shown if name != "importance"]
    rows = [cells(table, number) for number in range(len(found))]
    assert {name: [row[name] for row in rows] for name in extra} == {name: shown[name] for name in extra}
    explained = "|S|" in extra or "W" in extra
    assert (report.BUFFERS_CAPTION in report.plan_caption([table])) == explained
    columns, grounds = report.grounds_table(found)
    assert [c for c in columns if c not in report.GROUNDS_COLUMNS] == [
        column for column in table.columns if column.lstrip(">") in {*shown} - {"policy", "importance"}
    ]
    assert len({tuple(row) for row in grounds}) == len(found)


def test_a_question_without_plan_stands_among_plans_that_are_told_apart(answer: PlanAnswer) -> None:
    two = [of(answer, working_bytes=size, importance=GRADIENT) for size in (10**6, 2 * 10**6)]
    none = [infeasible("desk", 5 * MS, 60_624_182), infeasible("desk", 6 * MS, 12 * MS, "preload-32")]
    (table,) = report.plan_tables(two, none)
    assert [cells(table, number)["W"] for number in range(4)] == ["1 B", NONE, "1 MB", "2 MB"]
    assert "infeasible; the smallest T that works is 60.7 ms" in table.footnotes[0]


def test_the_document_for_machines_names_what_it_answers(answer: PlanAnswer) -> None:
    document = report.plan_json(of(answer, working_bytes=2_000_001, preload_bytes=5, importance=EXHAUSTIVE))
    assert document["question"] == {
        "policy": "sti",
        "target_ns": 50 * MS,
        "preload_bytes": 5,
        "working_bytes": 2_000_001,
    }
    assert document["importance"] == {"digest": "b" * 64, "method": "exhaustive"}
    assert report.plan_json(of(answer))["importance"] is None


@pytest.mark.parametrize(
    ("age_s", "text"),
    [(77.1, "77 s"), (123, "2 min"), (7199, "119 min"), (7200, "2 h"), (172_800, "2 d"), (0, "0 s")],
)
def test_an_age_is_whole_numbers_of_one_unit(age_s: float, text: str) -> None:
    assert report.format_age(int(age_s * 10**9)) == text


def test_an_answer_of_one_job_names_what_the_store_has_in_all(answer: PlanAnswer) -> None:
    pooled = replace(MEASURED, latency=replace(MEASURED.latency, count=400, median=43 * MS))
    both = replace(answer, pooled=pooled)
    assert report.notes(both) == [*report.notes(answer), "with earlier runs: median 43 ms of 400 requests"]
    assert cells(report.plan_tables([both])[0])["median [95 %]"].startswith("41.5 ms")
    document = report.plan_json(both)
    assert (document["measured"]["requests"], document["pooled"]["requests"]) == (30, 400)
    assert report.notes(replace(answer, pooled=MEASURED)) == report.notes(answer)
    assert "pooled" not in report.plan_json(answer)


def test_a_device_without_a_profile_has_a_row_with_the_reason() -> None:
    row = report.no_profile_row("dut", StableError("no way\nto it.", "Plug it in.", device="dut"))
    assert len(row) == len(report.PROFILE_COLUMNS)
    assert (row[0], row[-1]) == ("dut", "none: no way to it.")
    assert "stifarm profile --devices dut --again." in report.unfit_advice("dut")


def test_why_a_fit_is_unfit_is_said_in_per_cent() -> None:
    reason = "io: median residual of 227878 ppm, more than 200000"
    assert report.unfit_in_words(reason) == "io: median residual of 22.8 %, more than 20 %"
    assert report.unfit_in_words("fixed: 2 samples, fewer than 5") == "fixed: 2 samples, fewer than 5"
