"""The pure parts of ``bench.engines``: paired ratios, intervals, rows from samples, the table."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path

import pytest

from bench.engine_ours import Inferred
from bench.engine_page import Run, as_json, page, run_from_json, unmeasured
from bench.engine_rows import (
    COUNTED,
    KERNELS,
    PLAIN_READS,
    ROWS,
    STI,
    STI_CALM,
    STI_CALM_HELD,
    STI_HELD,
    Measured,
    OurInfo,
    PeerInfo,
    PlanSample,
    claims_of,
    cold_case,
    held_case,
    limited_case,
    measured_rows,
    plain_reads_case,
)
from bench.engines import command_line, main
from bench.figures import (
    BEGIN,
    END,
    Claim,
    Figure,
    between_marks,
    claim,
    cosine,
    figure,
    markdown,
    paired_ratio,
)
from bench.launching import Finished, PageCache

MS = 10**6
LLAMA = "llama.cpp q4_0, mmap"
SLOWER = "llama.cpp q4_0, direct IO"


def measured() -> Measured:
    """Two kinds of llama.cpp at 4 bits, measured in six rounds, each slower than the last."""
    found = Measured()
    for round_ in range(1, 7):
        found.samples.add(
            LLAMA, {"spawn_ns": 100 * round_ * MS, "create_ns": 80 * round_ * MS, "peak_bytes": 10**8}
        )
        found.samples.add(
            SLOWER, {"spawn_ns": 150 * round_ * MS, "create_ns": 140 * round_ * MS, "peak_bytes": 10**8}
        )
        found.samples.add(cold_case("native", 4), {"spawn_ns": 50 * round_ * MS, "peak_bytes": 15_000_000})
    found.peers = [PeerInfo(name, "4 bits", "spawn_ns", 0.98) for name in (LLAMA, SLOWER)]
    return found


def only(found: Measured, row: int) -> Claim:
    (made,) = claims_of(found, {row})
    return made


# ------------------------------------------------------------------ figures


def test_figure_is_the_median_with_the_interval_of_order_statistics() -> None:
    found = figure([60, 10, 20, 30, 40, 50])
    assert (found.value, found.low, found.high, found.count) == (35.0, 10.0, 60.0, 6)


def test_figure_of_few_samples_has_no_interval() -> None:
    assert figure([1, 2, 3]).low is None
    assert figure([1, 2, 3]).text() == "2.0"


def test_ratio_is_paired_by_round() -> None:
    # Unpaired medians would be 25 / 55 = 0.45.
    found = paired_ratio([10, 20, 30, 40], [20, 40, 70, 100])
    assert found.value == pytest.approx((0.4285714 + 0.5) / 2, abs=1e-6)


def test_ratio_of_unequal_rounds_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        paired_ratio([1, 2], [1])


def test_figure_text_scales() -> None:
    assert Figure(12_345_678, 12_000_000, 13_000_000, 9).text(1e6, 2) == "12.35 [12.00, 13.00]"


def test_cosine() -> None:
    assert cosine([1, 0], [1, 0]) == pytest.approx(1)
    assert cosine([[1, 0]], [0, 1]) == pytest.approx(0)
    assert cosine([3, 4], [-3, -4]) == pytest.approx(-1)
    assert math.isnan(cosine([0, 0], [1, 1]))


# ------------------------------------------------------------------ the table


def test_claim_is_reached_at_its_limit_and_not_above() -> None:
    assert claim("1", "x", "≤ 2", Figure(2.0, None, None, 3), 2.0, "").reached is True
    assert claim("1", "x", "≤ 2", Figure(2.001, None, None, 3), 2.0, "").reached is False


def test_markdown_has_a_line_per_claim_and_escapes_bars() -> None:
    lines = markdown(
        [Claim("1", "a|b", "≤ 1", "0.5", True, "fast", "note"), Claim("2", "c", "", "", None, "")]
    )
    assert lines.splitlines()[2:] == [
        "| 1 | a\\|b | ≤ 1 | 0.5 | yes | fast: note |",
        "| 2 | c |  |  | not measured |  |",
    ]


def test_a_page_keeps_what_stands_around_its_table() -> None:
    once = between_marks(f"before\n{BEGIN}\nold\n{END}\nafter\n", "new")
    assert once == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    assert between_marks(once, "new") == once


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="no lines"):
        between_marks(f"{END} then {BEGIN}", "new")


# ------------------------------------------------------------------ rows


def test_every_row_without_samples_says_so() -> None:
    found = Measured()
    found.absent[3] = "storage cannot be limited here"
    made = claims_of(found, ROWS)
    assert [entry.row for entry in made] == [str(row) for row in range(1, 11)]
    assert {entry.reached for entry in made} == {None}
    assert made[2].note == "storage cannot be limited here"


def test_row_1_compares_with_the_fastest_variant_round_by_round() -> None:
    made = only(measured(), 1)
    assert made.figure is not None
    assert made.figure.value == pytest.approx(0.5)
    assert made.figure.low == made.figure.high == pytest.approx(0.5)
    assert made.reached
    assert LLAMA in made.note
    assert "0.62" in made.note  # its creation and first request alone: 50 ÷ 80


def test_row_2_takes_the_smallest_plan_that_is_close_and_the_best_peer_that_is() -> None:
    found = measured()
    for _ in range(6):
        found.samples.add(cold_case("native", 32), {"spawn_ns": 200 * MS})
        found.samples.add("exact", {"spawn_ns": 999 * MS, "create_ns": 100 * MS})
    found.ours = [
        OurInfo(cold_case("native", 4), "4 bits", "native", 40, 0.97),
        OurInfo(cold_case("native", 32), "32 bits", "native", 340, 0.9999),
    ]
    found.peers.append(PeerInfo("exact", "fp32", "create_ns", 1.0))
    made = only(found, 2)
    assert made.figure is not None
    assert made.figure.value == pytest.approx(2.0)
    assert made.reached is False


@pytest.mark.parametrize(("plain_ms", "reached"), [(500, True), (400, False)])
def test_row_3_divides_by_the_time_the_bytes_take_sustained_and_read_plainly(
    plain_ms: int, reached: bool
) -> None:
    found = Measured()
    for _ in range(6):
        found.samples.add(limited_case("native 4"), {"spawn_ns": 520 * MS, "must_read_bytes": 50_000_000})
        found.samples.add(PLAIN_READS, {"bytes_per_s": 100_000_000, "duration_ns": 1})
        found.samples.add(plain_reads_case(4), {"bytes_per_s": 1, "duration_ns": plain_ms * MS})
    made = only(found, 3)
    assert made.figure is not None
    assert made.figure.value == pytest.approx(1.04)
    assert made.reached is reached


def test_row_4_is_the_peak_of_the_process() -> None:
    made = only(measured(), 4)
    assert made.shown == "15.0 [15.0, 15.0] MB"
    assert made.reached


def add_warm(
    found: Measured, case: str, latency_ms: int, preload_bytes: int, predicted_stall_ns: int
) -> None:
    """One round of warm requests of a plan."""
    found.samples.add(
        case,
        {
            "latency_ns": latency_ms * MS,
            "stall_ns": MS,
            "predicted_stall_ns": predicted_stall_ns,
            "preload_bytes": preload_bytes,
            "working_bytes": 9_000_000,
        },
    )


def test_row_5_compares_streaming_with_holding() -> None:
    found = Measured()
    for _ in range(6):
        add_warm(found, STI, 56, 4_000_000, 0)
        add_warm(found, STI_HELD, 50, 60_000_000, 0)
    made = only(found, 5)
    assert made.figure is not None
    assert made.figure.value == pytest.approx(1.12)
    assert made.reached is False


def test_row_5_judges_no_plan_that_predicts_a_stall() -> None:
    found = Measured()
    add_warm(found, STI, 50, 4_000_000, 1)
    add_warm(found, STI_HELD, 50, 60_000_000, 0)
    add_warm(found, STI_CALM, 51, 5_000_000, 0)
    add_warm(found, STI_CALM_HELD, 50, 60_000_000, 0)
    stalled, calm = claims_of(found, {5})
    assert (stalled.reached, stalled.unjudged) == (None, "not applicable")
    assert "| 1.00 × | not applicable |" in markdown([stalled])
    assert "5 MB preload" in calm.what
    assert calm.reached is True


def test_row_6_shows_the_worst_fidelity_of_each_group() -> None:
    found = Measured()
    for fidelity, ppm in ((2, 50_000), (3, 90_000), (4, 60_000), (5, 70_000), (6, 100_000)):
        found.samples.add(held_case("native", fidelity), {"decompress_ppm": ppm})
    low, high = claims_of(found, {6})
    assert (low.shown, low.reached) == ("9.0 %", False)
    assert (high.shown, high.reached) == ("10.0 %", True)


def test_row_6_judges_int8_apart_and_says_what_is_counted() -> None:
    found = Measured()
    found.samples.add(held_case("native", 4), {"decompress_ppm": 50_000})
    found.samples.add(held_case("native-int8", 4), {"decompress_ppm": 90_000})
    fp32, int8 = claims_of(found, {6})
    assert (fp32.reached, int8.reached) == (True, False)
    assert (fp32.what[-4:], int8.what[-4:]) == ("fp32", "int8")
    assert "outliers' products not counted" in int8.what
    assert (COUNTED["native"] in fp32.note, COUNTED["native-int8"] in int8.note) == (True, True)


def test_rows_7_and_8_are_per_board() -> None:
    def plan(board: str, measured_ms: int, stall_ms: int) -> PlanSample:
        passes_ns = (measured_ms * MS, measured_ms * MS * 11 // 10)
        return PlanSample(board, 200 * MS, 100 * MS, measured_ms * MS, passes_ns, 10 * MS, stall_ms * MS)

    found = Measured(plans=[plan("fast", 100, 10), plan("fast", 104, 12), plan("slow", 125, 30)])
    stalls = claims_of(found, {7})
    assert [(entry.regime, entry.shown, entry.reached) for entry in stalls] == [
        ("fast", "1.00 %", True),
        ("slow", "10.00 %", False),
    ]
    errors = claims_of(found, {8})
    assert "the same plan differs by 10.0 % in the median, 10.0 % at the 95th" in errors[0].note
    assert [(entry.regime, entry.shown, entry.reached) for entry in errors] == [
        ("fast", "1.9 %", True),
        ("fast", "3.8 %", True),
        ("slow", "20.0 %", False),
        ("slow", "20.0 %", False),
    ]


def test_row_10_compares_with_the_best_peer_of_the_same_precision() -> None:
    found = Measured()
    found.samples.add(KERNELS, {"product_1_mflops": 210_000, "peak_1_mflops": 280_000})
    found.peers = [PeerInfo("a", "fp32", "create_ns", 1.0), PeerInfo("b", "int8", "create_ns", 0.99)]
    for _ in range(6):
        found.samples.add("a", {"steady_ns": 50 * MS})
        found.samples.add("b", {"steady_ns": 20 * MS})
        found.samples.add(held_case("native", 6), {"latency_ns": 45 * MS})
    steady, products = claims_of(found, {10})
    assert steady.figure is not None
    assert steady.figure.value == pytest.approx(0.9)
    assert steady.reached
    assert (products.shown, products.reached) == ("75 %", False)


def test_row_2_says_what_the_closest_uniform_plan_reaches_when_none_is_close() -> None:
    found = measured()
    for _ in range(6):
        found.samples.add(cold_case("native", 6), {"spawn_ns": 40 * MS})
        found.samples.add("exact", {"spawn_ns": 999 * MS, "create_ns": 100 * MS})
    found.ours = [OurInfo(cold_case("native", 6), "6 bits, fp32", "native", 65, 0.9982)]
    found.peers.append(PeerInfo("exact", "fp32", "create_ns", 1.0))
    made = only(found, 2)
    assert made.reached is None
    assert "6 bits, fp32 reaches cosine 0.9982 at 0.40 [0.40, 0.40] × exact" in made.note


def test_products_are_shared_by_the_best_burst_of_each_and_a_request_by_both_threads() -> None:
    found = Measured(isa="avx2")
    for product, peak in ((90_000, 60_000), (80_000, 100_000)):
        found.samples.add(
            KERNELS, {"product_1_mflops": product, "peak_1_mflops": peak, "peak_mflops": 2 * peak}
        )
        found.samples.add(held_case("native", 32), {"latency_ns": 160 * MS})
    made = only(found, 10)
    assert (made.shown, made.reached) == ("90 %", True)
    assert made.regime == "fp32, tile in cache, 1 thread, nothing decoded, avx2"
    assert "22.4 GFLOP in 160.0 ms are 140 GFLOP/s, 70 % of the 200 of two threads at once" in made.note


def test_products_faster_than_the_peak_are_no_share_of_it() -> None:
    found = Measured()
    found.samples.add(KERNELS, {"product_1_mflops": 82_000, "peak_1_mflops": 75_000})
    made = only(found, 10)
    assert (made.shown, made.reached) == ("–", None)
    assert "measured too low" in made.note


def test_a_board_that_could_not_be_made_is_told_beside_those_that_were() -> None:
    found = Measured(plans=[PlanSample("this machine", 200, 100, 100, (100, 100), 0, 0)])
    found.absent[7] = "no limited boards: no cgroup"
    assert [entry.note for entry in claims_of(found, {7})][1:] == ["no limited boards: no cgroup"]


# ------------------------------------------------------------------ what is timed


def test_ready_is_where_the_first_requests_clock_starts() -> None:
    sample = {"latency_ns": 60, "verdict": {"valid": True, "reasons": []}}
    answer = {"opened_ns": 105, "requests": [{"started_ns": 112, "sample": sample}]}
    done = Inferred.of(Finished(answer=answer, spawned_ns=100, ended_ns=200, cpu_us=1))
    assert (done.ready_ns, done.spawn_to_logits_ns) == (12, 72)


def test_a_fresh_file_is_cold_after_its_cache_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_bytes(os.urandom(1 << 20))
    PageCache(whole=False).drop([file])
    with file.open("rb") as stream:
        try:
            os.preadv(stream.fileno(), [bytearray(4096)], 0, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno != errno.EAGAIN:
                pytest.skip(f"this file system does not tell what is cached: {error}")
            return
    if "tmpfs" in _file_system(tmp_path):
        pytest.skip("files of tmpfs are always in memory")
    pytest.fail("the file is still cached")


def _file_system(path: Path) -> str:
    """The type of the mount that holds a path."""
    device = path.stat().st_dev
    wanted = f" {os.major(device)}:{os.minor(device)} "
    lines = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if wanted in line]
    return lines[0].partition(" - ")[2].split()[0] if lines else ""


# ------------------------------------------------------------------ runs and their page


def run_of(found: Measured, *rows: int) -> Run:
    """With a heading that names its rows."""
    return Run((f"run of {rows}",), frozenset(rows), found)


def whole() -> Measured:
    """Something of everything that a run can hold."""
    found = measured()
    found.peers[0] = PeerInfo(LLAMA, "4 bits", "spawn_ns", 0.98, lacks="GELU by table")
    found.ours = [OurInfo(cold_case("native", 4), "4 bits", "native", 40, 0.97)]
    found.plans = [PlanSample("this machine", 200, 100, 100, (100, 101), 0, 0)]
    found.isa = "avx2"
    found.absent = {3: "storage cannot be limited here"}
    found.samples.add(KERNELS, {"product_1_mflops": 90_000, "peak_1_mflops": 99_000, "peak_mflops": 190_000})
    return found


def test_a_run_read_back_makes_the_same_page() -> None:
    run = run_of(whole(), *ROWS)
    again = run_from_json(as_json(run))
    assert page([again]) == page([run])
    assert "GELU by table" in page([again])
    assert (again.rows, again.found.plans, again.found.isa) == (run.rows, run.found.plans, "avx2")


@pytest.mark.parametrize("text", ["[]", "{}", '{"format": "stifarm-engines", "version": 0}'])
def test_other_data_is_no_run(text: str) -> None:
    with pytest.raises(ValueError, match="not a run of"):
        run_from_json(text)


def test_joined_runs_keep_their_headings_and_say_what_none_measured() -> None:
    text = page([run_of(measured(), 1), run_of(measured(), 4)])
    assert text.startswith("No run measured rows 2, 3, 5, 6, 7, 8, 9, 10.\n\n**Row 1**\n\n* run of (1,)\n")
    assert "\n\n**Row 4**\n\n* run of (4,)\n" in text
    assert text.index("| 1 | cold start") < text.index("**Row 4**") < text.index("| 4 | peak memory")


def test_a_row_is_measured_when_a_run_asked_for_it_and_has_samples() -> None:
    assert {1, 4} <= measured_rows(measured())
    assert unmeasured([run_of(measured(), 1)]) == [row for row in ROWS if row != 1]
    assert 4 not in unmeasured([run_of(measured(), 1), run_of(measured(), 4)])
    assert 9 in unmeasured([run_of(Measured(), 9)])


def test_one_partial_run_does_not_replace_a_page_and_several_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = f"before\n\n{BEGIN}\nold\n{END}\n\nafter\n"
    target, one, four = tmp_path / "engine.md", tmp_path / "e1.json", tmp_path / "e4.json"
    target.write_text(old)
    one.write_text(as_json(run_of(measured(), 1)))
    four.write_text(as_json(run_of(measured(), 4)))
    with pytest.raises(SystemExit, match="not measured: 2, 3, 4, 5"):
        main(["--from", str(one), "--write", str(target)])
    with pytest.raises(SystemExit, match="takes all rows"):
        main(["--rows", "1,4", "--write", str(target)])
    assert target.read_text() == old
    main(["--from", str(one), str(four), "--write", str(target)])
    written = target.read_text()
    assert written.startswith(f"before\n\n{BEGIN}\n\nNo run measured")
    assert written.endswith(f"\n\n{END}\n\nafter\n")
    assert "| 4 | peak memory" in capsys.readouterr().out


def test_a_page_without_marks_and_a_file_that_is_no_run_are_named(tmp_path: Path) -> None:
    target, run = tmp_path / "engine.md", tmp_path / "run.json"
    target.write_text("no marks")
    run.write_text(json.dumps({}))
    with pytest.raises(SystemExit, match="the page has no lines"):
        main(["--write", str(target)])
    with pytest.raises(SystemExit, match=r"run\.json: not a run of"):
        main(["--from", str(run)])


def test_the_command_line_is_shown_as_a_shell_takes_it() -> None:
    assert (
        command_line(["--rows", "1,4", "--json", "a b"]) == "python -m bench.engines --rows 1,4 --json 'a b'"
    )
