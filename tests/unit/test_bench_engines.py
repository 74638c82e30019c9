"""The pure parts of ``bench.engines``: paired ratios, intervals, rows from samples, the table."""

from __future__ import annotations

import math

import pytest

from bench.engine_rows import (
    PLAIN_READS,
    ROWS,
    STI,
    STI_HELD,
    Measured,
    OurInfo,
    PeerInfo,
    PlanSample,
    claims_of,
    cold_case,
    held_case,
    limited_case,
    plain_reads_case,
)
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

MS = 10**6
LLAMA = "llama.cpp q4_0, mmap"
SLOWER = "llama.cpp q4_0, direct IO"


def measured() -> Measured:
    """Two kinds of llama.cpp at 4 bits, measured in six rounds, each slower than the last."""
    found = Measured()
    for round_ in range(1, 7):
        found.samples.add(LLAMA, {"spawn_ns": 100 * round_ * MS, "create_ns": 80 * round_ * MS})
        found.samples.add(SLOWER, {"spawn_ns": 150 * round_ * MS, "create_ns": 140 * round_ * MS})
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


def test_row_5_compares_streaming_with_holding() -> None:
    found = Measured()
    for _ in range(6):
        found.samples.add(STI, {"latency_ns": 56 * MS, "stall_ns": MS, "predicted_stall_ns": 0})
        found.samples.add(STI_HELD, {"latency_ns": 50 * MS, "stall_ns": 0})
    made = only(found, 5)
    assert made.figure is not None
    assert made.figure.value == pytest.approx(1.12)
    assert made.reached is False


def test_row_6_shows_the_worst_fidelity_of_each_group() -> None:
    found = Measured()
    for fidelity, ppm in ((2, 50_000), (3, 90_000), (4, 60_000), (5, 70_000), (6, 100_000)):
        found.samples.add(held_case("native", fidelity), {"decompress_ppm": ppm})
    low, high = claims_of(found, {6})
    assert (low.shown, low.reached) == ("9.0 %", False)
    assert (high.shown, high.reached) == ("10.0 %", True)


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
    found = Measured(kernels={"product_gflops_1": 210.0, "peak_gflops_1": 280.0})
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
